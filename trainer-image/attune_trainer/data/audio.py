"""Decoding of whatever audio a source holds into mono samples at one rate, whole or span by span."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import av.error
import numpy as np
import soxr
from av.audio.frame import AudioFrame
from numpy.typing import NDArray

from attune_trainer.data.rejections import TOO_LONG, TOO_SHORT, RejectedLine

FILE_BYTES: Final = 2 * 1024**3
RECORDING_SECONDS: Final = 12 * 3600.0
_LOWEST_RATE, _HIGHEST_RATE = 1000, 768_000  # Hz
_CHANNELS: Final = 32
# Of spans that overlap, so many are collected at a time.
_OPEN_SPANS: Final = 64
# A transcript's last time may lie a little beyond the end of its audio.
_OVERHANG_SECONDS: Final = 0.5
_GAP_SECONDS: Final = 0.05  # between frames; less is rounding of their times
_FLAT_SAMPLES: Final = 3
_FLAT_LEVEL: Final = 0.95
_FLAT_DIFFERENCE: Final = 1e-4

# Demuxers of files with nothing but audio in them, or audio beside pictures. Playlists are none: they name other files.
_DEMUXERS: Final = (
    "aac,ac3,aiff,amr,amrnb,amrwb,asf,au,caf,flac,g722,gsm,matroska,webm,mov,mp4,m4a,3gp,mp3,ogg,w64,wav,alaw,mulaw"
)
# Raw streams say nothing of themselves: their names do, and all are of the telephone's 8 kHz but G.722.
_RAW: Final = {
    ".al": ("alaw", 8000),
    ".alaw": ("alaw", 8000),
    ".pcma": ("alaw", 8000),
    ".ul": ("mulaw", 8000),
    ".ulaw": ("mulaw", 8000),
    ".pcmu": ("mulaw", 8000),
    ".gsm": ("gsm", 8000),
    ".g722": ("g722", None),
}
AUDIO_SUFFIXES: Final = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".w64", ".caf",
    ".m4a", ".mp4", ".aac", ".webm", ".mka", ".wma", ".amr", ".awb", ".3gp", *_RAW,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a recording.

    Attributes:
        start: seconds from its beginning; None with the whole of it.
        end: seconds from its beginning; None up to its end.
        channel: which channel, from 0; None averages all.
    """

    start: float | None = None
    end: float | None = None
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a span may be.

    Attributes:
        sample_rate: wanted, in Hz.
        min_seconds: shorter spans are left out.
        max_seconds: longer spans are left out.
    """

    sample_rate: int
    min_seconds: float
    max_seconds: float


@dataclass(frozen=True, slots=True)
class Cut:
    """What became of a span: its samples, or the reason why there are none.

    Attributes:
        index: of the span, as it was given.
        samples: 16-bit mono, shape (samples,).
        clipped: share of the recording's samples in the span that lie on flat tops, or beyond full scale.
        reason: CamelCase; None where there are samples.
    """

    index: int
    samples: NDArray[np.int16] | None = None
    clipped: float = 0.0
    reason: str | None = None

    def unwrap(self) -> NDArray[np.int16]:
        """Gives the samples.

        Raises:
            RejectedLine: where there are none.
        """
        if self.samples is None:
            raise RejectedLine(self.reason or "AudioNotDecodable")
        return self.samples


@dataclass
class _OpenSpan:
    """A span that is being collected; first and last are its bounds in frames of the recording."""

    index: int
    span: Span
    first: int
    last: int | None
    chunks: list[NDArray[np.float32]] = field(default_factory=list)
    collected: int = 0


def decode_audio(path: Path, sample_rate: int, min_seconds: float, max_seconds: float) -> NDArray[np.int16]:
    """Decodes a file, mixes it to mono and resamples it; shape (samples,).

    A file is never read beyond max_seconds, whatever its header says. Channels are averaged. Both bounds are kept.

    Args:
        path: any file that libav reads; raw G.711, GSM and G.722 are known by their suffixes.
        sample_rate: wanted, in Hz.
        min_seconds: shorter audio is left out.
        max_seconds: longer audio is left out.

    Raises:
        RejectedLine: AudioNotDecodable, AudioEmpty, AudioNotFinite, AudioSilent, TooShort, TooLong.
    """
    return next(cut_spans(path, [Span()], Bounds(sample_rate, min_seconds, max_seconds))).unwrap()


def cut_spans(path: Path, spans: Sequence[Span], bounds: Bounds) -> Iterator[Cut]:
    """Decodes a file once, from its beginning, and yields each span as soon as its end is reached.

    What is in memory at a time is bounded: frames of the file, and the spans that are open, none of them longer than
    bounds.max_seconds. Every span gets exactly one Cut; those after a damaged place get AudioNotDecodable.

    Args:
        path: any file that libav reads; raw G.711, GSM and G.722 are known by their suffixes.
        spans: in any order; they may overlap.
        bounds: of the spans' durations.
    """
    collector = _Collector(spans, bounds)
    failure: str | None = None
    try:
        for rate, frame in _read_frames(path):
            yield from collector.take(rate, frame)
            if collector.done:
                return
    except RejectedLine as rejected:
        failure = rejected.reason
    yield from collector.end(failure)


def _read_frames(path: Path) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yields (rate in Hz, samples of shape (channels, frames)) in order, with zeros where a stream has gaps."""
    demuxer, rate = _RAW.get(path.suffix.lower(), (None, None))
    options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
    if rate is not None and demuxer != "gsm":
        options["sample_rate"] = str(rate)
    try:
        with av.open(str(path), format=demuxer, container_options=options) as container:
            if not container.streams.audio:
                raise RejectedLine("AudioNotDecodable")
            stream = container.streams.audio[0]
            stream.codec_context.thread_count = 1
            yield from _without_gaps(container.decode(stream))
    except (av.error.FFmpegError, OSError, ValueError, TypeError, OverflowError, ZeroDivisionError, MemoryError):
        raise RejectedLine("AudioNotDecodable") from None


def _without_gaps(frames: Iterator[AudioFrame]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    position, begin, first_rate, channels = 0, None, 0, 0
    for frame in frames:
        rate, count = frame.sample_rate, frame.layout.nb_channels
        if not _LOWEST_RATE <= rate <= _HIGHEST_RATE or not 1 <= count <= _CHANNELS:
            raise RejectedLine("AudioNotDecodable")
        if first_rate and (rate, count) != (first_rate, channels):
            raise RejectedLine("AudioFormatChanges")
        first_rate, channels = rate, count
        if frame.pts is not None and frame.time_base:
            time = Fraction(frame.pts) * frame.time_base
            begin = time if begin is None else begin
            missing = round((time - begin) * rate) - position
            if missing > _GAP_SECONDS * rate:
                if position + missing > RECORDING_SECONDS * rate:
                    raise RejectedLine("RecordingTooLong")
                for start in range(0, missing, rate):
                    yield rate, np.zeros((count, min(rate, missing - start)), dtype=np.float32)
                position += missing
        samples = _to_float(frame, count)
        position += samples.shape[1]
        if position > RECORDING_SECONDS * rate:
            raise RejectedLine("RecordingTooLong")
        yield rate, samples


def _to_float(frame: AudioFrame, channels: int) -> NDArray[np.float32]:
    """Gives a frame's samples with full scale at 1, shape (channels, frames)."""
    plain: NDArray[Any] = frame.to_ndarray()
    if not frame.format.is_planar:
        plain = plain.reshape(-1, channels).T
    if plain.dtype == np.uint8:
        return (plain.astype(np.float32) - 128.0) / 128.0
    if np.issubdtype(plain.dtype, np.integer):
        scale = float(np.iinfo(plain.dtype).max) + 1.0
        return (plain / scale).astype(np.float32)
    return plain.astype(np.float32, copy=False)


class _Collector:
    """Collects spans while frames go by."""

    def __init__(self, spans: Sequence[Span], bounds: Bounds) -> None:
        self._bounds = bounds
        self._rate = 0
        self._position = 0
        # The next one to open is the last.
        self._waiting = sorted(enumerate(spans), key=lambda entry: (entry[1].start or 0.0, entry[0]), reverse=True)
        self._open: list[_OpenSpan] = []

    @property
    def done(self) -> bool:
        """Whether every span has its Cut."""
        return not self._waiting and not self._open

    def take(self, rate: int, frame: NDArray[np.float32]) -> Iterator[Cut]:
        """Goes on by one frame, of shape (channels, frames)."""
        self._rate = rate
        after = self._position + frame.shape[1]
        while self._waiting and round((self._waiting[-1][1].start or 0.0) * rate) < after:
            index, span = self._waiting.pop()
            refused = self._refuse(span, frame.shape[0])
            if refused is not None:
                yield Cut(index, reason=refused)
                continue
            first = round((span.start or 0.0) * rate)
            last = round(span.end * rate) if span.end is not None else None
            self._open.append(_OpenSpan(index, span, first, last))
        mixed: dict[int | None, NDArray[np.float32]] = {}
        still_open = []
        for one in self._open:
            channel = one.span.channel
            if channel not in mixed:
                mixed[channel] = frame.mean(axis=0, dtype=np.float32) if channel is None else frame[channel]
            begin = max(0, one.first - self._position)
            chunk = mixed[channel][begin : None if one.last is None else max(0, one.last - self._position)]
            one.chunks.append(chunk.copy())
            one.collected += len(chunk)
            if (one.last is not None and one.last <= after) or one.collected > self._bounds.max_seconds * rate:
                yield self._finish(one)
            else:
                still_open.append(one)
        self._open = still_open
        self._position = after

    def end(self, failure: str | None) -> Iterator[Cut]:
        """Ends with the file, or at the place where it is damaged."""
        for one in self._open:
            overhang = 0 if one.last is None else one.last - self._position
            if failure is not None:
                yield Cut(one.index, reason=failure)
            elif overhang > _OVERHANG_SECONDS * self._rate:
                yield Cut(one.index, reason="SpanOutsideAudio")
            else:
                yield self._finish(one)
        nothing = "AudioEmpty" if self._position == 0 else "SpanOutsideAudio"
        for index, _ in reversed(self._waiting):
            yield Cut(index, reason=failure or nothing)
        self._open, self._waiting = [], []

    def _refuse(self, span: Span, channels: int) -> str | None:
        if span.channel is not None and not 0 <= span.channel < channels:
            return "ChannelNotFound"
        if span.end is not None and span.end - (span.start or 0.0) > self._bounds.max_seconds:
            return TOO_LONG
        return "SpansOverlap" if len(self._open) >= _OPEN_SPANS else None

    def _finish(self, one: _OpenSpan) -> Cut:
        mono = np.concatenate(one.chunks) if one.chunks else np.empty(0, dtype=np.float32)
        one.chunks.clear()
        if len(mono) == 0:
            return Cut(one.index, reason="AudioEmpty")
        if not np.isfinite(mono).all():
            return Cut(one.index, reason="AudioNotFinite")
        seconds = len(mono) / self._rate
        if seconds > self._bounds.max_seconds:
            return Cut(one.index, reason=TOO_LONG)
        if seconds < self._bounds.min_seconds:
            return Cut(one.index, reason=TOO_SHORT)
        clipped = measure_clipping(mono)
        if self._rate != self._bounds.sample_rate:
            mono = soxr.resample(mono, self._rate, self._bounds.sample_rate, quality="HQ")
        whole: NDArray[np.int16] = np.clip(np.rint(mono * 32768.0), -32768, 32767).astype(np.int16)
        if len(whole) == 0:
            return Cut(one.index, reason="AudioEmpty")
        if not whole.any():
            return Cut(one.index, reason="AudioSilent")
        return Cut(one.index, whole, clipped)


def measure_clipping(samples: NDArray[np.float32]) -> float:
    """Gives the share of samples that were cut off: three or more alike near full scale, or beyond full scale.

    A sine of full scale has rounded tops and none; one that was amplified by 2 into 16 bits has about two thirds.
    """
    if len(samples) == 0:
        return 0.0
    loud = np.abs(samples) >= _FLAT_LEVEL
    flat = np.zeros(len(samples), dtype=bool)
    alike = (np.abs(np.diff(samples)) < _FLAT_DIFFERENCE) & loud[1:] & loud[:-1]
    runs = np.flatnonzero(np.diff(np.concatenate(([0], alike.view(np.int8), [0]))))
    for begin, end in zip(runs[::2], runs[1::2], strict=True):
        if end - begin + 1 >= _FLAT_SAMPLES:
            flat[begin : end + 1] = True
    return float(np.mean(flat | (np.abs(samples) > 1.0)))
