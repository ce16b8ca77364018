"""What an arm, the route and the Gateway of a Canary look like, and what ails an arm's pods."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from attune.api.canary import ArmModel, PodTemplate
from attune.contract.exitcode import Disposition, ExitCode
from attune.contract.result import Failure
from attune.domain.actions import FormerArm, RolloutRecord
from attune.domain.jobs import (
    IMAGE_PULL_FAILED,
    MISSING_KEY,
    MISSING_SECRET,
    OUT_OF_MEMORY,
    PULL_REASONS,
    SECRET_KEY_MISSING,
    SECRET_NOT_FOUND,
    UNSCHEDULABLE,
)

CRASH_LOOP: Final = "CrashLoopBackOff"
CONTAINER_CONFIG_ERROR: Final = "ContainerConfigError"
# The kubelet restarts a container that ended; a second restart within a rollout is no accident.
CRASHES: Final = 2


@dataclass(frozen=True)
class ServingPod:
    """A pod of an arm, as far as decisions read it."""

    name: str
    revision: str
    image: str | None = None
    ready: bool = False
    unschedulable: str | None = None  # the scheduler's message
    waiting_reason: str | None = None
    waiting_message: str | None = None
    restarts: int = 0
    # How the container ended last, whether or not it runs again.
    ended_reason: str | None = None
    ended_code: int | None = None
    failure: Failure | None = None  # what the server said of its own end


@dataclass(frozen=True)
class PodProblem:
    """Why an arm's pods do not serve. fatal: time alone does not mend it."""

    reason: str
    message: str
    fatal: bool


@dataclass(frozen=True)
class ObservedArm:
    """A Deployment: what it serves, and how far it is.

    ready counts all pods that serve; rolled_out says that every wanted pod has this revision and serves, and that no
    other pod is left. former is what stable served before it was given this model, until all of that is over.
    """

    model: ArmModel
    template: PodTemplate
    replicas: int
    ready: int
    rolled_out: bool
    deadline_exceeded: bool = False
    pods: tuple[ServingPod, ...] = ()
    former: FormerArm | None = None

    @property
    def problem(self) -> PodProblem | None:
        """What keeps the pods of the present revision from serving; None when nothing is known to."""
        return find_problem(pod for pod in self.pods if pod.revision == self.model.revision)

    @property
    def stuck(self) -> bool:
        """Whether time alone does not bring the wanted pods."""
        fatal = self.problem is not None and self.problem.fatal
        return not self.rolled_out and (self.deadline_exceeded or fatal)

    @property
    def broken(self) -> bool:
        """Whether nothing is served, and time alone does not mend it."""
        return self.ready == 0 and self.stuck


@dataclass(frozen=True)
class ObservedRoute:
    """The HTTPRoute. rejected: why the Gateway does not take it. settled: the Gateway has seen the present weights."""

    stable_weight: int
    canary_weight: int
    rollout: RolloutRecord | None
    rejected: str | None = None
    settled: bool = True


@dataclass(frozen=True)
class ObservedGateway:
    """The Gateway that the route attaches to. Unreadable: the operator may not look, and takes it as given."""

    state: Literal["Programmed", "NotProgrammed", "NotFound", "NotServed", "Unreadable"]
    message: str = ""


def find_problem(pods: Iterable[ServingPod]) -> PodProblem | None:
    """Names the worst problem of some pods, fatal ones first; None when none has any."""
    problems = [problem for pod in pods if not pod.ready and (problem := _diagnose(pod)) is not None]
    return min(problems, key=lambda problem: (not problem.fatal, problem.reason, problem.message), default=None)


def _diagnose(pod: ServingPod) -> PodProblem | None:
    if pod.unschedulable:
        return PodProblem(UNSCHEDULABLE, f"no node fits the pod: {pod.unschedulable}", fatal=False)
    if pod.waiting_reason in PULL_REASONS:
        # The kubelet's own message changes from one attempt to the next; a status that follows it never rests.
        message = f"image {pod.image} cannot be pulled: check that it exists and that the node may pull it"
        # The first failure may be the registry's; from the second on the kubelet backs off.
        return PodProblem(IMAGE_PULL_FAILED, message, fatal=pod.waiting_reason != "ErrImagePull")
    if pod.waiting_reason == "CreateContainerConfigError":
        return _diagnose_configuration(pod.waiting_message or "")
    if pod.ended_reason == "OOMKilled":
        message = "the server was killed because it needed more memory than its limit; raise the limit in spec.template"
        return PodProblem(OUT_OF_MEMORY, message, fatal=pod.restarts >= CRASHES)
    if pod.failure is not None:
        # Some ends are the surroundings' fault and may be over with the next start; others come again.
        final = pod.ended_code in set(ExitCode) and ExitCode(pod.ended_code).disposition is Disposition.FAIL
        return PodProblem(pod.failure.reason, pod.failure.message, fatal=final or pod.restarts >= CRASHES)
    if pod.waiting_reason == CRASH_LOOP or pod.restarts >= CRASHES:
        ended = f"the server ends with code {pod.ended_code}" if pod.ended_code is not None else "the server ends"
        message = f"{ended} again and again; see kubectl logs {pod.name} --previous"
        return PodProblem(CRASH_LOOP, message, fatal=pod.restarts >= CRASHES)
    return None


def _diagnose_configuration(text: str) -> PodProblem:
    key = MISSING_KEY.search(text)
    if key is not None:
        secret = key.group(2).rpartition("/")[2]
        return PodProblem(SECRET_KEY_MISSING, f"Secret {secret} has no key {key.group(1)}; add it", fatal=False)
    found = MISSING_SECRET.search(text)
    if found is not None:
        message = (
            f"Secret {found.group(1)} does not exist in this namespace; create it, and the pods start by themselves"
        )
        return PodProblem(SECRET_NOT_FOUND, message, fatal=False)
    message = f"the container cannot be set up: {text or 'the kubelet gives no reason'}"
    return PodProblem(CONTAINER_CONFIG_ERROR, message, fatal=False)
