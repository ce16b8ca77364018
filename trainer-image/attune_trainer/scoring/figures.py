"""What candidates made of a split, and the figures that follow: each with its interval and what it is a share of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from attune.contract.measures import Metric
from attune.contract.training import Padding

from attune_trainer.scoring.bootstrap import (
    BootstrapInterval,
    Series,
    bootstrap_quantile,
    bootstrap_rate,
)
from attune_trainer.scoring.entities import Span, count_entities
from attune_trainer.scoring.errors import ErrorCounts
from attune_trainer.scoring.gates import GateOutcome
from attune_trainer.scoring.significance import MatchedPairs
from attune_trainer.scoring.slices import Gap, SliceFigures

# Latency is the time within which so many utterances are answered.
LATENCY_QUANTILE = 0.95


@dataclass(frozen=True)
class Measured:
    """What a candidate made of the split, utterance by utterance, in the split's order.

    Attributes:
        name: of the candidate.
        model_digest: of its files; None of an endpoint.
        padding: how its audio was padded, as in serving; None of an endpoint.
        words: word errors of each utterance.
        characters: character errors of each utterance.
        work_seconds: spent in transcription.
        audio_seconds: length of the audio.
        slots: where the word errors of each utterance are (see errors.Alignment).
        latencies: seconds for one utterance at a time; of an endpoint for each, of a model for a sample.
    """

    name: str
    model_digest: str | None
    padding: Padding | None
    words: tuple[ErrorCounts, ...]
    characters: tuple[ErrorCounts, ...]
    work_seconds: float
    audio_seconds: float
    slots: tuple[tuple[int, ...], ...] = ()
    latencies: tuple[float, ...] = ()

    @property
    def sentence_accuracy(self) -> float:
        """Share of utterances without a word error."""
        return self.series(Metric.SENTENCE_ACCURACY).rate

    @property
    def real_time_factor(self) -> float:
        """Seconds of work for a second of audio."""
        return self.work_seconds / self.audio_seconds

    def series(self, metric: Metric, spans: Sequence[Sequence[Span]] = ()) -> Series:
        """Gives what a metric that is counted by utterance is made of.

        Args:
            metric: one of those whose is_counted is true.
            spans: the entities of each reference, for EntityAccuracy.

        Raises:
            ValueError: for the others.
        """
        if metric is Metric.WER:
            return Series.of(self.words)
        if metric is Metric.CER:
            return Series.of(self.characters)
        if metric is Metric.SENTENCE_ACCURACY:
            return Series(tuple(int(one.errors == 0) for one in self.words), (1,) * len(self.words))
        if metric is Metric.ENTITY_ACCURACY:
            return count_entities(spans, self.slots)
        raise ValueError(f"{metric.value} is not counted by utterance")


@dataclass(frozen=True)
class Judged:
    """A candidate's figures.

    Attributes:
        measured: what they come from.
        rank: 1 is the lowest WER.
        counts: word errors of the whole split.
        figures: each metric that was asked for, and WER and CER always, with its interval.
        change: relative to the baseline's WER, with the paired interval; None for the baseline, and where the baseline
            makes too few errors for a ratio.
        matched: the matched-pairs test against the baseline; None for the baseline.
        detectable: the smallest relative change that the split would have shown four times in five.
        slices: the WER on each slice.
        gaps: how far apart the values of each label are.
        gates: what became of each gate, in the order in which they were set.
    """

    measured: Measured
    rank: int
    counts: ErrorCounts
    figures: Mapping[Metric, BootstrapInterval]
    change: BootstrapInterval | None
    matched: MatchedPairs | None = None
    detectable: float | None = None
    slices: tuple[SliceFigures, ...] = ()
    gaps: tuple[Gap, ...] = ()
    gates: tuple[GateOutcome, ...] = field(default=())

    @property
    def name(self) -> str:
        """Of the candidate."""
        return self.measured.name

    @property
    def wer(self) -> BootstrapInterval:
        """Word error rate."""
        return self.figures[Metric.WER]

    @property
    def cer(self) -> BootstrapInterval:
        """Character error rate."""
        return self.figures[Metric.CER]

    @property
    def failed_gates(self) -> tuple[str, ...]:
        """One short sentence for each gate that is broken."""
        return tuple(text for outcome in self.gates for text in outcome.broken)

    @property
    def open_gates(self) -> tuple[str, ...]:
        """One short sentence for each gate of which the split is too small to say whether it is kept."""
        return tuple(text for outcome in self.gates for text in outcome.in_doubt)


def measure_figures(
    measured: Measured,
    metrics: Sequence[Metric],
    spans: Sequence[Sequence[Span]],
    blocks: Sequence[str],
    confidence: float,
    seed: int,
) -> dict[Metric, BootstrapInterval]:
    """Gives the metrics with their intervals, WER and CER whether they were asked for or not.

    The real-time factor is one measurement of the whole split on one machine: it has no interval of draws, and its ends
    are itself.

    Args:
        measured: by the candidate.
        metrics: that were asked for.
        spans: entities of each reference.
        blocks: what is drawn.
        confidence: of the intervals.
        seed: of the draws.
    """
    figures: dict[Metric, BootstrapInterval] = {}
    for metric in Metric:
        if metric not in {Metric.WER, Metric.CER, *metrics}:
            continue
        if metric.is_counted:
            figures[metric] = bootstrap_rate(measured.series(metric, spans), blocks, confidence, seed)
        elif metric is Metric.LATENCY:
            figures[metric] = bootstrap_quantile(measured.latencies, LATENCY_QUANTILE, confidence, seed)
        else:
            factor = measured.real_time_factor
            figures[metric] = BootstrapInterval(factor, factor, factor, 1, len(measured.words))
    return figures
