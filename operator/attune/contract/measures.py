"""What is measured on transcripts, what is demanded of it, and what follows from it."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from attune.contract.base import ContractModel, DecimalString, between


class Metric(StrEnum):
    """A figure that an evaluation computes for each candidate."""

    WER = "Wer"
    CER = "Cer"
    SENTENCE_ACCURACY = "SentenceAccuracy"  # share of utterances without a word error
    ENTITY_ACCURACY = "EntityAccuracy"  # share of names, numbers and terms that were heard word for word
    REAL_TIME_FACTOR = "RealTimeFactor"  # seconds of work for a second of audio
    LATENCY = "Latency"  # seconds within which 95 % of single utterances are answered

    @property
    def is_accuracy(self) -> bool:
        """Whether more is better; of all others less is."""
        return self in {Metric.SENTENCE_ACCURACY, Metric.ENTITY_ACCURACY}

    @property
    def is_counted(self) -> bool:
        """Whether it is counted utterance by utterance, so that slices of the split have it too."""
        return self not in {Metric.REAL_TIME_FACTOR, Metric.LATENCY}


class Decision(StrEnum):
    """What an evaluation recommends."""

    PROMOTE = "Promote"  # a candidate beats the baseline beyond doubt and passes every gate
    KEEP = "Keep"  # the baseline passes the gates and nothing is better beyond doubt
    FINE_TUNE = "FineTune"  # nothing passes the gates: training is worth trying
    NO_FINE_TUNE_NEEDED = "NoFineTuneNeeded"  # the baseline alone was judged, and passes the gates
    INCONCLUSIVE = "Inconclusive"  # the interval contains both answers: more holdout audio is needed


class Gate(ContractModel):
    """A bound that a candidate must keep. Exactly one of max, min and maxChangeFromBaseline is given."""

    metric: Metric = Field(description="What is bounded.")
    max: Annotated[DecimalString, between("0", "1000")] | None = Field(
        default=None, description="Largest allowed value, as a fraction (0.10 is 10 %)."
    )
    min: Annotated[DecimalString, between("0", "1")] | None = Field(
        default=None, description="Smallest allowed value of an accuracy, as a fraction."
    )
    max_change_from_baseline: Annotated[DecimalString, between("-1", "1000")] | None = Field(
        default=None,
        description="Largest allowed relative change from the baseline; -0.05 demands at least 5 % better.",
    )
    slice: str | None = Field(
        default=None, description="A label of utterances: each of its values must keep the bound, not only their sum."
    )
