"""Figures by label of the utterances: which accents, channels or lengths a recogniser is worse on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from attune_trainer.scoring.bootstrap import (
    BootstrapInterval,
    Series,
    bootstrap_gap,
    bootstrap_rate,
    bootstrap_rate_change,
    choose_blocks,
)
from attune_trainer.scoring.significance import adjust_holm, compare_rates

# Below this, an interval of a word error rate of 10 % is wider than 6 to 18 %, whatever is drawn.
FEWEST_WORDS: Final = 100
FEWEST_UTTERANCES: Final = 10
MOST_VALUES: Final = 64
# What utterances without the label, and those of values beyond MOST_VALUES, are shown as.
NO_VALUE: Final = "(none)"
OTHER_VALUES: Final = "(others)"


@dataclass(frozen=True)
class Slice:
    """The utterances of one value of a label.

    Attributes:
        label: accent.
        value: scottish.
        places: where they are in the split.
        words: of their references.
    """

    label: str
    value: str
    places: tuple[int, ...]
    words: int

    @property
    def is_too_small(self) -> bool:
        """Whether it has too few words or utterances to say anything."""
        return self.words < FEWEST_WORDS or len(self.places) < FEWEST_UTTERANCES

    @property
    def name(self) -> str:
        """Label and value: accent=scottish."""
        return f"{self.label}={self.value}"


@dataclass(frozen=True)
class SliceFigures:
    """A candidate on a slice.

    Attributes:
        slice: which.
        wer: with its interval, of the slice alone; None where it has no words.
        change: of the WER from the baseline's on the same slice, with its paired interval; None for the baseline, in
            slices that are too small, and where the baseline makes too few errors for a ratio.
        p_value: that the change is chance, two-sided; None where there is none to test.
        p_adjusted: the same after Holm's correction over all slices of this candidate.
    """

    slice: Slice
    wer: BootstrapInterval | None
    change: BootstrapInterval | None = None
    p_value: float | None = None
    p_adjusted: float | None = None


@dataclass(frozen=True)
class Gap:
    """How far apart the values of a label are for a candidate; too small ones do not count.

    Attributes:
        label: accent.
        best: the value with the lowest WER.
        worst: the value with the highest.
        difference: of their rates, worst - best, with its interval.
        values: that were judged.
        too_small: that were not.
    """

    label: str
    best: SliceFigures
    worst: SliceFigures
    difference: BootstrapInterval
    values: int
    too_small: int


def divide(label: str, values: Sequence[str | None], words: Sequence[int]) -> list[Slice]:
    """Divides utterances by a label's values, those with most words first.

    Args:
        label: its name.
        values: of each utterance; None where it has none.
        words: of each utterance's reference.
    """
    weight: Counter[str] = Counter()
    for value, count in zip(values, words, strict=True):
        weight[value or NO_VALUE] += count
    shown = {value for value, _ in sorted(weight.items(), key=lambda item: (-item[1], item[0]))[:MOST_VALUES]}
    places: dict[str, list[int]] = {}
    for place, value in enumerate(values):
        known = value or NO_VALUE
        places.setdefault(known if known in shown else OTHER_VALUES, []).append(place)
    slices = [Slice(label, value, tuple(of), sum(words[place] for place in of)) for value, of in places.items()]
    return sorted(slices, key=lambda one: (one.value == OTHER_VALUES, -one.words, one.value))


def measure_slices(
    slices: Sequence[Slice],
    baseline: Series | None,
    candidate: Series,
    blocks: Sequence[str],
    confidence: float,
    seed: int,
) -> tuple[SliceFigures, ...]:
    """Measures a candidate on each slice; p-values are corrected over all slices that are not too small.

    Args:
        slices: of any labels.
        baseline: word errors of each utterance, or None where the candidate is the baseline or there is none.
        candidate: the same of the candidate.
        blocks: speaker or group of each utterance.
        confidence: of the intervals.
        seed: of the draws.
    """
    measured = [_measure(one, baseline, candidate, blocks, confidence, seed) for one in slices]
    tested = [place for place, one in enumerate(measured) if one.p_value is not None]
    adjusted = adjust_holm([measured[place].p_value or 0.0 for place in tested])
    for place, p_adjusted in zip(tested, adjusted, strict=True):
        measured[place] = replace(measured[place], p_adjusted=p_adjusted)
    return tuple(measured)


def _measure(
    one: Slice, baseline: Series | None, candidate: Series, blocks: Sequence[str], confidence: float, seed: int
) -> SliceFigures:
    here = candidate.take(one.places)
    if here.whole == 0:
        return SliceFigures(one, None)
    drawn, _ = choose_blocks([blocks[place] for place in one.places])
    wer = bootstrap_rate(here, drawn, confidence, seed)
    if baseline is None or one.is_too_small:
        return SliceFigures(one, wer)
    before = baseline.take(one.places)
    change = bootstrap_rate_change(before, here, drawn, confidence, seed)
    return SliceFigures(one, wer, change, compare_rates(before, here, drawn).p_two_sided)


def find_gaps(
    figures: Sequence[SliceFigures], candidate: Series, blocks: Sequence[str], confidence: float, seed: int
) -> tuple[Gap, ...]:
    """Gives the gap of each label with two values or more that say something, in the order of the figures."""
    by_label: dict[str, list[SliceFigures]] = {}
    for one in figures:
        by_label.setdefault(one.slice.label, []).append(one)
    gaps = []
    for label, values in by_label.items():
        judged = [one for one in values if not one.slice.is_too_small and one.slice.value != OTHER_VALUES]
        if len(judged) < 2:  # noqa: PLR2004 (a gap lies between two)
            continue
        best, worst = min(judged, key=_rate), max(judged, key=_rate)
        of_best, of_worst = (choose_blocks([blocks[place] for place in one.slice.places])[0] for one in (best, worst))
        rates = candidate.take(best.slice.places), candidate.take(worst.slice.places)
        difference = bootstrap_gap(*rates, of_best, of_worst, confidence, seed)
        gaps.append(Gap(label, best, worst, difference, len(judged), len(values) - len(judged)))
    return tuple(gaps)


def _rate(figures: SliceFigures) -> float:
    return figures.wer.value if figures.wer is not None else 0.0


def duration_of(seconds: float) -> str:
    """Names the bucket of a duration: 3.2 -> "2 to 5 s"."""
    for below, name in ((2.0, "under 2 s"), (5.0, "2 to 5 s"), (10.0, "5 to 10 s"), (20.0, "10 to 20 s")):
        if seconds < below:
            return name
    return "20 s or more"
