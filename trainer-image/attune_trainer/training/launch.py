"""Starts training processes under DeepSpeed's launcher, and makes of their end one outcome."""

import base64
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from attune.contract.exitcode import ExitCode

from attune_trainer.failures import OutOfMemory, PeerLost, RecipeFailure, Terminated
from attune_trainer.processors import usable_processors
from attune_trainer.training.events import EventReader
from attune_trainer.training.gang import Place
from attune_trainer.training.settings import TrainingSettings

_log = logging.getLogger(__name__)

# Of the launcher, which gives its child's on.
_KILLED: Final = frozenset({-signal.SIGKILL, 256 - signal.SIGKILL, 128 + signal.SIGKILL})
# NCCL ends a process like this whose peer is gone, wherever it is just then.
_ABORTED: Final = frozenset({-signal.SIGABRT, 256 - signal.SIGABRT, 128 + signal.SIGABRT})
_POLL_SECONDS: Final = 0.2
_END_SECONDS: Final = 45  # the launcher gives its children 30 s


def count_gpus() -> int:
    """Counts the GPUs that the container was given, without loading CUDA."""
    return len([name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()])  # noqa: PTH208


class TrainingProcesses:
    """The launcher and its children, from start to end; a context manager that leaves none behind.

    They are started before the settings are known: importing torch takes as long as fetching a small Dataset, and so
    both happen at once.
    """

    def __init__(self, directory: Path, processes: int, place: Place | None = None) -> None:
        """Starts the launcher.

        Args:
            directory: for settings, pipe and stop file.
            processes: how many train in this pod.
            place: which pod this is, where processes of several train together.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._settings = directory / "settings.json"
        self._settings.unlink(missing_ok=True)
        self.stop_file = directory / "stop"
        self.stop_file.unlink(missing_ok=True)
        pipe = directory / "events"
        self._events = EventReader(pipe)
        self._place = place
        nodes = {f"node-{index}": list(range(processes)) for index in range(place.nodes if place is not None else 1)}
        world = base64.urlsafe_b64encode(json.dumps(nodes).encode()).decode()
        host, port = (place.leader_host, place.training_port) if place is not None else ("127.0.0.1", _free_port())
        self._launcher = subprocess.Popen(
            [
                *(sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}"),
                f"--node_rank={place.index if place is not None else 0}",
                *(f"--master_addr={host}", f"--master_port={port}", "--quiet", "--no_local_rank"),
                *("--module", "attune_trainer.training.worker", str(self._settings), str(pipe)),
            ],
            env=_environment(processes),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def begin(self, settings: TrainingSettings) -> None:
        """Gives the waiting processes their settings."""
        partial = self._settings.with_suffix(".part")
        partial.write_text(settings.model_dump_json(), encoding="utf-8")
        partial.replace(self._settings)

    def follow(
        self,
        on_event: Callable[[dict[str, Any]], None],
        stop_wanted: Callable[[], bool],
        raise_if_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Passes events on until the processes have ended.

        Args:
            on_event: told of every event but the last word of a process that failed.
            stop_wanted: asked several times a second; once it says yes, training saves a checkpoint and ends.
            raise_if_lost: called as often; what it raises ends the processes at once, since they wait for others that
                are gone.

        Raises:
            Terminated: when training ended because it was asked to.
            RecipeFailure: when it failed; OutOfMemory also when the kernel killed a process.
        """
        last_words: dict[str, dict[str, Any]] = {}
        ended = killed = False
        while True:
            events = list(self._events.poll(0 if ended else _POLL_SECONDS))
            for event in events:
                if event["kind"] in {"failed", "stopped"}:
                    # Before the launcher has ended the others, with SIGKILL where they take long.
                    if event["kind"] == "failed" and "failed" not in last_words:
                        killed = has_killed_child(self._launcher.pid)
                    last_words.setdefault(event["kind"], event)
                elif event["kind"] != "waiting":
                    on_event(event)
            if ended and not events:
                break
            if stop_wanted():
                self.stop_file.touch()
            ended = self._launcher.poll() is not None
            if not ended:
                try:
                    raise_if_lost()
                except PeerLost:
                    os.killpg(self._launcher.pid, signal.SIGKILL)
                    raise
        self._conclude(last_words, killed=killed)

    def _conclude(self, last_words: dict[str, dict[str, Any]], *, killed: bool) -> None:
        """Raises what the end of the processes means, unless it is success."""
        code = self._launcher.returncode
        if "failed" in last_words:
            # The others fail because they no longer hear from the one that was killed.
            if killed or code in _KILLED:
                raise _killed()
            failed = last_words["failed"]
            raise RecipeFailure(ExitCode(failed["code"]), failed["reason"], failed["message"])
        if "stopped" in last_words:
            raise Terminated
        if self._place is not None and code in _ABORTED:
            raise PeerLost
        _check_exit_status(code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._launcher.poll() is None:
            self._launcher.terminate()
            try:
                self._launcher.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._launcher.pid, signal.SIGKILL)
                self._launcher.wait()
        self._events.close()


def _check_exit_status(code: int) -> None:
    """Explains the end of processes that could not explain it themselves."""
    if code in _KILLED:
        raise _killed()
    if code:
        message = f"training ended with status {code} and said nothing; the Job's log has its output"
        raise RecipeFailure(ExitCode.INTERNAL_ERROR, "TrainingCrashed", message)


def _killed() -> OutOfMemory:
    return OutOfMemory(
        "a training process was killed, most likely for using more memory than its limit; lower "
        "spec.hyperparameters.maxBatchSeconds or batchSize, or raise the memory in spec.resources.limits"
    )


def has_killed_child(parent: int) -> bool:
    """Tells whether a child was ended by SIGKILL and its parent has not asked for its status yet (proc_pid_stat(5))."""
    with contextlib.suppress(OSError):  # the parent may end at any time
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split():
            # What stands before the last parenthesis is the program's name, and may be anything.
            fields = Path(f"/proc/{child}/stat").read_bytes().rpartition(b")")[2].split()
            if fields[0] == b"Z" and os.waitstatus_to_exitcode(int(fields[-1])) == -signal.SIGKILL:
                return True
    return False


def _environment(processes: int) -> dict[str, str]:
    """Gives the launcher's environment: the right accelerator, and as many threads as there are cores for each."""
    environment = dict(os.environ)
    # Keys of the store are this process's alone.
    for name in list(environment):
        if name.startswith(("ATTUNE_STORE_", "ATTUNE_SOURCE_")):
            del environment[name]
    if not count_gpus():
        environment["DS_ACCELERATOR"] = "cpu"
    # The operator says how many threads the whole pod may have.
    environment["OMP_NUM_THREADS"] = str(max(1, usable_processors(environment) // processes))
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["HF_HUB_OFFLINE"] = "1"
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
