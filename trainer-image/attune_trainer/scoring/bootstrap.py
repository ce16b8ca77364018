"""Intervals by blockwise bootstrap (Liu and Peng, arXiv 1912.09508).

Utterances of one speaker or call err together. So whole blocks are drawn with replacement, as many as there are, and
the corpus rate is computed of each draw; the interval lies between percentiles of these rates. Two systems that heard
the same audio are compared on the same draws, which cancels what makes some blocks hard for both.

Plain percentiles are too narrow where blocks are few: a bootstrap's variance is (n-1)/n of the sample's, and it knows
normal tails where Student's are due. The percentiles are moved outwards for both (Hesterberg, What Teachers Should
Know about the Bootstrap, arXiv 1411.5279, section 3.1.2: the expanded percentile interval). Of 10 blocks the 95 %
interval lies between the 0.9th and the 99.1st percentile, of 1,000 between the 2.5th and the 97.5th.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from attune_trainer.scoring.errors import ErrorCounts

REPLICATIONS = 4000
# Below this many speakers or groups the percentiles of their bootstrap say little (it draws the same few again and
# again); utterances are drawn instead, and the report says that the interval is about these speakers only.
FEWEST_BLOCKS = 6
# How often a difference of the size that `smallest_change` gives would have been seen.
POWER = 0.8
# So many drawn blocks at a time: replications x blocks, 8 bytes each, once for the draw and once for what is summed.
_DRAWN_AT_ONCE = 2_000_000

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BootstrapInterval:
    """A figure of the whole corpus and the interval around it.

    Attributes:
        value: of the corpus itself, not the mean over draws.
        low: lower end.
        high: upper end.
        blocks: how many independent blocks there were.
        n: what the figure is a share of: words, characters, utterances, entities.
        deviation: standard deviation of the figure over the draws; its standard error.
    """

    value: float
    low: float
    high: float
    blocks: int
    n: int = 0
    deviation: float = 0.0


def describe_span(interval: BootstrapInterval, sign: str = "") -> str:
    """Writes an interval in percent: "5.0 to 13.2 %"."""
    return f"{100 * interval.low:{sign}.1f} to {100 * interval.high:{sign}.1f} %"


@dataclass(frozen=True)
class Series:
    """What a rate is made of, utterance by utterance: parts over wholes, both as sums.

    Word errors over words, utterances without an error over utterances, entities heard right over entities.
    """

    parts: tuple[int, ...]
    wholes: tuple[int, ...]

    @classmethod
    def of(cls, counts: Sequence[ErrorCounts]) -> "Series":
        """Errors over words (or over characters, where these were counted)."""
        return cls(tuple(one.errors for one in counts), tuple(one.words for one in counts))

    @property
    def part(self) -> int:
        """Sum of the parts."""
        return sum(self.parts)

    @property
    def whole(self) -> int:
        """Sum of the wholes."""
        return sum(self.wholes)

    @property
    def rate(self) -> float:
        """Part over whole; nan where there is no whole."""
        return self.part / self.whole if self.whole else math.nan

    def take(self, places: Sequence[int]) -> "Series":
        """Gives the utterances at these places alone."""
        return Series(tuple(self.parts[place] for place in places), tuple(self.wholes[place] for place in places))


def choose_blocks(labels: Sequence[str]) -> tuple[list[str], bool]:
    """Gives what to draw, and whether that is single utterances because there are too few labels.

    Args:
        labels: speaker, call or group of each utterance.
    """
    if len(set(labels)) < FEWEST_BLOCKS:
        return [str(position) for position in range(len(labels))], True
    return list(labels), False


def bootstrap_rate(series: Series, blocks: Sequence[str], confidence: float = 0.95, seed: int = 7) -> BootstrapInterval:
    """Gives a corpus rate with its interval.

    Args:
        series: of the utterances.
        blocks: the speaker, call or group of each utterance, in the same order.
        confidence: share of repetitions in which the interval is to hold the truth, 0 to 1.
        seed: same seed, same interval.

    Raises:
        ValueError: where the wholes add up to nothing, or when the lengths differ.
    """
    parts, wholes = _block_sums([series], blocks)
    rates = _draw(parts, wholes, seed)[:, 0]
    low, high = _percentiles(rates, confidence, len(wholes))
    value = float(parts.sum() / wholes.sum())
    return BootstrapInterval(value, low, high, len(wholes), series.whole, float(rates.std()))


def bootstrap_rate_change(
    baseline: Series, candidate: Series, blocks: Sequence[str], confidence: float = 0.95, seed: int = 7
) -> BootstrapInterval | None:
    """Gives the relative change of a rate, candidate / baseline - 1, with its paired interval.

    -0.4 means 40 % less. None where the baseline's rate is 0, or is 0 in some draws: there a relative change has no
    value.

    Args:
        baseline: of each utterance.
        candidate: of the same utterances in the same order.
        blocks: the block of each utterance.
        confidence: of the interval.
        seed: same seed, same interval.
    """
    parts, wholes = _block_sums([baseline, candidate], blocks)
    sums = parts.sum(axis=1)
    if sums[0] == 0:
        return None
    rates = _draw(parts, wholes, seed)
    if (rates[:, 0] == 0).any():
        return None
    changes = rates[:, 1] / rates[:, 0] - 1.0
    low, high = _percentiles(changes, confidence, len(wholes))
    value = float(sums[1] / sums[0] - 1.0)
    return BootstrapInterval(value, low, high, len(wholes), baseline.whole, float(changes.std()))


def bootstrap_gap(
    one: Series,
    other: Series,
    one_blocks: Sequence[str],
    other_blocks: Sequence[str],
    confidence: float = 0.95,
    seed: int = 7,
) -> BootstrapInterval:
    """Gives the difference of two rates on different utterances, other - one, with its interval.

    Each is drawn on its own: no utterance is in both.
    """
    first = _draw(*_block_sums([one], one_blocks), seed)[:, 0]
    second = _draw(*_block_sums([other], other_blocks), seed + 1)[:, 0]
    size = min(len(first), len(second))
    gaps = second[:size] - first[:size]
    fewest = min(len(set(one_blocks)), len(set(other_blocks)))
    low, high = _percentiles(gaps, confidence, fewest)
    return BootstrapInterval(other.rate - one.rate, low, high, fewest, one.whole + other.whole, float(gaps.std()))


def bootstrap_wer(
    counts: Sequence[ErrorCounts], blocks: Sequence[str], confidence: float = 0.95, seed: int = 7
) -> BootstrapInterval:
    """Gives the corpus error rate of counts with its interval, as bootstrap_rate does."""
    return bootstrap_rate(Series.of(counts), blocks, confidence, seed)


def bootstrap_change(
    baseline: Sequence[ErrorCounts],
    candidate: Sequence[ErrorCounts],
    blocks: Sequence[str],
    confidence: float = 0.95,
    seed: int = 7,
) -> BootstrapInterval | None:
    """Gives the relative change of the error rate of counts, as bootstrap_rate_change does."""
    return bootstrap_rate_change(Series.of(baseline), Series.of(candidate), blocks, confidence, seed)


def bootstrap_quantile(
    values: Sequence[float], quantile: float, confidence: float = 0.95, seed: int = 7
) -> BootstrapInterval:
    """Gives a quantile of values, such as the 95th percentile of latencies, with its interval.

    Raises:
        ValueError: without values.
    """
    if not values:
        raise ValueError("a quantile needs at least one value")
    known = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    size = max(1, min(REPLICATIONS, _DRAWN_AT_ONCE // len(known)))
    drawn = np.quantile(known[generator.integers(0, len(known), size=(size, len(known)))], quantile, axis=1)
    low, high = _percentiles(drawn, confidence, len(known))
    return BootstrapInterval(float(np.quantile(known, quantile)), low, high, len(known), len(known), float(drawn.std()))


def smallest_change(change: BootstrapInterval, confidence: float) -> float:
    """Gives the smallest relative change that this split would have shown in four of five repetitions.

    The interval leaves 0 out when the change is beyond z(confidence) standard errors; the measured one reaches that
    with the power asked for when the true one lies z(power) further out: 5 % standard error, 95 % -> 14 %.
    """
    normal = stats.norm
    return float((normal.ppf(0.5 + confidence / 2.0) + normal.ppf(POWER)) * change.deviation)


def _block_sums(systems: Sequence[Series], blocks: Sequence[str]) -> tuple[_Floats, _Floats]:
    """Adds up parts (systems x blocks) and wholes (blocks) by block."""
    if any(len(series.parts) != len(blocks) for series in systems):
        raise ValueError("each utterance needs its counts and its block")
    index = {name: position for position, name in enumerate(sorted(set(blocks)))}
    places = np.array([index[name] for name in blocks], dtype=np.intp)
    wholes = np.bincount(places, systems[0].wholes, len(index)).astype(np.float64)
    parts = np.stack([np.bincount(places, series.parts, len(index)) for series in systems])
    if wholes.sum() == 0:
        raise ValueError("a rate needs at least one word in the references")
    return parts.astype(np.float64), wholes


def _draw(parts: _Floats, wholes: _Floats, seed: int) -> _Floats:
    """Draws blocks with replacement; gives rates (replications x systems)."""
    generator = np.random.default_rng(seed)
    count = len(wholes)
    rates = []
    left = REPLICATIONS
    while left > 0:
        size = min(left, max(1, _DRAWN_AT_ONCE // count))
        drawn = generator.integers(0, count, size=(size, count))
        drawn_wholes = wholes[drawn].sum(axis=1)
        drawn_parts = np.stack([of_system[drawn].sum(axis=1) for of_system in parts], axis=1)
        # A draw of blocks without words has no rate; it is as good as not drawn.
        usable = drawn_wholes > 0
        rates.append(drawn_parts[usable] / drawn_wholes[usable, None])
        left -= size
    return np.concatenate(rates)


def _percentiles(values: _Floats, confidence: float, blocks: int) -> tuple[float, float]:
    tail = expanded_tail(confidence, blocks)
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)


def expanded_tail(confidence: float, blocks: int) -> float:
    """Gives the share of draws beyond each end of the interval, less than (1 - confidence) / 2 for few blocks.

    expanded_tail(0.95, 10) -> 0.0086; expanded_tail(0.95, 1000) -> 0.0248.
    """
    tail = (1.0 - confidence) / 2.0
    if blocks < 2:  # noqa: PLR2004 (one block has no spread, whatever is drawn)
        return tail
    reach = math.sqrt(blocks / (blocks - 1)) * stats.t.ppf(1.0 - tail, blocks - 1)
    return float(stats.norm.sf(reach))
