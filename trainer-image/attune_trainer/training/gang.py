"""Pods that train together: they begin as one, from one checkpoint, and each notices when another is gone.

The first one leads. The others report to it every second over HTTP, with their pods' uids; its answers tell them when
to begin, and from which checkpoint. Collectives notice that a peer has ended, since its connection closes, but not that
its node has vanished, nor that who answers under a host name is of an earlier attempt: these reports do.
"""

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from attune.contract.environment import COMPLETION_INDEX, GANG_PORT, LEADER_HOST, TRAINING_PORT
from attune.contract.exitcode import ExitCode
from pydantic import BaseModel, ConfigDict, ValidationError

from attune_trainer.failures import InvalidInput, PeerLost, RecipeFailure
from attune_trainer.progress import DualStackServer, listening_host

GANG_PORT_VARIABLE: Final = "ATTUNE_GANG_PORT"
TRAINING_PORT_VARIABLE: Final = "ATTUNE_TRAINING_PORT"

_log = logging.getLogger(__name__)
_REQUEST_SECONDS: Final = 5
_MAX_BYTES: Final = 4096

# Downloads a checkpoint by its name, or the newest one (None), and verifies it; None where there is none.
Download = Callable[[str | None], Path | None]


@dataclass(frozen=True)
class Place:
    """Which pod of a run this is.

    Attributes:
        index: its number, from 0; 0 leads.
        nodes: how many pods train together.
        leader_host: where the first one is found.
        gang_port: where the others report to it.
        training_port: where the training processes meet, on its host.
    """

    index: int
    nodes: int
    leader_host: str
    gang_port: int = GANG_PORT
    training_port: int = TRAINING_PORT

    @classmethod
    def from_environment(cls, nodes: int) -> "Place":
        """Reads what the operator and the Job controller tell a pod.

        Raises:
            InvalidInput: InvalidJob, when one of them has not.
        """
        index, host = os.environ.get(COMPLETION_INDEX, ""), os.environ.get(LEADER_HOST)
        if not index.isdecimal() or int(index) >= nodes or not host:
            message = (
                f"the run has {nodes} pods, but {COMPLETION_INDEX} or {LEADER_HOST} is not set as it should be; use "
                "operator and trainer images of one release"
            )
            raise InvalidInput("InvalidJob", message)
        return cls(
            index=int(index),
            nodes=nodes,
            leader_host=host,
            gang_port=int(os.environ.get(GANG_PORT_VARIABLE) or GANG_PORT),
            training_port=int(os.environ.get(TRAINING_PORT_VARIABLE) or TRAINING_PORT),
        )


@dataclass(frozen=True)
class Timing:
    """How patient pods are with each other, in seconds.

    Attributes:
        beat: between two reports.
        lost: silence after which a pod counts as lost.
        gather: time in which all have to be there; images may have to be pulled, and nodes to be found.
    """

    beat: float = 1.0
    lost: float = 30.0
    gather: float = 1800.0


class Stage(StrEnum):
    """Where the leader is."""

    PREPARING = "Preparing"
    GATHERING = "Gathering"
    TRAINING = "Training"
    PUBLISHING = "Publishing"


class Report(BaseModel):
    """What a pod tells the leader. ready names the checkpoint that it is ready to go on from, "" the beginning."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uid: str
    ready: str | None = None
    done: bool = False  # with training: from now on it only waits for the Result


class Answer(BaseModel):
    """What the leader answers. checkpoint is what all go on from, member the uid that it knows for this index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    leader: str
    stage: Stage
    checkpoint: str
    member: str | None = None


class Gang(Protocol):
    """The pods of a run, as one of them sees them."""

    @property
    def leads(self) -> bool:
        """Whether this pod reports, seals checkpoints and publishes."""

    @property
    def mark(self) -> str:
        """Names this meeting of the pods: what an earlier one has left unfinished in the store is none of its own."""

    def agree(self, download: Download, check: Callable[[], None]) -> Path | None:
        """Waits until every pod is there and has the same checkpoint; gives it, or None to begin at the beginning.

        Args:
            download: brings a checkpoint to the disk.
            check: called while waiting; what it raises ends that.

        Raises:
            RecipeFailure: GangIncomplete or PeerLost when it takes too long, and as download.
        """

    def raise_if_lost(self) -> None:
        """Passes while all pods are there.

        Raises:
            PeerLost: once one is not.
        """

    def finish_training(self) -> None:
        """Says that this pod has trained to the end."""


class Alone:
    """A run in one pod."""

    leads = True
    mark = ""

    def agree(self, download: Download, check: Callable[[], None]) -> Path | None:
        """Gives the newest checkpoint."""
        check()
        return download(None)

    def raise_if_lost(self) -> None:
        """Passes."""

    def finish_training(self) -> None:
        """Does nothing."""


def mark_of(leader: str) -> str:
    """Gives 8 hexadecimal digits of the leader's uid."""
    return hashlib.sha256(leader.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class _Heard:
    report: Report
    at: float


class Leader:
    """The first pod: answers the others until it is closed; a context manager."""

    leads = True

    def __init__(self, place: Place, uid: str, timing: Timing | None = None) -> None:
        """Begins to listen.

        Args:
            place: this pod's.
            uid: this pod's.
            timing: how patient it is.
        """
        self._place, self._uid, self._timing = place, uid, timing or Timing()
        self._lock = threading.Lock()
        self._stage = Stage.PREPARING
        self._checkpoint = ""
        self._heard: dict[int, _Heard] = {}
        self._replaced: set[int] = set()
        self.mark = mark_of(uid)
        self._server = DualStackServer(listening_host(), place.gang_port, self._build_handler())
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="gang", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._server.server_port

    def agree(self, download: Download, check: Callable[[], None]) -> Path | None:
        """Chooses the newest checkpoint, and waits until all others have it as well; see Gang."""
        newest = download(None)
        with self._lock:
            self._checkpoint = newest.name if newest is not None else ""
            self._stage = Stage.GATHERING
        deadline = time.monotonic() + self._timing.gather
        while missing := self._close_when_complete():
            check()
            if time.monotonic() > deadline:
                raise self._incomplete(missing)
            _pause.wait(self._timing.beat / 2)
        _log.info("all pods are there", extra={"nodes": self._place.nodes, "checkpoint": self._checkpoint or None})
        return newest

    def raise_if_lost(self) -> None:
        """Passes while every other pod reports, or has done its part; see Gang."""
        with self._lock:
            lost = self._find_lost() if self._stage is Stage.TRAINING else []
        if lost:
            raise PeerLost(lost)

    def finish_training(self) -> None:
        """Needs the others no more."""
        with self._lock:
            self._stage = Stage.PUBLISHING

    def hear(self, index: int, report: Report) -> Answer:
        """Takes a report, and answers it.

        Raises:
            ValueError: when there is no such pod.
        """
        if not 0 < index < self._place.nodes:
            raise ValueError(f"pod {index} of {self._place.nodes}")
        with self._lock:
            known = self._heard.get(index)
            is_new = known is None or known.report.uid != report.uid
            if is_new and self._stage is Stage.TRAINING:
                # Its predecessor, which trains here, has been replaced.
                self._replaced.add(index)
            elif not is_new or self._stage is not Stage.PUBLISHING:
                self._heard[index] = known = _Heard(report, time.monotonic())
            return Answer(
                leader=self._uid,
                stage=self._stage,
                checkpoint=self._checkpoint,
                member=known.report.uid if known is not None else None,
            )

    def _close_when_complete(self) -> list[int]:
        """Lets training begin when all are ready; gives those that are not."""
        with self._lock:
            now = time.monotonic()
            ready = {
                index
                for index, heard in self._heard.items()
                if heard.report.ready == self._checkpoint and now - heard.at <= self._timing.lost
            }
            missing = [index for index in range(1, self._place.nodes) if index not in ready]
            if not missing:
                self._stage = Stage.TRAINING
            return missing

    def _find_lost(self) -> list[int]:
        silent = {
            index
            for index, heard in self._heard.items()
            if time.monotonic() - heard.at > self._timing.lost and not heard.report.done
        }
        return sorted(silent | {index for index in self._replaced if not self._heard[index].report.done})

    def _incomplete(self, missing: list[int]) -> RecipeFailure:
        message = (
            f"{_list_pods(missing)} of {self._place.nodes} did not report to {self._place.leader_host}:"
            f"{self._place.gang_port} within {self._timing.gather / 60:.0f} min; see whether they run (kubectl "
            "describe pod), and whether a NetworkPolicy keeps them from each other. In a queue (spec.queueName) all "
            "start together"
        )
        return RecipeFailure(ExitCode.GANG_INCOMPLETE, "GangIncomplete", message)

    def _build_handler(self) -> type[BaseHTTPRequestHandler]:
        leader = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_POST(self) -> None:
                index = self.path.removeprefix("/members/")
                length = self.headers.get("Content-Length", "")
                if not index.isdecimal() or not length.isdecimal() or int(length) > _MAX_BYTES:
                    self.send_error(HTTPStatus.BAD_REQUEST)
                    return
                try:
                    answer = leader.hear(int(index), Report.model_validate_json(self.rfile.read(int(length))))
                except ValueError:
                    self.send_error(HTTPStatus.BAD_REQUEST)
                    return
                body = answer.model_dump_json().encode()
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
                """Keeps reports out of the log."""

        return Handler

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Member:
    """Any other pod: reports to the leader from the beginning of training until it is closed; a context manager."""

    leads = False

    def __init__(self, place: Place, uid: str, timing: Timing | None = None) -> None:
        """Says nothing yet.

        Args:
            place: this pod's.
            uid: this pod's.
            timing: how patient it is.
        """
        self._place, self._uid, self._timing = place, uid, timing or Timing()
        self._leader = self._ready = self.mark = ""
        self._lost = threading.Event()
        self._done = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_reporting, name="gang", daemon=True)

    def agree(self, download: Download, check: Callable[[], None]) -> Path | None:
        """Waits for the leader, and goes on from the checkpoint that it names; see Gang."""
        deadline = time.monotonic() + self._timing.gather
        while True:
            answer = self._say(Report(uid=self._uid))
            if answer is not None and answer.stage is Stage.GATHERING:
                found = download(answer.checkpoint) if answer.checkpoint else None
                if self._wait_for_beginning(answer, check):
                    self._leader, self._ready, self.mark = answer.leader, answer.checkpoint, mark_of(answer.leader)
                    self._thread.start()
                    return found
            check()
            if time.monotonic() > deadline:
                raise PeerLost([0])
            _pause.wait(self._timing.beat)

    def raise_if_lost(self) -> None:
        """Passes while the leader that it began with answers; see Gang."""
        if self._lost.is_set():
            raise PeerLost([0])

    def finish_training(self) -> None:
        """Tells the leader that it may do without this pod; again and again, until the leader has heard it."""
        self._done.set()

    def _wait_for_beginning(self, first: Answer, check: Callable[[], None]) -> bool:
        """Says that it is ready until training begins; False when leader or checkpoint have become others."""
        heard = time.monotonic()
        while True:
            answer = self._say(Report(uid=self._uid, ready=first.checkpoint))
            if answer is None:
                if time.monotonic() - heard > self._timing.lost:
                    return False
            else:
                heard = time.monotonic()
                if (answer.leader, answer.checkpoint) != (first.leader, first.checkpoint):
                    return False
                if answer.stage is Stage.TRAINING:
                    return answer.member == self._uid
            check()
            _pause.wait(self._timing.beat)

    def _keep_reporting(self) -> None:
        heard = time.monotonic()
        while not self._closed.wait(self._timing.beat):
            answer = self._say(Report(uid=self._uid, ready=self._ready, done=self._done.is_set()))
            if answer is None:
                if time.monotonic() - heard > self._timing.lost:
                    self._lost.set()
            elif (answer.leader, answer.member) != (self._leader, self._uid):
                self._lost.set()
            else:
                heard = time.monotonic()

    def _say(self, report: Report) -> Answer | None:
        """Reports; None where no leader answers, as when its name does not resolve yet."""
        with contextlib.closing(
            HTTPConnection(self._place.leader_host, self._place.gang_port, timeout=_REQUEST_SECONDS)
        ) as connection:
            try:
                connection.request("POST", f"/members/{self._place.index}", body=report.model_dump_json())
                response = connection.getresponse()
                if response.status != HTTPStatus.OK:
                    return None
                return Answer.model_validate_json(response.read(_MAX_BYTES))
            except (OSError, HTTPException, ValidationError):
                return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()


@contextlib.contextmanager
def open_gang(place: Place | None, uid: str) -> Iterator[Gang]:
    """Gives what a pod knows of the others; place is None where there are none."""
    if place is None:
        yield Alone()
        return
    member: Leader | Member = Leader(place, uid) if place.index == 0 else Member(place, uid)
    with member:
        yield member


def _list_pods(indices: list[int]) -> str:
    return f"pod{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


_pause = threading.Event()  # never set: wait() is a sleep that a test may cut short
