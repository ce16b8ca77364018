"""How a run went, in bounded room: loss by step, and what each validation gave."""

from collections.abc import Mapping
from typing import Final

from pydantic import BaseModel, ConfigDict

MOST_POINTS: Final = 512  # even: they are joined in pairs


class Validation(BaseModel):
    """One look at the validation split.

    Attributes:
        epoch: passes over the data done, with fraction.
        step: optimiser steps done.
        metrics: figures by name, such as wer; rates are fractions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: float
    step: int
    metrics: dict[str, float]


class Course(BaseModel):
    """Losses and validations so far; part of a run's checkpoints, so that a resumed run has one curve.

    Attributes:
        stride: steps that each loss is the mean of; it doubles when there are too many points.
        losses: mean losses, in order; the last point's step is their number times the stride.
        waiting_loss: sum of the losses that make no whole point yet.
        waiting_steps: how many they are.
        validations: in order; the first is of the base model, then there is at most one for each epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stride: int = 1
    losses: tuple[float, ...] = ()
    waiting_loss: float = 0.0
    waiting_steps: int = 0
    validations: tuple[Validation, ...] = ()

    def with_loss(self, loss: float) -> "Course":
        """Adds the loss of the next step."""
        waiting_loss, waiting_steps = self.waiting_loss + loss, self.waiting_steps + 1
        if waiting_steps < self.stride:
            return self.model_copy(update={"waiting_loss": waiting_loss, "waiting_steps": waiting_steps})
        losses, stride = (*self.losses, waiting_loss / waiting_steps), self.stride
        if len(losses) == MOST_POINTS:
            losses = tuple((one + other) / 2 for one, other in zip(losses[::2], losses[1::2], strict=True))
            stride *= 2
        return self.model_copy(update={"stride": stride, "losses": losses, "waiting_loss": 0.0, "waiting_steps": 0})

    def with_validation(self, epoch: float, step: int, metrics: Mapping[str, float]) -> "Course":
        """Adds what a validation gave."""
        validation = Validation(epoch=epoch, step=step, metrics=dict(metrics))
        return self.model_copy(update={"validations": (*self.validations, validation)})

    def steps(self) -> list[int]:
        """Gives the last step of each loss."""
        return [self.stride * (number + 1) for number in range(len(self.losses))]
