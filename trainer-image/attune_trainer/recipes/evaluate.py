"""evaluate: candidates x a split -> leaderboard with intervals, slices, winner, verdict, report."""

import logging
from collections.abc import Sequence
from typing import Any

from attune.contract.exitcode import ExitCode
from attune.contract.job import EvaluateRecipe
from attune.contract.measures import Metric
from attune.contract.result import EvaluateResult, FailedCandidate, LeaderboardRow, SliceGap, Verdict

from attune_trainer.data.dataset import (
    DatasetManifest,
    Utterance,
    fetch_audio,
    load_manifest,
    load_split,
    read_audio,
)
from attune_trainer.decimals import decimal_string
from attune_trainer.failures import InvalidInput, NotFound, RecipeFailure, Terminated
from attune_trainer.job import RecipeContext
from attune_trainer.scoring.bootstrap import BootstrapInterval
from attune_trainer.scoring.entities import Span, find_entities
from attune_trainer.scoring.errors import total
from attune_trainer.scoring.figures import Judged
from attune_trainer.scoring.hearing import Heard, Split, hear
from attune_trainer.scoring.noise import estimate_noise_ratio
from attune_trainer.scoring.normaliser import NORMALISER, normalise
from attune_trainer.scoring.publication import build_results, build_table
from attune_trainer.scoring.report import Subject, write_report
from attune_trainer.scoring.slices import Slice, divide, duration_of
from attune_trainer.scoring.verdict import Failed, Judgement, Question, judge

_log = logging.getLogger(__name__)

_REASON_CHARACTERS = 512
_CHANGE_CHARACTERS = 256
_MESSAGE_CHARACTERS = 256
_GATE_CHARACTERS = 96
_LABEL_CHARACTERS = 63
_MOST_TERMS = 10_000
_SAMPLE_RATE = 16000  # Hz, of prepared audio


def run(recipe: EvaluateRecipe, context: RecipeContext) -> EvaluateResult:
    """Judges the candidates on the split, each padded as it is served.

    A candidate that cannot be judged is named in the result, and the others are judged without it.

    Raises:
        RecipeFailure: where no candidate can be judged, the first one's; InvalidEvaluation; EmptySplit; UnknownSlice;
            NoEntities; and the store's failures.
    """
    _check(recipe)
    context.reporter.update(stage="Downloading", percent=1)
    manifest = load_manifest(context.store, recipe.dataset)
    utterances = load_split(context.store, recipe.dataset, recipe.split)
    if not utterances:
        raise InvalidInput("EmptySplit", f"the {recipe.split.value} split of dataset {recipe.dataset.name} is empty")
    references = [normalise(one.text, manifest.language) for one in utterances]
    slices = _divide(recipe, utterances, references)
    spans = _find_entities(recipe, context, references, manifest.language)
    split = Split(utterances, references, manifest.language, context.directory("audio"))
    _fetch(context, split)
    heard, failed = _hear_all(recipe, context, split)
    context.reporter.update(stage="Judging", percent=95)
    question = Question(
        blocks=[one.block(manifest.by) for one in utterances],
        baseline=recipe.baseline,
        gates=recipe.gates,
        confidence=float(recipe.confidence),
        seed=recipe.seed,
        metrics=recipe.metrics,
        slices=slices,
        spans=spans,
        failed=failed,
    )
    judgement = judge([one.measured for one in heard], question)
    context.reporter.update(stage="Publishing", percent=97)
    report_uri = _publish(recipe, context, split, heard, judgement, question, manifest)
    return EvaluateResult(
        leaderboard=[_row(one, question) for one in judgement.leaderboard],
        winner=judgement.winner,
        verdict=Verdict(
            decision=judgement.decision,
            reason=judgement.reason[:_REASON_CHARACTERS],
            would_change=judgement.would_change[:_CHANGE_CHARACTERS],
        ),
        report_uri=report_uri,
        normaliser=NORMALISER,
        gaps=_gaps(judgement.leaderboard[0]),
        failed=[
            FailedCandidate(candidate=one.name, reason=one.reason, message=one.message[:_MESSAGE_CHARACTERS])
            for one in failed
        ],
    )


def _check(recipe: EvaluateRecipe) -> None:
    names = [one.name for one in recipe.candidates]
    if len(set(names)) != len(names):
        raise _invalid("two candidates have the same name; give each its own")
    if recipe.baseline not in names:
        raise _invalid(f"the baseline {recipe.baseline} is none of the candidates")
    for one in recipe.candidates:
        if (one.model is None) == (one.endpoint is None):
            raise _invalid(f"candidate {one.name} needs exactly one of model and endpoint")
    for gate in recipe.gates:
        if [gate.max, gate.min, gate.max_change_from_baseline].count(None) != 2:  # noqa: PLR2004 (two of three)
            raise _invalid("each gate needs exactly one of max, min and maxChangeFromBaseline")
        if gate.metric.is_accuracy != (gate.min is not None):
            better, bound = ("larger", "min") if gate.metric.is_accuracy else ("smaller", "max")
            raise _invalid(f"{gate.metric.value} is better when {better}; a gate bounds it by {bound}")
        if gate.slice is not None and (gate.slice not in recipe.slices or not gate.metric.is_counted):
            raise _invalid(
                f"the gate on {gate.metric.value} in {gate.slice} needs a slice of spec.slices, and a metric that is "
                "counted by utterance"
            )
    wanted = {*recipe.metrics, *(gate.metric for gate in recipe.gates)}
    if (Metric.ENTITY_ACCURACY in wanted) != (recipe.entities is not None):
        raise _invalid("EntityAccuracy and spec.entities belong together: give both or neither")


def _invalid(message: str) -> InvalidInput:
    return InvalidInput("InvalidEvaluation", message)


def _divide(recipe: EvaluateRecipe, utterances: Sequence[Utterance], references: Sequence[str]) -> list[Slice]:
    """Divides the split by each label that was asked for.

    Raises:
        RecipeFailure: UnknownSlice, where no utterance has it.
    """
    own = [
        {"speaker": one.speaker, "group": one.group, "duration": duration_of(one.seconds), **one.labels}
        for one in utterances
    ]
    words = [len(reference.split()) for reference in references]
    slices: list[Slice] = []
    for label in recipe.slices:
        values = [labels.get(label) for labels in own]
        if not any(values):
            known = sorted({name for labels in own for name in labels})
            raise InvalidInput(
                "UnknownSlice",
                f"no utterance of the {recipe.split.value} split has a label {label}: take it out of spec.slices, or "
                f"name it in the Dataset's slices and manifest; there is {', '.join(known[:16])}",
            )
        slices += divide(label, values, words)
    return slices


def _find_entities(
    recipe: EvaluateRecipe, context: RecipeContext, references: Sequence[str], language: str
) -> list[tuple[Span, ...]]:
    """Finds what EntityAccuracy counts; nothing where it was not asked for.

    Raises:
        RecipeFailure: NoEntities, TermsNotFound, TermsUnreadable, and the store's.
    """
    told = recipe.entities
    if told is None:
        return []
    terms = list(told.terms)
    if told.terms_uri is not None:
        terms += _read_terms(told.terms_uri, context)
    spans = find_entities(references, terms, language, numbers=told.numbers)
    if not any(spans):
        raise InvalidInput(
            "NoEntities",
            f"none of the terms or numbers of spec.entities is said in the {recipe.split.value} split; correct the "
            "terms, or leave EntityAccuracy out",
        )
    return spans


def _read_terms(uri: str, context: RecipeContext) -> list[str]:
    try:
        text = context.store.read_bytes(uri).decode("utf-8-sig")
    except NotFound as error:
        raise NotFound("TermsNotFound", f"there is no {uri}; upload it, or correct spec.entities.termsUri") from error
    except UnicodeDecodeError as error:
        raise InvalidInput("TermsUnreadable", f"{uri} is not UTF-8 text; write one term a line in UTF-8") from error
    terms = [line.strip() for line in text.splitlines() if line.strip()]
    if len(terms) > _MOST_TERMS:
        raise InvalidInput("TermsUnreadable", f"{uri} has {len(terms)} lines, at most {_MOST_TERMS} are read")
    return terms


def _fetch(context: RecipeContext, split: Split) -> None:
    def report(fetched: int) -> None:
        context.raise_if_stopped()
        context.reporter.update(step=fetched, total_steps=len(split.utterances))

    fetch_audio(context.store, split.utterances, split.audio, report)


def _hear_all(recipe: EvaluateRecipe, context: RecipeContext, split: Split) -> tuple[list[Heard], list[Failed]]:
    """Lets each candidate hear the split; gives those who did, and why others did not.

    Raises:
        RecipeFailure: the first one's where none did; Terminated; StoreUnavailable, since another attempt may reach it.
    """
    heard: list[Heard] = []
    failures: list[tuple[str, RecipeFailure]] = []
    for position, candidate in enumerate(recipe.candidates):
        context.raise_if_stopped()
        try:
            heard.append(hear(candidate, position, recipe, context, split))
        except Terminated:
            raise
        except RecipeFailure as failure:
            if failure.code is ExitCode.STORE_UNAVAILABLE and failure.reason != "HubUnavailable":
                raise
            failures.append((candidate.name, failure))
            _log.warning("candidate not judged", extra={"candidate": candidate.name, "reason": failure.reason})
            continue
        measured = heard[-1].measured
        _log.info(
            "candidate measured",
            extra={
                "candidate": candidate.name,
                "wordErrorRate": round(total(measured.words).rate, 4),
                "realTimeFactor": round(measured.real_time_factor, 4),
            },
        )
    if not heard:
        raise failures[0][1]
    return heard, [
        Failed(name, failure.reason, failure.message.removeprefix(f"candidate {name}: ")) for name, failure in failures
    ]


def _row(one: Judged, question: Question) -> LeaderboardRow:
    figures = {metric: figure for metric, figure in one.figures.items() if metric in question.wanted}
    cer, sentences = figures.get(Metric.CER), figures.get(Metric.SENTENCE_ACCURACY)
    entities, latency = figures.get(Metric.ENTITY_ACCURACY), figures.get(Metric.LATENCY)
    factor = figures.get(Metric.REAL_TIME_FACTOR)
    return LeaderboardRow(
        candidate=one.name,
        rank=one.rank,
        model_digest=one.measured.model_digest,
        padding=one.measured.padding,
        utterances=len(one.measured.words),
        words=one.counts.words,
        hits=one.counts.hits,
        substitutions=one.counts.substitutions,
        deletions=one.counts.deletions,
        insertions=one.counts.insertions,
        wer=decimal_string(one.wer.value, 4),
        wer_low=decimal_string(one.wer.low, 4),
        wer_high=decimal_string(one.wer.high, 4),
        **_span("cer", cer),
        **_span("sentence_accuracy", sentences),
        entities=None if entities is None else entities.n,
        **_span("entity_accuracy", entities),
        real_time_factor=None if factor is None else decimal_string(factor.value, 4),
        latency_seconds=None if latency is None else decimal_string(latency.value, 4),
        change_from_baseline=None if one.change is None else decimal_string(one.change.value, 4),
        change_low=None if one.change is None else decimal_string(one.change.low, 4),
        change_high=None if one.change is None else decimal_string(one.change.high, 4),
        p_value=None if one.matched is None else decimal_string(one.matched.p_value, 6),
        detectable_change=None if one.detectable is None else decimal_string(one.detectable, 4),
        failed_gates=[text[:_GATE_CHARACTERS] for text in (*one.failed_gates, *one.open_gates)][:16],
    )


def _span(name: str, figure: BootstrapInterval | None) -> dict[str, Any]:
    if figure is None:
        return {}
    ends = {"": figure.value, "_low": figure.low, "_high": figure.high}
    return {f"{name}{suffix}": decimal_string(value, 4) for suffix, value in ends.items()}


def _gaps(best: Judged) -> list[SliceGap]:
    return [
        SliceGap(
            label=gap.label[:_LABEL_CHARACTERS],
            candidate=best.name,
            best=gap.best.slice.value[:_LABEL_CHARACTERS],
            best_wer=decimal_string(gap.best.wer.value, 4),
            worst=gap.worst.slice.value[:_LABEL_CHARACTERS],
            worst_wer=decimal_string(gap.worst.wer.value, 4),
            gap=decimal_string(gap.difference.value, 4),
            gap_low=decimal_string(gap.difference.low, 4),
            gap_high=decimal_string(gap.difference.high, 4),
            values=gap.values,
            too_small=gap.too_small,
        )
        for gap in best.gaps
        if gap.best.wer is not None and gap.worst.wer is not None
    ]


def _publish(
    recipe: EvaluateRecipe,
    context: RecipeContext,
    split: Split,
    heard: Sequence[Heard],
    judgement: Judgement,
    question: Question,
    manifest: DatasetManifest,
) -> str:
    folder = recipe.output_prefix.rstrip("/")
    noise = [_estimate_noise(context, split, one) for one in split.utterances]
    confusions = {one.measured.name: one for one in heard}
    results = build_results(recipe, split.utterances, judgement, question, confusions)
    table = build_table(split.utterances, judgement, question, noise)
    context.publish(f"{folder}/results.json", results)
    context.publish(f"{folder}/utterances.parquet", table, "application/vnd.apache.parquet")
    subject = Subject(
        title=f"{context.spec.owner.namespace}/{context.spec.owner.name}",
        dataset=recipe.dataset,
        split=recipe.split,
        by=manifest.by,
        seconds=[one.seconds for one in split.utterances],
        noise=noise,
        heard=confusions,
        question=question,
    )
    html = write_report(subject, judgement, context.work_directory)
    return context.publish(f"{folder}/report.html", html, "text/html; charset=utf-8")


def _estimate_noise(context: RecipeContext, split: Split, utterance: Utterance) -> float:
    context.raise_if_stopped()
    return estimate_noise_ratio(read_audio(context.store, utterance, split.audio), _SAMPLE_RATE)
