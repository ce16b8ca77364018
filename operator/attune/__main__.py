"""`python -m attune`: runs the operator, in a pod with its ServiceAccount, elsewhere with KUBECONFIG."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from typing import Final

import kopf

from attune import __version__
from attune.adapters.cluster import CUSTOM, Cluster
from attune.adapters.lease import Lease
from attune.errors import AttuneError, Refused, Unavailable
from attune.handlers.watch import CHILDREN, build_kopf_settings, build_registry
from attune.probes import ProbeServer
from attune.reconcile.loop import Controller
from attune.settings import Settings, SettingsError
from attune.telemetry import Metrics, configure_logging

_log = logging.getLogger("attune")

_STUCK_SECONDS: Final = 120.0
_HEARTBEAT_SECONDS: Final = 30.0
_WAIT_SECONDS: Final = 2.0


class Operator:
    """One process: waits for its CRDs and for the Lease, then watches and works until it is told to stop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._stop = asyncio.Event()
        self._beat = time.monotonic()
        self._controller: Controller | None = None
        self._waiting_for: str | None = "starting"
        plain = Cluster.connect(request_seconds=settings.lease_seconds / 3, workers=1)
        self._plain = plain
        self._lease = Lease(
            plain,
            settings.lease_namespace,
            settings.lease_name,
            settings.identity or f"{socket.gethostname()}-{os.getpid()}",
            seconds=settings.lease_seconds,
        )

    async def run(self) -> int:
        """Gives the process's exit status: 0 after a signal, 1 when leadership or the watch was lost."""
        probes = ProbeServer(
            self._settings.http_host,
            self._settings.http_port,
            self._metrics.registry,
            self._find_trouble,
            lambda: self._waiting_for,
        )
        self._handle_signals()
        beat = asyncio.create_task(self._keep_beating())
        _log.info("operator starts", extra={"version": __version__, "port": probes.port})
        try:
            if not await self._wait_for_kinds() or not await self._wait_for_lease():
                return 0
            return await self._lead()
        finally:
            beat.cancel()
            await asyncio.to_thread(self._lease.release)
            self._metrics.leader.set(0)
            probes.close()
            _log.info("operator ends")

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)

    def _find_trouble(self) -> str | None:
        silence = time.monotonic() - self._beat
        if silence > _HEARTBEAT_SECONDS:
            return f"the event loop has been busy for {silence:.0f} s"
        if self._controller is not None and self._controller.is_stuck(_STUCK_SECONDS):
            return f"nothing has been worked on for {_STUCK_SECONDS:.0f} s, and something is due"
        return None

    async def _keep_beating(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(1)

    async def _wait_for_kinds(self) -> bool:
        """Waits until the API server serves the four kinds; False when told to stop."""
        while not self._stop.is_set():
            try:
                missing = await asyncio.to_thread(
                    lambda: [kind for kind, one in CUSTOM.items() if not self._plain.is_served(one)]
                )
            except (Unavailable, Refused) as error:
                self._say(str(error))
            else:
                if not missing:
                    return True
                self._say(f"the CRDs of {', '.join(missing)} are not installed; apply crds/ or let the chart do it")
            await self._pause(_WAIT_SECONDS)
        return False

    async def _wait_for_lease(self) -> bool:
        """Waits for leadership; False when told to stop. A replica that waits is ready: it can take over."""
        said = False
        while not self._stop.is_set():
            try:
                if await asyncio.to_thread(self._lease.try_acquire):
                    return True
                self._waiting_for = None
                if not said:
                    _log.info("waiting for the Lease")
                    said = True
            except Refused as error:
                self._say(f"the Lease cannot be written: {error}")
            await self._pause(self._lease.retry_seconds)
        return False

    def _say(self, trouble: str) -> None:
        if trouble != self._waiting_for:
            _log.warning("waiting", extra={"for": trouble})
        self._waiting_for = trouble

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    async def _lead(self) -> int:
        settings = self._settings
        self._waiting_for = None
        self._metrics.leader.set(1)
        _log.info("leading")
        cluster = Cluster.connect(
            request_seconds=settings.request_seconds, workers=settings.workers, fence=self._lease.check
        )
        controller = self._controller = Controller(cluster, settings, self._metrics)
        children = await asyncio.to_thread(lambda: [one for one in CHILDREN if self._plain.is_served(one)])
        renewing = asyncio.create_task(self._keep_lease(), name="lease")
        working = asyncio.create_task(controller.run(), name="controller")
        # kopf cancels, when it ends, the tasks that began after its own: let these begin first.
        await asyncio.sleep(0.05)
        stop_watching = asyncio.Event()
        roots = await kopf.spawn_tasks(
            registry=build_registry(controller, children),
            settings=build_kopf_settings(children),
            # kopf's own guess asks for the user's name, and an arbitrary uid in a container has none.
            identity=settings.identity or "attune",
            standalone=True,
            clusterwide=not settings.watch_namespaces,
            namespaces=settings.watch_namespaces,
            stop_flag=stop_watching,
        )
        # kopf has put its own handlers there; a stop begins with the work, not with the watch.
        self._handle_signals()
        watching = asyncio.create_task(kopf.run_tasks(roots, ignored=await _running_tasks(roots)), name="watch")
        told = asyncio.create_task(self._stop.wait(), name="stop")
        done, _ = await asyncio.wait({renewing, working, watching, told}, return_when=asyncio.FIRST_COMPLETED)
        for task in (working, renewing):
            task.cancel()
        await asyncio.wait({working})
        await asyncio.to_thread(self._lease.release)
        stop_watching.set()
        await asyncio.wait({watching}, timeout=2)
        failed = [task for task in done if task is not told]
        for task in failed:
            error = task.exception() if not task.cancelled() else None
            _log.error("ended early", extra={"part": task.get_name(), "error": repr(error)})
        return 1 if failed else 0

    async def _keep_lease(self) -> None:
        """Renews the Lease until it is lost.

        Raises:
            NotLeader: then.
        """
        while True:
            await asyncio.sleep(self._lease.renew_seconds)
            with contextlib.suppress(Refused):
                await asyncio.to_thread(self._lease.try_acquire)
            self._lease.check()


async def _running_tasks(without: object) -> frozenset[asyncio.Task[object]]:
    roots = set(without) if isinstance(without, (list, tuple, set, frozenset)) else set()
    return frozenset(task for task in asyncio.all_tasks() if task not in roots)


def main() -> int:
    """Runs the operator; gives the exit status, 2 when the settings are wrong."""
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as error:
        configure_logging("INFO")
        _log.error("settings cannot be used", extra={"error": str(error)})
        return 2
    configure_logging(settings.log_level)

    async def run() -> None:
        status = await Operator(settings).run()
        # Writes have ended and the Lease is given back; what is left are threads and watches that may take their time.
        logging.shutdown()
        os._exit(status)

    try:
        asyncio.run(run())
    except AttuneError as error:
        _log.error("cannot start", extra={"error": str(error)})
    return 1


if __name__ == "__main__":
    sys.exit(main())
