"""Starts, recognises and ends processes of ours, and only those: a pid counts with the time its process started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from devcluster.errors import ClusterError
from devcluster.paths import REPOSITORY
from devcluster.supervisor import Specification

# The supervisor gives its daemons ten seconds; then the kernel ends what is left.
STOP_SECONDS = 25.0
OWN_NAMESPACES = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc")


@dataclass(frozen=True)
class Identity:
    """A process that cannot be mistaken for another one that got its number later."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """The identity of a living process; None if there is none or it is a zombie."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        return Identity.of(self.pid) == self


def read_identity(file: Path) -> Identity | None:
    """The living process that a pid file names; None if it has ended or was never written."""
    try:
        pid, started = file.read_text().split()
        identity = Identity(int(pid), int(started))
    except (FileNotFoundError, ValueError):
        return None
    return identity if identity.alive else None


def wait_until(condition: Callable[[], bool], *, seconds: float, what: str, every: float = 0.1) -> None:
    """Wait for a condition; ClusterError naming `what` when it does not hold within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(every)


@dataclass(frozen=True)
class Supervised:
    """A supervisor and its daemons, known by the files it keeps in `folder`."""

    folder: Path
    own_namespaces: bool = False

    @property
    def _pid_file(self) -> Path:
        return self.folder / "supervisor.pid"

    @property
    def _spec_file(self) -> Path:
        return self.folder / "supervisor.json"

    def identity(self) -> Identity | None:
        """The supervisor's process (unshare's, where it has namespaces of its own) while it runs."""
        return read_identity(self._pid_file)

    def runs(self, specification: Specification) -> bool:
        """Whether exactly this specification runs."""
        same = self._spec_file.is_file() and self._spec_file.read_text() == specification.to_json()
        return same and self.identity() is not None

    def start(self, specification: Specification) -> None:
        """Start the specification unless it runs already; another one that runs is stopped first."""
        if self.runs(specification):
            return
        self.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._spec_file.write_text(specification.to_json())
        prefix = OWN_NAMESPACES if self.own_namespaces else ()
        with (self.folder / "supervisor.log").open("ab") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "devcluster.supervisor", str(self._spec_file)],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # It is meant to outlive this process.
        process.returncode = 0
        identity = Identity.of(process.pid)
        if identity is None:
            raise ClusterError(f"the supervisor ended at once; see {self.folder / 'supervisor.log'}")
        self._pid_file.write_text(f"{identity.pid} {identity.started}\n")

    def inner_pid(self) -> int | None:
        """The pid of the supervisor itself, seen from here: unshare's child where it has namespaces of its own."""
        identity = self.identity()
        if identity is None or not self.own_namespaces:
            return identity.pid if identity else None
        children = Path(f"/proc/{identity.pid}/task/{identity.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def stop(self) -> None:
        """End the supervisor and with it every daemon; nothing if it does not run."""
        identity = self.identity()
        if identity is None:
            self._pid_file.unlink(missing_ok=True)
            return
        inner = self.inner_pid()
        if inner is not None:
            os.kill(inner, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while identity.alive:
            _reap_own(identity.pid)
            if time.monotonic() > deadline:
                os.kill(inner or identity.pid, signal.SIGKILL)
                deadline += STOP_SECONDS
            time.sleep(0.05)
        self._pid_file.unlink(missing_ok=True)


def _reap_own(pid: int) -> None:
    """Collect the process if it is a child of ours, else it stays a zombie while we wait for its end."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def run_logged(arguments: Sequence[str], log: Path, *, what: str, cwd: Path | None = None) -> None:
    """Run a command with its output in a log; ClusterError with the log's last lines when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        code = subprocess.run(
            arguments, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        raise ClusterError(f"{what} failed with exit code {code}; the end of {log}:\n{tail(log)}")


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, indented."""
    try:
        text = log.read_text(errors="replace")
    except FileNotFoundError:
        return "     (no log)"
    return "\n".join(f"     {line}" for line in text.splitlines()[-lines:])
