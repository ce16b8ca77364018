"""Golden utterances go to both arms at a fixed pace, each counts once, and the counts grow in a fixed order."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Final

from attune.contract.metrics import Track

from attune_trainer.failures import StoreUnavailable
from attune_trainer.replay.arm import Arm, RequestFailedError, WrongModelError
from attune_trainer.replay.ledger import Counts, Ledger

_log = logging.getLogger(__name__)

# An arm that is slower than the pace is not piled up on.
_IN_FLIGHT: Final = 4
_ROUNDS: Final = 5
_READY_POLL_SECONDS: Final = 1.0


@dataclass(frozen=True)
class GoldenUtterance:
    """A labelled utterance as it is replayed.

    Attributes:
        id: names it in the order; holds nothing of what was said.
        reference: the normalised transcript.
        read_audio: gives the FLAC file; StoreUnavailable where it cannot be had at the moment.
    """

    id: str
    reference: str
    read_audio: Callable[[], Awaitable[bytes]]

    @property
    def words(self) -> int:
        """Number of reference words."""
        return len(self.reference.split())


@dataclass(frozen=True)
class _Turn:
    """An utterance's place in the queue, with the errors of the arms that have answered it."""

    utterance: GoldenUtterance
    rounds: int = 0
    stable_errors: int | None = None
    canary_errors: int | None = None

    def errors(self, track: Track) -> int | None:
        return self.stable_errors if track is Track.STABLE else self.canary_errors

    def answered(self, track: Track, errors: int) -> "_Turn":
        if track is Track.STABLE:
            return replace(self, stable_errors=errors)
        return replace(self, canary_errors=errors)


def fix_order(utterances: Sequence[GoldenUtterance], seed: int) -> list[GoldenUtterance]:
    """Gives each utterance once, in an order that only the set and the seed decide.

    A scorer that starts anew so replays what was replayed before, and its counts are an earlier state of the old ones.
    """
    distinct = {utterance.id: utterance for utterance in utterances}
    ordered = [distinct[key] for key in sorted(distinct)]
    random.Random(seed).shuffle(ordered)  # noqa: S311 (an order, no secret)
    return ordered


@dataclass
class Replay:
    """Replays a golden set once.

    Attributes:
        utterances: in the order of fix_order.
        arms: stable and canary.
        ledger: takes the counts.
        count_errors: (normalised reference, raw hypothesis) -> word errors, not yet capped.
        max_errors: what an utterance counts at most.
        per_minute: utterances; the pace is never made up for once it was lost.
        on_pair: told the counts after each pair.
    """

    utterances: Sequence[GoldenUtterance]
    arms: tuple[Arm, Arm]
    ledger: Ledger
    count_errors: Callable[[str, str], int]
    max_errors: int
    per_minute: int
    on_pair: Callable[[Counts], None]
    ready_poll_seconds: float = _READY_POLL_SECONDS

    async def run(self) -> None:
        """Returns when every utterance has counted: answered by both arms, or given up after several rounds.

        What an arm never answered counts as an empty transcript. Left out, it would make an arm that fails on what is
        hard to hear look better than one that tries.
        """
        self._queue = deque(_Turn(utterance) for utterance in self.utterances)
        self._pace = _Pace(60 / self.per_minute)
        await self.wait_for_arms()
        # Whoever has asked is counted in the order of asking: were it the order of answering, quick answers, which
        # tend to be the short and right ones, would be over-represented whenever the counts are read.
        in_flight: deque[asyncio.Task[_Turn]] = deque()
        try:
            while self._queue or in_flight:
                if self._queue and len(in_flight) < _IN_FLIGHT and await self._pace.is_due(until=_head(in_flight)):
                    in_flight.append(asyncio.create_task(self._ask(self._queue.popleft())))
                elif in_flight and (in_flight[0].done() or not self._queue or len(in_flight) == _IN_FLIGHT):
                    await self._commit(await in_flight.popleft())
        finally:
            for task in in_flight:
                task.cancel()
        self.ledger.exhaust()

    async def wait_for_arms(self) -> None:
        """Returns when both arms are ready and serve the models that they are to serve."""
        waited = False
        while not all(await asyncio.gather(*(arm.is_ready() for arm in self.arms))):
            if not waited:
                _log.info("waiting for both arms to be ready")
            waited = True
            await asyncio.sleep(self.ready_poll_seconds)
        if waited:
            _log.info("both arms are ready")

    async def _ask(self, turn: _Turn) -> _Turn:
        """Asks the arms that have not answered yet, both at the same time; neither, while the store is away."""
        try:
            audio = await turn.utterance.read_audio()
        except StoreUnavailable as failure:
            _log.warning("no audio; the utterance comes again later", extra={"reason": failure.reason})
            return turn
        missing = [arm for arm in self.arms if turn.errors(arm.track) is None]
        outcomes = await asyncio.gather(*(self._ask_arm(arm, turn.utterance, audio) for arm in missing))
        refused = False
        for arm, outcome in zip(missing, outcomes, strict=True):
            match outcome:
                case int():
                    turn = turn.answered(arm.track, outcome)
                case RequestFailedError():
                    refused = True
        return replace(turn, rounds=turn.rounds + 1) if refused else turn

    async def _ask_arm(
        self, arm: Arm, utterance: GoldenUtterance, audio: bytes
    ) -> int | RequestFailedError | WrongModelError:
        try:
            hypothesis = await arm.transcribe(audio, f"{utterance.id}.flac")
        except RequestFailedError as error:
            self.ledger.add_failure(arm.track)
            _log.warning("no transcript", extra={"track": arm.track.value, "problem": str(error)})
            return error
        except WrongModelError as error:
            _log.warning("another model answered; it is not counted", extra={"track": arm.track.value})
            return error
        return min(self.max_errors, self.count_errors(utterance.reference, hypothesis))

    async def _commit(self, turn: _Turn) -> None:
        if turn.rounds >= _ROUNDS:
            for track in Track:
                if turn.errors(track) is None:
                    given_up = {"utterance": turn.utterance.id, "track": track.value, "rounds": turn.rounds}
                    _log.error("utterance given up; it counts as not heard", extra=given_up)
                    turn = turn.answered(track, min(self.max_errors, turn.utterance.words))
        if turn.stable_errors is not None and turn.canary_errors is not None:
            self.on_pair(self.ledger.add_pair(turn.utterance.words, turn.stable_errors, turn.canary_errors))
            return
        self._queue.append(turn)
        # Nothing is gained by asking an arm that is away, and every question would cost its utterance a round.
        await self.wait_for_arms()


def _head(in_flight: deque[asyncio.Task[_Turn]]) -> "asyncio.Task[_Turn] | None":
    return in_flight[0] if in_flight else None


class _Pace:
    """Says when the next utterance is due; time that was lost stays lost, so a slow arm meets no burst afterwards."""

    def __init__(self, interval_seconds: float) -> None:
        self._interval = interval_seconds
        self._next = monotonic()

    async def is_due(self, until: "asyncio.Task[_Turn] | None") -> bool:
        """Waits for the next moment, or for a task to end, whichever is first; True when the moment has come."""
        delay = self._next - monotonic()
        if delay > 0:
            if until is None:
                await asyncio.sleep(delay)
            else:
                await asyncio.wait({until}, timeout=delay)
                if self._next > monotonic():
                    return False
        now = monotonic()
        self._next = self._next + self._interval if now - self._next < self._interval else now + self._interval
        return True
