"""Dataset: where the audio is, what is done to it, and what came out."""

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from attune.api.meta import (
    NAME_IS_A_LABEL,
    PRIORITY_NEEDS_A_QUEUE,
    PodResources,
    QueueableSpec,
    Resource,
    SecretRef,
    SpecModel,
    Status,
    StatusModel,
    cel,
)
from attune.contract.base import DecimalString, Uri, between
from attune.contract.job import PrepareRecipe, SourceFormat, SplitBy

_DEFAULTS = PrepareRecipe.model_fields
_SHORTEST, _LONGEST = (float(_DEFAULTS[name].default) for name in ("min_seconds", "max_seconds"))


class S3Source(SpecModel):
    """A prefix in an S3 bucket."""

    uri: Uri = Field(
        description="s3://bucket/prefix; audio paths are relative to it.",
        json_schema_extra=cel(("self.startsWith('s3://')", "must start with s3://")),
    )
    credentials_secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with endpoint, region, accessKey and secretKey, when the namespace's store does not serve.",
    )


class Source(SpecModel):
    """Audio with transcripts."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "(self.format == 'Manifest') == has(self.manifest)",
                "manifest must be given with format Manifest, and only then",
            )
        )
    )

    s3: S3Source = Field(description="Where the files are.")
    format: SourceFormat = Field(
        description="Manifest: a JSONL file lists audio and text. Directory: each audio file has a .txt beside it."
    )
    manifest: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^/].*$")] | None = Field(
        default=None, description="Path of the JSONL file, relative to the source's uri."
    )


class PipelineStep(SpecModel):
    """A step of preparation. Fields belong to the step that `step` names."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.step == 'Normalize' || !has(self.sampleRate)",
                "sampleRate belongs to step Normalize",
            ),
            (
                "self.step == 'Filter' || (!has(self.minSeconds) && !has(self.maxSeconds))",
                "minSeconds and maxSeconds belong to step Filter",
            ),
            (
                (
                    f"(has(self.minSeconds) ? double(self.minSeconds) : {_SHORTEST})"
                    f" < (has(self.maxSeconds) ? double(self.maxSeconds) : {_LONGEST})"
                ),
                f"minSeconds ({_SHORTEST:g} where absent) must be less than maxSeconds ({_LONGEST:g} where absent)",
            ),
        )
    )

    step: Literal["Normalize", "Filter"] = Field(
        description="Normalize: decode, mix to mono, resample. Filter: leave out what is too short or too long."
    )
    sample_rate: Literal[16000] | None = Field(default=None, description="Normalize: sample rate in Hz.")
    min_seconds: Annotated[DecimalString, between("0", "30")] | None = Field(
        default=None,
        description=f"Filter: shortest utterance that is kept, in seconds; {_SHORTEST:g} where absent.",
    )
    max_seconds: Annotated[DecimalString, between("0", "30")] | None = Field(
        default=None,
        description=f"Filter: longest utterance that is kept, in seconds; {_LONGEST:g} where absent.",
    )


class SplitsSpec(SpecModel):
    """How utterances are divided. No speaker (or group) and no repeated sentence is in two splits."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "double(self.validation) + double(self.holdout) < 1.0",
                "validation and holdout must leave a share to train on: together less than 1",
            )
        )
    )

    by: SplitBy = Field(default=SplitBy.SPEAKER, description="The label that never crosses: Speaker or Group.")
    validation: Annotated[DecimalString, between("0.01", "0.5")] = Field(
        default="0.1",
        description="Share of utterances for validation.",
    )
    holdout: Annotated[DecimalString, between("0.01", "0.5")] = Field(
        default="0.1",
        description="Share of utterances kept for evaluation.",
    )
    seed: int = Field(default=7, ge=0, le=2147483647, description="Seed of the division.")


class DatasetSpec(QueueableSpec):
    """What is wanted: where the audio is, and how it is prepared and split."""

    sources: Annotated[list[Source], Field(min_length=1, max_length=16)] = Field(description="Where the audio is.")
    language: Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Z]{2})?$", max_length=6)] = Field(
        description="Language of the transcripts: en, de, pt-BR."
    )
    pipeline: Annotated[list[PipelineStep], Field(max_length=8)] = Field(
        default=[PipelineStep(step="Normalize", sample_rate=16000)],
        description="Steps of preparation, in order; each at most once.",
        json_schema_extra=cel(
            ("self.all(a, self.exists_one(b, b.step == a.step))", "each step may be given once"),
        ),
    )
    splits: SplitsSpec = Field(default_factory=SplitsSpec, description="How utterances are divided.")
    max_rejected_share: Annotated[DecimalString, between("0", "1")] = Field(
        default="0.05",
        description="Share of bad manifest lines or files above which the Dataset fails.",
    )
    resources: PodResources | None = Field(default=None, description="Resources of the preparation's pod.")
    suspend: bool = Field(default=False, description="Stops the work until it is false again.")


class StatisticsStatus(StatusModel):
    """Size over all splits."""

    hours: DecimalString = Field(description="Hours of audio.")
    utterances: int = Field(ge=0, description="Utterances.")
    speakers: int = Field(ge=0, description="Different speakers.")
    words: int = Field(ge=0, description="Words of the transcripts.")
    vocabulary: int = Field(ge=0, description="Different words.")
    oov_rate: DecimalString = Field(description="Share of holdout words that the train split never has.")


class SplitStatus(StatusModel):
    """Size of one split."""

    utterances: int = Field(ge=0, description="Utterances.")
    hours: DecimalString = Field(description="Hours of audio.")
    speakers: int = Field(ge=0, description="Different speakers.")
    words: int = Field(ge=0, description="Words of the transcripts.")


class SplitsStatus(StatusModel):
    """Size of each split."""

    train: SplitStatus = Field(description="What models are trained on.")
    validation: SplitStatus = Field(description="What training is watched with.")
    holdout: SplitStatus = Field(description="What models are judged on.")


class RejectionStatus(StatusModel):
    """Utterances that were left out for one reason."""

    reason: str = Field(max_length=63, description="CamelCase reason.")
    count: int = Field(ge=0, description="How many.")
    examples: list[Annotated[str, Field(max_length=128)]] = Field(
        default=[], max_length=3, description="The first places: manifest line or file."
    )


class QualityStatus(StatusModel):
    """What was left out."""

    rejected: int = Field(ge=0, description="Utterances left out.")
    rejections: list[RejectionStatus] = Field(default=[], max_length=16, description="By reason.")


class DatasetStatus(Status):
    """What came out: revision, sizes, what was left out, and how the work stands."""

    revision: str | None = Field(default=None, max_length=71, description="Digest of the content-addressed manifest.")
    uri: str | None = Field(default=None, max_length=1024, description="Folder of this revision in the store.")
    stats: StatisticsStatus | None = Field(default=None, description="Size over all splits.")
    splits: SplitsStatus | None = Field(default=None, description="Size of each split.")
    quality: QualityStatus | None = Field(default=None, description="What was left out and why.")
    job_name: str | None = Field(default=None, max_length=63, description="The preparation's Job.")


class Dataset(Resource):
    """Audio with transcripts, prepared for training and evaluation: normalised, filtered, split, counted."""

    KIND: ClassVar[str] = "Dataset"
    PLURAL: ClassVar[str] = "datasets"
    SHORT_NAME: ClassVar[str] = "ads"
    TERMINAL_CONDITION: ClassVar[str] = "Ready"
    COLUMNS: ClassVar[tuple[tuple[str, str, str, int], ...]] = (
        ("Phase", "string", ".status.phase", 0),
        ("Hours", "string", ".status.stats.hours", 0),
        ("Utterances", "integer", ".status.stats.utterances", 0),
        ("Holdout", "integer", ".status.splits.holdout.utterances", 0),
        ("Rejected", "integer", ".status.quality.rejected", 0),
        ("Reason", "string", ".status.conditions[?(@.type=='Ready')].reason", 0),
        ("Revision", "string", ".status.revision", 1),
        ("Age", "date", ".metadata.creationTimestamp", 0),
    )
    RULES: ClassVar[tuple[tuple[str, str], ...]] = (
        ("size(self.metadata.name) <= 52", "the name must have at most 52 characters"),
        NAME_IS_A_LABEL,
        PRIORITY_NEEDS_A_QUEUE,
    )

    spec: DatasetSpec
    status: DatasetStatus = DatasetStatus()
