"""Copies of a recording that differ by codec or level: found by a fingerprint of how its spectrum changes.

A fingerprint is made after J. Haitsma and T. Kalker, "A highly robust audio fingerprinting system" (ISMIR 2002), but
once for a whole clip: in 32 steps of time, for each of 8 neighbouring pairs of bands that a telephone carries, whether
the difference between the two grows or falls. Gain changes none of it, and a codec little.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_STEPS: Final = 33
_EDGES: Final = np.geomspace(300.0, 3400.0, 10)  # Hz
_FRAME: Final = 512  # samples at 16 kHz
_RATE: Final = 16000
# Codecs move a clip by some milliseconds; the clip that is compared is moved so far as well.
_SHIFTS: Final = (0.0, -0.02, 0.02, -0.04, 0.04)  # s
# Durations of copies differ by a codec's frame or two.
_SLACK_SECONDS: Final = 0.1
# Smaller changes than this are noise, and say nothing.
_LEAST_CHANGE: Final = 2.0  # dB
_LEAST_BITS: Final = 48
# Share of what counts. Copies by GSM, AMR and AAC differ in 4 to 6 %, the same sentence by a synthesiser's other voices
# in 14 % and more, other sentences in 36 %.
_MOST_WRONG: Final = 0.09
# What a codec changes is spread over a clip; where one word is another, all that is wrong is in an eighth or two.
_PARTS: Final = 8
_PART_SLACK: Final = 2
_PART_WRONG: Final = 0.15
_FLOOR_DB: Final = -50.0  # below the loudest

_Bits = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Which way each of 256 differences goes, and whether it goes far enough to count; packed, 32 bytes each.

    moved: the same for the clip begun a little earlier or later.
    """

    seconds: float
    rises: NDArray[np.uint8]
    counts: NDArray[np.uint8]
    moved: tuple[tuple[NDArray[np.uint8], NDArray[np.uint8]], ...]


def fingerprint(samples: NDArray[np.int16]) -> Fingerprint:
    """Makes a clip's fingerprint, from mono samples at 16 kHz, shape (samples,)."""
    audio = samples.astype(np.float32)
    pieces = [_describe(audio, round(shift * _RATE)) for shift in _SHIFTS]
    rises, counts = pieces[0]
    return Fingerprint(len(samples) / _RATE, rises, counts, tuple(pieces[1:]))


class Recordings:
    """The recordings that were heard so far."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], list[tuple[float, NDArray[np.uint8], NDArray[np.uint8]]]] = defaultdict(list)

    def add(self, new: Fingerprint, sentence: str) -> bool:
        """Remembers a recording, unless one like it is known already: then tells so.

        Only recordings of the same sentence are compared: a synthesiser's sentences that differ by a word may sound as
        much alike as two copies do.
        """
        place = round(new.seconds / _SLACK_SECONDS)
        near = [one for bucket in (place - 1, place, place + 1) for one in self._known[sentence, bucket]]
        near = [one for one in near if abs(one[0] - new.seconds) <= _SLACK_SECONDS]
        if near and self._is_among(new, near):
            return True
        self._known[sentence, place].append((new.seconds, new.rises, new.counts))
        return False

    @staticmethod
    def _is_among(new: Fingerprint, near: list[tuple[float, NDArray[np.uint8], NDArray[np.uint8]]]) -> bool:
        rises, counts = np.stack([one[1] for one in near]), np.stack([one[2] for one in near])
        for moved_rises, moved_counts in ((new.rises, new.counts), *new.moved):
            both: NDArray[np.uint8] = counts & moved_counts
            shared = _count(both)
            differing: NDArray[np.uint8] = (rises ^ moved_rises) & both
            wrong = _count(differing)
            everywhere = np.all(wrong <= _PART_SLACK + _PART_WRONG * shared, axis=1)
            enough = shared.sum(axis=1) >= _LEAST_BITS
            if bool(np.any(everywhere & enough & (wrong.sum(axis=1) <= _MOST_WRONG * shared.sum(axis=1)))):
                return True
        return False


def _count(bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Counts set bits by eighths of the clips: (clips, 32) -> (clips, 8)."""
    counted: NDArray[np.int64] = np.bitwise_count(bits).reshape(len(bits), _PARTS, -1).sum(axis=2, dtype=np.int64)
    return counted


def _describe(audio: NDArray[np.float32], shift: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Gives (rises, counts), packed, of the clip moved by so many samples."""
    moved = np.pad(audio, (max(0, shift), 0))[max(0, -shift) :]
    if len(moved) < _FRAME:
        moved = np.pad(moved, (0, _FRAME - len(moved)))
    hop = max(1, min(_FRAME // 2, (len(moved) - _FRAME) // (2 * _STEPS)))
    frames = np.lib.stride_tricks.sliding_window_view(moved, _FRAME)[::hop] * np.hanning(_FRAME).astype(np.float32)
    powers = np.square(np.abs(np.fft.rfft(frames, axis=1)))
    bins = np.searchsorted(np.fft.rfftfreq(_FRAME, 1 / _RATE), _EDGES)
    bands = np.add.reduceat(powers, bins, axis=1)[:, : len(_EDGES) - 1]
    parts = np.array_split(np.arange(len(bands)), _STEPS)
    steps = np.stack([bands[part].sum(axis=0) if len(part) else np.zeros(bands.shape[1]) for part in parts])
    loudest = max(float(steps.max()), 1e-9)
    levels = 10 * np.log10(np.maximum(steps / loudest, 10 ** (_FLOOR_DB / 10)))
    changes = np.diff(levels[:, :-1] - levels[:, 1:], axis=0)
    rises: _Bits = changes > 0
    counts: _Bits = np.abs(changes) >= _LEAST_CHANGE
    return np.packbits(rises), np.packbits(counts)
