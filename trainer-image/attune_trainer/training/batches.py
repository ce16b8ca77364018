"""Which utterances train together, and to which length they are padded: a pure function of seed and epoch.

Nothing is kept between epochs, so a run that resumes needs only the number of the epoch and of the step in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np

from attune_trainer.modeling.buckets import choose_bucket, next_bucket

# A model that has only heard clips which fill their bucket fails on one with a longer tail, and the other way round.
LONGER_BUCKET_SHARE: Final = 0.3


@dataclass(frozen=True)
class Batch:
    """Utterances of like length.

    Attributes:
        members: positions in the list of utterances.
        bucket: seconds that each is padded to.
    """

    members: tuple[int, ...]
    bucket: float


def plan_epoch(
    seconds: Sequence[float],
    buckets: Sequence[float],
    *,
    batch_size: int,
    max_batch_seconds: float,
    seed: int,
    epoch: int,
    processes: int = 1,
    chosen: Sequence[int] | None = None,
) -> list[tuple[Batch, ...]]:
    """Plans an epoch: one entry for each optimiser step, with one batch for each process.

    Every utterance that was chosen is used, as often as it was chosen. In a step of several processes a batch may be
    repeated, so that each has one. Audio of a batch, its padding included, is at most max_batch_seconds, unless a
    single utterance is longer; where all are padded to one window, only the audio itself counts. Three tenths of the
    batches are padded one bucket up.

    Args:
        seconds: duration of each utterance.
        buckets: durations to pad to, ascending.
        batch_size: utterances in a batch, at most.
        max_batch_seconds: audio in a batch, at most.
        seed: of everything that is drawn here.
        epoch: number of the epoch, from 0.
        processes: how many train together.
        chosen: positions of the utterances that the epoch contains; None takes each once.
    """
    positions = range(len(seconds)) if chosen is None else chosen
    draw = np.random.default_rng([seed, epoch])
    by_bucket: dict[float, list[int]] = {bucket: [] for bucket in buckets}
    for place in draw.permutation(len(positions)).tolist():
        index = positions[place]
        by_bucket[choose_bucket(seconds[index], buckets)].append(index)
    batches: list[Batch] = []
    waiting: list[int] = []
    for bucket in buckets:
        waiting += by_bucket[bucket]
        longer = any(by_bucket[other] for other in buckets if other > bucket)
        while waiting:
            padded = next_bucket(bucket, buckets) if draw.random() < LONGER_BUCKET_SHARE else bucket
            costs = [seconds[index] if len(buckets) == 1 else padded for index in waiting[:batch_size]]
            count = _count_fitting(costs, max_batch_seconds)
            if longer and count == len(waiting) < batch_size:
                break  # too few to fill a batch: they go with the next bucket's
            batches.append(Batch(tuple(waiting[:count]), padded))
            waiting = waiting[count:]
    # Processes wait for the slowest, so those of one step get batches of like cost.
    batches.sort(key=lambda batch: (batch.bucket * len(batch.members), batch.members))
    batches += batches[: -len(batches) % processes] if len(batches) >= processes else []
    while len(batches) % processes:
        batches.append(batches[0])
    steps = [tuple(batches[start : start + processes]) for start in range(0, len(batches), processes)]
    return [steps[index] for index in draw.permutation(len(steps)).tolist()]


def _count_fitting(costs: Sequence[float], limit: float) -> int:
    """Counts how many of the first costs stay within a limit together; at least 1."""
    return max(1, sum(spent <= limit for spent in accumulate(costs)))
