"""What a decision may ask for: a closed union of actions, and the Plan that carries them."""

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from attune.api.canary import ArmModel, PodTemplate
from attune.api.meta import PodResources, Status
from attune.contract.job import JobSpec, ScoreRecipe
from attune.contract.metrics import Track


class Access(NamedTuple):
    """What a Job's pod gets of its namespace beside the store, each by the index of the source or candidate it is for.

    source_secrets: Secret with a source's own credentials. source_claims: PersistentVolumeClaim that a source is on.
    endpoint_secrets: Secret with the key of a candidate's endpoint.
    """

    source_secrets: tuple[tuple[int, str], ...] = ()
    source_claims: tuple[tuple[int, str], ...] = ()
    endpoint_secrets: tuple[tuple[int, str], ...] = ()


NO_ACCESS: Final = Access()


@dataclass(frozen=True)
class EnsureJob:
    """A Job (and the ConfigMap with its job.json) must exist under this name, running or suspended.

    With a queue (of Kueue) the Job is created suspended and never changed again: Kueue decides when it runs. With
    several nodes it has as many pods, and they find each other through a headless Service of the owner's. What it may
    read is what Access says.
    """

    name: str
    spec: JobSpec
    suspended: bool
    resources: PodResources | None = None
    source_secrets: tuple[tuple[int, str], ...] = ()
    source_claims: tuple[tuple[int, str], ...] = ()
    endpoint_secrets: tuple[tuple[int, str], ...] = ()
    # GPU processes or not, a Job that trains gets this long to save a checkpoint when it is told to stop.
    termination_grace_seconds: int = 60
    queue: str | None = None
    workload_priority_class: str | None = None
    priority_class: str | None = None
    nodes: int = 1


@dataclass(frozen=True)
class DeleteJob:
    """A Job (with its ConfigMap and pods) must be gone.

    pods_first: the Job goes only after its pods have ended, so that another of its name cannot begin beside them.
    """

    name: str
    pods_first: bool = False


class FormerArm(NamedTuple):
    """What stable served before the promotion that is under way."""

    model: ArmModel
    template: PodTemplate


@dataclass(frozen=True)
class EnsureArm:
    """The Deployment of an arm must serve this model with so many pods.

    template is the one that the arm was rolled out with, its image filled in: while the spec already asks for
    another, stable must go on as it is. former is written down in the request that replaces it, and forgotten when the
    promotion is over.
    """

    track: Track
    model: ArmModel
    template: PodTemplate
    replicas: int
    former: FormerArm | None = None


@dataclass(frozen=True)
class DeleteArm:
    """The Deployment of an arm must be gone; its Service stays, so that the route always resolves."""

    track: Track


@dataclass(frozen=True)
class RolloutRecord:
    """What is known of a rollout, kept on the route beside the weights, so that both change in one request.

    step is None until the first step began. reached is the weight that the canary was last given; losses counts how
    often it has lost that for want of pods in this step. promoting is true from the last Pass until stable serves the
    new model; with a failed_reason, until it serves its former one again. Any other rollout with a failed_reason has
    failed: no later pass can raise its weight, whatever else was lost. Times are RFC 3339 in UTC.
    """

    id: str
    step: int | None
    started: str
    step_started: str
    reached: int = 0
    losses: int = 0
    promoting: bool = False
    failed_reason: str | None = None
    failed_message: str | None = None


@dataclass(frozen=True)
class EnsureRoute:
    """The HTTPRoute (and the Services that it names) must carry these weights, which sum to 100, and this record."""

    stable_weight: int
    canary_weight: int
    rollout: RolloutRecord | None
    reason: str


@dataclass(frozen=True)
class EnsureScorer:
    """The Job that replays golden utterances to both arms must run."""

    name: str
    recipe: ScoreRecipe


@dataclass(frozen=True)
class EmitEvent:
    """An Event on the custom resource."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


JobAction = EnsureJob | DeleteJob | EmitEvent
CanaryAction = EnsureArm | DeleteArm | EnsureRoute | EnsureScorer | DeleteJob | EmitEvent
Action = JobAction | CanaryAction


@dataclass(frozen=True)
class Plan:
    """What to do now: actions in order, then the status, then when to look again (None: when something changes)."""

    actions: tuple[Action, ...]
    status: Status
    look_again_seconds: float | None = None
