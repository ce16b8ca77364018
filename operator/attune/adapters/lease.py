"""Leadership by a Lease: one holder at a time, renewed while it lives, given back when it ends."""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from attune.adapters.cluster import LEASE, Cluster
from attune.errors import AlreadyExists, Conflict, NotLeader, NotServed, Refused, Unavailable

# A holder stops writing this share of the duration after its last renewal, well before another may take over.
_DEADLINE: Final = 2 / 3


class Lease:
    """This process's claim on a Lease object. Safe to use from several threads.

    Another's claim counts as run out when its record has not changed for its duration as measured by this process's own
    monotonic clock, so clocks that differ between machines do no harm.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        name: str,
        identity: str,
        *,
        seconds: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._renewed: float | None = None
        self._seen: tuple[Any, float] | None = None

    @property
    def retry_seconds(self) -> float:
        """How often to ask whether the Lease is free."""
        return min(2.0, self._seconds / 5)

    @property
    def renew_seconds(self) -> float:
        """How often to renew: three times before writes would stop."""
        return self._seconds / 5

    def is_held(self) -> bool:
        """Tells whether this process may write now."""
        with self._lock:
            return self._renewed is not None and self._clock() - self._renewed < self._seconds * _DEADLINE

    def check(self) -> None:
        """Stops a write of a process that may no longer lead.

        Raises:
            NotLeader: when the Lease is not held, or was not renewed in time.
        """
        if not self.is_held():
            raise NotLeader(f"Lease {self._namespace}/{self._name} is not held by {self._identity}")

    def try_acquire(self) -> bool:
        """Takes or renews the Lease; False when another holds it or the API server does not answer.

        Raises:
            Refused: when Leases may not be written here at all.
        """
        asked = self._clock()
        try:
            won = self._claim(asked)
        except (Unavailable, Conflict, AlreadyExists, NotServed):
            return False
        if won:
            with self._lock:
                # Counted from before the request: the answer may have been on its way for long.
                self._renewed = asked
        return won

    def release(self) -> None:
        """Gives the Lease back, so that another need not wait for its end."""
        with self._lock:
            held, self._renewed = self._renewed is not None, None
        if not held:
            return
        try:
            present = self._cluster.get(LEASE, self._namespace, self._name)
            if present is not None and present["spec"].get("holderIdentity") == self._identity:
                spec = {**present["spec"], "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
                self._cluster.replace({**present, "spec": spec})
        except (Unavailable, Conflict, Refused, NotServed):
            # It runs out by itself.
            return

    def _claim(self, asked: float) -> bool:
        present = self._cluster.get(LEASE, self._namespace, self._name)
        if present is None:
            self._cluster.create(
                {
                    "apiVersion": LEASE.api_version,
                    "kind": LEASE.kind,
                    "metadata": {"name": self._name, "namespace": self._namespace},
                    "spec": self._build_spec({}),
                }
            )
            return True
        spec = present.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        if holder not in ("", self._identity) and not self._has_run_out(spec, asked):
            return False
        self._cluster.replace({**present, "spec": self._build_spec(spec)})
        return True

    def _has_run_out(self, spec: dict[str, Any], asked: float) -> bool:
        record = (spec.get("holderIdentity"), spec.get("renewTime"), spec.get("leaseTransitions"))
        if self._seen is None or self._seen[0] != record:
            self._seen = (record, asked)
        return asked - self._seen[1] >= float(spec.get("leaseDurationSeconds") or self._seconds)

    def _build_spec(self, spec: dict[str, Any]) -> dict[str, Any]:
        mine = spec.get("holderIdentity") == self._identity
        transitions = int(spec.get("leaseTransitions") or 0)
        now = _now()
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._seconds,
            "acquireTime": spec.get("acquireTime") or now if mine else now,
            "renewTime": now,
            "leaseTransitions": transitions if mine or not spec else transitions + 1,
        }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
