"""What a decision on a Canary reads."""

from dataclasses import dataclass
from datetime import datetime

from attune.api.canary import Canary, CanarySpec, CanaryStatus, PodTemplate
from attune.api.dataset import Dataset
from attune.api.finetune import FineTune
from attune.domain.arms import ObservedArm, ObservedGateway, ObservedRoute
from attune.domain.canary.identity import fill_image
from attune.domain.jobs import Availability, ObservedJob
from attune.domain.verdict import NoEvidence, PairedSums


@dataclass(frozen=True)
class ObservedCanary:
    """Everything that the decision on a Canary reads.

    fine_tune and dataset are the referents, None where they are missing, with whether they can be built on. Since
    looking_since this operator has been there to look.
    """

    canary: Canary
    now: datetime
    looking_since: datetime
    inference_image: str
    fine_tune: FineTune | None
    fine_tune_state: Availability
    dataset: Dataset | None
    dataset_state: Availability
    gateway: ObservedGateway
    stable: ObservedArm | None
    trial: ObservedArm | None  # the canary arm
    route: ObservedRoute | None
    scorers: tuple[ObservedJob, ...]
    evidence: PairedSums | NoEvidence
    prometheus_hosts: tuple[str, ...] = ()  # that may be asked; empty: any

    @property
    def spec(self) -> CanarySpec:
        """What is wanted."""
        return self.canary.spec

    @property
    def status(self) -> CanaryStatus:
        """What was written last."""
        return self.canary.status

    @property
    def template(self) -> PodTemplate:
        """The template that is wanted, its image filled in."""
        return fill_image(self.spec.template, self.inference_image)

    @property
    def stable_ready(self) -> bool:
        """Whether stable serves at all."""
        return self.stable is not None and self.stable.ready > 0


def is_serving(o: ObservedCanary) -> bool:
    """Whether requests have ever been routed here; before that a model needs no trial."""
    return o.route is not None or (o.status.stable is not None and o.status.stable.weight > 0)


def has_all_pods(o: ObservedCanary, arm: ObservedArm | None) -> bool:
    """Whether as many pods of an arm serve its model as are wanted now, which may be more than were asked for."""
    return arm is not None and arm.rolled_out and arm.replicas == o.spec.replicas
