"""What each epoch of a run hears: which utterances, how they sound, and in which batches they train."""

from collections.abc import Sequence

from attune.contract.training import Augmentation

from attune_trainer.augmentation.augmenter import Augmenter
from attune_trainer.failures import InvalidInput
from attune_trainer.modeling.speech_model import SpeechModel
from attune_trainer.training.batches import Batch, plan_epoch
from attune_trainer.training.loader import read_samples
from attune_trainer.training.mixture import choose_utterances
from attune_trainer.training.settings import TrainingSettings, TrainingUtterance


def check_augmentation(wanted: Augmentation | None, speech_model: SpeechModel) -> None:
    """Lets pass what can be done to the audio of a model.

    Raises:
        InvalidInput: AugmentationUnsupported.
    """
    if wanted is not None and wanted.spec_augment is not None and speech_model.reads_samples:
        message = (
            "spec.augmentation.specAugment blanks out parts of log-mel features, but the base model hears samples "
            f"({type(speech_model.model).__name__}); leave it out, the other augmentations work"
        )
        raise InvalidInput("AugmentationUnsupported", message)


class Epochs:
    """All epochs of a run, planned ahead: every process plans the same, and so does a run that goes on.

    Attributes:
        plans: of each epoch, one entry for each optimiser step.
        steps: optimiser steps of the whole run.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        utterances: Sequence[TrainingUtterance],
        buckets: Sequence[float],
        *,
        window_seconds: float,
        batches: int,
    ) -> None:
        """Plans.

        Args:
            settings: of the run.
            utterances: that it trains on.
            buckets: durations to pad to, ascending.
            window_seconds: what the model takes in one pass.
            batches: that make an optimiser step, of all processes together.
        """
        self._settings = settings
        self._utterances = utterances
        self._recorded = [one.seconds for one in utterances]
        self._buckets = buckets
        self._window_seconds = window_seconds
        self._batches = batches
        self.plans = [self._plan(epoch) for epoch in range(settings.hyperparameters.epochs)]
        self.steps = sum(map(len, self.plans))

    def work(self) -> list[float]:
        """Gives the seconds of audio in each step of the run, its padding included."""
        return [sum(len(batch.members) * batch.bucket for batch in step) for plan in self.plans for step in plan]

    def done(self, steps: int) -> float:
        """Gives how many passes over the data so many steps are, with fraction."""
        left = steps
        for number, plan in enumerate(self.plans):
            if left < len(plan):
                return number + left / len(plan)
            left -= len(plan)
        return float(len(self.plans))

    def augmenter(self, epoch: int) -> Augmenter | None:
        """Gives what changes the utterances in an epoch; None where they are heard as they were recorded."""
        settings = self._settings
        if settings.augmentation is None:
            return None
        return Augmenter(
            settings.augmentation,
            self._recorded,
            lambda position: read_samples(self._utterances[position]),
            seed=settings.hyperparameters.seed,
            epoch=epoch,
            window_seconds=self._window_seconds,
            noises=settings.noises,
            rooms=settings.rooms,
        )

    def seconds(self, augmenter: Augmenter | None) -> list[float]:
        """Gives each utterance's duration as it is heard: an augmenter may change its speed."""
        return self._recorded if augmenter is None else augmenter.seconds

    def _plan(self, epoch: int) -> list[tuple[Batch, ...]]:
        parameters = self._settings.hyperparameters
        return plan_epoch(
            self.seconds(self.augmenter(epoch)),
            self._buckets,
            batch_size=parameters.batch_size,
            max_batch_seconds=parameters.max_batch_seconds,
            seed=parameters.seed,
            epoch=epoch,
            processes=self._batches,
            chosen=self._choose(epoch),
        )

    def _choose(self, epoch: int) -> list[int] | None:
        """Gives the utterances of an epoch; None takes each once.

        Shares are of what was recorded: a mixture's utterances take turns over the epochs, and could not if their
        durations changed from one to the next.
        """
        settings = self._settings
        if settings.mixture is None:
            return None
        return choose_utterances(
            self._recorded,
            [one.part for one in self._utterances],
            settings.mixture,
            seed=settings.hyperparameters.seed,
            epoch=epoch,
        )
