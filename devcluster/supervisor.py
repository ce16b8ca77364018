"""Keeps a set of daemons running as its children, restarts those that end, and takes all of them with it when it ends.

Run as `python3 -m devcluster.supervisor SPEC.json`. The node runs it as process 1 of process and mount namespaces of
its own, so that the end of this one process is the end of every container and mount; the control plane of the tests
runs it as an ordinary process without any rights.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

STOP_SECONDS = 10.0
RESTART_SECONDS = 1.0
# The kernel's PR_SET_PDEATHSIG: a daemon must not outlive a supervisor that was killed.
PARENT_DEATH_SIGNAL = 1


@dataclass(frozen=True)
class Daemon:
    """One program to keep running; its output goes to `log`."""

    name: str
    arguments: tuple[str, ...]
    log: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Specification:
    """What one supervisor runs. `binds` are (source, target) folders, mounted first, for those in a mount namespace."""

    daemons: tuple[Daemon, ...]
    binds: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> str:
        """The specification as the supervisor's file holds it."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Specification:
        """Read what `to_json` wrote."""
        loaded = json.loads(text)
        daemons = tuple(Daemon(**{**daemon, "arguments": tuple(daemon["arguments"])}) for daemon in loaded["daemons"])
        return cls(daemons, tuple((source, target) for source, target in loaded["binds"]))


class Supervisor:
    """Runs a Specification until it is told to stop (SIGTERM or SIGINT)."""

    def __init__(self, specification: Specification) -> None:
        self.specification = specification
        self.running: dict[int, Daemon] = {}
        self.due: dict[str, float] = {daemon.name: 0.0 for daemon in specification.daemons}
        self.stopping = False
        self.libc = ctypes.CDLL(None, use_errno=True)

    def run(self) -> None:
        """Start everything, restart what ends, and end everything in the reverse order when told to."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        if self.specification.binds:
            # A kubelet expects that mounts are shared; here they are shared within the node's namespace only.
            subprocess.run(["mount", "--make-rshared", "/"], check=True)
        for source, target in self.specification.binds:
            subprocess.run(["mount", "--bind", source, target], check=True)
        while not self.stopping:
            for daemon in self.specification.daemons:
                if 0 <= self.due[daemon.name] <= time.monotonic():
                    self._start(daemon)
            self._reap()
            # A signal ends the sleep early.
            time.sleep(0.1)
        for pid, _daemon in reversed(self.running.items()):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while self.running and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.05)
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
        while self.running:
            self._reap()
            time.sleep(0.05)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stopping = True

    def _start(self, daemon: Daemon) -> None:
        with Path(daemon.log).open("ab") as log:
            process = subprocess.Popen(
                daemon.arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **daemon.environment},
                preexec_fn=lambda: self.libc.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL),  # noqa: PLW1509 - one thread
            )
        # `_reap` waits for every child, orphans of containers included, so Popen is not to wait for this one.
        process.returncode = 0
        self.running[process.pid] = daemon
        self.due[daemon.name] = -1.0

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            daemon = self.running.pop(pid, None)
            if daemon is None or self.stopping:
                continue
            with Path(daemon.log).open("a") as log:
                code = os.waitstatus_to_exitcode(status)
                log.write(f"supervisor: {daemon.name} ended with {code}; starting it again\n")
            self.due[daemon.name] = time.monotonic() + RESTART_SECONDS


def main() -> None:
    """Run the specification that the first argument names."""
    Supervisor(Specification.from_json(Path(sys.argv[1]).read_text())).run()


if __name__ == "__main__":
    main()
