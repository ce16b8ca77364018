"""Which utterances an epoch contains where Datasets are weighted, or an old domain is replayed: pure and seeded.

Nothing is kept between epochs, so a run that resumes needs only the number of the epoch.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

import numpy as np
from pydantic import BaseModel, ConfigDict

_UNITS: Final = 1000  # milliseconds: whole numbers add up to the same on every machine
# Which of a run's draws this is; batches draw from [seed, epoch].
_STREAM: Final = 1


class Mixture(BaseModel):
    """What an epoch is mixed from. Its parts are the Datasets, in order, and after them the old domain's, if replayed.

    Attributes:
        weights: what the share of each Dataset is multiplied by.
        temperature: 1 shares by size; the higher, the more alike are the shares.
        replay: share of an epoch's audio that the old domain gets; 0 where nothing is replayed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: tuple[float, ...]
    temperature: float = 1.0
    replay: float = 0.0


def plan_shares(sizes: Sequence[float], mixture: Mixture) -> list[float]:
    """Gives each part's share of an epoch's audio; shares sum to 1.

    A Dataset's share goes by weight x size^(1 / temperature), as in training on many languages (Arivazhagan et al.
    2019, arXiv 1907.05019). Sizes 300 and 100 -> 0.75 and 0.25; with temperature 100 as good as 0.5 each; with weights
    1 and 3 also 0.5 each. Replay of 0.2 leaves them 0.8 of that.

    Args:
        sizes: of each Dataset, in any unit; the old domain's is not needed.
        mixture: as the FineTune asks for.
    """
    pulls = [
        weight * (size / max(sizes)) ** (1 / mixture.temperature) if size else 0.0
        for size, weight in zip(sizes, mixture.weights, strict=True)
    ]
    shares = [(1 - mixture.replay) * pull / sum(pulls) for pull in pulls]
    return [*shares, mixture.replay] if mixture.replay else shares


def choose_utterances(
    seconds: Sequence[float], parts: Sequence[int], mixture: Mixture, *, seed: int, epoch: int
) -> list[int]:
    """Chooses an epoch's utterances: positions in ascending order, one that is used n times n times.

    Without replay an epoch is as long as all Datasets together; replay is added to that, so that new audio loses
    nothing. A part whose share is less than its audio is heard in turns, one that has more is repeated: each is read as
    one endless line of passes, every pass in an order of its own, of which an epoch takes the next stretch. So over any
    number of epochs the uses of two utterances of a part differ by at most 1, and a part's seconds in an epoch are
    exact up to one utterance. Equal shares of everything give every utterance exactly once.

    Args:
        seconds: duration of each utterance.
        parts: the part that each belongs to, numbered as Mixture says.
        mixture: as the FineTune asks for.
        seed: of the order of each pass.
        epoch: number of the epoch, from 0.
    """
    members: list[list[int]] = [[] for _ in range(len(mixture.weights) + bool(mixture.replay))]
    for index, part in enumerate(parts):
        members[part].append(index)
    lengths = [max(1, round(_UNITS * one)) for one in seconds]
    sizes = [sum(lengths[index] for index in part) for part in members]
    datasets = sizes[: len(mixture.weights)]
    whole = sum(datasets) / (1 - mixture.replay)
    chosen: list[int] = []
    for number, share in enumerate(plan_shares(datasets, mixture)):
        if not members[number]:
            continue
        quota = max(1, round(share * whole))
        chosen += _take(members[number], lengths, seed=(seed, _STREAM, number), first=epoch * quota, count=quota)
    return sorted(chosen)


def _take(
    members: Sequence[int], lengths: Sequence[int], *, seed: tuple[int, ...], first: int, count: int
) -> Iterator[int]:
    """Yields the utterances that begin in a stretch of the endless line."""
    size = sum(lengths[index] for index in members)
    for number in range(first // size, -(-(first + count) // size)):
        order = [members[place] for place in np.random.default_rng([*seed, number]).permutation(len(members))]
        ends = accumulate(lengths[index] for index in order)
        for index, end in zip(order, ends, strict=True):
            if first <= number * size + end - lengths[index] < first + count:
                yield index


def draw_sample(seconds: Sequence[float], wanted: float, *, seed: int) -> list[int]:
    """Draws utterances until they last as long as is wanted; gives positions in the order drawn, all where too few.

    A longer sample begins with the shorter one of the same seed.
    """
    drawn: list[int] = []
    total = 0.0
    for index in np.random.default_rng([seed, _STREAM]).permutation(len(seconds)).tolist():
        if total >= wanted:
            break
        drawn.append(index)
        total += seconds[index]
    return drawn
