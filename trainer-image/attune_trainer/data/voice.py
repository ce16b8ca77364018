"""Voice activity: where in a clip somebody speaks, by Silero VAD.

The detector's weights come with the package silero-vad. Its own code runs them with torch or ONNX Runtime; the network
is so small (0.3 M weights) that numpy does, and preparation goes on without either.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from safetensors.numpy import load_file

CHUNK: Final = 512  # samples at 16 kHz: 32 ms
_CONTEXT: Final = 64  # samples of the chunk before
_HOP: Final = 128
_BINS: Final = 129
_UNITS: Final = 128
# As the detector's authors set them.
_SPEECH: Final = 0.5
_SILENCE: Final = 0.35  # once there is speech, it goes on down to this

_Array = NDArray[np.float32]


@dataclass(frozen=True)
class Activity:
    """Where speech begins and ends in a clip, in samples."""

    first: int
    last: int


def find_speech(samples: _Array) -> Activity | None:
    """Finds the stretch from the first to the last speech of a clip; None where nobody speaks.

    Args:
        samples: mono at 16 kHz, shape (samples,).
    """
    speaking = False
    chunks = []
    for index, probability in enumerate(speech_probabilities(samples)):
        speaking = probability >= (_SILENCE if speaking else _SPEECH)
        if speaking:
            chunks.append(index)
    if not chunks:
        return None
    return Activity(chunks[0] * CHUNK, min(len(samples), (chunks[-1] + 1) * CHUNK))


def speech_probabilities(samples: _Array) -> _Array:
    """Gives how likely it is that somebody speaks, for each 32 ms in order; shape (chunks,)."""
    weights = _load_weights()
    if len(samples) == 0:
        return np.empty(0, dtype=np.float32)
    padded = np.pad(samples.astype(np.float32, copy=False), (_CONTEXT, -len(samples) % CHUNK))
    windows = sliding_window_view(padded, _CONTEXT + CHUNK)[::CHUNK]
    return _run_lstm(_encode(windows, weights), weights)


@cache
def _load_weights() -> dict[str, _Array]:
    found = importlib.util.find_spec("silero_vad")  # not imported: its code wants torch
    if found is None or found.origin is None:
        raise ModuleNotFoundError("silero_vad is not installed")
    weights: dict[str, _Array] = load_file(Path(found.origin).parent / "data" / "silero_vad_16k.safetensors")
    return weights


def _encode(windows: _Array, weights: dict[str, _Array]) -> _Array:
    """Gives a vector of each window: (chunks, 576) -> (chunks, 128).

    Magnitudes of a short-time transform, then four convolutions, which leave one frame.
    """
    reflected = np.pad(windows, ((0, 0), (0, _CONTEXT)), mode="reflect")
    transform = weights["stft_conv.weight"][:, 0, :]
    frames = sliding_window_view(reflected, transform.shape[1], axis=1)[:, ::_HOP]
    spectrum = frames @ transform.T
    magnitudes = np.sqrt(np.square(spectrum[..., :_BINS]) + np.square(spectrum[..., _BINS:]))
    hidden: _Array = magnitudes.transpose(0, 2, 1)  # (chunks, channels, frames)
    for number, stride in ((1, 1), (2, 2), (3, 2), (4, 1)):
        hidden = _convolve(hidden, weights[f"conv{number}.weight"], weights[f"conv{number}.bias"], stride)
    encoded: _Array = hidden[:, :, 0]
    return encoded


def _convolve(inputs: _Array, kernel: _Array, bias: _Array, stride: int) -> _Array:
    """One-dimensional convolution, padded by 1, and a rectifier: (chunks, channels, frames) -> likewise."""
    padded = np.pad(inputs, ((0, 0), (0, 0), (1, 1)))
    patches = sliding_window_view(padded, kernel.shape[2], axis=2)[:, :, ::stride]
    summed: _Array = np.einsum("ncfk,ock->nof", patches, kernel, optimize=True) + bias[:, None]
    np.maximum(summed, 0.0, out=summed)
    return summed


def _run_lstm(encoded: _Array, weights: dict[str, _Array]) -> _Array:
    """Goes over the chunks in order: (chunks, 128) -> (chunks,)."""
    inputs = encoded @ weights["lstm_cell.weight_ih"].T + weights["lstm_cell.bias_ih"] + weights["lstm_cell.bias_hh"]
    recurrent = np.ascontiguousarray(weights["lstm_cell.weight_hh"].T)
    output, bias = weights["final_conv.weight"].reshape(-1), float(weights["final_conv.bias"][0])
    hidden = np.zeros(_UNITS, dtype=np.float32)
    cell = np.zeros(_UNITS, dtype=np.float32)
    scores = np.empty(len(encoded), dtype=np.float32)
    for index, given in enumerate(inputs):
        entry, forget, candidate, leave = (given + hidden @ recurrent).reshape(4, _UNITS)
        cell = _sigmoid(forget) * cell + _sigmoid(entry) * np.tanh(candidate)
        hidden = _sigmoid(leave) * np.tanh(cell)
        scores[index] = float(np.maximum(hidden, 0.0) @ output) + bias
    return _sigmoid(scores)


def _sigmoid(values: _Array) -> _Array:
    # By way of tanh, which never overflows.
    result: _Array = 0.5 + 0.5 * np.tanh(0.5 * values)
    return result
