"""Progress while a Job runs, and the Summary that it leaves behind as its termination message."""

from typing import Annotated, Literal

from pydantic import Field

from attune.contract.base import ContractModel, DecimalString
from attune.contract.environment import TERMINATION_MESSAGE_BYTES
from attune.contract.measures import Decision
from attune.contract.training import Padding


class MetricValue(ContractModel):
    """A named figure. Names are lower case: wer, loss, audioSecondsPerSecond."""

    name: str = Field(max_length=63)
    value: DecimalString


class Estimate(ContractModel):
    """What a whole run will take, extrapolated from its first steps."""

    seconds: int  # by the clock, validations included
    gpu_hours: DecimalString
    memory_bytes: int  # of the fullest GPU; on a CPU, of all training processes together


class Hardware(ContractModel):
    """What a run's arithmetic depends on: its class of hardware."""

    device: str = Field(max_length=128)
    precision: str = Field(max_length=8)  # bf16, fp16, fp32
    processes: int
    threads: int  # of each process
    torch: str = Field(max_length=64)

    def describe(self) -> str:
        """Says it in words."""
        return (
            f"{self.device}, {self.precision}, {self.processes} process{'es' if self.processes > 1 else ''} "
            f"of {self.threads} thread{'s' if self.threads > 1 else ''}, torch {self.torch}"
        )


class Progress(ContractModel):
    """How far a Job is. GET /progress on PROGRESS_PORT answers this."""

    stage: str = Field(max_length=63)  # CamelCase: Downloading, Training, Validating, Publishing, ...
    percent: int = Field(ge=0, le=100)
    step: int | None = None
    total_steps: int | None = None
    epoch: DecimalString | None = None
    estimated_remaining_seconds: int | None = None
    metrics: list[MetricValue] = Field(default=[], max_length=16)
    estimate: Estimate | None = None


class SplitStatistics(ContractModel):
    """Size of one split. oovRate: share of its words that are not known; absent of the split that tells what is."""

    utterances: int
    hours: DecimalString
    speakers: int
    words: int
    vocabulary: int | None = None  # absent in results of trainers before it was told
    oov_rate: DecimalString | None = None


class SliceStatistics(ContractModel):
    """A label that figures are told apart by: how many values it has, and how many utterances have none."""

    name: str = Field(max_length=63)
    values: int
    unlabelled: int


class DatasetStatistics(ContractModel):
    """Size of a Dataset over all splits. oovRate: share of holdout words that are not known."""

    hours: DecimalString
    utterances: int
    speakers: int
    words: int
    vocabulary: int
    oov_rate: DecimalString


class Splits(ContractModel):
    """Size of each split."""

    train: SplitStatistics
    validation: SplitStatistics
    holdout: SplitStatistics


class Rejection(ContractModel):
    """Why utterances were left out: how many, and the first few places (manifest line or file)."""

    reason: str = Field(max_length=63)  # CamelCase
    count: int
    examples: list[Annotated[str, Field(max_length=128)]] = Field(default=[], max_length=3)


class PrepareResult(ContractModel):
    """What came out of prepare. revision is the digest of the content-addressed manifest."""

    recipe: Literal["prepare"] = "prepare"
    revision: str
    uri: str
    stats: DatasetStatistics
    splits: Splits
    slices: list[SliceStatistics] = Field(default=[], max_length=8)
    rejected: int
    rejections: list[Rejection] = Field(default=[], max_length=16)
    warnings: list[Annotated[str, Field(max_length=256)]] = Field(default=[], max_length=8)
    report_uri: str | None = None


class FinetuneResult(ContractModel):
    """What came out of finetune. WERs are of the validation split, in the serving configuration, as fractions.

    There is no adapter where all weights were trained. curve_uri has the word error rates after every epoch, as JSON;
    the first entry is the base model's.
    """

    recipe: Literal["finetune"] = "finetune"
    model_id: str
    model_uri: str
    model_digest: str
    adapter_uri: str | None = None
    adapter_digest: str | None = None
    base_digest: str
    padding: Padding
    baseline_wer: DecimalString
    wer: DecimalString
    # Of the retained Dataset's validation split, with retention only.
    old_baseline_wer: DecimalString | None = None
    old_wer: DecimalString | None = None
    steps: int
    epochs: DecimalString
    training_seconds: int
    gpu_seconds: int
    audio_seconds_per_second: DecimalString
    stopped_early: bool = False
    # Absent in results of trainers before these were told.
    weights_digest: str | None = None  # of the merged model's weights alone: its other files name the model
    total_steps: int | None = None  # that were planned
    budget_reached: bool | None = None
    cost: DecimalString | None = None  # where the budget has a price
    peak_memory_bytes: int | None = None  # as in the estimate
    estimate: Estimate | None = None
    report_uri: str | None = None
    curve_uri: str | None = None
    code_version: str | None = None
    hardware: Hardware | None = None
    # Why the same run again, on the same hardware, may give weights of another digest.
    irreproducible: str | None = Field(default=None, max_length=256)


class LeaderboardRow(ContractModel):
    """One candidate's figures with their intervals; rates are fractions.

    What does not fit into a Summary is left out there, and is in results.json beside the report.
    """

    candidate: str
    rank: int
    model_digest: str | None = None  # an endpoint shows no files
    padding: Padding | None = None  # and pads as it likes
    utterances: int
    words: int
    hits: int
    substitutions: int
    deletions: int
    insertions: int
    wer: DecimalString
    wer_low: DecimalString
    wer_high: DecimalString
    cer: DecimalString | None = None
    cer_low: DecimalString | None = None
    cer_high: DecimalString | None = None
    sentence_accuracy: DecimalString | None = None
    sentence_accuracy_low: DecimalString | None = None
    sentence_accuracy_high: DecimalString | None = None
    entities: int | None = None  # that the references hold
    entity_accuracy: DecimalString | None = None
    entity_accuracy_low: DecimalString | None = None
    entity_accuracy_high: DecimalString | None = None
    real_time_factor: DecimalString | None = None
    latency_seconds: DecimalString | None = None  # 95 % of utterances take at most this
    # Relative to the baseline's WER, with the paired interval; absent for the baseline itself.
    change_from_baseline: DecimalString | None = None
    change_low: DecimalString | None = None
    change_high: DecimalString | None = None
    p_value: DecimalString | None = None  # of the matched-pairs sentence-segment word error test
    detectable_change: DecimalString | None = None  # the smallest that this split shows four times in five
    failed_gates: list[str] = Field(default=[], max_length=16)


class Verdict(ContractModel):
    """What to do, and the figure that decided."""

    decision: Decision
    reason: str = Field(max_length=512)
    would_change: str | None = Field(default=None, max_length=256)  # what would lead to another decision


class SliceGap(ContractModel):
    """How far apart the values of a label are for the candidate that comes first; rates are fractions."""

    label: str = Field(max_length=63)
    candidate: str
    best: str = Field(max_length=63)
    best_wer: DecimalString
    worst: str = Field(max_length=63)
    worst_wer: DecimalString
    gap: DecimalString  # worst - best
    gap_low: DecimalString
    gap_high: DecimalString
    values: int  # that were judged
    too_small: int  # values with too few words to say anything


class FailedCandidate(ContractModel):
    """A candidate that could not be judged, and why."""

    candidate: str
    reason: str = Field(max_length=63)
    message: str = Field(max_length=256)


class EvaluateResult(ContractModel):
    """What came out of evaluate."""

    recipe: Literal["evaluate"] = "evaluate"
    leaderboard: list[LeaderboardRow] = Field(max_length=8)
    winner: str | None = None
    verdict: Verdict
    report_uri: str  # results.json and utterances.parquet lie beside it
    # Absent in results of trainers before these were told.
    normaliser: str | None = Field(default=None, max_length=63)
    gaps: list[SliceGap] = Field(default=[], max_length=8)
    failed: list[FailedCandidate] = Field(default=[], max_length=8)


class ScoreResult(ContractModel):
    """What came out of score; the counters in Prometheus are what counts."""

    recipe: Literal["score"] = "score"
    utterances: int


Result = Annotated[
    PrepareResult | FinetuneResult | EvaluateResult | ScoreResult,
    Field(discriminator="recipe"),
]


class Failure(ContractModel):
    """Why a recipe failed: reason for machines, message for the person who can mend it."""

    reason: str = Field(pattern=r"^[A-Z][A-Za-z0-9]*$", max_length=63)
    message: str = Field(max_length=1024)
    rejections: list[Rejection] = Field(default=[], max_length=16)


class Summary(ContractModel):
    """The termination message: a result or a failure, at most TERMINATION_MESSAGE_BYTES as JSON."""

    version: Literal["v1"] = "v1"
    result: Result | None = None
    failure: Failure | None = None

    def to_message(self) -> str:
        """Writes the JSON for the termination message.

        Raises:
            ValueError: when it is longer than Kubernetes keeps; a truncated message would be no JSON.
        """
        text = self.model_dump_json(by_alias=True, exclude_none=True)
        size = len(text.encode())
        if size > TERMINATION_MESSAGE_BYTES:
            raise ValueError(f"summary is {size} bytes long, {TERMINATION_MESSAGE_BYTES} are kept")
        return text
