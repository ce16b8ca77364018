"""Requests that wait at the same time are transcribed together, by one worker thread, out of a bounded queue."""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Final, Protocol

from attune_trainer.serving.audio import SAMPLE_RATE, Samples

# Clips within this factor of each other's length are batched: a long one would keep the short ones' answers back.
_LIKE_LENGTH: Final = 2.0
_LIKE_ANYWAY_SECONDS: Final = 2.0
# Background work gives way to clients', but not for ever; and its batches are small, because who comes next waits for
# the one that is under way.
_PATIENCE_SECONDS: Final = 10.0
_BACKGROUND_SHARE: Final = 0.25


class OverloadedError(Exception):
    """No room for another request; it may be sent again after retry_after_seconds."""

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__(f"overloaded, try again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


class BatchObserver(Protocol):
    """Is told what the batcher does; the metrics implement it."""

    def observe_batch(self, utterances: int, audio_seconds: float, busy_seconds: float) -> None:
        """One batch has been transcribed in busy_seconds."""

    def observe_queue(self, utterances: int, audio_seconds: float) -> None:
        """The queue now holds this much."""

    def observe_requests(self, accepted: int) -> None:
        """So many requests are accepted and not yet answered."""


@dataclass(frozen=True)
class BatchLimits:
    """Bounds on a batch and on what may wait for one."""

    max_utterances: int  # in a batch
    max_seconds: float  # in a batch, as padded for the model
    max_wait_seconds: float  # for requests that are on their way, before a batch starts without them
    max_requests: int  # accepted and not yet answered
    max_waiting_seconds: float  # of audio in the queue


@dataclass(eq=False)
class Waiting:
    """An utterance in the queue and the future that its request awaits."""

    samples: Samples
    language: str | None
    text: asyncio.Future[str]
    background: bool = False
    since: float = field(default_factory=monotonic)

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return len(self.samples) / SAMPLE_RATE

    @property
    def gives_way(self) -> bool:
        """Whether others go first."""
        return self.background and monotonic() - self.since < _PATIENCE_SECONDS


def choose_batch(seconds: Sequence[float], limits: BatchLimits, languages: Sequence[str | None]) -> list[int]:
    """Chooses which of the waiting utterances are transcribed next, as indices into seconds (oldest first).

    The oldest always goes, so none starves; with it go those of its language and of like length, nearest first,
    because those take about as long: [3, 25, 4, 3.1] and room for 2 -> [0, 3]. The batch costs its number times its
    longest, and stays within limits.max_seconds: four of 30 s fit in 120 s.
    """
    oldest = max(seconds[0], _LIKE_ANYWAY_SECONDS)
    distances = {
        index: max(oldest, length) / min(oldest, length)
        for index, length in enumerate(max(value, _LIKE_ANYWAY_SECONDS) for value in seconds)
        if index and languages[index] == languages[0]
    }
    chosen, longest = [0], seconds[0]
    for index in sorted(distances, key=lambda index: (distances[index], index)):
        longest = max(longest, seconds[index])
        if (
            distances[index] > _LIKE_LENGTH
            or len(chosen) >= limits.max_utterances
            or (len(chosen) + 1) * longest > limits.max_seconds
        ):
            break
        chosen.append(index)
    return sorted(chosen)


@dataclass
class Batcher:
    """Turns concurrent calls of transcribe() into batches. All methods belong to the event loop's thread.

    Attributes:
        recognise: samples and their language -> texts, in the same order; runs on the worker, one call at a time.
        padded_seconds: length of a clip -> what the model makes of it: 30 for every clip that is padded to the window.
        worker: an executor with a single thread.
    """

    recognise: Callable[[list[Samples], str | None], list[str]]
    padded_seconds: Callable[[float], float]
    worker: Executor
    limits: BatchLimits
    observer: BatchObserver
    _queue: list[Waiting] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _requests: int = 0
    _on_their_way: int = 0
    _audio_seconds: float = 0.0  # transcribed so far, and the time that it took
    _busy_seconds: float = 0.0

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Holds a place for a request from its first byte to its answer.

        Raises:
            OverloadedError: when max_requests hold one already.
        """
        if self._requests >= self.limits.max_requests:
            raise OverloadedError(self._retry_after_seconds())
        self._requests += 1
        self.observer.observe_requests(self._requests)
        try:
            yield
        finally:
            self._requests -= 1
            self.observer.observe_requests(self._requests)

    @contextmanager
    def announce(self) -> Iterator[None]:
        """Says that an utterance is on its way (uploading, decoding), which a batch may wait for a moment."""
        self._on_their_way += 1
        try:
            yield
        finally:
            self._on_their_way -= 1
            self._changed.set()

    def transcribe(
        self, samples: Samples, language: str | None = None, *, background: bool = False
    ) -> asyncio.Future[str]:
        """Puts an utterance in the queue at once and gives its text to come. To cancel that takes it out again.

        The future fails with what the recogniser raised for this utterance alone.

        Args:
            samples: float32 at 16 kHz.
            language: what the model is told; None leaves it to the model.
            background: others go first, for a few seconds.

        Raises:
            OverloadedError: when the queue already holds max_waiting_seconds of audio.
        """
        item = Waiting(samples, language, asyncio.get_running_loop().create_future(), background)
        queued = sum(other.seconds for other in self._queue)
        if self._queue and queued + item.seconds > self.limits.max_waiting_seconds:
            raise OverloadedError(self._retry_after_seconds())
        self._queue.append(item)
        self._report_queue()
        self._changed.set()
        item.text.add_done_callback(lambda _: self._leave(item))
        return item.text

    def _leave(self, item: Waiting) -> None:
        if item in self._queue:
            self._queue.remove(item)
            self._report_queue()

    async def run(self) -> None:
        """Transcribes batches until cancelled."""
        while True:
            await self._wait_for_batch()
            if not self._queue:
                continue
            batch = self._next_batch()
            self._queue = [item for item in self._queue if item not in batch]
            self._report_queue()
            await self._transcribe_batch(batch)

    def _next_batch(self) -> list[Waiting]:
        candidates, limits = [item for item in self._queue if not item.gives_way], self.limits
        if not candidates:
            candidates = self._queue
            limits = replace(limits, max_seconds=limits.max_seconds * _BACKGROUND_SHARE)
        chosen = choose_batch(
            [self.padded_seconds(item.seconds) for item in candidates], limits, [item.language for item in candidates]
        )
        return [candidates[index] for index in chosen]

    async def _wait_for_batch(self) -> None:
        """Returns when something waits, and then nothing more is on its way, or the batch is full, or time is up."""
        while not self._queue:
            await self._wait_for_change(None)
        deadline = monotonic() + self.limits.max_wait_seconds
        while self._queue and self._on_their_way and len(self._queue) < self.limits.max_utterances:
            remaining = deadline - monotonic()
            if remaining <= 0:
                return
            await self._wait_for_change(remaining)

    async def _wait_for_change(self, timeout_seconds: float | None) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _transcribe_batch(self, batch: list[Waiting]) -> None:
        try:
            texts = await self._recognise(batch)
        except Exception as error:  # noqa: BLE001 (whatever the model raises belongs to the request that caused it)
            if len(batch) == 1:
                _settle(batch[0], error)
                return
        else:
            for item, text in zip(batch, texts, strict=True):
                _settle(item, text)
            return
        # One bad utterance, or too little memory for so many: alone, each gets its own answer. The exception is gone by
        # now, and with it the tensors that its traceback holds.
        for item in batch:
            if not item.text.done():
                await self._transcribe_batch([item])

    async def _recognise(self, batch: list[Waiting]) -> list[str]:
        started = monotonic()
        samples = [item.samples for item in batch]
        texts = await asyncio.get_running_loop().run_in_executor(
            self.worker, self.recognise, samples, batch[0].language
        )
        if len(texts) != len(batch):
            raise RuntimeError(f"{len(batch)} utterances gave {len(texts)} texts")
        audio, busy = sum(item.seconds for item in batch), monotonic() - started
        self._audio_seconds += audio
        self._busy_seconds += busy
        self.observer.observe_batch(len(batch), audio, busy)
        return texts

    def _retry_after_seconds(self) -> int:
        """Estimates when what waits now will be done, from the speed so far; between 1 and 60 s."""
        speed = self._busy_seconds / self._audio_seconds if self._audio_seconds else 1.0
        waiting = sum(item.seconds for item in self._queue)
        return max(1, min(60, math.ceil(waiting * speed)))

    def _report_queue(self) -> None:
        self.observer.observe_queue(len(self._queue), sum(item.seconds for item in self._queue))


def _settle(item: Waiting, outcome: str | Exception) -> None:
    if item.text.done():  # the client went away
        return
    if isinstance(outcome, Exception):
        item.text.set_exception(outcome)
    else:
        item.text.set_result(outcome)
