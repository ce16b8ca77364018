"""Works through the queue: a bounded number of passes at a time, each in a thread, none twice for one key."""

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TypeVar

from attune.adapters.cluster import CUSTOM, Cluster
from attune.errors import AttuneError, NotLeader
from attune.reconcile.boundary import Outcome, reconcile
from attune.reconcile.queue import Key, WorkQueue
from attune.settings import Settings
from attune.telemetry import Metrics

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Controller:
    """Keeps every custom resource on its way: woken by events, by its own plans, and by a re-sync.

    Nothing in here outlives the process or has to: each pass reads anew whatever it decides on.
    """

    def __init__(self, cluster: Cluster, settings: Settings, metrics: Metrics) -> None:
        self._cluster = cluster
        self._settings = settings
        self._metrics = metrics
        self.queue = WorkQueue()
        self._failures: dict[Key, int] = {}
        self._references: dict[Key, frozenset[Key]] = {}
        self._last_pass = time.monotonic()
        metrics.depth.set_function(lambda: self.queue.depth)
        metrics.oldest.set_function(self.queue.oldest_seconds)

    def wake(self, key: Key) -> None:
        """Something about this resource, or one of its children, has changed."""
        self.queue.wake(key)

    def wake_referrers(self, key: Key) -> None:
        """A resource has changed: those that refer to it may go on."""
        for referrer, references in list(self._references.items()):
            if key in references:
                self.queue.wake(referrer)

    async def run(self) -> None:
        """Works until cancelled.

        Raises:
            NotLeader: when the Lease has run out; nothing may be written any more.
        """
        executor = ThreadPoolExecutor(self._settings.workers, thread_name_prefix="reconcile")
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._settings.workers):
                    group.create_task(self._work(executor))
                group.create_task(self._resync(executor))
        except BaseExceptionGroup as errors:
            lost = errors.subgroup(NotLeader)
            if lost is not None:
                raise NotLeader("the Lease has run out") from errors
            raise
        finally:
            # Passes that are in the middle of a write end it first: the Lease is given back only after this.
            executor.shutdown(wait=False, cancel_futures=True)
            await asyncio.get_running_loop().run_in_executor(None, functools.partial(executor.shutdown, wait=True))

    def is_stuck(self, seconds: float) -> bool:
        """Tells whether keys have been due for so long without any pass coming to an end."""
        return self.queue.oldest_seconds() > seconds and time.monotonic() - self._last_pass > seconds

    async def _work(self, executor: ThreadPoolExecutor) -> None:
        while True:
            key = await self.queue.take()
            try:
                await self._pass(key, executor)
            finally:
                self.queue.done(key)

    async def _pass(self, key: Key, executor: ThreadPoolExecutor) -> None:
        now = datetime.now(UTC).replace(microsecond=0)
        began = time.monotonic()
        outcome = await self._call(
            executor,
            functools.partial(
                reconcile,
                self._cluster,
                self._settings,
                key,
                now,
                self._failures.get(key, 0),
                functools.partial(self._references.__setitem__, key),
            ),
        )
        self._last_pass = time.monotonic()
        self._metrics.duration.labels(key.kind).observe(self._last_pass - began)
        self._account(key, outcome)
        if outcome.look_again_seconds is not None:
            # 0 means at once; a key that is worked on is handed out again as soon as this pass is done.
            self.queue.wake(key, outcome.look_again_seconds)

    def _account(self, key: Key, outcome: Outcome) -> None:
        self._metrics.reconciles.labels(key.kind, outcome.result).inc()
        for ended in outcome.ended_rollouts:
            self._metrics.rollouts.labels(ended).inc()
        if outcome.error is None:
            self._failures.pop(key, None)
        else:
            self._failures[key] = self._failures.get(key, 0) + 1
            self._metrics.errors.labels(key.kind, outcome.error).inc()
        if outcome.result == "gone":
            self._references.pop(key, None)

    async def _resync(self, executor: ThreadPoolExecutor) -> None:
        """Wakes every resource now and then: whatever event was lost, its effect is not lost for longer."""
        while True:
            try:
                for key in await self._call(executor, self._list_keys):
                    self.queue.wake(key)
                pause = float(self._settings.resync_seconds)
            except NotLeader:
                raise
            except AttuneError as error:
                _log.warning("re-sync failed", extra={"error": str(error)})
                pause = min(10.0, self._settings.resync_seconds)
            await asyncio.sleep(pause)

    def _list_keys(self) -> list[Key]:
        namespaces: tuple[str | None, ...] = self._settings.watch_namespaces or (None,)
        return [
            Key(kind, body["metadata"]["namespace"], body["metadata"]["name"])
            for kind, served in CUSTOM.items()
            for namespace in namespaces
            for body in self._cluster.list(served, namespace)
        ]

    async def _call(self, executor: ThreadPoolExecutor, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(executor, call)
