"""Tests that stand beside the intervals: matched pairs, comparison of blocks, and Holm's correction for many."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from attune_trainer.scoring.bootstrap import Series
from attune_trainer.scoring.errors import slot_errors

# Words that both systems must have heard right, without an insertion, for what lies before and behind them to count
# as independent (Gillick and Cox, ICASSP 1989; two words as in NIST's implementation).
BETWEEN_SEGMENTS = 2


@dataclass(frozen=True)
class MatchedPairs:
    """The matched-pairs sentence-segment word error test.

    Attributes:
        segments: in which at least one system errs.
        mean: difference of errors in a segment, candidate - baseline.
        z: the mean by its standard error; 0 where no segment differs.
        p_value: two-sided; 1 where no segment differs.
    """

    segments: int
    mean: float
    z: float
    p_value: float


def compare_matched_pairs(baseline: Sequence[Sequence[int]], candidate: Sequence[Sequence[int]]) -> MatchedPairs:
    """Tests whether two systems make equally many word errors (Gillick and Cox, ICASSP 1989).

    Utterances are cut where both systems heard two words right, so that errors in one segment have nothing to do with
    those in the next; of each segment the difference of errors counts, and their mean is asked to be 0.

    Args:
        baseline: slots of each utterance (see errors.Alignment).
        candidate: of the same utterances.

    Raises:
        ValueError: when the lengths differ.
    """
    differences: list[int] = []
    for one, other in zip(baseline, candidate, strict=True):
        differences += [errors - before for before, errors in _cut_segments(one, other)]
    count = len(differences)
    values = np.asarray(differences, dtype=np.float64)
    if count < 2 or not values.any():  # noqa: PLR2004 (one value has no spread)
        return MatchedPairs(count, float(values.mean()) if count else 0.0, 0.0, 1.0)
    spread = float(values.std(ddof=1)) / math.sqrt(count)
    mean = float(values.mean())
    z = mean / spread if spread > 0 else math.copysign(math.inf, mean)
    return MatchedPairs(count, mean, z, float(2.0 * stats.norm.sf(abs(z))))


def _cut_segments(one: Sequence[int], other: Sequence[int]) -> list[tuple[int, int]]:
    """Gives (errors of one, errors of the other) of each segment in which somebody errs."""
    if len(one) != len(other):
        raise ValueError("both systems must have heard the same utterance")
    segments: list[tuple[int, int]] = []
    first = second = good = 0
    for place, (slot, slot_of_other) in enumerate(zip(one, other, strict=True)):
        is_word = place < len(one) - 1
        if slot or slot_of_other:
            if good >= BETWEEN_SEGMENTS and (first or second):
                segments.append((first, second))
                first = second = 0
            first += slot_errors(slot)
            second += slot_errors(slot_of_other)
            # A word that was heard right after an insertion is the first good one; a wrong one is none.
            good = int(is_word and not slot & 1 and not slot_of_other & 1)
        else:
            good += is_word
    if first or second:
        segments.append((first, second))
    return segments


@dataclass(frozen=True)
class Comparison:
    """Whether a paired rate differs from a multiple of the baseline's.

    Attributes:
        p_two_sided: that the difference is chance.
        p_above: small where the candidate's rate is above that multiple beyond doubt.
    """

    p_two_sided: float
    p_above: float


def compare_rates(baseline: Series, candidate: Series, blocks: Sequence[str], multiple: float = 1.0) -> Comparison:
    """Tests candidate - multiple x baseline of a rate against 0, by blocks, with Student's t.

    The same linearised variance as a clustered standard error: of each block what it adds to the difference beyond
    its share of the wholes. Unlike draws, it gives p-values as small as a correction for many slices asks for.

    Args:
        baseline: of each utterance.
        candidate: of the same utterances.
        blocks: of each utterance.
        multiple: 1.02 asks whether the candidate is more than 2 % above the baseline.
    """
    parts = np.asarray(candidate.parts, dtype=np.float64) - multiple * np.asarray(baseline.parts, dtype=np.float64)
    return _test_sum(parts, np.asarray(candidate.wholes, dtype=np.float64), blocks)


def compare_with_bound(series: Series, blocks: Sequence[str], bound: float) -> Comparison:
    """Tests a rate against a bound, by blocks, with Student's t, as compare_rates does."""
    wholes = np.asarray(series.wholes, dtype=np.float64)
    return _test_sum(np.asarray(series.parts, dtype=np.float64) - bound * wholes, wholes, blocks)


def _test_sum(parts: NDArray[np.float64], wholes: NDArray[np.float64], blocks: Sequence[str]) -> Comparison:
    index = {name: position for position, name in enumerate(sorted(set(blocks)))}
    places = np.array([index[name] for name in blocks], dtype=np.intp)
    by_block = np.bincount(places, parts, len(index))
    of_block = np.bincount(places, wholes, len(index))
    count = len(index)
    total = float(by_block.sum())
    if count < 2:  # noqa: PLR2004 (one block has no spread)
        return Comparison(1.0, 1.0)
    beyond = by_block - of_block * (total / of_block.sum())
    error = math.sqrt(float((beyond**2).sum()) * count / (count - 1))
    if error == 0.0:
        return Comparison(float(total == 0), float(total <= 0))
    t = total / error
    return Comparison(float(2.0 * stats.t.sf(abs(t), count - 1)), float(stats.t.sf(t, count - 1)))


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values of several tests so that one false alarm among all of them is as rare as promised (Holm 1979).

    adjust_holm([0.01, 0.04, 0.03]) -> [0.03, 0.06, 0.06].
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = largest
    return adjusted
