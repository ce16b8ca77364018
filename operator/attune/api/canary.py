"""Canary: a long-lived deployment of a recogniser whose model is rolled out by live word error rate."""

from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from attune.api.meta import (
    LocalRef,
    ModelSource,
    PodResources,
    Resource,
    SpecModel,
    Status,
    StatusModel,
    cel,
)
from attune.contract.base import DecimalString, DnsLabel, between

LabelKey = Annotated[str, Field(min_length=1, max_length=253)]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
Hostname = Annotated[
    str,
    Field(
        pattern=r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
        min_length=1,
        max_length=253,
    ),
]
Seconds = Annotated[int, Field(ge=1, le=604800)]


class TemplateMetadata(SpecModel):
    """Labels and annotations of the inference pods."""

    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=32)] = Field(
        default={},
        description="Labels, but for those of attune.dev/ and app.kubernetes.io/managed-by, which are the operator's.",
        json_schema_extra=cel(
            (
                "self.all(key, !key.startsWith('attune.dev/') && key != 'app.kubernetes.io/managed-by')",
                "labels of attune.dev/ and app.kubernetes.io/managed-by are the operator's",
            )
        ),
    )
    annotations: Annotated[dict[LabelKey, Annotated[str, Field(max_length=1024)]], Field(max_length=32)] = Field(
        default={}, description="Annotations."
    )


class EnvironmentVariable(SpecModel):
    """A plain environment variable."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)] = Field(description="Name.")
    value: Annotated[str, Field(max_length=4096)] = Field(default="", description="Value; never a secret.")


class ServerContainer(SpecModel):
    """The container that serves the model."""

    name: Literal["server"] = Field(description="server: the container that serves the model.")
    image: Annotated[str, Field(min_length=1, max_length=512)] | None = Field(
        default=None, description="Inference image; the operator's own where absent."
    )
    resources: PodResources | None = Field(default=None, description="Resources of the container.")
    env: Annotated[list[EnvironmentVariable], Field(max_length=32)] = Field(
        default=[],
        description="Further environment variables. Names that start with ATTUNE_ are the operator's.",
        json_schema_extra={
            **cel(("self.all(e, !e.name.startsWith('ATTUNE_'))", "names that start with ATTUNE_ are the operator's")),
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
        },
    )


class Toleration(SpecModel):
    """A toleration (core/v1)."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "!has(self.operator) || self.operator != 'Exists' || !has(self.value)",
                "operator Exists goes without a value",
            ),
            (
                "has(self.key) || (has(self.operator) && self.operator == 'Exists')",
                "without a key, operator must be Exists",
            ),
        )
    )

    key: Annotated[str, Field(max_length=253)] | None = Field(default=None, description="Taint key.")
    operator: Literal["Exists", "Equal"] | None = Field(default=None, description="Exists or Equal.")
    value: LabelValue | None = Field(default=None, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Taint effect."
    )


class TemplatePodSpec(SpecModel):
    """The part of a PodSpec that may be given."""

    containers: Annotated[list[ServerContainer], Field(max_length=1)] = Field(
        default=[],
        description="The container named server.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] | None = Field(
        default=None, description="Labels that a node must have."
    )
    tolerations: Annotated[list[Toleration], Field(max_length=16)] | None = Field(
        default=None, description="Taints that are tolerated."
    )
    service_account_name: Annotated[str, Field(max_length=253)] | None = Field(
        default=None, description="ServiceAccount of the pods (for workload identity)."
    )
    priority_class_name: Annotated[str, Field(max_length=253)] | None = Field(
        default=None, description="Priority class of the pods."
    )


class PodTemplate(SpecModel):
    """The inference pods: a part of a PodTemplateSpec; the model arrives as environment variables."""

    metadata: TemplateMetadata = Field(default_factory=TemplateMetadata, description="Labels and annotations.")
    spec: TemplatePodSpec = Field(default_factory=TemplatePodSpec, description="The pods.")


class ServiceSpec(SpecModel):
    """The Services in front of each arm."""

    port: int = Field(default=8000, ge=1, le=65535, description="Port of the Services and of the route's backends.")


class GatewayRef(SpecModel):
    """The Gateway that the route attaches to. It must allow routes from this namespace."""

    name: DnsLabel = Field(description="Name of the Gateway.")
    namespace: DnsLabel | None = Field(
        default=None, description="Its namespace; this one where absent. The Gateway's allowedRoutes decides."
    )
    section_name: DnsLabel | None = Field(default=None, description="Listener; all where absent.")


class Provider(StrEnum):
    """What divides the traffic."""

    GATEWAY_API = "GatewayApi"


class Traffic(SpecModel):
    """How requests reach the arms."""

    provider: Provider = Field(default=Provider.GATEWAY_API, description="GatewayApi: an HTTPRoute with weights.")
    gateway_ref: GatewayRef = Field(description="The Gateway that the HTTPRoute attaches to.")
    hostnames: Annotated[list[Hostname], Field(min_length=1, max_length=16)] = Field(
        description="Hostnames of the route.", json_schema_extra={"x-kubernetes-list-type": "set"}
    )


class Pause(SpecModel):
    """Waits at the weight that was reached, whatever the analysis says, unless it says Fail."""

    seconds: Seconds = Field(description="How long.")


class Step(SpecModel):
    """A step of a rollout. Exactly one of weight and pause is given."""

    model_config = ConfigDict(
        json_schema_extra=cel(("has(self.weight) != has(self.pause)", "exactly one of weight and pause must be given"))
    )

    weight: int | None = Field(default=None, ge=1, le=100, description="Percent of requests that the canary gets.")
    pause: Pause | None = Field(default=None, description="Waits.")


class PrometheusSource(SpecModel):
    """Where the scorer's counters are read."""

    url: Annotated[
        str, Field(pattern=r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[A-Za-z0-9._/-]*)?$", max_length=512)
    ] = Field(description="Base URL of Prometheus: http://prometheus.monitoring:9090.")


class Golden(SpecModel):
    """Labelled utterances that are replayed to both arms, each once in a rollout."""

    dataset_ref: LocalRef = Field(description="The Dataset.")
    split: Literal["Validation", "Holdout"] = Field(default="Holdout", description="Its split.")
    requests_per_minute: int = Field(
        default=60, ge=1, le=60000, description="Utterances replayed in a minute; each goes to both arms."
    )


class WerTest(SpecModel):
    """When the canary's word error rate is good enough, and when it is too bad."""

    max_increase: Annotated[DecimalString, between("0", "10")] = Field(
        default="0.05",
        description="Tolerated relative increase over stable: 0.05 is 5 %.",
    )
    confidence: Annotated[DecimalString, between("0.8", "0.999")] = Field(
        default="0.95",
        description="Confidence of the sequence, valid however often it is looked at.",
    )
    min_words: int = Field(
        default=2000, ge=1, le=100000000, description="Reference words that must have been scored before Pass."
    )


class NoData(StrEnum):
    """What happens while the analysis knows nothing. It never promotes."""

    HOLD = "Hold"


class Analysis(SpecModel):
    """How a rollout is judged."""

    interval_seconds: int = Field(default=15, ge=1, le=3600, description="Seconds between two looks.")
    prometheus: PrometheusSource = Field(description="Where the counters are read.")
    golden: Golden = Field(description="Labelled utterances that are replayed to both arms.")
    wer: WerTest = Field(default_factory=WerTest, description="The word-error test.")
    on_no_data: NoData = Field(default=NoData.HOLD, description="Hold: the weight stays while nothing is known.")
    no_data_timeout_seconds: Seconds = Field(
        default=1800,
        description="Seconds without any answer while the operator looks; then the rollout is rolled back.",
    )
    max_step_seconds: Seconds = Field(
        default=3600,
        description="Seconds that a step may stay undecided while the operator looks; then the rollout is rolled back.",
    )


class CanarySpec(SpecModel):
    """What is wanted: model, pods, traffic, steps and test. A change of model or template starts a rollout."""

    model: ModelSource = Field(description="The model that should serve.")
    replicas: int = Field(default=1, ge=1, le=1000, description="Pods of the stable arm, and of the canary arm.")
    template: PodTemplate = Field(default_factory=PodTemplate, description="The inference pods.")
    service: ServiceSpec = Field(default_factory=ServiceSpec, description="The Services in front of each arm.")
    traffic: Traffic = Field(description="How requests reach the arms.")
    steps: Annotated[list[Step], Field(min_length=1, max_length=32)] = Field(
        default=[Step(weight=5), Step(weight=25), Step(weight=50), Step(weight=100)],
        description="Weights in rising order, with pauses between them where wanted. Promotion follows the last.",
        json_schema_extra=cel(
            ("self.exists(s, has(s.weight))", "at least one step must have a weight"),
            (
                (
                    "self.filter(s, has(s.weight)).map(s, s.weight).isSorted() && self.all(a, !has(a.weight)"
                    " || self.exists_one(b, has(b.weight) && b.weight == a.weight))"
                ),
                "weights must rise from step to step",
            ),
        ),
    )
    analysis: Analysis = Field(description="How a rollout is judged.")
    progress_deadline_seconds: Seconds = Field(
        default=600, description="Seconds in which an arm's pods must become ready."
    )
    suspend: bool = Field(
        default=False, description="Holds the rollout where it is; traffic is served at the weights that were reached."
    )


class Phase(StrEnum):
    """Summary for people."""

    INITIALIZING = "Initializing"
    PROGRESSING = "Progressing"
    PAUSED = "Paused"
    PROMOTING = "Promoting"
    HEALTHY = "Healthy"
    ROLLING_BACK = "RollingBack"
    DEGRADED = "Degraded"


class AnalysisVerdict(StrEnum):
    """What the word-error test says. Unknown never promotes."""

    PASS = "Pass"  # noqa: S105 (a verdict)
    FAIL = "Fail"
    INCONCLUSIVE = "Inconclusive"
    UNKNOWN = "Unknown"


class ArmModel(StatusModel):
    """A model as it is served."""

    revision: str = Field(max_length=16, description="Hash of model and template; names the arm's pods.")
    model_id: str = Field(max_length=256, description="Name of the model.")
    uri: str = Field(max_length=1024, description="Its files.")
    digest: str | None = Field(default=None, max_length=71, description="Digest of its files, where known.")


class ArmStatus(ArmModel):
    """An arm."""

    weight: int = Field(ge=0, le=100, description="Percent of requests.")
    ready_replicas: int = Field(default=0, ge=0, description="Pods that are ready.")


class RolloutStatus(StatusModel):
    """The rollout that is under way."""

    id: str = Field(
        max_length=16, description="Names the rollout: a hash of Canary and both models, and which try of them it is."
    )
    step: int = Field(ge=0, description="Index of the current step, from 0.")
    steps: int = Field(ge=1, description="Number of steps.")
    started_time: str = Field(max_length=32, description="Start.", json_schema_extra={"format": "date-time"})
    step_started_time: str = Field(
        max_length=32, description="Start of the step.", json_schema_extra={"format": "date-time"}
    )
    last_data_time: str | None = Field(
        default=None,
        max_length=32,
        description="When the analysis last knew something.",
        json_schema_extra={"format": "date-time"},
    )
    promoting: bool = Field(
        default=False, description="True from the last Pass until stable serves the new model, or its former one again."
    )


_PAIRED = "Utterances that count for both arms; what an arm never answers counts as an empty transcript of it."


class AnalysisStatus(StatusModel):
    """What the word-error test knows. Rates are fractions; low and high bound the difference."""

    verdict: AnalysisVerdict = Field(description="Pass, Fail, Inconclusive or Unknown.")
    message: str = Field(max_length=512, description="The verdict in a sentence.")
    utterances: int = Field(default=0, ge=0, description=_PAIRED)
    words: int = Field(default=0, ge=0, description="Their reference words.")
    golden_utterances: int | None = Field(default=None, ge=0, description="Utterances that the golden set holds.")
    stable_wer: DecimalString | None = Field(default=None, description="Word error rate of stable.")
    canary_wer: DecimalString | None = Field(default=None, description="Word error rate of the canary.")
    difference: DecimalString | None = Field(
        default=None, description="Canary's WER less (1 + maxIncrease) times stable's."
    )
    low: DecimalString | None = Field(default=None, description="Lower bound of the difference.")
    high: DecimalString | None = Field(default=None, description="Upper bound of the difference.")
    needs_utterances: int | None = Field(default=None, ge=0, description="Utterances still needed, estimated.")


class Outcome(StrEnum):
    """How a rollout ended."""

    PROMOTED = "Promoted"
    ROLLED_BACK = "RolledBack"
    SUPERSEDED = "Superseded"
    WITHDRAWN = "Withdrawn"


class HistoryEntry(StatusModel):
    """A rollout that has ended."""

    id: str = Field(max_length=16, description="Name of the rollout.")
    revision: str = Field(max_length=16, description="Hash of model and template.")
    model_id: str = Field(max_length=256, description="Name of the model.")
    outcome: Outcome = Field(description="Promoted, RolledBack, Superseded or Withdrawn.")
    reason: str = Field(max_length=63, description="CamelCase cause.")
    message: str = Field(max_length=512, description="The figures that decided.")
    weight: int = Field(ge=0, le=100, description="Highest weight that was reached.")
    started_time: str = Field(max_length=32, description="Start.", json_schema_extra={"format": "date-time"})
    finished_time: str = Field(max_length=32, description="End.", json_schema_extra={"format": "date-time"})
    stable_wer: DecimalString | None = Field(default=None, description="Word error rate of stable at the end.")
    canary_wer: DecimalString | None = Field(default=None, description="Word error rate of the canary at the end.")
    utterances: int = Field(default=0, ge=0, description=_PAIRED)


class CanaryStatus(Status):
    """What is served, and how the rollout goes."""

    stable: ArmStatus | None = Field(default=None, description="The arm that has been promoted.")
    canary: ArmStatus | None = Field(default=None, description="The arm on trial.")
    rollout: RolloutStatus | None = Field(default=None, description="The rollout that is under way.")
    analysis: AnalysisStatus | None = Field(default=None, description="What the word-error test knows.")
    history: list[HistoryEntry] = Field(default=[], max_length=10, description="The last ten rollouts, newest first.")


class Canary(Resource):
    """A recogniser in production. A change of its model is rolled out by live word error rate."""

    KIND: ClassVar[str] = "Canary"
    PLURAL: ClassVar[str] = "canaries"
    SHORT_NAME: ClassVar[str] = "acn"
    TERMINAL_CONDITION: ClassVar[str] = "Ready"
    COLUMNS: ClassVar[tuple[tuple[str, str, str, int], ...]] = (
        ("Phase", "string", ".status.phase", 0),
        ("Stable", "string", ".status.stable.modelId", 0),
        ("Canary", "string", ".status.canary.modelId", 0),
        ("Weight", "integer", ".status.canary.weight", 0),
        ("Verdict", "string", ".status.analysis.verdict", 0),
        ("Stable-WER", "string", ".status.analysis.stableWer", 0),
        ("Canary-WER", "string", ".status.analysis.canaryWer", 0),
        ("Reason", "string", ".status.conditions[?(@.type=='Ready')].reason", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
    )
    RULES: ClassVar[tuple[tuple[str, str], ...]] = (
        ("size(self.metadata.name) <= 40", "the name must have at most 40 characters"),
        (
            "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            "the name must begin with a letter and hold only lower case letters, digits and hyphens: it names Services",
        ),
    )

    spec: CanarySpec
    status: CanaryStatus = CanaryStatus()
