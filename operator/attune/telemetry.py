"""The operator's own Prometheus metrics and its JSON logs."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from attune.api.canary import Outcome

_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Metrics:
    """What the operator counts of itself; one registry of its own, so that two can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.reconciles = Counter(
            "attune_reconcile_total",
            "Passes over a resource, by what came of them: changed, unchanged, gone, error.",
            ("kind", "result"),
            registry=self.registry,
        )
        self.duration = Histogram(
            "attune_reconcile_duration_seconds",
            "Time that a pass took.",
            ("kind",),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.errors = Counter(
            "attune_reconcile_errors_total",
            "Passes that ended early, by the error.",
            ("kind", "reason"),
            registry=self.registry,
        )
        self.rollouts = Counter(
            "attune_rollouts_total",
            "Rollouts that have ended: Promoted, RolledBack, Superseded, Withdrawn.",
            ("outcome",),
            registry=self.registry,
        )
        for outcome in Outcome:
            # A series that appears with its first count has no beginning to compute an increase from.
            self.rollouts.labels(outcome)
        self.depth = Gauge("attune_workqueue_depth", "Resources that are due to be looked at.", registry=self.registry)
        self.oldest = Gauge(
            "attune_workqueue_oldest_seconds",
            "How long the resource that has waited longest has been due.",
            registry=self.registry,
        )
        self.leader = Gauge("attune_leader", "1 while this replica acts, else 0.", registry=self.registry)


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what was given as extra becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Renders a record."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({key: value for key, value in vars(record).items() if key not in _STANDARD and _is_plain(value)})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _is_plain(value: object) -> bool:
    # kopf hangs objects and settings on its records; only what was meant as a field is one.
    return value is None or isinstance(value, str | int | float | bool)


def configure_logging(level: str) -> None:
    """Sends the operator's log as JSON to stdout, and the libraries' from WARNING on."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("attune").setLevel(level)
