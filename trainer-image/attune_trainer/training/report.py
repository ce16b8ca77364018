"""The report of a training run, as a page that needs no network and as a model card; neither holds a transcript."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import markupsafe
from attune.contract.costs import describe_break_even
from attune.contract.job import DatasetInput, FinetuneRecipe
from attune.contract.result import FinetuneResult
from attune.contract.training import Method

from attune_trainer.data.dataset import DatasetManifest
from attune_trainer.pages import draw, render_page
from attune_trainer.scoring.bootstrap import (
    REPLICATIONS,
    BootstrapInterval,
    bootstrap_change,
    bootstrap_wer,
    choose_blocks,
    describe_span,
)
from attune_trainer.scoring.errors import ErrorCounts, total
from attune_trainer.scoring.normaliser import NORMALISER
from attune_trainer.training.checkpoints import Counts, TrainingState
from attune_trainer.training.licence import OTHER

# Of a recipe: told elsewhere, or no parameter. Prices are not for a model card, which goes where the model goes.
_NO_PARAMETERS: Final[dict[str, Any]] = {
    **dict.fromkeys(
        ("recipe", "base", "datasets", "model_id", "output_prefix", "checkpoint_prefix", "economics"), True
    ),
    "budget": {"cost_per_gpu_hour", "currency"},
    "retention": {"dataset": {"revision", "uri"}},
}


@dataclass(frozen=True)
class CountedDataset:
    """A Dataset at its revision, with what its manifest counts.

    Attributes:
        name: of the Dataset.
        revision: digest of what was prepared.
        splits: by name (train, validation): utterances, hours, speakers and words.
    """

    name: str
    revision: str
    splits: Mapping[str, Mapping[str, Any]]

    @classmethod
    def from_manifest(cls, dataset: DatasetInput, manifest: DatasetManifest) -> "CountedDataset":
        """Takes the counts over."""
        counted = {name: manifest.content["splits"][name] for name in ("train", "validation")}
        return cls(dataset.name, dataset.revision, counted)


@dataclass(frozen=True)
class TrainingReport:
    """What there is to report.

    Attributes:
        title: namespace and name of the FineTune.
        recipe: what was asked for.
        result: what came out.
        state: of the run at its end.
        language: of the speech.
        licence: that the base's files state; None where they state none.
        datasets: that were trained on and, last, that of an old domain which is kept.
        blocks: speaker, call or group of each utterance of the validation split.
    """

    title: str
    recipe: FinetuneRecipe
    result: FinetuneResult
    state: TrainingState
    language: str
    licence: str | None
    datasets: Sequence[CountedDataset]
    blocks: Sequence[str]


@dataclass(frozen=True)
class Figures:
    """Word errors on the validation split, with 95 % intervals.

    Attributes:
        before: counts of the base model, and its rate.
        after: those of the tuned model.
        change: relative, paired; None where the base makes too few errors for a ratio.
        over_utterances: whether there were too few speakers or groups to draw from.
        drawn: how many utterances, speakers or groups were drawn from.
    """

    before: tuple[ErrorCounts, BootstrapInterval]
    after: tuple[ErrorCounts, BootstrapInterval]
    change: BootstrapInterval | None
    over_utterances: bool
    drawn: int


def measure(state: TrainingState, blocks: Sequence[str]) -> Figures | None:
    """Draws the intervals; None for a run that was begun by a release that kept no counts."""
    if not state.baseline_counts or not state.best_counts:
        return None
    before, after = _read_counts(state.baseline_counts), _read_counts(state.best_counts)
    drawn, over_utterances = choose_blocks(blocks)
    return Figures(
        before=(total(before), bootstrap_wer(before, drawn)),
        after=(total(after), bootstrap_wer(after, drawn)),
        change=bootstrap_change(before, after, drawn),
        over_utterances=over_utterances,
        drawn=len(set(drawn)),
    )


def why_irreproducible(state: TrainingState, gpus: int) -> str | None:
    """Says why the same run again, on the same class of hardware, may give other weights; None where it does not."""
    if state.budget_reached:
        return "its budget ended it by the clock, and another run may be faster or slower"
    if len(state.hardware) > 1:
        return "its attempts ran on different hardware"
    if gpus:
        return "a GPU adds numbers up in an order that changes from run to run"
    if state.hardware and state.hardware[0].processes > 1:
        return "several processes trained together; the same weights are only promised for one"
    return None


def write_report(report: TrainingReport, work_directory: Path) -> str:
    """Gives the page; whatever comes from outside is escaped.

    Args:
        report: what there is to report.
        work_directory: where the plotting library may keep its caches.
    """
    return render_page("training/report.html.j2", **_describe(report), plot=_plot(report.state, work_directory))


def write_card(report: TrainingReport) -> str:
    """Gives the model card: Markdown, with the front matter that model hubs read."""
    return render_page("training/README.md.j2", **_describe(report))


def _describe(report: TrainingReport) -> dict[str, Any]:
    """Puts everything into words."""
    recipe, result, state = report.recipe, report.result, report.state
    figures = measure(state, report.blocks)
    base = recipe.base.uri
    return {
        "title": report.title,
        "model_id": result.model_id,
        "base": base,
        "base_name": base.removeprefix("hf://").partition("@")[0] if base.startswith("hf://") else base,
        "language": report.language,
        "method": recipe.method.value,
        "validated_on": ", ".join(one.name for one in recipe.datasets),
        "licence": report.licence,
        "licence_text": _describe_licence(report.licence),
        "wer_percent": f"{100 * float(result.wer):.2f}",
        "summary": _summarise(result, figures),
        "ending": _describe_ending(report),
        "worth": _describe_worth(report, figures),
        "rows": [] if figures is None else [_row("base", *figures.before), _row("tuned", *figures.after)],
        "validation_utterances": len(state.best_counts),
        "validation_words": 0 if figures is None else figures.after[0].words,
        "drawn": 0 if figures is None else figures.drawn,
        "over_utterances": figures is not None and figures.over_utterances,
        "replications": REPLICATIONS,
        "normaliser": NORMALISER,
        "datasets": [
            {"name": one.name, "revision": one.revision, "split": split, **counted}
            for one in report.datasets
            for split, counted in one.splits.items()
        ],
        "parameters": list(_list_parameters(recipe)),
        "usage": _describe_usage(report),
        "padding": recipe.padding.value,
        "digests": {
            "base model": result.base_digest,
            "model": result.model_digest,
            "its weights alone": result.weights_digest or "not known",
            **({"adapter": result.adapter_digest} if result.adapter_digest else {}),
            "configuration": recipe.config_digest(),
        },
        "code_version": result.code_version,
        "hardware": [one.describe() for one in state.hardware],
        "irreproducible": result.irreproducible,
    }


def _describe_licence(licence: str | None) -> str:
    if licence is None:
        return "unknown: ask its publisher"
    return "of its own; see the LICENSE file of the base model" if licence == OTHER else licence


def _summarise(result: FinetuneResult, figures: Figures | None) -> str:
    said = f"word error rate {_describe_change(result.baseline_wer, result.wer)}"
    if figures is not None and figures.change is not None:
        change = figures.change
        said += f", a change of {100 * change.value:+.1f} % (95 % interval {describe_span(change, '+')})"
    if result.old_baseline_wer is not None and result.old_wer is not None:
        said += f"; on the old domain's {_describe_change(result.old_baseline_wer, result.old_wer)}"
    return said


def _describe_change(before: str, after: str) -> str:
    """("0.2", "0.113") -> "20.00 % -> 11.30 %"."""
    return f"{100 * float(before):.2f} % -> {100 * float(after):.2f} %"


def _describe_ending(report: TrainingReport) -> str:
    result, planned = report.result, report.recipe.hyperparameters.epochs
    steps = f"{result.steps} of {result.total_steps} steps, {float(result.epochs):g} of {planned} epochs"
    if result.budget_reached:
        return f"The budget ended the run after {steps}; the best checkpoint until then is the model."
    if result.stopped_early:
        return f"Early stopping ended the run after {steps}; the best epoch is the model."
    return f"All {result.total_steps} steps were trained; the best of {planned} epochs is the model."


def _describe_worth(report: TrainingReport, figures: Figures | None) -> list[str]:
    """Says when the run has paid for itself, on its figures and on the worst that the interval leaves."""
    economics, budget, result = report.recipe.economics, report.recipe.budget, report.result
    if economics is None or budget is None or result.cost is None:
        return []
    baseline, cost = float(result.baseline_wer), float(result.cost)
    prices = (
        f"{economics.cost_per_corrected_word} for a corrected word and {economics.hours_per_month} hours of "
        f"{economics.words_per_hour} words a month"
    )
    expected = describe_break_even(economics, budget, baseline, float(result.wer), cost)
    sentences = [f"At {prices}, the model {expected}."]
    if figures is not None and figures.change is not None:
        worst = describe_break_even(economics, budget, baseline, baseline * (1 + figures.change.high), cost)
        sentences.append(f"At the end of the interval that is worst for it, it {worst}.")
    return sentences


def _row(name: str, counts: ErrorCounts, wer: BootstrapInterval) -> dict[str, Any]:
    return {
        "name": name,
        "wer": f"{100 * wer.value:.2f} %",
        "interval": describe_span(wer),
        "substitutions": counts.substitutions,
        "deletions": counts.deletions,
        "insertions": counts.insertions,
    }


def _describe_usage(report: TrainingReport) -> list[tuple[str, str, str]]:
    """Lists what was estimated and what it was: training time, GPU hours, peak memory; and the cost."""
    result, estimate = report.result, report.result.estimate
    rows = [
        (
            "training time",
            "" if estimate is None else _minutes(estimate.seconds),
            _minutes(result.training_seconds),
        ),
        (
            "GPU hours",
            "" if estimate is None else f"{float(estimate.gpu_hours):.2f}",
            f"{result.gpu_seconds / 3600:.2f}",
        ),
        (
            "peak memory",
            "" if estimate is None else _gigabytes(estimate.memory_bytes),
            _gigabytes(result.peak_memory_bytes or 0),
        ),
    ]
    if report.recipe.budget is not None and result.cost is not None:
        estimated = None if estimate is None else report.recipe.budget.cost(float(estimate.gpu_hours) * 3600)
        amount = report.recipe.budget.amount
        rows.append(("cost", "" if estimated is None else amount(estimated), amount(float(result.cost))))
    return rows


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _list_parameters(recipe: FinetuneRecipe) -> Iterator[tuple[str, str]]:
    told = recipe.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=_NO_PARAMETERS)
    if recipe.method is Method.FULL:
        del told["lora"]  # defaults of what there is not
    yield from _flatten(told)
    for one in recipe.datasets:
        if one.weight is not None:
            yield f"datasets.{one.name}.weight", one.weight


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """{"lora": {"rank": 16}, "kinds": ["Gsm", "Opus"]} -> ("lora.rank", "16"), ("kinds", "Gsm, Opus")."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"{prefix}{name}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{name}", str(value)


def _read_counts(rows: Counts) -> list[ErrorCounts]:
    return [ErrorCounts.from_row(row) for row in rows]


def _plot(state: TrainingState, work_directory: Path) -> markupsafe.Markup:
    """Draws loss by step, and beside it every figure of the validations by epoch."""
    course = state.course
    names = list(dict.fromkeys(name for one in course.validations for name in one.metrics))

    def paint(figure: Any) -> None:
        losses, figures = figure.subplots(1, 2)
        losses.plot(course.steps(), course.losses, linewidth=1)
        losses.set_xlabel("step")
        losses.set_ylabel("training loss")
        losses.set_ylim(bottom=0)
        for name in names:
            told = [(one.epoch, 100 * one.metrics[name]) for one in course.validations if name in one.metrics]
            figures.plot(*zip(*told, strict=True), marker="o", label=name)
        figures.set_xlabel("epoch (0: the base model)")
        figures.set_ylabel("on the validation split (%)")
        figures.set_ylim(bottom=0)
        if names:
            figures.legend(loc="best")
        for axes in (losses, figures):
            axes.grid(alpha=0.3)

    return draw((10, 3.6), paint, work_directory)
