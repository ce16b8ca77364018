"""What can be done to audio: pure functions of mono float32 samples at 16 kHz, and of the generator they draw from."""

import io
from collections.abc import Sequence
from math import ceil
from typing import Any, Final

import numpy as np
import soundfile
import soxr
from attune.contract.training import CodecKind, NoiseKind, SpecAugment
from numpy.random import Generator
from numpy.typing import NDArray

Audio = NDArray[np.float32]

SAMPLE_RATE: Final = 16000  # Hz
# Opus' own bounds for speech of the poorest lines, in kbit/s.
OPUS_KBPS: Final = (6.0, 16.0)

_TELEPHONE_RATE: Final = 8000  # Hz
# Brown noise would put nearly all of its power where no microphone of speech and no mel bin hears it.
_LOWEST_HZ: Final = 50.0
# Amplitude falls with this power of frequency, and power with twice it: 3 dB an octave for pink noise, 6 for brown.
_FALL: Final = {NoiseKind.WHITE: 0.0, NoiseKind.PINK: 0.5, NoiseKind.BROWN: 1.0}
# libsndfile knows Opus' rate as a level: 0 stands for 256 kbit/s, 1 for 6 kbit/s (ogg_opus.c, version 1.2).
_OPUS_LEAST_KBPS: Final = 6.0
_OPUS_SPAN_KBPS: Final = 250.0


def change_speed(samples: Audio, factor: float) -> Audio:
    """Plays audio faster or slower: its duration divided by the factor, its pitch multiplied (Ko et al. 2015).

    change_speed(10 s of 440 Hz, 1.1) -> 9.09 s of 484 Hz.
    """
    if factor == 1.0:
        return samples
    changed: Audio = soxr.resample(samples, SAMPLE_RATE * factor, SAMPLE_RATE, quality="HQ")
    return changed


def make_noise(kind: NoiseKind, length: int, draw: Generator) -> Audio:
    """Makes noise of a colour, shape (length,), of no particular level; below 50 Hz there is none.

    Raises:
        KeyError: for Babble, which is not made of nothing.
    """
    size = _padded_size(length)
    frequencies = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    gains = np.zeros_like(frequencies)
    heard = frequencies >= _LOWEST_HZ
    gains[heard] = frequencies[heard] ** -_FALL[kind]
    real, imaginary = draw.standard_normal((2, len(frequencies)))
    return _float32(np.fft.irfft(gains * (real + 1j * imaginary), size)[:length])


def make_babble(talkers: Sequence[Audio], length: int, draw: Generator) -> Audio:
    """Lets talkers speak at once, equally loud, each from a place of its own, over again where one is too short."""
    babble = np.zeros(length)
    for samples in talkers:
        level = np.sqrt(_power(samples))
        start = int(draw.integers(len(samples)))
        if level:
            babble += np.resize(np.roll(samples, -start), length) / level
    return _float32(babble)


def mix(speech: Audio, noise: Audio, snr_db: float) -> Audio:
    """Adds noise at a ratio of powers, each over the whole clip; where either is silent there is none, nor noise."""
    loud, soft = _power(speech), _power(noise)
    if not loud or not soft:
        return speech
    return _float32(speech + noise * np.sqrt(loud / soft / 10 ** (snr_db / 10)))


def simulate_room(rt60_seconds: float, direct_db: float, draw: Generator) -> Audio:
    """Makes an impulse response: the direct path, then noise that falls by 60 dB in rt60 (Polack's model).

    Args:
        rt60_seconds: how long that takes; the response is as long.
        direct_db: power of the direct path against all that follows it.
        draw: what the noise is drawn from.
    """
    times = np.arange(1, max(2, ceil(rt60_seconds * SAMPLE_RATE))) / SAMPLE_RATE
    tail = draw.standard_normal(len(times)) * 10 ** (-3 * times / rt60_seconds)
    tail *= np.sqrt(10 ** (-direct_db / 10) / np.square(tail).sum())
    return _float32(np.concatenate([[1.0], tail]))


def reverberate(samples: Audio, response: Audio) -> Audio:
    """Lets audio sound in a room, at its own length and level; the direct path, the response's peak, is not delayed."""
    heard = response[np.argmax(np.abs(response)) :]
    size = _padded_size(len(samples) + len(heard) - 1)
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(heard, size), size)[: len(samples)]
    power = _power(wet)
    return _float32(wet * np.sqrt(_power(samples) / power)) if power else samples


def pass_codec(samples: Audio, kind: CodecKind, opus_kbps: float = OPUS_KBPS[0]) -> Audio:
    """Sends audio through a codec and back, at its own length; louder than full scale is clipped.

    Args:
        samples: what is sent.
        kind: Gsm and Mulaw carry 8 kHz, so what is above 4 kHz is lost; Opus carries what its rate has room for.
        opus_kbps: the rate that Opus aims at, from 6 to 256.
    """
    if kind is CodecKind.OPUS:
        level = 1 - (opus_kbps - _OPUS_LEAST_KBPS) / _OPUS_SPAN_KBPS
        return _recode(samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=level)
    narrow = soxr.resample(samples, SAMPLE_RATE, _TELEPHONE_RATE, quality="HQ")
    subtype = {CodecKind.GSM: "GSM610", CodecKind.MULAW: "ULAW"}[kind]
    coded = _recode(narrow, _TELEPHONE_RATE, format="WAV", subtype=subtype)
    return _fit(soxr.resample(coded, _TELEPHONE_RATE, SAMPLE_RATE, quality="HQ"), len(samples))


def mask_features(features: Audio, frames: int, wanted: SpecAugment, draw: Generator) -> Audio:
    """Blanks out stretches of time and bands of frequency with the utterance's mean; gives a copy.

    Masks lie within the utterance: padding behind it stays the silence that it is.

    Args:
        features: log-mel, shape (mels, frames), 100 frames a second.
        frames: how many of them are the utterance.
        wanted: how many masks, and how large they may be.
        draw: what sizes and places are drawn from.
    """
    masked = features.copy()
    spoken = masked[:, :frames]
    blank = spoken.mean(dtype=np.float64)
    longest = min(100 * float(wanted.time_mask_seconds), float(wanted.time_mask_share) * spoken.shape[1])
    widest = float(wanted.frequency_mask_share) * len(spoken)
    for _ in range(wanted.time_masks):
        spoken[:, _draw_stretch(spoken.shape[1], int(longest), draw)] = blank
    for _ in range(wanted.frequency_masks):
        spoken[_draw_stretch(len(spoken), int(widest), draw)] = blank
    return masked


def _draw_stretch(length: int, longest: int, draw: Generator) -> slice:
    size = int(draw.integers(longest + 1))
    start = int(draw.integers(length - size + 1))
    return slice(start, start + size)


def _recode(samples: Audio, rate: int, **how: Any) -> Audio:
    file = io.BytesIO()
    # Beyond full scale libsndfile's integer codecs would wrap around.
    soundfile.write(file, np.clip(samples, -1.0, 32767 / 32768), rate, **how)
    file.seek(0)
    return _fit(soundfile.read(file, dtype="float32")[0], len(samples))


def _fit(samples: Audio, length: int) -> Audio:
    """Cuts off, or fills up with silence, what codecs and resampling round up or down."""
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def _padded_size(length: int) -> int:
    """Gives a power of two: fast to transform, and never so few that there is no frequency to be heard."""
    return max(1024, 1 << (length - 1).bit_length())


def _power(samples: NDArray[Any]) -> float:
    return float(np.square(samples, dtype=np.float64).mean())


def _float32(samples: NDArray[np.float64]) -> Audio:
    return samples.astype(np.float32)
