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
    SecretRef,
    SpecModel,
    Status,
    StatusModel,
    cel,
)
from attune.contract.base import DecimalString, DnsLabel, S3Uri, Uri, between
from attune.contract.measures import Decision, Metric
from attune.contract.training import Padding

Label = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$", min_length=1, max_length=63)]


class CandidateModel(SpecModel):
    """A model by its files."""

    uri: Uri = Field(description="s3://bucket/prefix or hf://organisation/name.")


class EndpointSpec(SpecModel):
    """A server that speaks OpenAI's transcription API (POST url/audio/transcriptions)."""

    url: Annotated[
        str,
        Field(
            pattern=r"^https?://[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?$",
            min_length=8,
            max_length=512,
        ),
    ] = Field(
        description="Where it is, up to and with the version: http://asr.vendor.svc:8000/v1. No key belongs here."
    )
    model: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")] = Field(
        default="whisper-1", description="Name of the model in its requests."
    )
    key_secret_ref: SecretRef | None = Field(
        default=None, description="Secret whose apiKey is sent as a bearer token; absent where none is wanted."
    )
    requests_per_minute: int | None = Field(
        default=None,
        ge=1,
        le=60000,
        description="Most requests a minute, retries included; absent: as fast as it answers.",
    )
    timeout_seconds: int = Field(default=60, ge=1, le=600, description="Longest wait for one answer, in seconds.")
    max_attempts: int = Field(
        default=4, ge=1, le=10, description="Attempts for one utterance; one that fails them all fails the candidate."
    )


class Candidate(SpecModel):
    """Something named that is to be judged. Exactly one of model, fineTuneRef and endpoint is given."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "(has(self.model) ? 1 : 0) + (has(self.fineTuneRef) ? 1 : 0) + (has(self.endpoint) ? 1 : 0) == 1",
                "exactly one of model, fineTuneRef and endpoint must be given",
            )
        )
    )

    name: DnsLabel = Field(description="Name in the leaderboard.")
    model: CandidateModel | None = Field(default=None, description="A model by its files.")
    fine_tune_ref: LocalRef | None = Field(default=None, description="A FineTune; its finished model is judged.")
    endpoint: EndpointSpec | None = Field(default=None, description="A server that transcribes.")


class GateSpec(SpecModel):
    """A bound that the winner must keep. Exactly one of max, min and maxChangeFromBaseline is given."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "(has(self.max) ? 1 : 0) + (has(self.min) ? 1 : 0) + (has(self.maxChangeFromBaseline) ? 1 : 0) == 1",
                "exactly one of max, min and maxChangeFromBaseline must be given",
            ),
            (
                "(self.metric in ['SentenceAccuracy', 'EntityAccuracy']) == has(self.min)",
                (
                    "SentenceAccuracy and EntityAccuracy are better when larger and take min; the other metrics take "
                    "max or maxChangeFromBaseline"
                ),
            ),
            (
                "!has(self.slice) || self.metric in ['Wer', 'Cer', 'SentenceAccuracy', 'EntityAccuracy']",
                "RealTimeFactor and Latency are not counted by utterance: leave slice out",
            ),
        )
    )

    metric: Metric = Field(description="What is bounded.")
    max: Annotated[DecimalString, between("0", "1000")] | None = Field(
        default=None,
        description="Largest allowed value, as a fraction: 0.10 is 10 %; of Latency in seconds.",
    )
    min: Annotated[DecimalString, between("0", "1")] | None = Field(
        default=None, description="Smallest allowed value of an accuracy, as a fraction: 0.95 is 95 %."
    )
    max_change_from_baseline: Annotated[DecimalString, between("-1", "1000")] | None = Field(
        default=None,
        description="Largest allowed relative change from the baseline; -0.05 demands at least 5 % better.",
    )
    slice: Label | None = Field(
        default=None,
        description=(
            "One of spec.slices: each of its values must keep the bound. A value fails when the bound is broken beyond "
            "doubt (Holm's correction over all values); where it is broken within the interval the verdict is "
            "Inconclusive."
        ),
    )


class EntitiesSpec(SpecModel):
    """What must be heard word for word. At least one of terms, termsUri and numbers is given."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                (
                    "(has(self.terms) && size(self.terms) > 0) || has(self.termsUri) "
                    "|| (has(self.numbers) && self.numbers)"
                ),
                "give terms, termsUri or numbers: true",
            ),
        )
    )

    terms: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=256)] = Field(
        default=[], description="Names and terms, of one or more words; they are normalised as the transcripts are."
    )
    terms_uri: S3Uri | None = Field(default=None, description="A text file in the store with one term a line.")
    numbers: bool = Field(
        default=False,
        description="Every run of words with digits; in English also of number words: four one one two.",
    )


class EvaluationSpec(QueueableSpec):
    """What is wanted: a split to judge on, candidates, and what they must keep."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self.candidates.exists(c, c.name == self.baseline)", "baseline must be the name of a candidate"),
            (
                "!has(self.gates) || self.gates.all(g, !has(g.slice) || (has(self.slices) && g.slice in self.slices))",
                "the slice of a gate must be one of spec.slices",
            ),
            (
                (
                    "has(self.entities) || ((!has(self.metrics) || !('EntityAccuracy' in self.metrics)) && "
                    "(!has(self.gates) || !self.gates.exists(g, g.metric == 'EntityAccuracy')))"
                ),
                "EntityAccuracy needs spec.entities",
            ),
            (
                (
                    "!has(self.entities) || (has(self.metrics) && 'EntityAccuracy' in self.metrics) || "
                    "(has(self.gates) && self.gates.exists(g, g.metric == 'EntityAccuracy'))"
                ),
                "spec.entities is for the metric EntityAccuracy: add it to metrics, or leave entities out",
            ),
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
    slices: Annotated[list[Label], Field(max_length=8)] = Field(
        default=[],
        description=(
            "Labels by whose values the figures are given as well: labels of the Dataset's utterances, speaker, group, "
            "or duration. At most 64 values of a label are shown, those with most words."
        ),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    entities: EntitiesSpec | None = Field(default=None, description="What EntityAccuracy counts.")
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
    padding: Padding | None = Field(
        default=None, description="How its audio was padded, as in serving; an endpoint does not say."
    )
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
    cer_low: DecimalString | None = Field(default=None, description="Lower end of its interval.")
    cer_high: DecimalString | None = Field(default=None, description="Upper end of its interval.")
    sentence_accuracy: DecimalString | None = Field(default=None, description="Share of utterances without an error.")
    sentence_accuracy_low: DecimalString | None = Field(default=None, description="Lower end of its interval.")
    sentence_accuracy_high: DecimalString | None = Field(default=None, description="Upper end of its interval.")
    entities: int | None = Field(default=None, ge=0, description="Names, numbers and terms in the references.")
    entity_accuracy: DecimalString | None = Field(
        default=None, description="Share of them that was heard word for word."
    )
    entity_accuracy_low: DecimalString | None = Field(default=None, description="Lower end of its interval.")
    entity_accuracy_high: DecimalString | None = Field(default=None, description="Upper end of its interval.")
    real_time_factor: DecimalString | None = Field(default=None, description="Seconds of work for a second of audio.")
    latency_seconds: DecimalString | None = Field(
        default=None, description="Seconds within which 95 % of utterances, one at a time, were answered."
    )
    change_from_baseline: DecimalString | None = Field(default=None, description="Relative change of WER.")
    change_low: DecimalString | None = Field(default=None, description="Lower end of its paired interval.")
    change_high: DecimalString | None = Field(default=None, description="Upper end of its paired interval.")
    p_value: DecimalString | None = Field(
        default=None, description="Of the matched-pairs sentence-segment word error test against the baseline."
    )
    detectable_change: DecimalString | None = Field(
        default=None, description="Smallest relative change that this split would have shown four times in five."
    )
    failed_gates: list[Annotated[str, Field(max_length=128)]] = Field(
        default=[], max_length=16, description="Gates that it does not keep."
    )


class VerdictStatus(StatusModel):
    """What to do."""

    decision: Decision = Field(description="Promote, Keep, FineTune, NoFineTuneNeeded or Inconclusive.")
    reason: str = Field(max_length=512, description="The figure that decided.")
    would_change: str | None = Field(default=None, max_length=256, description="What would lead to another decision.")


class SliceGapStatus(StatusModel):
    """How far apart the values of a label are for the candidate that comes first; rates are fractions."""

    label: str = Field(max_length=63, description="The label.")
    candidate: str = Field(max_length=63, description="Name of the candidate.")
    best: str = Field(max_length=63, description="The value with the lowest word error rate.")
    best_wer: DecimalString = Field(description="Its word error rate.")
    worst: str = Field(max_length=63, description="The value with the highest word error rate.")
    worst_wer: DecimalString = Field(description="Its word error rate.")
    gap: DecimalString = Field(description="Their difference.")
    gap_low: DecimalString = Field(description="Lower end of its interval.")
    gap_high: DecimalString = Field(description="Upper end of its interval.")
    values: int = Field(ge=0, description="Values that were judged.")
    too_small: int = Field(ge=0, description="Values with too few words to say anything.")


class FailedCandidateStatus(StatusModel):
    """A candidate that could not be judged."""

    candidate: str = Field(max_length=63, description="Its name.")
    reason: str = Field(max_length=63, description="CamelCase reason.")
    message: str = Field(max_length=256, description="What happened, and what to change.")


class EvaluationStatus(Status):
    """What came out: leaderboard, winner, verdict, and how the work stands."""

    leaderboard: list[LeaderboardRowStatus] = Field(default=[], max_length=8, description="Candidates, best first.")
    winner: str | None = Field(default=None, max_length=63, description="The best candidate.")
    verdict: VerdictStatus | None = Field(default=None, description="What to do.")
    dataset_revision: str | None = Field(default=None, max_length=71, description="Revision that was judged on.")
    gaps: list[SliceGapStatus] = Field(default=[], max_length=8, description="By label of spec.slices.")
    failed: list[FailedCandidateStatus] = Field(
        default=[], max_length=8, description="Candidates that could not be judged; the others were."
    )
    normaliser: str | None = Field(
        default=None, max_length=63, description="Name of the rules by which texts were made comparable."
    )
    report: str | None = Field(
        default=None,
        max_length=1024,
        description="HTML report in the store; results.json and utterances.parquet lie beside it.",
    )
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
