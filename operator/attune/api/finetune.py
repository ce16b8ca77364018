"""FineTune: a training run of a base model on datasets."""

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from attune.api.meta import (
    IMMUTABLE,
    NAME_IS_A_LABEL,
    LocalRef,
    PodResources,
    Resource,
    SpecModel,
    Status,
    StatusModel,
    cel,
)
from attune.contract.base import DecimalString, Uri
from attune.contract.costs import Budget, Economics
from attune.contract.training import (
    Checkpointing,
    Distributed,
    EarlyStopping,
    Hyperparameters,
    Lora,
    Method,
    Padding,
)


class BaseModelSource(SpecModel):
    """The model to start from."""

    uri: Uri = Field(description="Files of a model: s3://bucket/prefix or hf://organisation/name.")


def _immutable(name: str) -> tuple[str, str]:
    """A rule of the whole spec for an optional field: it may be neither added, changed nor removed."""
    same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})"
    return same, f"{name} is immutable: create a new resource instead"


class FineTuneSpec(SpecModel):
    """What is wanted: a base model, Datasets, and how to train. What decides the model cannot be changed."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            _immutable("earlyStopping"),
            _immutable("budget"),
            (
                "!has(self.economics) || (has(self.budget) && has(self.budget.costPerGpuHour))",
                "economics needs budget.costPerGpuHour: what the run costs",
            ),
        )
    )

    base_model: BaseModelSource = Field(description="The model to start from.", json_schema_extra=cel(IMMUTABLE))
    datasets: Annotated[list[LocalRef], Field(min_length=1, max_length=8)] = Field(
        description="Datasets whose train splits are trained on.",
        json_schema_extra={
            **cel(IMMUTABLE),
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
        },
    )
    method: Method = Field(
        default=Method.LORA, description="How weights are adapted: Lora.", json_schema_extra=cel(IMMUTABLE)
    )
    lora: Lora = Field(default_factory=Lora, description="Adapters' shape.", json_schema_extra=cel(IMMUTABLE))
    hyperparameters: Hyperparameters = Field(
        default_factory=Hyperparameters, description="The optimiser's run.", json_schema_extra=cel(IMMUTABLE)
    )
    padding: Padding = Field(
        default=Padding.BUCKETS,
        description="How audio is padded in training and, later, in serving: Buckets (fast) or Window.",
        json_schema_extra=cel(IMMUTABLE),
    )
    early_stopping: EarlyStopping | None = Field(
        default=None,
        description="Ends the run when validation WER no longer falls.",
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
        default_factory=Distributed, description="Processes that train together.", json_schema_extra=cel(IMMUTABLE)
    )
    checkpoint: Checkpointing = Field(default_factory=Checkpointing, description="When state is saved.")
    resources: PodResources | None = Field(default=None, description="Resources of the training pod.")
    suspend: bool = Field(
        default=False, description="Stops the run at a checkpoint until it is false again, then goes on from there."
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

    uri: str = Field(max_length=1024, description="Folder of the merged model.")
    digest: str = Field(max_length=71, description="Digest of the merged model's files.")
    adapter_uri: str = Field(max_length=1024, description="Folder of the adapter.")
    adapter_digest: str = Field(max_length=71, description="Digest of the adapter's files.")
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


class HardwareStatus(StatusModel):
    """A class of hardware: where all of it is equal, the same run gives the same weights."""

    device: str = Field(max_length=128, description="GPU or processor.")
    precision: str = Field(max_length=8, description="bf16 or fp32.")
    processes: int = Field(ge=1, description="Training processes.")
    threads: int = Field(ge=1, description="Threads of each process.")
    torch: str = Field(max_length=64, description="Version of torch.")


class Lineage(StatusModel):
    """Where the model comes from."""

    base_uri: str = Field(max_length=1024, description="The base model.")
    base_digest: str | None = Field(default=None, max_length=71, description="Digest of the base model's files.")
    datasets: list[LineageDataset] = Field(default=[], max_length=8, description="What it was trained on.")
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
    )

    spec: FineTuneSpec
    status: FineTuneStatus = FineTuneStatus()
