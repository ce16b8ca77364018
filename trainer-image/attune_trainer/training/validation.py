"""Word errors of a model on what it is validated on, counted by all processes together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from attune_trainer.failures import InvalidInput
from attune_trainer.modeling.recognizer import Recognizer
from attune_trainer.scoring.errors import ErrorCounts, count_errors, total
from attune_trainer.scoring.normaliser import normalise
from attune_trainer.training.checkpoints import Counts
from attune_trainer.training.loader import read_samples
from attune_trainer.training.settings import TrainingSettings, TrainingUtterance

_CHUNK: Final = 16  # utterances between two looks at the stop flag


@dataclass(frozen=True)
class Measured:
    """What a validation gave.

    Attributes:
        metrics: corpus word error rates as fractions: wer and, where an old domain is kept, oldWer.
        counts: word errors in each utterance of the validation split.
    """

    metrics: dict[str, float]
    counts: Counts


class Validator:
    """Transcribes the validation split and, where an old domain is kept, that one's too."""

    def __init__(
        self,
        settings: TrainingSettings,
        device: torch.device,
        *,
        rank: int,
        processes: int,
        raise_if_stopped: Callable[[], None],
        report: Callable[[float], None],
    ) -> None:
        """Fixes what is transcribed, and by whom.

        Args:
            settings: of the run.
            device: on which processes share what they counted.
            rank: of this process.
            processes: how many there are.
            raise_if_stopped: called now and then, by all processes at the same points.
            report: told the percentage that is done.
        """
        self._settings = settings
        self._device = device
        self._rank = rank
        self._processes = processes
        self._raise_if_stopped = raise_if_stopped
        self._report = report

    def measure(self, recognizer: Recognizer, percent: tuple[float, float]) -> Measured:
        """Measures a model as it is served; all processes have to call this at the same point.

        Args:
            recognizer: transcribes.
            percent: how far the run is when this begins, and when it ends.

        Raises:
            InvalidInput: NoValidationWords.
        """
        new, keeping, (low, high) = self._settings.validation, self._settings.keeping, percent
        old = keeping.validation if keeping is not None else ()
        between = low + (high - low) * len(new) / (len(new) + len(old))
        counts = self._count(recognizer, new, (low, between))
        metrics = {"wer": total(counts).rate}
        if old:
            metrics["oldWer"] = total(self._count(recognizer, old, (between, high))).rate
        return Measured(metrics, tuple(one.row for one in counts))

    def _count(
        self, recognizer: Recognizer, utterances: Sequence[TrainingUtterance], percent: tuple[float, float]
    ) -> list[ErrorCounts]:
        language, (low, high) = self._settings.language, percent
        order = sorted(range(len(utterances)), key=lambda index: utterances[index].seconds)
        mine = order[self._rank :: self._processes]
        rows: list[Sequence[int]] = [(0, 0, 0, 0)] * len(utterances)
        # Of the largest share, so that all processes ask each other equally often.
        share = -(-len(utterances) // self._processes)
        for start in range(0, share, _CHUNK):
            self._raise_if_stopped()
            chunk = mine[start : start + _CHUNK]
            texts = recognizer.transcribe([read_samples(utterances[index]) for index in chunk])
            for index, text in zip(chunk, texts, strict=True):
                rows[index] = count_errors(normalise(utterances[index].text, language), normalise(text, language)).row
            self._report(low + (high - low) * (start + len(chunk)) / share)
        if self._processes > 1:
            shared = torch.tensor(rows, device=self._device)
            torch.distributed.all_reduce(shared)
            rows = shared.tolist()
        counts = [ErrorCounts.from_row(row) for row in rows]
        if not total(counts).words:
            message = "a validation split has no words to count errors on; give the Dataset more transcribed audio"
            raise InvalidInput("NoValidationWords", message)
        return counts
