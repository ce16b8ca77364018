"""The report of an evaluation: one HTML file that holds no transcript and needs no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import markupsafe
from attune.contract.job import DatasetInput, Split, SplitBy
from attune.contract.measures import Gate, Metric

from attune_trainer.pages import draw, render_page
from attune_trainer.scoring.bootstrap import (
    REPLICATIONS,
    BootstrapInterval,
    Series,
    bootstrap_rate,
    choose_blocks,
    describe_span,
)
from attune_trainer.scoring.errors import HISTOGRAM, histogram
from attune_trainer.scoring.figures import Judged
from attune_trainer.scoring.gates import GateOutcome, describe_gate, write_value
from attune_trainer.scoring.hearing import Heard
from attune_trainer.scoring.normaliser import NORMALISER
from attune_trainer.scoring.slices import FEWEST_UTTERANCES, FEWEST_WORDS, Slice, SliceFigures, divide, duration_of
from attune_trainer.scoring.verdict import Judgement, Question

_DURATIONS: Final = ("under 2 s", "2 to 5 s", "5 to 10 s", "10 to 20 s", "20 s or more")
_NOISES: Final = ("under 5 dB", "5 to 10 dB", "10 to 20 dB", "20 to 30 dB", "30 dB or more")
_PLOTTED_VALUES: Final = 12
_HEADINGS: Final = {
    Metric.WER: "WER",
    Metric.CER: "CER",
    Metric.SENTENCE_ACCURACY: "right sentences",
    Metric.ENTITY_ACCURACY: "right entities",
    Metric.REAL_TIME_FACTOR: "real-time factor",
    Metric.LATENCY: "latency, 95 %",
}


@dataclass(frozen=True)
class Subject:
    """What was judged.

    Attributes:
        title: of the report.
        dataset: and its revision.
        split: of it.
        by: the label that blocks are made of.
        seconds: length of each utterance.
        noise: estimated signal-to-noise ratio of each in dB.
        heard: by candidate.
        question: what they were judged by.
    """

    title: str
    dataset: DatasetInput
    split: Split
    by: SplitBy
    seconds: Sequence[float]
    noise: Sequence[float]
    heard: Mapping[str, Heard]
    question: Question


def write_report(subject: Subject, judgement: Judgement, work_directory: Path) -> str:
    """Gives the HTML; whatever comes from outside is escaped.

    Args:
        subject: what was judged.
        judgement: what came out.
        work_directory: where the plotting library may keep its caches.
    """
    first, question = judgement.leaderboard[0], subject.question
    label = subject.by.value.lower()
    metrics = [metric for metric in Metric if metric in first.figures and metric in {Metric.WER, *question.wanted}]
    return render_page(
        "scoring/report.html.j2",
        title=subject.title,
        utterances=len(first.measured.words),
        words=first.counts.words,
        minutes=f"{first.measured.audio_seconds / 60:.1f}",
        split=subject.split.value,
        dataset=subject.dataset.name,
        revision=subject.dataset.revision,
        baseline=question.baseline,
        normaliser=NORMALISER,
        decision=judgement.decision.value,
        reason=judgement.reason,
        would_change=judgement.would_change,
        confidence=_percent(question.confidence),
        joint_confidence=_percent(judgement.joint),
        metrics=[_HEADINGS[metric] for metric in metrics],
        rows=[_row(one, metrics, subject) for one in judgement.leaderboard],
        failed=question.failed,
        plot=_plot_metrics(judgement.leaderboard, [one for one in metrics if one.is_counted], work_directory),
        gates=[
            {
                "text": describe_gate(gate),
                "kept": [_kept(gate, one.gates[place], one, question) for one in judgement.leaderboard],
            }
            for place, gate in enumerate(question.gates)
        ],
        labels=_labels(judgement.leaderboard, question, work_directory),
        fewest_words=FEWEST_WORDS,
        fewest_utterances=FEWEST_UTTERANCES,
        by_length=_plot_by(
            judgement, subject, [duration_of(one) for one in subject.seconds], _DURATIONS, work_directory
        ),
        by_noise=_plot_by(judgement, subject, [noise_of(one) for one in subject.noise], _NOISES, work_directory),
        histogram_labels=[f"{name} errors" if name != "1" else "1 error" for name, _, _ in HISTOGRAM],
        replications=REPLICATIONS,
        blocks=len(first.measured.words) if judgement.over_utterances else len(set(question.blocks)),
        block_name="utterances" if judgement.over_utterances else f"{label}s",
        block_label=label,
        over_utterances=judgement.over_utterances,
        several=judgement.joint > question.confidence,
    )


def noise_of(ratio: float) -> str:
    """Names the bucket of a signal-to-noise ratio in dB: 12.0 -> "10 to 20 dB"."""
    for below, name in zip((5.0, 10.0, 20.0, 30.0), _NOISES, strict=False):
        if ratio < below:
            return name
    return _NOISES[-1]


def _kept(gate: Gate, outcome: GateOutcome, one: Judged, question: Question) -> str:
    if gate.max_change_from_baseline is not None and one.name == question.baseline:
        return "baseline"
    if outcome.broken:
        return f"failed: {'; '.join(outcome.broken)}"
    return f"in doubt: {'; '.join(outcome.in_doubt)}" if outcome.in_doubt else "kept"


def _row(one: Judged, metrics: Sequence[Metric], subject: Subject) -> dict[str, Any]:
    heard = subject.heard[one.name]
    return {
        "name": one.name,
        "figures": [_figure(metric, one.figures[metric]) for metric in metrics],
        "change": "" if one.change is None else f"{100 * one.change.value:+.1f} %",
        "change_interval": "" if one.change is None else describe_span(one.change, "+"),
        "p_value": "" if one.matched is None else write_probability(one.matched.p_value),
        "segments": "" if one.matched is None else one.matched.segments,
        "detectable": "" if one.detectable is None else f"{100 * one.detectable:.1f} %",
        "hits": one.counts.hits,
        "substitutions": one.counts.substitutions,
        "deletions": one.counts.deletions,
        "insertions": one.counts.insertions,
        "padding": "" if one.measured.padding is None else one.measured.padding.value,
        "histogram": histogram(one.measured.words),
        "kinds": len(heard.confusion_counts),
        "confusions": heard.confusions,
        "digest": one.measured.model_digest or "an endpoint shows no files",
    }


def _figure(metric: Metric, figure: BootstrapInterval) -> dict[str, Any]:
    if metric is Metric.REAL_TIME_FACTOR:
        return {"value": write_value(metric, figure.value), "interval": "", "n": figure.n}
    span = describe_span(figure) if metric.is_counted else f"{figure.low:.3g} to {figure.high:.3g} s"
    value = f"{100 * figure.value:.2f} %" if metric.is_counted else write_value(metric, figure.value)
    return {"value": value, "interval": span, "n": figure.n}


def write_probability(value: float) -> str:
    """Writes a p-value: "0.032"; "< 0.0001"."""
    smallest = 0.0001
    return f"< {smallest}" if value < smallest else f"{value:.2g}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _labels(leaderboard: Sequence[Judged], question: Question, work_directory: Path) -> list[dict[str, Any]]:
    """Gives a table and a drawing for each label."""
    gaps = {(one.name, gap.label): gap for one in leaderboard for gap in one.gaps}
    found = []
    for label in dict.fromkeys(one.label for one in question.slices):
        by_candidate = [[figures for figures in one.slices if figures.slice.label == label] for one in leaderboard]
        found.append(
            {
                "name": label,
                # Not "values": in a template that would be the method of a dict.
                "entries": [
                    {
                        "name": together[0].slice.value,
                        "utterances": len(together[0].slice.places),
                        "words": together[0].slice.words,
                        "too_small": together[0].slice.is_too_small,
                        "cells": [_slice_cell(figures) for figures in together],
                    }
                    for together in zip(*by_candidate, strict=True)
                ],
                "gaps": [
                    {
                        "candidate": one.name,
                        "best": gap.best.slice.value,
                        "worst": gap.worst.slice.value,
                        "gap": f"{100 * gap.difference.value:.1f} points",
                        "interval": f"{100 * gap.difference.low:.1f} to {100 * gap.difference.high:.1f} points",
                        "judged": gap.values,
                        "too_small": gap.too_small,
                    }
                    for one in leaderboard
                    if (gap := gaps.get((one.name, label))) is not None
                ],
                "plot": _plot_slices(leaderboard, label, work_directory),
            }
        )
    return found


def _slice_cell(figures: SliceFigures) -> dict[str, str]:
    change = figures.change
    return {
        "wer": "" if figures.wer is None else f"{100 * figures.wer.value:.1f} %",
        "interval": "" if figures.wer is None else describe_span(figures.wer),
        "change": "" if change is None else f"{100 * change.value:+.1f} % ({describe_span(change, '+')})",
        "p_value": "" if figures.p_adjusted is None else write_probability(figures.p_adjusted),
    }


# (name of a line, its values with intervals by place; None where there is nothing to show)
_Line = tuple[str, Sequence[BootstrapInterval | None]]


def _draw_lines(lines: Sequence[_Line], names: Sequence[str], quantity: str, work_directory: Path) -> markupsafe.Markup:
    """Draws values with intervals beside each other, one colour for each line."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for number, (name, values) in enumerate(lines):
            shift = (number - (len(lines) - 1) / 2) * 0.6 / max(1, len(lines))
            shown = [(place + shift, one) for place, one in enumerate(values) if one is not None]
            _paint_bars(axes, [place for place, _ in shown], [one for _, one in shown], name)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(quantity)
        axes.grid(axis="x", alpha=0.3)
        if len(lines) > 1:
            legend = axes.legend(loc="best", fontsize="small")
            for text in legend.get_texts():
                text.set_parse_math(parse_math=False)

    return draw((8, 1.0 + 0.22 * len(names) * max(1, len(lines)) + 0.2 * len(names)), paint, work_directory)


def _paint_bars(axes: Any, places: Sequence[float], values: Sequence[BootstrapInterval], name: str) -> None:
    spread = [
        [max(0.0, 100 * (one.value - one.low)) for one in values],
        [max(0.0, 100 * (one.high - one.value)) for one in values],
    ]
    # A label that begins with an underscore would be left out of the legend.
    axes.errorbar([100 * one.value for one in values], places, xerr=spread, fmt="o", capsize=3, label=f" {name}")


def _plot_metrics(leaderboard: Sequence[Judged], metrics: Sequence[Metric], work_directory: Path) -> markupsafe.Markup:
    """Draws each metric that is counted, a panel for each, with the candidates' intervals."""

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        places = list(range(len(leaderboard)))
        for axes, metric in zip(panels, metrics, strict=True):
            _paint_bars(axes, places, [one.figures[metric] for one in leaderboard], metric.value)
            # Names are shown as they are: a dollar sign in one starts no formula.
            axes.set_yticks(places, [one.name for one in leaderboard], parse_math=False)
            axes.set_ylim(len(leaderboard) - 0.5, -0.5)
            axes.set_xlabel(f"{_HEADINGS[metric]} (%)")
            axes.grid(axis="x", alpha=0.3)
        panels[0].set_xlim(left=0)

    width = 8 if len(metrics) == 1 else 5 + 2.5 * len(metrics)
    return draw((width, 0.9 + 0.45 * len(leaderboard)), paint, work_directory)


def _plot_slices(leaderboard: Sequence[Judged], label: str, work_directory: Path) -> markupsafe.Markup | None:
    """Draws the WER on the values of a label that say something; those with most words where they are many."""
    judged = [
        [one for one in judged.slices if one.slice.label == label and not one.slice.is_too_small]
        for judged in leaderboard
    ]
    names = [one.slice.value for one in judged[0][:_PLOTTED_VALUES]]
    if not names:
        return None
    lines: list[_Line] = [
        (one.name, [figures.wer for figures in values[:_PLOTTED_VALUES]])
        for one, values in zip(leaderboard, judged, strict=True)
    ]
    return _draw_lines(lines, names, "word error rate (%)", work_directory)


def _plot_by(
    judgement: Judgement, subject: Subject, values: Sequence[str], order: Sequence[str], work_directory: Path
) -> markupsafe.Markup:
    """Draws the WER by buckets of a quantity, in their order; buckets that are too small are left out."""
    question = subject.question
    words = [one.words for one in judgement.leaderboard[0].measured.words]
    known = {one.value: one for one in divide("bucket", values, words)}
    buckets = [known[name] for name in order if name in known]

    def measure(one: Judged) -> list[BootstrapInterval | None]:
        series = one.measured.series(Metric.WER)
        return [None if bucket.is_too_small else measure_bucket(series, bucket) for bucket in buckets]

    def measure_bucket(series: Series, bucket: Slice) -> BootstrapInterval:
        drawn, _ = choose_blocks([question.blocks[place] for place in bucket.places])
        return bootstrap_rate(series.take(bucket.places), drawn, question.confidence, question.seed)

    names = [f"{one.value} ({one.words} words{', too few' if one.is_too_small else ''})" for one in buckets]
    lines: list[_Line] = [(one.name, measure(one)) for one in judgement.leaderboard]
    return _draw_lines(lines, names, "word error rate (%)", work_directory)
