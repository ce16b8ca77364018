"""What a decision may ask for: a closed union of actions, and the Plan that carries them."""

from dataclasses import dataclass
from typing import Literal

from attune.api.canary import ArmModel
from attune.api.meta import PodResources, Status
from attune.contract.job import JobSpec, ScoreRecipe
from attune.contract.metrics import Track


@dataclass(frozen=True)
class EnsureJob:
    """A Job (and the ConfigMap with its job.json) must exist under this name, running or suspended.

    source_secrets: name of the Secret with a source's own credentials, by the source's index.
    """

    name: str
    spec: JobSpec
    suspended: bool
    resources: PodResources | None = None
    source_secrets: tuple[tuple[int, str], ...] = ()
    # GPU processes or not, a Job that trains gets this long to save a checkpoint when it is told to stop.
    termination_grace_seconds: int = 60


@dataclass(frozen=True)
class DeleteJob:
    """A Job (with its ConfigMap and pods) must be gone."""

    name: str


@dataclass(frozen=True)
class EnsureArm:
    """The Deployment and the Service of an arm must serve this model with so many pods."""

    track: Track
    model: ArmModel
    replicas: int


@dataclass(frozen=True)
class DeleteArm:
    """The Deployment of an arm must be gone; its Service stays, so that the route always resolves."""

    track: Track


@dataclass(frozen=True)
class EnsureRoute:
    """The HTTPRoute must carry these weights; they sum to 100.

    failed_rollout is written into the route in the same request as the weights: once it says that a rollout has
    failed, no later pass can raise that rollout's weight, whatever else was lost.
    """

    stable_weight: int
    canary_weight: int
    rollout: str | None
    failed_rollout: str | None
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
