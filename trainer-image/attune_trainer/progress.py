"""How far a recipe is: kept by a ProgressReporter, answered over HTTP while the recipe runs."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from attune.contract.environment import PROGRESS_PORT
from attune.contract.result import Estimate, MetricValue, Progress
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from attune_trainer.decimals import decimal_string

PROGRESS_PORT_VARIABLE = "ATTUNE_PROGRESS_PORT"
PROGRESS_HOST_VARIABLE = "ATTUNE_PROGRESS_HOST"

_log = logging.getLogger(__name__)
_MAX_METRICS = 16


class ProgressReporter:
    """Holds the newest progress of a recipe; safe to update from any thread.

    Remaining time is the time since a stage's first step over the steps done since then, times the steps left; without
    steps the same by percent. A resumed run that starts at step 900 is so not taken for one that made 900 at once.

    Attributes:
        registry: what GET /metrics answers; recipes may register collectors of their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._stage = "Starting"
        self._percent = 0
        self._step: int | None = None
        self._total_steps: int | None = None
        self._epoch: float | None = None
        self._metrics: dict[str, str] = {}
        self._estimate: Estimate | None = None
        self._step_origin: tuple[float, int] | None = None
        self._began = clock()
        self._exact_percent = 0.0
        self.registry = CollectorRegistry()
        self.registry.register(_ProgressCollector(self))

    def update(
        self,
        *,
        stage: str | None = None,
        percent: float | None = None,
        step: int | None = None,
        total_steps: int | None = None,
        epoch: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Overwrites what is given and keeps the rest; a new stage forgets the last one's steps.

        Args:
            stage: CamelCase name of what is being done.
            percent: of the whole recipe, 0 to 100.
            step: optimiser steps (or items) done in this stage.
            total_steps: of this stage.
            epoch: passes over the data, with fraction.
            metrics: figures by lower-case name; those that are not finite are left out.
        """
        now = self._clock()
        with self._lock:
            if stage is not None and stage != self._stage:
                _log.info("stage", extra={"stage": stage})
                self._stage = stage
                self._step = self._total_steps = None
                self._step_origin = None
            if percent is not None:
                self._exact_percent = min(100.0, max(0.0, float(percent)))
                self._percent = int(self._exact_percent)
            if total_steps is not None:
                self._total_steps = total_steps
            if step is not None:
                self._step = step
                if self._step_origin is None or step < self._step_origin[1]:
                    self._step_origin = (now, step)
            if epoch is not None:
                self._epoch = epoch
            for name, value in (metrics or {}).items():
                try:
                    self._metrics[name] = decimal_string(value)
                except ValueError:
                    self._metrics.pop(name, None)
            while len(self._metrics) > _MAX_METRICS:
                self._metrics.pop(next(iter(self._metrics)))

    def expect(self, estimate: Estimate) -> None:
        """Says from now on what the whole recipe will take."""
        with self._lock:
            self._estimate = estimate

    def snapshot(self) -> Progress:
        """Gives the newest progress with the remaining time as it looks now."""
        now = self._clock()
        with self._lock:
            return Progress(
                stage=self._stage,
                percent=self._percent,
                step=self._step,
                total_steps=self._total_steps,
                epoch=None if self._epoch is None else decimal_string(self._epoch, 3),
                estimated_remaining_seconds=self._remaining_seconds(now),
                metrics=[MetricValue(name=name, value=value) for name, value in self._metrics.items()],
                estimate=self._estimate,
            )

    def _remaining_seconds(self, now: float) -> int | None:
        if self._step is not None and self._total_steps is not None and self._step_origin is not None:
            began, first = self._step_origin
            done = self._step - first
            if done <= 0:
                return None
            return max(0, round((now - began) / done * (self._total_steps - self._step)))
        if self._exact_percent <= 0:
            return None
        return round((now - self._began) / self._exact_percent * (100.0 - self._exact_percent))


class _ProgressCollector(Collector):
    """Exports a reporter's newest progress as gauges."""

    def __init__(self, reporter: ProgressReporter) -> None:
        self._reporter = reporter

    def describe(self) -> list[Metric]:
        """Says that names depend on the recipe; the registry then asks for no sample at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields percent, steps, remaining seconds and the recipe's figures."""
        progress = self._reporter.snapshot()
        yield GaugeMetricFamily("attune_job_progress_percent", "Share of the recipe that is done.", progress.percent)
        if progress.step is not None:
            yield GaugeMetricFamily("attune_job_step", "Steps done in this stage.", progress.step)
        if progress.total_steps is not None:
            yield GaugeMetricFamily("attune_job_steps", "Steps of this stage.", progress.total_steps)
        if progress.estimated_remaining_seconds is not None:
            yield GaugeMetricFamily(
                "attune_job_estimated_remaining_seconds", "Seconds to the end.", progress.estimated_remaining_seconds
            )
        figures = GaugeMetricFamily("attune_job_figure", "A figure that the recipe reports.", labels=["name"])
        for metric in progress.metrics:
            figures.add_metric([metric.name], float(metric.value))
        yield figures


class DualStackServer(ThreadingHTTPServer):
    """Listens on a socket of the address's own family; daemon threads, so that a slow reader keeps no Job alive."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        """Binds, for IPv4 as well where the address is of IPv6."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # HTTPServer.server_bind asks the resolver for the host's name, which can take seconds in a pod.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


def listening_host() -> str:
    """Gives the address to listen on: all of the pod's, or the one in ATTUNE_PROGRESS_HOST."""
    return os.environ.get(PROGRESS_HOST_VARIABLE) or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")  # noqa: S104 (others reach it over the pod's address)


class ProgressServer:
    """Answers GET /progress, /metrics and /healthz from a thread of its own, until it is closed.

    Args:
        reporter: whose progress is answered.
        host: address to listen on; all of the pod's by default. ATTUNE_PROGRESS_HOST overrides the default.
        port: 0 takes any free one. ATTUNE_PROGRESS_PORT overrides the default.
    """

    def __init__(self, reporter: ProgressReporter, host: str | None = None, port: int | None = None) -> None:
        host = listening_host() if host is None else host
        if port is None:
            port = int(os.environ.get(PROGRESS_PORT_VARIABLE) or PROGRESS_PORT)

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/progress":
                    body = reporter.snapshot().model_dump_json(by_alias=True, exclude_none=True).encode()
                    self._answer(HTTPStatus.OK, "application/json", body)
                elif path == "/metrics":
                    self._answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(reporter.registry))
                elif path == "/healthz":
                    self._answer(HTTPStatus.OK, "text/plain; charset=utf-8", b"ok\n")
                else:
                    self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"not found\n")

            def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
                """Keeps scrapes out of the log."""

        self._server = DualStackServer(host, port, Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="progress", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._server.server_port

    def close(self) -> None:
        """Stops answering."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
