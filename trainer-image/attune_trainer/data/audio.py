"""Decoding of whatever audio a source holds into mono samples at one rate."""

from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from attune_trainer.data.rejections import TOO_LONG, TOO_SHORT, RejectedLine

FILE_BYTES = 512 * 1024 * 1024
_LOWEST_RATE, _HIGHEST_RATE = 1000, 768_000  # Hz
_CHANNELS = 32
_UNKNOWN_FRAMES = 1 << 62  # libsndfile gives about 2^63 for streams that do not say


def decode_audio(path: Path, sample_rate: int, min_seconds: float, max_seconds: float) -> NDArray[np.int16]:
    """Decodes a file, mixes it to mono and resamples it; shape (samples,).

    A file is never read beyond max_seconds, whatever its header says. Channels are averaged. Both bounds are kept.

    Args:
        path: any file that libsndfile reads.
        sample_rate: wanted, in Hz.
        min_seconds: shorter audio is left out.
        max_seconds: longer audio is left out.

    Raises:
        RejectedLine: AudioNotDecodable, AudioEmpty, AudioNotFinite, AudioSilent, TooShort, TooLong.
    """
    samples, rate = _read_bounded(path, max_seconds)
    if len(samples) == 0:
        raise RejectedLine("AudioEmpty")
    if not np.isfinite(samples).all():
        raise RejectedLine("AudioNotFinite")
    seconds = len(samples) / rate
    if seconds > max_seconds:
        raise RejectedLine(TOO_LONG)
    if seconds < min_seconds:
        raise RejectedLine(TOO_SHORT)
    mono = samples.mean(axis=1, dtype=np.float32)
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate, quality="HQ")
    whole: NDArray[np.int16] = np.clip(np.rint(mono * 32768.0), -32768, 32767).astype(np.int16)
    if len(whole) == 0:
        raise RejectedLine("AudioEmpty")
    if not whole.any():
        raise RejectedLine("AudioSilent")
    return whole


def _read_bounded(path: Path, max_seconds: float) -> tuple[NDArray[np.float32], int]:
    """Reads at most a little more than max_seconds; samples of shape (frames, channels), and their rate in Hz."""
    try:
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            if not _LOWEST_RATE <= rate <= _HIGHEST_RATE or not 1 <= channels <= _CHANNELS:
                raise RejectedLine("AudioNotDecodable")
            limit = int(max_seconds * rate) + 1
            if limit < file.frames < _UNKNOWN_FRAMES:
                raise RejectedLine(TOO_LONG)
            return file.read(frames=limit + 1, dtype="float32", always_2d=True), rate
    except (soundfile.SoundFileError, OSError, ValueError, TypeError):
        # libsndfile answers formats without a rate, or with odd headers, by any of these.
        raise RejectedLine("AudioNotDecodable") from None
