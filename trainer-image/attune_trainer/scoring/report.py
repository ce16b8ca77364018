"""The report of an evaluation: one HTML file that holds no transcript and needs no network."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import markupsafe
from attune.contract.job import DatasetInput, Split, SplitBy
from attune.contract.measures import Gate

from attune_trainer.pages import draw, render_page
from attune_trainer.scoring.bootstrap import REPLICATIONS, BootstrapInterval
from attune_trainer.scoring.errors import ErrorCounts
from attune_trainer.scoring.normaliser import NORMALISER
from attune_trainer.scoring.verdict import Judged, Judgement, gate_failure

_HISTOGRAM = (("0", 0, 0), ("1", 1, 1), ("2", 2, 2), ("3 to 5", 3, 5), ("6 to 29", 6, 29), ("30 or more", 30, 1 << 62))


@dataclass(frozen=True)
class Subject:
    """What was judged, for the report's head.

    Attributes:
        title: of the report.
        dataset: and its revision.
        split: of it.
        by: the label that blocks are made of.
        blocks: how many blocks there are.
        baseline: name of the baseline.
        gates: that were set.
        confidence: of the intervals.
        confusions: by candidate, how often each confusion happened; no words.
    """

    title: str
    dataset: DatasetInput
    split: Split
    by: SplitBy
    blocks: int
    baseline: str
    gates: Sequence[Gate]
    confidence: float
    confusions: Mapping[str, Sequence[int]]


def write_report(subject: Subject, judgement: Judgement, work_directory: Path) -> str:
    """Gives the HTML; whatever comes from outside is escaped.

    Args:
        subject: what was judged.
        judgement: what came out.
        work_directory: where the plotting library may keep its caches.
    """
    first = judgement.leaderboard[0]
    base = next(one for one in judgement.leaderboard if one.name == subject.baseline)
    others = len(judgement.leaderboard) - 1
    label = subject.by.value.lower()
    return render_page(
        "scoring/report.html.j2",
        title=subject.title,
        utterances=len(first.measured.words),
        words=first.counts.words,
        minutes=f"{first.measured.audio_seconds / 60:.1f}",
        split=subject.split.value,
        dataset=subject.dataset.name,
        revision=subject.dataset.revision,
        baseline=subject.baseline,
        normaliser=NORMALISER,
        decision=judgement.decision.value,
        reason=judgement.reason,
        confidence=f"{100 * subject.confidence:.4g} %",
        joint_confidence=f"{100 * (1 - (1 - subject.confidence) / max(1, others)):.4g} %",
        rows=[_row(one, subject.confusions[one.name]) for one in judgement.leaderboard],
        plot=_plot(judgement.leaderboard, work_directory),
        gates=[
            {
                "text": _gate(gate),
                "kept": [_kept(gate, one, base) for one in judgement.leaderboard],
            }
            for gate in subject.gates
        ],
        histogram_labels=[f"{name} errors" if name != "1" else "1 error" for name, _, _ in _HISTOGRAM],
        replications=REPLICATIONS,
        blocks=len(first.measured.words) if judgement.over_utterances else subject.blocks,
        block_name="utterances" if judgement.over_utterances else f"{label}s",
        block_label=label,
        over_utterances=judgement.over_utterances,
        several=others > 1,
    )


def _gate(gate: Gate) -> str:
    if gate.max is not None:
        return f"{gate.metric.value} at most {gate.max}"
    return f"{gate.metric.value} change at most {gate.max_change_from_baseline}"


def _kept(gate: Gate, one: Judged, base: Judged) -> str:
    if gate.max is None and one is base:
        return "baseline"
    return "kept" if gate_failure(gate, one.measured, base.measured) is None else "failed"


def _row(one: Judged, confusions: Sequence[int]) -> dict[str, Any]:
    return {
        "name": one.name,
        "wer": f"{100 * one.wer.value:.2f} %",
        "wer_interval": describe_span(one.wer),
        "change": "" if one.change is None else f"{100 * one.change.value:+.1f} %",
        "change_interval": "" if one.change is None else describe_span(one.change, "+"),
        "substitutions": one.counts.substitutions,
        "deletions": one.counts.deletions,
        "insertions": one.counts.insertions,
        "cer": f"{100 * one.cer.value:.2f} %",
        "sentence_accuracy": f"{100 * one.measured.sentence_accuracy:.1f} %",
        "real_time_factor": f"{one.measured.real_time_factor:.3f}",
        "padding": one.measured.padding.value,
        "histogram": histogram(one.measured.words),
        "confusions": len(confusions),
        "top_confusion": max(confusions, default=0),
        "digest": one.measured.model_digest,
    }


def describe_span(interval: BootstrapInterval, sign: str = "") -> str:
    """Writes an interval in percent: "5.0 to 13.2 %"."""
    return f"{100 * interval.low:{sign}.1f} to {100 * interval.high:{sign}.1f} %"


def histogram(counts: Sequence[ErrorCounts]) -> list[int]:
    """Counts utterances by their number of word errors: 0, 1, 2, 3 to 5, 6 to 29, 30 or more."""
    by_errors = Counter(one.errors for one in counts)
    return [sum(by_errors[number] for number in by_errors if low <= number <= high) for _, low, high in _HISTOGRAM]


def _plot(leaderboard: Sequence[Judged], work_directory: Path) -> markupsafe.Markup:
    """Draws each candidate's WER with its interval."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        places = list(range(len(leaderboard)))
        values = [100 * one.wer.value for one in leaderboard]
        spread = [
            [100 * (one.wer.value - one.wer.low) for one in leaderboard],
            [100 * (one.wer.high - one.wer.value) for one in leaderboard],
        ]
        axes.errorbar(values, places, xerr=[[max(0.0, x) for x in side] for side in spread], fmt="o", capsize=4)
        # Names are shown as they are: a dollar sign in one starts no formula.
        axes.set_yticks(places, [one.name for one in leaderboard], parse_math=False)
        axes.set_ylim(len(leaderboard) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("word error rate (%)")
        axes.grid(axis="x", alpha=0.3)

    return draw((8, 0.9 + 0.45 * len(leaderboard)), paint, work_directory)
