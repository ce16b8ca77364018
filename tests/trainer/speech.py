"""Speech for tests: spoken by espeak-ng, and coded as recordings of all kinds are."""

import io
import subprocess
from functools import cache
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr

from tests.assets.mini_model import ensure_espeak

RATE = 16000

# suffix: (libav's codec, container, rate in Hz)
CODED = {
    ".wav": ("pcm_s16le", "wav", 16000),
    ".flac": ("flac", "flac", 16000),
    ".m4a": ("aac", "ipod", 44100),
    ".mp3": ("libmp3lame", "mp3", 44100),
    ".opus": ("libopus", "opus", 48000),
    ".webm": ("libopus", "webm", 48000),
    ".ulaw": ("pcm_mulaw", "mulaw", 8000),
    ".alaw": ("pcm_alaw", "alaw", 8000),
    ".g722": ("adpcm_g722", "g722", 16000),
    ".amr": ("libopencore_amrnb", "amr", 8000),
    ".caf": ("pcm_s16le", "caf", 16000),
}
# What libav has no encoder for comes from libsndfile: (format, subtype).
CODED_BY_SNDFILE = {
    ".gsm": ("RAW", "GSM610"),
    ".ogg": ("OGG", "VORBIS"),
    ".au": ("AU", "ULAW"),
    ".aiff": ("AIFF", "PCM_16"),
}


@cache
def speak(text: str, voice: str = "en-us") -> np.ndarray:
    """Speaks a text: mono float32 at 16 kHz."""
    spoken = subprocess.run(
        [ensure_espeak(), "-v", voice, "--stdout", text], check=True, capture_output=True, timeout=60
    ).stdout
    # Streamed, so its header does not know how long it is.
    samples, rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
    return soxr.resample(samples, rate, RATE).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), dtype=np.float32)


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> None:
    """Writes samples of shape (frames,) or (frames, channels)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)


def write_coded(path: Path, samples: np.ndarray) -> None:
    """Codes mono samples at 16 kHz as the suffix says."""
    suffix = path.suffix
    if suffix in CODED_BY_SNDFILE:
        file_format, subtype = CODED_BY_SNDFILE[suffix]
        telephone = soxr.resample(samples, RATE, 8000)
        soundfile.write(path, telephone, 8000, format=file_format, subtype=subtype)
        return
    codec, container, rate = CODED[suffix]
    whole = np.clip(np.rint(samples * 32767), -32768, 32767).astype(np.int16)
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(whole[None, :], format="s16", layout="mono")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(
            format=stream.codec_context.format,
            layout="mono",
            rate=rate,
            frame_size=stream.codec_context.frame_size or 0,
        )
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(piece))
        output.mux(stream.encode(None))


def likeness(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Correlates two clips; gives the highest correlation and at how many seconds of delay it is."""
    size = 1 << (len(first) + len(second)).bit_length()
    products = np.fft.irfft(np.fft.rfft(first, size) * np.conj(np.fft.rfft(second, size)), size)
    best = int(np.argmax(products))
    norm = np.sqrt(float(first @ first) * float(second @ second))
    return float(products[best] / norm), (best if best < size // 2 else best - size) / RATE
