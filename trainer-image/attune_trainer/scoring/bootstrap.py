"""Intervals for word error rates by blockwise bootstrap (Liu and Peng, arXiv 1912.09508).

Utterances of one speaker or call err together. So whole blocks are drawn with replacement, as many as there are, and
the corpus rate is computed of each draw; the interval lies between the percentiles of these rates. Two systems that
heard the same audio are compared on the same draws, which cancels what makes some blocks hard for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attune_trainer.scoring.errors import ErrorCounts

REPLICATIONS = 4000
# Below this many speakers or groups the percentiles of their bootstrap say little (it draws the same few again and
# again); utterances are drawn instead, and the report says that the interval is about these speakers only.
FEWEST_BLOCKS = 6
# So many drawn blocks at a time: replications x blocks, 8 bytes each, once for the draw and once for what is summed.
_DRAWN_AT_ONCE = 2_000_000

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BootstrapInterval:
    """A figure of the whole corpus and the percentile interval around it.

    Attributes:
        value: of the corpus itself, not the mean over draws.
        low: lower end.
        high: upper end.
        blocks: how many independent blocks there were; an interval from a handful is too narrow.
    """

    value: float
    low: float
    high: float
    blocks: int


def choose_blocks(labels: Sequence[str]) -> tuple[list[str], bool]:
    """Gives what to draw, and whether that is single utterances because there are too few labels.

    Args:
        labels: speaker, call or group of each utterance.
    """
    if len(set(labels)) < FEWEST_BLOCKS:
        return [str(position) for position in range(len(labels))], True
    return list(labels), False


def bootstrap_wer(
    counts: Sequence[ErrorCounts], blocks: Sequence[str], confidence: float = 0.95, seed: int = 7
) -> BootstrapInterval:
    """Gives the corpus error rate with its interval.

    Args:
        counts: of each utterance.
        blocks: the speaker, call or group of each utterance, in the same order.
        confidence: share of draws inside the interval, 0 to 1.
        seed: same seed, same interval.

    Raises:
        ValueError: without reference words, or when the lengths differ.
    """
    errors, words = _block_sums([counts], blocks)
    rates = _draw(errors, words, seed)[:, 0]
    low, high = _percentiles(rates, confidence)
    return BootstrapInterval(float(errors.sum() / words.sum()), low, high, len(words))


def bootstrap_change(
    baseline: Sequence[ErrorCounts],
    candidate: Sequence[ErrorCounts],
    blocks: Sequence[str],
    confidence: float = 0.95,
    seed: int = 7,
) -> BootstrapInterval | None:
    """Gives the relative change of the error rate, candidate / baseline - 1, with its paired interval.

    -0.4 means 40 % fewer errors. None where the baseline makes no error, or none in some draws: there a relative change
    has no value.

    Args:
        baseline: counts of each utterance.
        candidate: counts of the same utterances in the same order.
        blocks: the block of each utterance.
        confidence: share of draws inside the interval.
        seed: same seed, same interval.
    """
    errors, words = _block_sums([baseline, candidate], blocks)
    sums = errors.sum(axis=1)
    if sums[0] == 0:
        return None
    rates = _draw(errors, words, seed)
    if (rates[:, 0] == 0).any():
        return None
    low, high = _percentiles(rates[:, 1] / rates[:, 0] - 1.0, confidence)
    return BootstrapInterval(float(sums[1] / sums[0] - 1.0), low, high, len(words))


def _block_sums(systems: Sequence[Sequence[ErrorCounts]], blocks: Sequence[str]) -> tuple[_Floats, _Floats]:
    """Adds up errors (systems x blocks) and words (blocks) by block."""
    if any(len(counts) != len(blocks) for counts in systems):
        raise ValueError("each utterance needs its counts and its block")
    index = {name: position for position, name in enumerate(sorted(set(blocks)))}
    places = np.array([index[name] for name in blocks], dtype=np.intp)
    words = np.bincount(places, [one.words for one in systems[0]], len(index)).astype(np.float64)
    errors = np.stack([np.bincount(places, [one.errors for one in counts], len(index)) for counts in systems])
    if words.sum() == 0:
        raise ValueError("a rate needs at least one word in the references")
    return errors.astype(np.float64), words


def _draw(errors: _Floats, words: _Floats, seed: int) -> _Floats:
    """Draws blocks with replacement; gives rates (replications x systems)."""
    generator = np.random.default_rng(seed)
    count = len(words)
    rates = []
    left = REPLICATIONS
    while left > 0:
        size = min(left, max(1, _DRAWN_AT_ONCE // count))
        drawn = generator.integers(0, count, size=(size, count))
        drawn_words = words[drawn].sum(axis=1)
        drawn_errors = np.stack([of_system[drawn].sum(axis=1) for of_system in errors], axis=1)
        # A draw of blocks without words has no rate; it is as good as not drawn.
        usable = drawn_words > 0
        rates.append(drawn_errors[usable] / drawn_words[usable, None])
        left -= size
    return np.concatenate(rates)


def _percentiles(values: _Floats, confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)
