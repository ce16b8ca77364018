"""Evaluation: candidates x metrics on a split; a leaderboard, a winner, a verdict."""

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from attune.api.meta import (
    NAME_IS_A_LABEL,
    PRIORITY_NEEDS_A_QUEUE,
    LocalRef,
    PodResources,
    QueueableSpec,
    Resource,
    SpecModel,
    Status,
    StatusModel,
    cel,
)
from attune.contract.base import DecimalString, DnsLabel, Uri, between
from attune.contract.measures import Decision, Metric
from attune.contract.training import Padding


class CandidateModel(SpecModel):
    """A model by its files."""

    uri: Uri = Field(description="s3://bucket/prefix or hf://organisation/name.")


class Candidate(SpecModel):
    """A named model to be judged. Exactly one of model and fineTuneRef is given."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("has(self.model) != has(self.fineTuneRef)", "exactly one of model and fineTuneRef must be given")
        )
    )

    name: DnsLabel = Field(description="Name in the leaderboard.")
    model: CandidateModel | None = Field(default=None, description="A model by its files.")
    fine_tune_ref: LocalRef | None = Field(default=None, description="A FineTune; its finished model is judged.")


class GateSpec(SpecModel):
    """A bound that the winner must keep. Exactly one of max and maxChangeFromBaseline is given."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "has(self.max) != has(self.maxChangeFromBaseline)",
                "exactly one of max and maxChangeFromBaseline must be given",
            )
        )
    )

    metric: Literal[Metric.WER, Metric.CER, Metric.REAL_TIME_FACTOR] = Field(
        description="What is bounded: Wer, Cer or RealTimeFactor."
    )
    max: Annotated[DecimalString, between("0", "1000")] | None = Field(
        default=None,
        description="Largest allowed value, as a fraction: 0.10 is 10 %.",
    )
    max_change_from_baseline: Annotated[DecimalString, between("-1", "1000")] | None = Field(
        default=None,
        description="Largest allowed relative change from the baseline; -0.05 demands at least 5 % better.",
    )


class EvaluationSpec(QueueableSpec):
    """What is wanted: a split to judge on, candidates, and what they must keep."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self.candidates.exists(c, c.name == self.baseline)", "baseline must be the name of a candidate"),
        )
    )

    dataset_ref: LocalRef = Field(description="The Dataset to judge on.")
    split: Literal["Validation", "Holdout"] = Field(default="Holdout", description="Its split to judge on.")
    candidates: Annotated[list[Candidate], Field(min_length=1, max_length=8)] = Field(
        description="Models to be judged.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    baseline: DnsLabel = Field(description="The candidate that the others are compared with.")
    metrics: Annotated[list[Metric], Field(min_length=1, max_length=8)] = Field(
        default=[Metric.WER],
        description="Figures to compute.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    gates: Annotated[list[GateSpec], Field(max_length=16)] = Field(
        default=[], description="Bounds that the winner must keep."
    )
    confidence: Annotated[DecimalString, between("0.5", "0.999")] = Field(
        default="0.95", description="Confidence of the intervals."
    )
    resources: PodResources | None = Field(default=None, description="Resources of the evaluation's pod.")
    suspend: bool = Field(default=False, description="Stops the work until it is false again.")


class LeaderboardRowStatus(StatusModel):
    """One candidate's figures; rates are fractions."""

    candidate: str = Field(max_length=63, description="Name of the candidate.")
    rank: int = Field(ge=1, description="1 is the best.")
    model_digest: str | None = Field(default=None, max_length=71, description="Digest of the judged files.")
    padding: Padding = Field(description="How its audio was padded, as in serving.")
    utterances: int = Field(ge=0, description="Utterances judged.")
    words: int = Field(ge=0, description="Reference words.")
    hits: int = Field(ge=0, description="Words heard right.")
    substitutions: int = Field(ge=0, description="Words heard as others.")
    deletions: int = Field(ge=0, description="Words not heard.")
    insertions: int = Field(ge=0, description="Words heard that nobody said.")
    wer: DecimalString = Field(description="Word error rate over the whole split.")
    wer_low: DecimalString = Field(description="Lower end of its interval.")
    wer_high: DecimalString = Field(description="Upper end of its interval.")
    cer: DecimalString | None = Field(default=None, description="Character error rate.")
    sentence_accuracy: DecimalString | None = Field(default=None, description="Share of utterances without an error.")
    real_time_factor: DecimalString | None = Field(default=None, description="Seconds of work for a second of audio.")
    change_from_baseline: DecimalString | None = Field(default=None, description="Relative change of WER.")
    change_low: DecimalString | None = Field(default=None, description="Lower end of its paired interval.")
    change_high: DecimalString | None = Field(default=None, description="Upper end of its paired interval.")
    failed_gates: list[Annotated[str, Field(max_length=128)]] = Field(
        default=[], max_length=16, description="Gates that it does not keep."
    )


class VerdictStatus(StatusModel):
    """What to do."""

    decision: Decision = Field(description="Promote, Keep, FineTune, NoFineTuneNeeded or Inconclusive.")
    reason: str = Field(max_length=512, description="The figure that decided.")


class EvaluationStatus(Status):
    """What came out: leaderboard, winner, verdict, and how the work stands."""

    leaderboard: list[LeaderboardRowStatus] = Field(default=[], max_length=8, description="Candidates, best first.")
    winner: str | None = Field(default=None, max_length=63, description="The best candidate.")
    verdict: VerdictStatus | None = Field(default=None, description="What to do.")
    dataset_revision: str | None = Field(default=None, max_length=71, description="Revision that was judged on.")
    report: str | None = Field(default=None, max_length=1024, description="HTML report in the store.")
    job_name: str | None = Field(default=None, max_length=63, description="The evaluation's Job.")


class Evaluation(Resource):
    """Judges candidate models on a held-out split: a leaderboard with intervals, a winner, a verdict."""

    KIND: ClassVar[str] = "Evaluation"
    PLURAL: ClassVar[str] = "evaluations"
    SHORT_NAME: ClassVar[str] = "aev"
    TERMINAL_CONDITION: ClassVar[str] = "Succeeded"
    COLUMNS: ClassVar[tuple[tuple[str, str, str, int], ...]] = (
        ("Phase", "string", ".status.phase", 0),
        ("Verdict", "string", ".status.verdict.decision", 0),
        ("Winner", "string", ".status.winner", 0),
        ("WER", "string", ".status.leaderboard[0].wer", 0),
        ("Low", "string", ".status.leaderboard[0].werLow", 0),
        ("High", "string", ".status.leaderboard[0].werHigh", 0),
        ("Reason", "string", ".status.conditions[?(@.type=='Succeeded')].reason", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
    )
    RULES: ClassVar[tuple[tuple[str, str], ...]] = (
        ("size(self.metadata.name) <= 52", "the name must have at most 52 characters"),
        NAME_IS_A_LABEL,
        PRIORITY_NEEDS_A_QUEUE,
    )

    spec: EvaluationSpec
    status: EvaluationStatus = EvaluationStatus()
