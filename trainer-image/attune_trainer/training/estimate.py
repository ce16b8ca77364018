"""What a run will take, from its first steps."""

from collections.abc import Sequence
from typing import Final

from attune.contract.result import Estimate

from attune_trainer.decimals import decimal_string

PROBE_STEPS: Final = 20
_WARM_UP_STEPS: Final = 2  # in which memory is laid out and kernels are chosen


def choose_probe(total_steps: int) -> tuple[int, int]:
    """Gives the steps after which the clock of the probe starts and ends: 100 -> (2, 20); 12 -> (2, 6).

    Where both are the same, a run is too short to be worth an estimate.
    """
    return _WARM_UP_STEPS, max(_WARM_UP_STEPS, min(PROBE_STEPS, total_steps // 2))


def extrapolate(
    work: Sequence[float],
    probe: tuple[int, int],
    probe_seconds: float,
    *,
    validations: int,
    validation_seconds: float,
    gpus: int,
    memory_bytes: int,
) -> Estimate:
    """Takes steps to cost what their padded audio does, and each validation as long as the base model's.

    The base is slower where it is padded to its window and the tuned model is not: the estimate is rather too long.
    Early stopping and a budget make it too long as well.

    Args:
        work: seconds of padded audio in each step of the run.
        probe: as choose_probe gives it.
        probe_seconds: that its steps took.
        validations: how many there will be.
        validation_seconds: that the base model's took.
        gpus: that work at the same time.
        memory_bytes: the peak so far.
    """
    first, last = probe
    seconds = probe_seconds * sum(work) / sum(work[first:last]) + validations * validation_seconds
    return Estimate(
        seconds=round(seconds), gpu_hours=decimal_string(seconds * gpus / 3600, 4), memory_bytes=memory_bytes
    )
