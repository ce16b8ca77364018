"""The learning rate over a run."""

from typing import Final

FINAL_SHARE: Final = 0.05


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Gives the share of the peak learning rate that a step uses: a linear rise, then a linear fall to 5 %.

    learning_rate_factor(0, 100, 0.1) -> 0.1; (9, 100, 0.1) -> 1.0; (99, 100, 0.1) -> 0.05.

    Args:
        step: number of the step, from 0.
        total_steps: of the whole run.
        warmup_ratio: share of all steps in which the rate rises.
    """
    warmup = round(total_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    falling = max(1, total_steps - warmup)
    done = min(1.0, (step - warmup + 1) / falling)
    return 1.0 - (1.0 - FINAL_SHARE) * done
