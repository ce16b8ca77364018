"""What a Job and its pods mean: the part of a decision that Dataset, FineTune and Evaluation share."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, Literal, assert_never

from pydantic import ValidationError

from attune.api.meta import Condition, PodResources, QueueableSpec, Resource, Status
from attune.contract.exitcode import KILLED, REASON_SWALLOWED, ExitCode
from attune.contract.job import JobSpec, Owner, Recipe
from attune.contract.result import Failure, Result, Summary
from attune.domain.actions import NO_ACCESS, Access, DeleteJob, EnsureJob, JobAction, Plan
from attune.domain.conditions import State, decide_conditions
from attune.domain.events import decide_events
from attune.domain.kueue import ADMITTED, QUEUED, ObservedQueue, describe_wait
from attune.domain.names import build_job_name, fingerprint, is_same_run
from attune.domain.times import format_time

SUSPENDED: Final = "Suspended"
SUSPENDED_BY_OTHERS: Final = "SuspendedByOthers"
STARTING: Final = "Starting"
RETRYING: Final = "Retrying"
SECRET_NOT_FOUND: Final = "SecretNotFound"  # noqa: S105 (a reason, no secret)
SECRET_KEY_MISSING: Final = "SecretKeyMissing"  # noqa: S105
CLAIM_NOT_FOUND: Final = "ClaimNotFound"
IMAGE_PULL_FAILED: Final = "ImagePullFailed"
UNSCHEDULABLE: Final = "Unschedulable"
POD_NOT_CREATED: Final = "PodNotCreated"
OUT_OF_MEMORY: Final = ExitCode.OUT_OF_MEMORY.reason
RESULT_UNREADABLE: Final = "ResultUnreadable"
RESULT_LOST: Final = "ResultLost"
NODE_LOST: Final = "NodeLost"

# How the kubelet words what keeps a container from starting.
PULL_REASONS: Final = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
)
MISSING_SECRET: Final = re.compile(r'secrets? "([^"]+)" not found')
MISSING_CLAIM: Final = re.compile(r'persistentvolumeclaim "([^"]+)" not found')
MISSING_KEY: Final = re.compile(r"couldn't find key (\S+) in Secret (\S+)")
# Kueue's reasons to let a Job wait change without an event of the Job's.
_QUEUE_SECONDS: Final = 30.0
_POD_SECONDS: Final = 5.0
# What may be otherwise later without any change of the resource: the store's or the hub's answer, room for all pods.
_RETRIED: Final = frozenset(
    {ExitCode.ACCESS_DENIED, ExitCode.NOT_FOUND, ExitCode.STORE_UNAVAILABLE, ExitCode.GANG_INCOMPLETE}
)


@dataclass(frozen=True)
class ObservedPod:
    """A pod of a Job, as far as decisions read it. index: which one of several that work together, from 0."""

    name: str
    created: str
    phase: Literal["Pending", "Running", "Succeeded", "Failed", "Unknown"]
    index: int = 0
    ip: str | None = None
    image: str | None = None
    image_id: str | None = None  # what the kubelet says it runs, once it does
    waiting_reason: str | None = None
    waiting_message: str | None = None
    unschedulable: str | None = None  # the scheduler's message
    exit_code: int | None = None
    terminated_reason: str | None = None
    termination_message: str | None = None
    disrupted: bool = False


@dataclass(frozen=True)
class ObservedJob:
    """A Job of the resource at hand, with its pods.

    suspended_by: who suspended it, where that was not this operator. queue: where it is in one of Kueue's. refusal: why
    the API server lets it have no pod, or not all of several.
    """

    name: str
    suspended: bool = False
    suspended_by: str | None = None
    queue: ObservedQueue | None = None
    refusal: str | None = None
    deleting: bool = False
    complete: bool = False
    failed: bool = False
    failed_reason: str | None = None
    failed_message: str | None = None
    finished: datetime | None = None
    config_present: bool = True  # the ConfigMap with its job.json and, for several pods, the Service that they need
    pods: tuple[ObservedPod, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether it is complete or has failed."""
        return self.complete or self.failed

    @property
    def newest_pod(self) -> ObservedPod | None:
        """The pod that was created last."""
        return max(self.pods, key=lambda pod: (pod.created, pod.name), default=None)

    @property
    def latest_pods(self) -> tuple[ObservedPod, ...]:
        """The newest pod of each index, in the order of these: those that work together, or are to."""
        newest: dict[int, ObservedPod] = {}
        for pod in sorted(self.pods, key=lambda one: (one.created, one.name)):
            newest[pod.index] = pod
        return tuple(newest[index] for index in sorted(newest))

    @property
    def running_pod(self) -> ObservedPod | None:
        """The pod that works at the moment, and says how far all are: of several the first."""
        working = (pod for pod in self.pods if pod.phase == "Running" and pod.exit_code is None)
        return next((pod for pod in working if pod.index == 0), None)


@dataclass(frozen=True)
class Surroundings:
    """What decisions on Jobs need of the installation."""

    store_secret: str
    retry_seconds: int
    progress_seconds: int


@dataclass(frozen=True)
class Standing:
    """Where a resource stands: what its conditions, its phase and its Events say."""

    state: State
    phase: str
    reason: str
    message: str
    working: bool = False
    stalled: bool = False
    # Worth a Warning, though it may yet mend itself.
    warning: bool = False

    def conditions(
        self, before: Iterable[Condition], *, terminal: str, generation: int, now: datetime
    ) -> list[Condition]:
        """The three conditions that say so."""
        return decide_conditions(
            before,
            terminal=terminal,
            state=self.state,
            reason=self.reason,
            message=self.message[:2048],
            working=self.working,
            stalled=self.stalled,
            generation=generation,
            now=format_time(now),
        )

    @property
    def event_kind(self) -> Literal["Normal", "Warning"]:
        """How it is announced."""
        return "Warning" if self.stalled or self.warning else "Normal"


@dataclass(frozen=True)
class Wording:
    """How a kind speaks of its work. pending is the terminal condition while nothing is decided yet."""

    pending: State
    phase: str  # while it runs: Preparing, Running
    reason: str  # while it runs: Preparing, Training, Evaluating
    does: str  # "prepares the Dataset"
    more_memory: str  # what to change when memory ran out


@dataclass(frozen=True)
class Course:
    """What to do about a Job now, and where that leaves its owner. result is there once the Job has left one."""

    actions: tuple[JobAction, ...]
    standing: Standing
    result: Result | None = None
    look_again_seconds: float | None = None


def build_ensure_job(
    owner: Owner,
    recipe: Recipe,
    run: str,
    *,
    turn: QueueableSpec,
    suspended: bool,
    resources: PodResources | None,
    access: Access = NO_ACCESS,
    termination_grace_seconds: int = 60,
    placement: tuple[str, ...] = (),
    nodes: int = 1,
) -> EnsureJob:
    """Builds the wish for a Job: its name says which run it is and how it is placed.

    placement: further things that a new Job needs to take effect, and that make no new run.
    """
    turns = {
        "queue": turn.queue_name,
        "workload-priority": turn.workload_priority_class_name,
        "priority": turn.priority_class_name,
    }
    place = fingerprint(
        resources,
        *(f"{index}={secret}" for index, secret in access.source_secrets),
        *(f"endpoint {index}={secret}" for index, secret in access.endpoint_secrets),
        *placement,
        *(f"{what}={name}" for what, name in turns.items() if name is not None),
        digits=5,
    )
    return EnsureJob(
        name=build_job_name(owner.name, recipe.recipe, run, place, nodes=nodes),
        spec=JobSpec(owner=owner, result_key=build_key("results", owner, run) + ".json", recipe=recipe),
        suspended=suspended,
        resources=resources,
        source_secrets=access.source_secrets,
        source_claims=access.source_claims,
        endpoint_secrets=access.endpoint_secrets,
        termination_grace_seconds=termination_grace_seconds,
        queue=turn.queue_name,
        workload_priority_class=turn.workload_priority_class_name,
        priority_class=turn.priority_class_name,
        nodes=nodes,
    )


def build_key(area: str, owner: Owner, run: str) -> str:
    """Builds a key (prefix) in the namespace's store: never another namespace's, never another resource's.

    build_key("results", <Dataset calls in ns team>, "1a2b") -> "results/team/dataset/calls/1a2b".
    """
    return f"{area}/{owner.namespace}/{owner.kind.lower()}/{owner.name}/{run}"


def build_plan(
    resource: Resource,
    status: Status,
    standing: Standing,
    now: datetime,
    actions: tuple[JobAction, ...],
    look_again_seconds: float | None = None,
) -> Plan:
    """Builds the plan of a kind that works through a Job: its actions, what is announced, and the whole status."""
    before, terminal = resource.status.conditions, resource.TERMINAL_CONDITION
    generation = resource.metadata.generation
    after = standing.conditions(before, terminal=terminal, generation=generation, now=now)
    events = decide_events(before, after, terminal=terminal, kind=standing.event_kind)
    return Plan(
        actions=(*actions, *events),
        status=status.model_copy(
            update={"observed_generation": generation, "phase": standing.phase, "conditions": after}
        ),
        look_again_seconds=look_again_seconds,
    )


def decide_course(
    wanted: EnsureJob,
    jobs: tuple[ObservedJob, ...],
    *,
    words: Wording,
    now: datetime,
    surroundings: Surroundings,
) -> Course:
    """Decides what to do about the wanted Job; Jobs of earlier specs are deleted first."""
    outdated = decide_outdated(wanted.name, jobs)
    job = next((one for one in jobs if one.name == wanted.name), None)
    if job is None and any(not one.ended and is_same_run(one.name, wanted.name) for one in jobs):
        # Its pod may still save the checkpoint that the wanted one is to go on from.
        standing = _hold(words) if wanted.suspended else _begin(wanted, words)
        return Course(outdated, standing, look_again_seconds=2)
    course = _decide_wanted(wanted, job, words, now, surroundings)
    return replace(course, actions=(*outdated, *course.actions))


def decide_outdated(wanted: str, jobs: Iterable[ObservedJob], *, keep_same_run: bool = False) -> tuple[DeleteJob, ...]:
    """Chooses the Jobs that are no longer wanted. keep_same_run: those whose result is in the status stay."""
    return tuple(
        DeleteJob(one.name, pods_first=not one.ended and is_same_run(one.name, wanted))
        for one in jobs
        if one.name != wanted and not one.deleting and not (keep_same_run and is_same_run(one.name, wanted))
    )


def decide_expired(
    jobs: Iterable[ObservedJob], seconds: int | None, now: datetime
) -> tuple[tuple[DeleteJob, ...], float | None]:
    """Chooses the complete Jobs that have been kept long enough, and says after how many seconds the next one will be.

    For the owner of a result that is in the status: what nobody has read yet is not to go. A failed Job stays, or what
    it failed of would be tried again.
    """
    if seconds is None:
        return (), None
    left = {
        one.name: seconds - (now - one.finished).total_seconds()
        for one in jobs
        if one.complete and one.finished is not None and not one.deleting
    }
    later = [time for time in left.values() if time > 0]
    return tuple(DeleteJob(name) for name, time in left.items() if time <= 0), min(later, default=None)


def _decide_wanted(
    wanted: EnsureJob, job: ObservedJob | None, words: Wording, now: datetime, surroundings: Surroundings
) -> Course:
    held = _hold(words)
    if job is None:
        return Course((), held) if wanted.suspended else Course((wanted,), _begin(wanted, words))
    if job.deleting:
        return Course((), held if wanted.suspended else _begin(wanted, words), look_again_seconds=2)
    if job.failed:
        return _decide_failed(wanted, job, words, now, surroundings)
    if job.complete:
        return _decide_complete(wanted, job, words)
    if job.queue is not None:
        return _decide_queued(wanted, job, job.queue, words, surroundings)
    if job.suspended and job.suspended_by is not None and not wanted.suspended:
        others = (
            f"Job {job.name} was suspended by {job.suspended_by}, which is the one to let it go on; if it never will, "
            f"kubectl delete job {job.name} starts it anew"
        )
        actions = () if job.config_present else (wanted,)
        return Course(actions, _work_on(words, "Pending", SUSPENDED_BY_OTHERS, others, warning=True))
    actions = (wanted,) if job.suspended != wanted.suspended or not job.config_present else ()
    if wanted.suspended or job.suspended:
        return Course(actions, held if wanted.suspended else _begin(wanted, words))
    return _follow(wanted, job, words, surroundings, actions)


def _decide_queued(
    wanted: EnsureJob, job: ObservedJob, queue: ObservedQueue, words: Wording, surroundings: Surroundings
) -> Course:
    """Follows a Job whose turn is Kueue's to give and to take; what is done to spec.suspend, Kueue would undo.

    A resource that is suspended leaves the queue: its Job is deleted, and a later one goes on from the checkpoint.
    """
    if wanted.suspended:
        return Course((DeleteJob(job.name, pods_first=True),), _hold(words))
    actions = () if job.config_present else (wanted,)
    if not job.suspended:
        return _follow(wanted, job, words, surroundings, actions)
    wait = describe_wait(job.name, queue)
    standing = _work_on(words, QUEUED, wait.reason, wait.message, warning=wait.warning)
    return Course(actions, standing, look_again_seconds=_QUEUE_SECONDS)


def _follow(
    wanted: EnsureJob,
    job: ObservedJob,
    words: Wording,
    surroundings: Surroundings,
    actions: tuple[JobAction, ...],
) -> Course:
    """Says where a Job stands that may run and has not ended."""
    if job.refusal is not None:
        refused = _work_on(words, "Pending", POD_NOT_CREATED, _describe_refusal(wanted, job.refusal), warning=True)
        return Course(actions, refused, look_again_seconds=_POD_SECONDS)
    # That the API server refuses a pod shows in no event of the Job's.
    look_again = None if len(job.latest_pods) >= wanted.nodes else _POD_SECONDS
    described = _describe_pods(wanted, job, words, surroundings)
    if described is not None:
        return Course(actions, described, look_again_seconds=look_again)
    if job.queue is None:
        return Course(actions, _begin(wanted, words), look_again_seconds=look_again)
    admitted = f"queue {job.queue.name} has admitted Job {job.name}; {_starts(wanted)}"
    return Course(actions, _work_on(words, "Pending", ADMITTED, admitted), look_again_seconds=look_again)


def _begin(wanted: EnsureJob, words: Wording) -> Standing:
    if wanted.queue is not None:
        return _work_on(words, QUEUED, QUEUED, f"Job {wanted.name} waits in queue {wanted.queue}")
    return _work_on(words, "Pending", STARTING, f"Job {wanted.name} {words.does}; {_starts(wanted)}")


def _starts(wanted: EnsureJob) -> str:
    return "its pod starts" if wanted.nodes == 1 else f"its {wanted.nodes} pods start, and wait for each other"


def _describe_refusal(wanted: EnsureJob, refusal: str) -> str:
    # Each attempt has another name.
    plain = re.sub(rf"{re.escape(wanted.name)}-[a-z0-9]*", wanted.name, refusal)
    field = wanted.priority_class is not None and f"PriorityClass with name {wanted.priority_class}" in plain
    help_ = "; create it or correct spec.priorityClassName" if field else ""
    none = "no pod" if wanted.nodes == 1 else f"not all of its {wanted.nodes} pods"
    return f"Job {wanted.name} gets {none}: {plain}{help_} (it is tried again by itself)"


def _hold(words: Wording) -> Standing:
    return Standing(words.pending, SUSPENDED, SUSPENDED, "spec.suspend is true; set it to false to go on")


def _describe_pods(wanted: EnsureJob, job: ObservedJob, words: Wording, surroundings: Surroundings) -> Standing | None:
    """Says where a Job stands that is neither held nor ended; None while its pods are on their way.

    Pods that work together only do so while all of them are there: what holds one back holds the Job back.
    """
    pods = job.latest_pods
    starting = (pod for pod in pods if pod.phase not in ("Running", "Succeeded", "Failed"))
    blocked = next((why for pod in starting if (why := _describe_waiting(wanted, pod, surroundings)) is not None), None)
    if blocked is not None:
        return _work_on(words, "Pending", *blocked, warning=True)
    failed = [pod for pod in pods if pod.phase == "Failed"]
    if failed:
        reason, message, _ = describe_failure(job, words)
        cause = "its pod was evicted" if max(failed, key=_weigh_end).disrupted else f"{reason}: {message}"
        again = (
            "a new pod is started" if wanted.nodes == 1 else f"all {wanted.nodes} pods go back to the last checkpoint"
        )
        return _work_on(words, words.phase, RETRYING, f"{cause}; {again}", warning=True)
    # A container that has just ended shows before its pod has, and the pod before its Job: all of that is still work.
    if len(pods) >= wanted.nodes and all(pod.phase in ("Running", "Succeeded") for pod in pods):
        return _work_on(words, words.phase, words.reason, f"Job {wanted.name} {words.does}")
    return None


def _work_on(words: Wording, phase: str, reason: str, message: str, *, warning: bool = False) -> Standing:
    return Standing(words.pending, phase, reason, message, working=True, warning=warning)


def _decide_failed(
    wanted: EnsureJob, job: ObservedJob, words: Wording, now: datetime, surroundings: Surroundings
) -> Course:
    reason, message, code = describe_failure(job, words)
    if reason == NODE_LOST:
        again = _work_on(words, words.phase, RETRYING, f"{message}; the Job runs again", warning=True)
        return Course((DeleteJob(job.name),), _hold(words) if wanted.suspended else again, look_again_seconds=1)
    failed = Standing("False", "Failed", reason, message, stalled=True)
    if code not in _RETRIED or wanted.suspended:
        return Course((), failed)
    minutes = max(1, round(surroundings.retry_seconds / 60))
    failed = replace(
        failed,
        message=f"{message} (tried again every {minutes} min; at once after kubectl delete job {job.name})",
    )
    passed = (now - job.finished).total_seconds() if job.finished is not None else float(surroundings.retry_seconds)
    left = surroundings.retry_seconds - passed
    if left > 0:
        return Course((), failed, look_again_seconds=left)
    return Course((DeleteJob(job.name),), failed, look_again_seconds=1)


def _decide_complete(wanted: EnsureJob, job: ObservedJob, words: Wording) -> Course:
    """Reads the result; where its pod has gone before it was read, the Job runs again and says it again."""
    pod = next((one for one in job.pods if one.phase == "Succeeded"), None)
    if pod is None:
        lost = Standing(
            words.pending,
            "Pending",
            RESULT_LOST,
            f"the pod of Job {job.name} went before its result was read; the Job runs again, and finds it in the store",
            working=True,
            warning=True,
        )
        return Course((DeleteJob(job.name),), lost, look_again_seconds=1)
    summary = parse_summary(pod.termination_message) if pod.termination_message else None
    if summary is None or summary.result is None or summary.result.recipe != wanted.spec.recipe.recipe:
        unreadable = Standing(
            "False",
            "Failed",
            RESULT_UNREADABLE,
            f"the pod of Job {job.name} ended well, but left no result that this operator understands; "
            "use operator and trainer images of one release, then delete the Job",
            stalled=True,
        )
        return Course((), unreadable)
    done = Standing("True", "Succeeded", "Succeeded", f"Job {job.name} is done")
    return Course((), done, result=summary.result)


def describe_failure(job: ObservedJob, words: Wording) -> tuple[str, str, ExitCode | None]:
    """Gives reason, message and exit code of a Job's latest failure: the recipe's own words where it left some."""
    # Of pods that work together the first to end is looked for; the others have only followed it.
    ended = [pod for pod in job.latest_pods if pod.exit_code not in (None, 0)]
    earlier = [pod for pod in job.pods if pod.exit_code not in (None, 0)]
    pod = max(ended, key=_weigh_end, default=max(earlier, key=lambda one: (one.created, one.name), default=None))
    if pod is None or pod.exit_code is None:
        reason = job.failed_reason or "JobFailed"
        return reason, job.failed_message or f"Job {job.name} failed and its pods are gone", None
    code = ExitCode(pod.exit_code) if pod.exit_code in set(ExitCode) else None
    failure = _parse_failure(pod.termination_message)
    if pod.terminated_reason == REASON_SWALLOWED:
        return NODE_LOST, f"the node of pod {pod.name} went down while its container ran", None
    if pod.terminated_reason == "OOMKilled" or (pod.exit_code == KILLED and failure is None):
        message = f"the container was killed because it needed more memory than its limit; {words.more_memory}"
        return OUT_OF_MEMORY, message, ExitCode.OUT_OF_MEMORY
    if failure is not None:
        return failure.reason, failure.message, code
    reason = code.reason if code is not None else "JobFailed"
    return reason, f"the container ended with code {pod.exit_code}; see kubectl logs {pod.name}", code


def _weigh_end(pod: ObservedPod) -> int:
    """Orders the ends of pods that worked together: the greatest is the cause of the others."""
    if pod.disrupted:
        return 2
    if pod.exit_code == ExitCode.PEER_LOST:
        return 0
    return 1 if pod.exit_code == ExitCode.TERMINATED else 3


def parse_summary(message: str) -> Summary | None:
    """Reads a termination message; None when it is no Summary of this contract."""
    try:
        return Summary.model_validate_json(message)
    except ValidationError:
        return None


def _parse_failure(message: str | None) -> Failure | None:
    summary = parse_summary(message) if message else None
    return summary.failure if summary is not None else None


def _describe_waiting(wanted: EnsureJob, pod: ObservedPod, surroundings: Surroundings) -> tuple[str, str] | None:
    """Says why a pod does not start, where somebody has to do something; None while it is on its way."""
    claim = MISSING_CLAIM.search(pod.unschedulable or "")
    if claim is not None:
        return (
            CLAIM_NOT_FOUND,
            (
                f"PersistentVolumeClaim {claim.group(1)} does not exist in this namespace; create it or correct the "
                "source's claimName, and the Job goes on by itself"
            ),
        )
    if pod.unschedulable:
        return UNSCHEDULABLE, f"no node fits the pod: {pod.unschedulable}"
    if pod.waiting_reason in PULL_REASONS:
        # The kubelet's own message changes from one attempt to the next; a status that follows it never rests.
        return (
            IMAGE_PULL_FAILED,
            (
                f"image {pod.image} cannot be pulled: check that it exists and that the node may pull it "
                f"(kubectl describe pod {pod.name} has the registry's answer); it is tried again by itself"
            ),
        )
    if pod.waiting_reason != "CreateContainerConfigError":
        return None
    text = pod.waiting_message or ""
    key = MISSING_KEY.search(text)
    if key is not None:
        secret = key.group(2).rpartition("/")[2]
        return SECRET_KEY_MISSING, f"Secret {secret} has no key {key.group(1)}; add it, and the Job goes on by itself"
    found = MISSING_SECRET.search(text)
    if found is not None:
        secret = found.group(1)
        what = "the store's" if secret == surroundings.store_secret else "a source's"
        if any(secret == name for _, name in wanted.endpoint_secrets):
            return (
                SECRET_NOT_FOUND,
                (
                    f"Secret {secret} (key of a candidate's endpoint) does not exist in this namespace; create it with "
                    "the key apiKey, and the Job goes on by itself"
                ),
            )
        return (
            SECRET_NOT_FOUND,
            (
                f"Secret {secret} ({what} endpoint and credentials) does not exist in this namespace; create it, and "
                "the Job goes on by itself"
            ),
        )
    return "ContainerConfigError", f"the container cannot be set up: {text or 'the kubelet gives no reason'}"


Availability = Literal["Ready", "NotReady", "Failed", "NotFound"]


def describe_availability(kind: str, name: str, availability: Availability) -> tuple[str, str] | None:
    """Gives reason and message for a referent that cannot be used; None when it can."""
    done = "ready" if kind == "Dataset" else "finished"
    match availability:
        case "Ready":
            return None
        case "NotReady":
            return f"{kind}Not{done.capitalize()}", f"{kind} {name} is not {done} yet; waiting for it"
        case "Failed":
            return (
                f"{kind}Failed",
                (
                    f"{kind} {name} has failed; mend it (kubectl describe {kind.lower()} {name}), and this goes on by "
                    "itself"
                ),
            )
        case "NotFound":
            return f"{kind}NotFound", f"there is no {kind} {name} in this namespace; create it or correct the reference"
        case _:
            assert_never(availability)
