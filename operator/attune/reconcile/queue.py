"""The keys that are waiting to be looked at: each at most once, never twice at the same time."""

import asyncio
import time
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Key:
    """Names a custom resource."""

    kind: str
    namespace: str
    name: str


class WorkQueue:
    """Hands out keys, coalesced: however often a key is woken while it waits, it is handed out once.

    A key that is woken while it is being worked on is handed out again afterwards, never to two workers at once.
    Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._waiting: dict[Key, float] = {}  # in _ready, since when (monotonic)
        self._working: set[Key] = set()
        self._woken: set[Key] = set()  # woken while worked on
        self._timers: dict[Key, tuple[float, asyncio.TimerHandle]] = {}

    def wake(self, key: Key, after: float = 0.0) -> None:
        """Makes a key due after so many seconds; of several times the earliest counts."""
        if after > 0:
            self._wake_later(key, after)
        elif key in self._working:
            self._woken.add(key)
        elif key not in self._waiting:
            self._cancel_timer(key)
            self._waiting[key] = time.monotonic()
            self._ready.put_nowait(key)

    def _wake_later(self, key: Key, after: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + after
        timer = self._timers.get(key)
        if timer is not None and timer[0] <= due:
            return
        self._cancel_timer(key)
        self._timers[key] = (due, loop.call_at(due, self._fire, key))

    def _fire(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.wake(key)

    def _cancel_timer(self, key: Key) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer[1].cancel()

    async def take(self) -> Key:
        """Waits for a due key and hands it out. done() must follow."""
        key = await self._ready.get()
        del self._waiting[key]
        self._working.add(key)
        # What is looked at now needs no later look that was asked for before.
        self._cancel_timer(key)
        return key

    def done(self, key: Key) -> None:
        """Ends the work on a key; it is due again at once when it was woken meanwhile."""
        self._working.discard(key)
        if key in self._woken:
            self._woken.discard(key)
            self.wake(key)

    @property
    def depth(self) -> int:
        """How many keys are due now."""
        return len(self._waiting)

    def oldest_seconds(self) -> float:
        """How long the key that has waited longest has been due; 0 when none is."""
        return time.monotonic() - min(self._waiting.values()) if self._waiting else 0.0
