"""FineTune: a training run of a base model on datasets."""

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from attune.api.meta import (
    IMMUTABLE,
    NAME_IS_A_LABEL,
    PRIORITY_NEEDS_A_QUEUE,
    LocalRef,
    ModelSource,
    PodResources,
    QueueableSpec,
    Resource,
    SpecModel,
    Status,
    StatusModel,
    cel,
)
from attune.contract.base import DecimalString, between
from attune.contract.costs import Budget, Economics
from attune.contract.training import (
    RT60_MAX_SECONDS,
    RT60_MIN_SECONDS,
    Augmentation,
    Checkpointing,
    Distributed,
    EarlyStopping,
    Ewc,
    Hyperparameters,
    Lora,
    LoraVariant,
    Method,
    Padding,
    Precision,
    Replay,
)

_LORA = Lora()
# Defaults are filled in before rules are checked, so lora is there whatever the method is.
_LORA_UNTOUCHED = (
    f"self.lora.rank == {_LORA.rank} && self.lora.alpha == {_LORA.alpha} && self.lora.dropout == '{_LORA.dropout}' "
    "&& !has(self.lora.variant) && !has(self.lora.targetModules)"
)

# What the models of the contract check as well; their messages name the field as a person wrote it.
_AUGMENTATION_RULES = cel(
    (
        (
            "has(self.speed) || has(self.roomImpulseResponse) || has(self.noise) || has(self.codec) || "
            "has(self.specAugment)"
        ),
        "augmentation needs at least one of speed, roomImpulseResponse, noise, codec and specAugment",
    ),
    (
        "!has(self.speed) || double(self.speed.min) <= double(self.speed.max)",
        "speed.min must be at most speed.max",
    ),
    (
        "!has(self.noise) || self.noise.snrDbMin <= self.noise.snrDbMax",
        "noise.snrDbMin must be at most noise.snrDbMax",
    ),
    (
        "!has(self.noise) || size(self.noise.kinds) > 0 || has(self.noise.uri)",
        "noise needs kinds, or a uri with recordings",
    ),
    (
        (
            "!has(self.roomImpulseResponse) || (has(self.roomImpulseResponse.rt60MinSeconds) ? "
            f"double(self.roomImpulseResponse.rt60MinSeconds) : {RT60_MIN_SECONDS}) <= "
            "(has(self.roomImpulseResponse.rt60MaxSeconds) ? "
            f"double(self.roomImpulseResponse.rt60MaxSeconds) : {RT60_MAX_SECONDS})"
        ),
        (
            f"roomImpulseResponse.rt60MinSeconds ({RT60_MIN_SECONDS} where absent) must be at most rt60MaxSeconds "
            f"({RT60_MAX_SECONDS} where absent)"
        ),
    ),
    (
        (
            "!has(self.roomImpulseResponse) || !has(self.roomImpulseResponse.uri) || "
            "(!has(self.roomImpulseResponse.rt60MinSeconds) && !has(self.roomImpulseResponse.rt60MaxSeconds))"
        ),
        "roomImpulseResponse takes a uri, or bounds of simulated rooms, not both",
    ),
    (
        "!has(self.specAugment) || self.specAugment.timeMasks + self.specAugment.frequencyMasks > 0",
        "specAugment needs timeMasks or frequencyMasks",
    ),
)


class TrainingDataset(LocalRef):
    """A Dataset that is trained on."""

    weight: Annotated[DecimalString, between("0.001", "1000")] | None = Field(
        default=None,
        description=(
            "Multiplies the share of an epoch's audio that the Dataset gets by its size. An epoch stays as long as all "
            "Datasets together: weight 2 beside another Dataset of the same size is two thirds of it."
        ),
    )


class ReplaySpec(Replay):
    """Trains on audio of an old domain beside the new one."""

    dataset_ref: LocalRef = Field(description="The Dataset of the old domain.")


class EwcSpec(Ewc):
    """Holds on to the weights that an old domain depends on: no substitute for replay, beside which it may help."""

    dataset_ref: LocalRef | None = Field(
        default=None, description="The Dataset of the old domain; replay's where both are given."
    )


class RetentionSpec(SpecModel):
    """What is done so that an old domain is not forgotten. Its validation split is transcribed after each epoch too."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("has(self.replay) || has(self.ewc)", "replay, ewc or both must be given"),
            (
                "!has(self.ewc) || has(self.replay) != has(self.ewc.datasetRef)",
                "ewc.datasetRef must be given without replay, and only then: replay names the Dataset already",
            ),
        )
    )

    replay: ReplaySpec | None = Field(default=None, description="Trains on audio of the old domain as well.")
    ewc: EwcSpec | None = Field(
        default=None,
        description=(
            "Elastic weight consolidation: penalises changes of what the old domain depends on. Alone it keeps much "
            "less than replay does, and a large lambda keeps the new domain from being learned; beside replay, begin "
            "with 3."
        ),
    )

    @property
    def dataset_ref(self) -> LocalRef | None:
        """The Dataset of the old domain."""
        if self.replay is not None:
            return self.replay.dataset_ref
        return self.ewc.dataset_ref if self.ewc is not None else None


def _immutable_if_any(*names: str) -> tuple[tuple[str, str], ...]:
    """Gives rules for optional fields: not even their presence changes, which a rule on the field itself cannot see."""
    return tuple(
        (
            f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})",
            f"{name} is immutable: create a new resource instead",
        )
        for name in names
    )


def _not_trained_on(way: str) -> tuple[str, str]:
    """Gives the rule that the Dataset of the old domain is none of those that are trained on."""
    reference = f"self.retention.{way}.datasetRef"
    return (
        (
            f"!has(self.retention) || !has(self.retention.{way}) || !has({reference}) || "
            f"!self.datasets.exists(one, one.name == {reference}.name)"
        ),
        f"the Dataset of retention.{way} is in datasets already, and so not forgotten; take it out of one of them",
    )


class FineTuneSpec(QueueableSpec):
    """What is wanted: a base model, Datasets, and how to train. What decides the model cannot be changed."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            *_immutable_if_any("earlyStopping", "budget", "augmentation", "datasetTemperature", "retention"),
            (
                "!has(self.datasetTemperature) || size(self.datasets) > 1",
                "datasetTemperature needs at least two datasets",
            ),
            _not_trained_on("replay"),
            _not_trained_on("ewc"),
            (
                "!has(self.retention) || !has(self.retention.ewc) || self.distributed.deepspeed.zeroStage < 3",
                "retention.ewc needs whole weights in every process: zeroStage must be 2 or less",
            ),
            (
                (
                    "!has(self.retention) || !has(self.retention.ewc) || !has(self.lora.variant) || "
                    f"self.lora.variant != '{LoraVariant.DORA}'"
                ),
                "retention.ewc cannot tell how far Dora moves weights: choose another lora.variant, or replay alone",
            ),
            (
                f"self.method != '{Method.FULL}' || ({_LORA_UNTOUCHED})",
                "method Full trains all weights and has no adapters: remove lora",
            ),
            (
                f"self.method != '{Method.QLORA}' || self.distributed.deepspeed.zeroStage < 3",
                "method QLora keeps its 4-bit weights whole in every process: zeroStage must be 2 or less",
            ),
            (
                "!has(self.distributed.deepspeed.offload) || self.distributed.deepspeed.zeroStage >= 2",
                "deepspeed.offload works with zeroStage 2 and 3: raise it, or leave offload out",
            ),
            (
                f"self.hyperparameters.precision != '{Precision.FP16}' || self.distributed.deepspeed.zeroStage == 0",
                "precision Fp16 works with zeroStage 0 only: choose Bf16, or leave zeroStage out",
            ),
            (
                "!has(self.economics) || (has(self.budget) && has(self.budget.costPerGpuHour))",
                "economics needs budget.costPerGpuHour: what the run costs",
            ),
        )
    )

    base_model: ModelSource = Field(
        description="The model to start from: files, or what another FineTune has made.",
        json_schema_extra=cel(IMMUTABLE),
    )
    datasets: Annotated[list[TrainingDataset], Field(min_length=1, max_length=8)] = Field(
        description="Datasets whose train splits are trained on.",
        json_schema_extra={
            **cel(IMMUTABLE),
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
        },
    )
    dataset_temperature: Annotated[DecimalString, between("1", "100")] | None = Field(
        default=None,
        description=(
            "Flattens the shares of Datasets of different sizes: each gets its size to the power of 1 / temperature. "
            "1, as without it, is by size; 100 is as good as equal shares."
        ),
    )
    method: Method = Field(
        default=Method.LORA,
        description=(
            "What is trained: Lora, adapters beside frozen weights; QLora, the same beside weights rounded to 4 bits; "
            "Full, every weight."
        ),
        json_schema_extra=cel(IMMUTABLE),
    )
    lora: Lora = Field(
        default_factory=Lora, description="Adapters' shape, of Lora and QLora.", json_schema_extra=cel(IMMUTABLE)
    )
    hyperparameters: Hyperparameters = Field(
        default_factory=Hyperparameters, description="The optimiser's run.", json_schema_extra=cel(IMMUTABLE)
    )
    padding: Padding = Field(
        default=Padding.BUCKETS,
        description=(
            "How audio is padded in training and, later, in serving: Buckets (fast) or Window. Of a model that is told "
            "what is padding, it is always Buckets."
        ),
        json_schema_extra=cel(IMMUTABLE),
    )
    early_stopping: EarlyStopping | None = Field(
        default=None,
        description="Ends the run when validation WER no longer falls.",
    )
    augmentation: Augmentation | None = Field(
        default=None,
        description=(
            "Changes training audio anew in each epoch, in the order of its fields; validation hears what was recorded."
        ),
        json_schema_extra=_AUGMENTATION_RULES,
    )
    retention: RetentionSpec | None = Field(
        default=None, description="Keeps the model from forgetting what it heard well before."
    )
    budget: Budget | None = Field(
        default=None,
        description="Ends the run, at the best checkpoint so far, when it has taken this much.",
        json_schema_extra=cel(
            (
                "has(self.maxGpuHours) || has(self.maxHours) || has(self.costPerGpuHour)",
                "at least one of maxGpuHours, maxHours and costPerGpuHour must be given",
            ),
            ("!has(self.currency) || has(self.costPerGpuHour)", "currency goes with costPerGpuHour"),
        ),
    )
    economics: Economics | None = Field(
        default=None,
        description="What corrections cost: the status then says when the run has paid for itself. May change.",
    )
    distributed: Distributed = Field(
        default_factory=Distributed,
        description="Pods and processes that train together.",
        json_schema_extra=cel(IMMUTABLE),
    )
    checkpoint: Checkpointing = Field(default_factory=Checkpointing, description="When state is saved.")
    resources: PodResources | None = Field(
        default=None, description="Resources of the training pod; of each, where there are several."
    )
    suspend: bool = Field(
        default=False,
        description=(
            "Stops the run at a checkpoint, its GPU free within a minute, until it is false again; then goes on from "
            "there, in a queue after waiting for its turn anew."
        ),
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=2147483647,
        description=(
            "The Job of a run whose result is in the status is deleted, with its pod and log, this long after its end; "
            "a failed one stays. Absent: it stays as well."
        ),
    )


class ProgressMetric(StatusModel):
    """A figure of the run."""

    name: str = Field(max_length=63, description="Name, such as wer or loss.")
    value: DecimalString = Field(description="Value.")


class ProgressStatus(StatusModel):
    """How far the run is."""

    stage: str = Field(max_length=63, description="What it is doing: Downloading, Training, Validating, ...")
    percent: int = Field(ge=0, le=100, description="Percent of the whole.")
    step: int | None = Field(default=None, ge=0, description="Optimiser steps done.")
    total_steps: int | None = Field(default=None, ge=0, description="Optimiser steps in all.")
    epoch: DecimalString | None = Field(default=None, description="Passes over the data done.")
    estimated_remaining_seconds: int | None = Field(default=None, ge=0, description="Seconds to the end, estimated.")
    metrics: list[ProgressMetric] = Field(default=[], max_length=16, description="Latest figures.")
    last_updated_time: str | None = Field(
        default=None, max_length=32, description="When this was read.", json_schema_extra={"format": "date-time"}
    )


class ModelStatus(StatusModel):
    """What the run made."""

    uri: str = Field(max_length=1024, description="Folder of the model, adapters merged.")
    digest: str = Field(max_length=71, description="Digest of the model's files.")
    adapter_uri: str | None = Field(
        default=None, max_length=1024, description="Folder of the adapter; absent where all weights were trained."
    )
    adapter_digest: str | None = Field(default=None, max_length=71, description="Digest of the adapter's files.")
    padding: Padding = Field(description="How the model wants its audio padded.")
    weights_digest: str | None = Field(
        default=None,
        max_length=71,
        description="Digest of its weights alone: the same again for the same FineTune under another name.",
    )


class LineageDataset(StatusModel):
    """A Dataset that went into the run."""

    name: str = Field(max_length=63, description="Name of the Dataset.")
    revision: str = Field(max_length=71, description="Its revision when the run began.")
    uri: str = Field(max_length=1024, description="Folder of that revision.")


class LineageParent(StatusModel):
    """The FineTune that made the base model; attune.json beside the model tells of all generations."""

    name: str = Field(max_length=63, description="Name of the FineTune.")
    model_id: str | None = Field(default=None, max_length=128, description="Its modelId.")
    digest: str = Field(max_length=71, description="Digest of its merged model, which is the base here.")
    adapter_uri: str | None = Field(default=None, max_length=1024, description="Folder of its adapter.")
    adapter_digest: str | None = Field(default=None, max_length=71, description="Digest of its adapter's files.")


class HardwareStatus(StatusModel):
    """A class of hardware: where all of it is equal, the same run gives the same weights."""

    device: str = Field(max_length=128, description="GPU or processor.")
    precision: str = Field(max_length=8, description="bf16, fp16 or fp32.")
    processes: int = Field(ge=1, description="Training processes.")
    threads: int = Field(ge=1, description="Threads of each process.")
    torch: str = Field(max_length=64, description="Version of torch.")


class Lineage(StatusModel):
    """Where the model comes from."""

    base_uri: str = Field(max_length=1024, description="The base model.")
    base_digest: str | None = Field(default=None, max_length=71, description="Digest of the base model's files.")
    parent: LineageParent | None = Field(default=None, description="The FineTune that made the base model, if one did.")
    datasets: list[LineageDataset] = Field(default=[], max_length=8, description="What it was trained on.")
    retained: LineageDataset | None = Field(default=None, description="The Dataset of the old domain.")
    config_digest: str | None = Field(
        default=None, max_length=71, description="Digest of the configuration, the base's address and the revisions."
    )
    image_digest: str | None = Field(default=None, max_length=71, description="Digest of the trainer image.")
    code_version: str | None = Field(default=None, max_length=32, description="Attune's version in that image.")
    hardware: HardwareStatus | None = Field(default=None, description="The class of hardware that it ran on.")
    irreproducible: str | None = Field(
        default=None,
        max_length=256,
        description="Why the same FineTune again, on the same class of hardware, may give weights of another digest.",
    )


class FineTuneMetrics(StatusModel):
    """Validation figures, in the configuration in which each model is served."""

    baseline_wer: DecimalString = Field(description="Word error rate of the base model, as a fraction.")
    wer: DecimalString = Field(description="Word error rate of the tuned model, as a fraction.")
    old_baseline_wer: DecimalString | None = Field(
        default=None, description="Word error rate of the base model on the validation split of the old domain."
    )
    old_wer: DecimalString | None = Field(
        default=None, description="Word error rate of the tuned model on the validation split of the old domain."
    )


class Usage(StatusModel):
    """What the run took."""

    training_seconds: int = Field(ge=0, description="Wall-clock seconds of training.")
    gpu_seconds: int = Field(ge=0, description="GPU seconds; 0 on a CPU.")
    audio_seconds_per_second: DecimalString = Field(description="Seconds of audio trained on in a second.")
    peak_memory_bytes: int | None = Field(
        default=None, ge=0, description="Peak of the fullest GPU; on a CPU, of all training processes together."
    )
    cost: DecimalString | None = Field(default=None, description="Price of the GPU time, in the budget's currency.")
    budget_reached: bool | None = Field(default=None, description="Whether the budget has ended the run.")


class EstimateStatus(StatusModel):
    """What the whole run will take, without early stopping and budget."""

    seconds: int = Field(ge=0, description="Wall-clock seconds of training, validations included.")
    gpu_hours: DecimalString = Field(description="GPU hours; 0 on a CPU.")
    memory_bytes: int = Field(ge=0, description="Peak memory, as in usage.")


class FineTuneStatus(Status):
    """What came out: the model, its figures and its lineage, and how the run stands."""

    model_id: str | None = Field(default=None, max_length=128, description="ft:<base>:<id>.")
    progress: ProgressStatus | None = Field(default=None, description="How far the run is.")
    model: ModelStatus | None = Field(default=None, description="What the run made.")
    lineage: Lineage | None = Field(default=None, description="Where the model comes from.")
    metrics: FineTuneMetrics | None = Field(default=None, description="Validation figures.")
    curve: str | None = Field(default=None, max_length=1024, description="Address of the figures after every epoch.")
    estimate: EstimateStatus | None = Field(
        default=None, description="What it will take, extrapolated from its first steps; usage is what it took."
    )
    usage: Usage | None = Field(default=None, description="What the run took.")
    report: str | None = Field(default=None, max_length=1024, description="HTML report in the store.")
    job_name: str | None = Field(default=None, max_length=63, description="The run's Job.")


class FineTune(Resource):
    """A training run of a base model on datasets, inside the cluster."""

    KIND: ClassVar[str] = "FineTune"
    PLURAL: ClassVar[str] = "finetunes"
    SHORT_NAME: ClassVar[str] = "aft"
    TERMINAL_CONDITION: ClassVar[str] = "Succeeded"
    COLUMNS: ClassVar[tuple[tuple[str, str, str, int], ...]] = (
        ("Phase", "string", ".status.phase", 0),
        ("Progress", "integer", ".status.progress.percent", 0),
        ("ETA", "integer", ".status.progress.estimatedRemainingSeconds", 0),
        ("Base-WER", "string", ".status.metrics.baselineWer", 0),
        ("WER", "string", ".status.metrics.wer", 0),
        ("Model", "string", ".status.modelId", 0),
        ("Reason", "string", ".status.conditions[?(@.type=='Succeeded')].reason", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
    )
    RULES: ClassVar[tuple[tuple[str, str], ...]] = (
        ("size(self.metadata.name) <= 52", "the name must have at most 52 characters"),
        NAME_IS_A_LABEL,
        PRIORITY_NEEDS_A_QUEUE,
        (
            "!has(self.spec.baseModel.fineTuneRef) || self.spec.baseModel.fineTuneRef.name != self.metadata.name",
            "baseModel.fineTuneRef must name another FineTune",
        ),
    )

    spec: FineTuneSpec
    status: FineTuneStatus = FineTuneStatus()
