"""Features and tokens of the coming batches, made while the current one trains."""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import soundfile
import torch
from torch import Tensor

from attune_trainer.augmentation.augmenter import Augmenter
from attune_trainer.failures import InvalidInput
from attune_trainer.modeling.speech_model import SpeechModel, TokenBatch
from attune_trainer.training.batches import Batch
from attune_trainer.training.settings import TrainingUtterance
from attune_trainer.training.transcripts import TranscriptEncoder

_AHEAD: Final = 4


@dataclass(frozen=True)
class TrainingBatch:
    """What one process works on at a time: a step's work, or a part of it where gradients accumulate.

    Attributes:
        features: what the network hears, shape (utterances, ...).
        tokens: what it reads, and what it is to say.
        lengths: samples of each utterance, without padding.
        bucket: seconds that each utterance is padded to.
    """

    features: Tensor
    tokens: TokenBatch
    lengths: Tensor
    bucket: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, inputs, targets and lengths: what the loss takes."""
        return self.features, self.tokens.inputs, self.tokens.targets, self.lengths


class BatchLoader:
    """Loads batches in a thread of its own, a few ahead, and gives them in order.

    Which batches there are is given from outside, and what an augmenter draws depends on the utterance alone, so the
    thread cannot change a run's course.
    """

    def __init__(
        self,
        speech_model: SpeechModel,
        encoder: TranscriptEncoder,
        utterances: Sequence[TrainingUtterance],
        batches: Sequence[Batch],
        augmenter: Augmenter | None = None,
    ) -> None:
        self._speech_model = speech_model
        self._encoder = encoder
        self._utterances = utterances
        self._batches = batches
        self._augmenter = augmenter
        self._queue: queue.Queue[TrainingBatch | BaseException] = queue.Queue(maxsize=_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[TrainingBatch]:
        """Yields every batch; an error of the thread is raised here."""
        for _ in self._batches:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join()

    def _fill(self) -> None:
        for batch in self._batches:
            try:
                item: TrainingBatch | BaseException = self._load(batch)
            except Exception as error:  # noqa: BLE001 (whatever it is, the training thread is to raise it)
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or isinstance(item, BaseException):
                return

    def _load(self, batch: Batch) -> TrainingBatch:
        members = [self._utterances[index] for index in batch.members]
        audio = [read_samples(one) for one in members]
        if self._augmenter is not None:
            audio = [self._augmenter.hear(*one) for one in zip(batch.members, audio, strict=True)]
        transcripts = [self._encoder.encode(one.text) for one in members]
        tokens = self._encoder.batch([ids for ids in transcripts if ids is not None])
        features = self._speech_model.features(audio, batch.bucket)
        if self._augmenter is not None:
            self._mask(features, batch, self._augmenter, [len(samples) for samples in audio])
        lengths = self._speech_model.lengths(audio, batch.bucket)
        return TrainingBatch(features=features, tokens=tokens, lengths=lengths, bucket=batch.bucket)

    def _mask(self, features: Tensor, batch: Batch, augmenter: Augmenter, samples: Sequence[int]) -> None:
        """Blanks out parts of log-mel features, in place; samples have none."""
        if self._speech_model.reads_samples:
            return
        log_mel = self._speech_model.log_mel(features)
        for row, position in enumerate(batch.members):
            log_mel[row] = torch.from_numpy(augmenter.mask(position, log_mel[row].numpy(), samples[row]))


def read_samples(utterance: TrainingUtterance):  # type: ignore[no-untyped-def]  # noqa: ANN201
    """Reads an utterance's samples: float32, shape (samples,)."""
    try:
        samples, _ = soundfile.read(utterance.audio, dtype="float32")
    except soundfile.LibsndfileError as error:
        message = "a file of the prepared Dataset cannot be decoded; prepare the Dataset again"
        raise InvalidInput("AudioDamaged", message) from error
    return samples
