"""Untrusted uploads become 16 kHz mono samples, within bounds on time and memory."""

import math
import time
from dataclasses import dataclass
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

Samples = npt.NDArray[np.float32]

SAMPLE_RATE: Final = 16_000  # Hz
# The containers that clients send; libsndfile opens many more, each of them more parser for strangers to play with.
_CONTAINERS: Final = frozenset({"WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"})
_MIN_RATE: Final = 4_000
_MAX_RATE: Final = 192_000
_MAX_CHANNELS: Final = 8
_BLOCK_SECONDS: Final = 5


@dataclass(frozen=True)
class AudioLimits:
    """Bounds on one upload: seconds of audio, and seconds that decoding it may take."""

    max_seconds: float
    max_decode_seconds: float


class UnusableAudioError(Exception):
    """The upload cannot be transcribed; code is for machines, the message for the person who sent it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def decode_audio(source: BinaryIO, limits: AudioLimits) -> Samples:
    """Decodes WAV, FLAC, Ogg (Vorbis, Opus) or MP3 into float32 mono samples at 16 kHz, in [-1, 1].

    Works in blocks, so that a header that lies about its length, rate or channels costs no more than the limits.

    Raises:
        UnusableAudioError: not audio, empty, too long, or too slow to decode.
    """
    deadline = time.monotonic() + limits.max_decode_seconds
    try:
        with soundfile.SoundFile(source) as sound:
            _check_header(sound)
            return _decode_blocks(sound, limits, deadline)
    except (soundfile.LibsndfileError, RuntimeError, EOFError) as error:
        raise UnusableAudioError(
            "invalid_audio", "The file could not be decoded. Send WAV, FLAC, Ogg or MP3 audio."
        ) from error


def _check_header(sound: soundfile.SoundFile) -> None:
    if sound.format not in _CONTAINERS:
        raise UnusableAudioError(
            "unsupported_format", f"{sound.format} audio is not accepted. Send WAV, FLAC, Ogg or MP3 audio."
        )
    if not _MIN_RATE <= sound.samplerate <= _MAX_RATE:
        raise UnusableAudioError(
            "unsupported_sample_rate",
            f"A sample rate of {sound.samplerate} Hz is not accepted. Send {_MIN_RATE} to {_MAX_RATE} Hz.",
        )
    if sound.channels > _MAX_CHANNELS:
        raise UnusableAudioError(
            "too_many_channels", f"{sound.channels} channels are not accepted. Send at most {_MAX_CHANNELS}."
        )


def _decode_blocks(sound: soundfile.SoundFile, limits: AudioLimits, deadline: float) -> Samples:
    rate = sound.samplerate
    max_frames = math.floor(limits.max_seconds * rate)
    resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    parts: list[Samples] = []
    frames = 0
    while True:
        block = sound.read(_BLOCK_SECONDS * rate, dtype="float32", always_2d=True)
        frames += len(block)
        if frames > max_frames:
            raise UnusableAudioError(
                "audio_too_long", f"The audio is longer than {limits.max_seconds:g} s. Send it in shorter pieces."
            )
        if time.monotonic() > deadline:
            raise UnusableAudioError(
                "decoding_too_slow", f"The audio took longer than {limits.max_decode_seconds:g} s to decode."
            )
        last = len(block) < _BLOCK_SECONDS * rate
        mono = np.ascontiguousarray(block.mean(axis=1, dtype=np.float32))
        parts.append(mono if resampler is None else resampler.resample_chunk(mono, last=last))
        if last:
            break
    if frames == 0:
        raise UnusableAudioError("empty_audio", "The file holds no audio.")
    # Float WAV files may hold anything, and one NaN would spread over the whole batch.
    return np.clip(np.nan_to_num(np.concatenate(parts), posinf=1.0, neginf=-1.0), -1.0, 1.0)
