"""What the four kinds share: metadata, conditions, references, pods' resources, and how a kind names itself."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from attune.contract.base import ContractModel, DnsLabel, Uri
from attune.contract.job import Owner

GROUP = "attune.dev"
VERSION = "v1alpha1"
# kubectl get attune lists all four kinds.
CATEGORY = "attune"

# Keys that pydantic passes on to the JSON schema, from where the CRD generator takes them.
CEL = "x-kubernetes-validations"


def cel(*rules: tuple[str, str]) -> dict[str, Any]:
    """Attaches CEL rules, each (expression, message), to a model or a field."""
    return {CEL: [{"rule": rule, "message": message} for rule, message in rules]}


IMMUTABLE = ("self == oldSelf", "is immutable: create a new resource instead")

# References name an object by a DNS label; one with a dot in its name could never be referred to.
NAME_IS_A_LABEL = (
    "self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
    "the name must hold only lower case letters, digits and hyphens",
)


class SpecModel(ContractModel):
    """Part of a spec: camelCase, frozen, unknown keys refused."""


class StatusModel(BaseModel):
    """Part of a status: as a spec, but keys that another version of the operator wrote are passed over."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")


class Metadata(StatusModel):
    """The parts of an object's metadata that decisions read."""

    name: str
    namespace: str
    uid: str
    resource_version: str = ""
    generation: int = 1
    deletion_timestamp: str | None = None
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}


class Condition(StatusModel):
    """A Kubernetes condition (meta/v1)."""

    type: str = Field(max_length=63, description="CamelCase name of the condition.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: str = Field(
        min_length=1, max_length=63, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", description="CamelCase cause."
    )
    message: str = Field(max_length=2048, description="What happened and, where something must change, what.")
    last_transition_time: str = Field(
        max_length=32,
        description="When status changed last.",
        json_schema_extra={"format": "date-time"},
    )
    observed_generation: int = Field(ge=0, description="Generation of the spec that this speaks of.")


Conditions = Annotated[
    list[Condition],
    Field(
        max_length=16,
        description="State in detail, by type.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]


class Status(StatusModel):
    """What every kind reports."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="Generation that the operator has acted on."
    )
    phase: str | None = Field(default=None, max_length=32, description="Summary for people; conditions are the truth.")
    conditions: Conditions = []


class LocalRef(SpecModel):
    """Names an object in the same namespace."""

    name: DnsLabel = Field(description="Name of the object, in the same namespace.")


class SecretRef(SpecModel):
    """Names a Secret in the same namespace."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253)] = Field(
        description="Name of the Secret, in the same namespace."
    )


Quantity = Annotated[
    str,
    Field(
        pattern=r"^[0-9]{1,12}(\.[0-9]{1,3})?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$",
        max_length=20,
        description="A Kubernetes quantity: 500m, 4, 16Gi.",
    ),
]
ResourceName = Annotated[str, Field(min_length=1, max_length=63)]
# A DNS subdomain, and short enough to be the value of a label as well.
LabelName = Annotated[
    str,
    Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", min_length=1, max_length=63),
]
PRIORITY_NEEDS_A_QUEUE = (
    "!has(self.spec.workloadPriorityClassName) || has(self.spec.queueName)",
    "spec.workloadPriorityClassName is Kueue's and needs spec.queueName; without a queue use spec.priorityClassName",
)


class PodResources(SpecModel):
    """What a pod's container asks for and is held to."""

    requests: Annotated[dict[ResourceName, Quantity], Field(max_length=16)] | None = Field(
        default=None, description="What the scheduler sets aside."
    )
    limits: Annotated[dict[ResourceName, Quantity], Field(max_length=16)] | None = Field(
        default=None, description="What the container may use at most; nvidia.com/gpu goes here."
    )


class QueueableSpec(SpecModel):
    """What a spec says of the order in which its Job gets its turn."""

    queue_name: LabelName | None = Field(
        default=None,
        description=(
            "A LocalQueue of Kueue in this namespace: the Job is created suspended and labelled with it, and Kueue "
            "alone decides when it runs."
        ),
    )
    workload_priority_class_name: LabelName | None = Field(
        default=None, description="A WorkloadPriorityClass of Kueue: the Job's place in the queue."
    )
    priority_class_name: LabelName | None = Field(
        default=None,
        description=(
            "PriorityClass of the Job's pods; in a queue it is the Job's place too, where workloadPriorityClassName "
            "is absent."
        ),
    )


class ModelSource(SpecModel):
    """Where a model comes from. Exactly one of uri and fineTuneRef is given."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("has(self.uri) != has(self.fineTuneRef)", "exactly one of uri and fineTuneRef must be given")
        )
    )

    uri: Uri | None = Field(default=None, description="Files of a model: s3://bucket/prefix or hf://organisation/name.")
    fine_tune_ref: LocalRef | None = Field(default=None, description="A FineTune; its finished model is taken.")


class Resource(BaseModel):
    """One custom resource. Subclasses say how the kind is named and what kubectl prints of it."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    KIND: ClassVar[str]
    PLURAL: ClassVar[str]
    SHORT_NAME: ClassVar[str]
    # The condition that says whether it is as it should be: Ready or Succeeded.
    TERMINAL_CONDITION: ClassVar[str]
    # (heading, type, JSON path, priority).
    COLUMNS: ClassVar[tuple[tuple[str, str, str, int], ...]]
    # CEL rules on the whole object.
    RULES: ClassVar[tuple[tuple[str, str], ...]] = ()

    metadata: Metadata
    status: Status = Status()

    def owner(self) -> Owner:
        """This resource as its Jobs know it."""
        return Owner(kind=self.KIND, namespace=self.metadata.namespace, name=self.metadata.name, uid=self.metadata.uid)
