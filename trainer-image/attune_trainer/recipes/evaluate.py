"""evaluate: candidates x a split -> leaderboard with intervals, winner, verdict, report."""

import gc
import hashlib
import json
import logging
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import attune
import jiwer
from attune.contract.job import EvaluateCandidate, EvaluateRecipe, SplitBy
from attune.contract.measures import Metric
from attune.contract.result import EvaluateResult, LeaderboardRow, Verdict
from pydantic import TypeAdapter

from attune_trainer.data.dataset import Utterance, fetch_audio, load_manifest, load_split, read_audio, total_seconds
from attune_trainer.decimals import decimal_string
from attune_trainer.failures import InvalidInput, NotFound, OutOfMemory, RecipeFailure, Terminated, is_out_of_memory
from attune_trainer.job import RecipeContext
from attune_trainer.modeling import load_recognizer
from attune_trainer.processors import describe_processors
from attune_trainer.scoring.bootstrap import BootstrapInterval
from attune_trainer.scoring.errors import count_characters, count_errors, total
from attune_trainer.scoring.normaliser import NORMALISER, normalise
from attune_trainer.scoring.report import Subject, histogram, write_report
from attune_trainer.scoring.verdict import Judged, Judgement, Measured, judge
from attune_trainer.store import digest_directory, fetch_model

_log = logging.getLogger(__name__)

# Utterances handed over at a time: enough for full batches, few enough to stop and report soon.
_CHUNK = 64
_REASON_CHARACTERS = 512
_GATE_CHARACTERS = 96


@dataclass(frozen=True)
class _Heard:
    """A candidate's figures, and how often each of its confusions happened."""

    measured: Measured
    confusions: tuple[int, ...]


_HEARD: TypeAdapter[_Heard] = TypeAdapter(_Heard)


def run(recipe: EvaluateRecipe, context: RecipeContext) -> EvaluateResult:
    """Judges the candidates on the split, each padded as it is served.

    Raises:
        RecipeFailure: naming the candidate, where its model cannot be fetched or loaded; InvalidEvaluation; EmptySplit;
            and the store's failures.
    """
    _check(recipe)
    context.reporter.update(stage="Downloading", percent=1)
    manifest = load_manifest(context.store, recipe.dataset)
    utterances = load_split(context.store, recipe.dataset, recipe.split)
    if not utterances:
        raise InvalidInput("EmptySplit", f"the {recipe.split.value} split of dataset {recipe.dataset.name} is empty")
    audio = context.directory("audio")

    def report(fetched: int) -> None:
        context.raise_if_stopped()
        context.reporter.update(step=fetched, total_steps=len(utterances))

    fetch_audio(context.store, utterances, audio, report)
    references = [normalise(one.text, manifest.language) for one in utterances]
    heard = []
    for position, candidate in enumerate(recipe.candidates):
        context.raise_if_stopped()
        heard.append(_measure(candidate, position, recipe, context, utterances, references, manifest.language))
        counts = total(heard[-1].measured.words)
        _log.info(
            "candidate measured",
            extra={
                "candidate": candidate.name,
                "wordErrorRate": round(counts.rate, 4),
                "realTimeFactor": round(heard[-1].measured.real_time_factor, 4),
            },
        )
    context.reporter.update(stage="Judging", percent=95)
    blocks = [one.block(manifest.by) for one in utterances]
    judgement = judge(
        [one.measured for one in heard], blocks, recipe.baseline, recipe.gates, float(recipe.confidence), recipe.seed
    )
    context.reporter.update(stage="Publishing", percent=97)
    report_uri = _publish(recipe, context, utterances, heard, judgement, manifest.by)
    return EvaluateResult(
        leaderboard=[_row(one, recipe) for one in judgement.leaderboard],
        winner=judgement.winner,
        verdict=Verdict(decision=judgement.decision, reason=judgement.reason[:_REASON_CHARACTERS]),
        report_uri=report_uri,
    )


def _check(recipe: EvaluateRecipe) -> None:
    names = [one.name for one in recipe.candidates]
    if len(set(names)) != len(names):
        raise InvalidInput("InvalidEvaluation", "two candidates have the same name; give each its own")
    if recipe.baseline not in names:
        raise InvalidInput("InvalidEvaluation", f"the baseline {recipe.baseline} is none of the candidates")
    for gate in recipe.gates:
        if (gate.max is None) == (gate.max_change_from_baseline is None):
            raise InvalidInput("InvalidEvaluation", "each gate needs exactly one of max and maxChangeFromBaseline")
        if gate.metric is Metric.SENTENCE_ACCURACY:
            raise InvalidInput("InvalidEvaluation", "SentenceAccuracy is better when larger; a gate cannot bound it")


def _measure(
    candidate: EvaluateCandidate,
    position: int,
    recipe: EvaluateRecipe,
    context: RecipeContext,
    utterances: Sequence[Utterance],
    references: Sequence[str],
    language: str,
) -> _Heard:
    """Lets one candidate hear the split, or reads what this very model heard before; a failure names the candidate.

    What was heard lies beside the Dataset's revision, so that an attempt that was cut off goes on where it was, and
    another Evaluation of the same model on the same split need not hear it again; nor fetch it, where the candidate
    names its digest.
    """
    try:
        context.reporter.update(stage="LoadingModel", percent=_begun(recipe, position))
        folder, known = context.directory("models") / str(position), candidate.model.digest
        digest = known or digest_directory(fetch_model(context.store, candidate.model.uri, folder))
        question = _question(recipe, digest)
        name = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:32]
        key = f"{recipe.dataset.uri.rstrip('/')}/measured/{name}.json"
        heard = _read_measured(context, key, question)
        if heard is None:
            if known:
                fetch_model(context.store, candidate.model.uri, folder, known)
            heard = _transcribe_all(
                candidate, folder, digest, position, recipe, context, utterances, references, language
            )
            context.publish(key, {"question": question, "heard": _HEARD.dump_python(heard, mode="json")})
        shutil.rmtree(folder, ignore_errors=True)
        return replace(heard, measured=replace(heard.measured, name=candidate.name))
    except Terminated:
        raise
    except RecipeFailure as failure:
        raise RecipeFailure(
            failure.code, failure.reason, f"candidate {candidate.name}: {failure.message}", failure.rejections
        ) from failure
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"candidate {candidate.name} needs more memory than the pod has: raise the memory in "
            "spec.resources.limits, or evaluate a smaller model"
        ) from error


def _question(recipe: EvaluateRecipe, model_digest: str) -> dict[str, Any]:
    """Names everything that what is heard depends on; with the machine, where its speed counts too."""
    question: dict[str, Any] = {
        "attune": attune.__version__,
        "dataset": recipe.dataset.revision,
        "split": recipe.split.value,
        "model": model_digest,
        "normaliser": NORMALISER,
    }
    if Metric.REAL_TIME_FACTOR in {*recipe.metrics, *(gate.metric for gate in recipe.gates)}:
        question["machine"] = describe_processors()
    return question


def _begun(recipe: EvaluateRecipe, position: int) -> float:
    """Gives the progress in percent at which a candidate's turn begins; all of them take 5 to 95."""
    return 5 + 90 / len(recipe.candidates) * position


def _read_measured(context: RecipeContext, key: str, question: dict[str, Any]) -> _Heard | None:
    """Gives what was measured before, where it answers the same question."""
    try:
        content = json.loads(context.store.read_bytes(key))
        if content["question"] != question:
            return None
        heard = _HEARD.validate_python(content["heard"])
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError):
        _log.warning("what was measured before is not readable; measuring again", extra={"key": key})
        return None
    _log.info("measured before", extra={"key": key})
    return heard


def _transcribe_all(
    candidate: EvaluateCandidate,
    folder: Path,
    digest: str,
    position: int,
    recipe: EvaluateRecipe,
    context: RecipeContext,
    utterances: Sequence[Utterance],
    references: Sequence[str],
    language: str,
) -> _Heard:
    begun, share = _begun(recipe, position), _begun(recipe, 1) - _begun(recipe, 0)
    recognizer = load_recognizer(folder)
    audio = context.directory("audio")
    # Clips of like length together: a batch is as long as its longest.
    order = sorted(range(len(utterances)), key=lambda index: (utterances[index].seconds, utterances[index].id))
    recognizer.warm_up()
    hypotheses: dict[int, str] = {}
    seconds = 0.0
    context.reporter.update(stage="Transcribing", step=0, total_steps=len(utterances))
    for start in range(0, len(order), _CHUNK):
        context.raise_if_stopped()
        chunk = order[start : start + _CHUNK]
        clips = [read_audio(context.store, utterances[index], audio) for index in chunk]
        began = time.perf_counter()
        texts = recognizer.transcribe(clips, language=language.partition("-")[0])
        seconds += time.perf_counter() - began
        hypotheses.update(zip(chunk, texts, strict=True))
        context.reporter.update(step=len(hypotheses), percent=begun + share * len(hypotheses) / len(order))
    normalised = [normalise(hypotheses[index], language) for index in range(len(utterances))]
    measured = Measured(
        name=candidate.name,
        model_digest=digest,
        padding=recognizer.padding,
        words=tuple(map(count_errors, references, normalised)),
        characters=tuple(
            count_characters(reference, text, language) for reference, text in zip(references, normalised, strict=True)
        ),
        work_seconds=seconds,
        audio_seconds=total_seconds(utterances),
    )
    del recognizer
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return _Heard(measured, _confusions(references, normalised))


def _confusions(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[int, ...]:
    """Counts how often each word was taken for each other word; gives the counts without the words, largest first."""
    aligned = jiwer.process_words(list(references), list(hypotheses))
    pairs: Counter[tuple[str, str]] = Counter()
    for reference, hypothesis, chunks in zip(aligned.references, aligned.hypotheses, aligned.alignments, strict=True):
        for chunk in chunks:
            if chunk.type == "substitute":
                pairs.update(
                    zip(
                        reference[chunk.ref_start_idx : chunk.ref_end_idx],
                        hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx],
                        strict=True,
                    )
                )
    return tuple(sorted(pairs.values(), reverse=True))


def _row(one: Judged, recipe: EvaluateRecipe) -> LeaderboardRow:
    wanted = {*recipe.metrics, *(gate.metric for gate in recipe.gates)}
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
        cer=decimal_string(one.cer.value, 4) if Metric.CER in wanted else None,
        sentence_accuracy=(
            decimal_string(one.measured.sentence_accuracy, 4) if Metric.SENTENCE_ACCURACY in wanted else None
        ),
        real_time_factor=(
            decimal_string(one.measured.real_time_factor, 4) if Metric.REAL_TIME_FACTOR in wanted else None
        ),
        change_from_baseline=None if one.change is None else decimal_string(one.change.value, 4),
        change_low=None if one.change is None else decimal_string(one.change.low, 4),
        change_high=None if one.change is None else decimal_string(one.change.high, 4),
        failed_gates=[text[:_GATE_CHARACTERS] for text in one.failed_gates],
    )


def _publish(
    recipe: EvaluateRecipe,
    context: RecipeContext,
    utterances: Sequence[Utterance],
    heard: Sequence[_Heard],
    judgement: Judgement,
    by: SplitBy,
) -> str:
    folder = recipe.output_prefix.rstrip("/")
    confusions = {one.measured.name: one.confusions for one in heard}
    blocks = {one.block(by) for one in utterances}
    subject = Subject(
        title=f"{context.spec.owner.namespace}/{context.spec.owner.name}",
        dataset=recipe.dataset,
        split=recipe.split,
        by=by,
        blocks=len(blocks),
        baseline=recipe.baseline,
        gates=recipe.gates,
        confidence=float(recipe.confidence),
        confusions=confusions,
    )
    context.publish(f"{folder}/results.json", _results(recipe, utterances, judgement, confusions))
    html = write_report(subject, judgement, context.work_directory)
    return context.publish(f"{folder}/report.html", html, "text/html; charset=utf-8")


def _results(
    recipe: EvaluateRecipe,
    utterances: Sequence[Utterance],
    judgement: Judgement,
    confusions: dict[str, tuple[int, ...]],
) -> dict[str, Any]:
    """Everything that was counted, utterance by utterance, and no transcript."""
    return {
        "version": 1,
        "dataset": recipe.dataset.model_dump(by_alias=True),
        "split": recipe.split.value,
        "baseline": recipe.baseline,
        "normaliser": NORMALISER,
        "confidence": recipe.confidence,
        "seed": recipe.seed,
        "gates": [gate.model_dump(by_alias=True, exclude_none=True, mode="json") for gate in recipe.gates],
        "verdict": {"decision": judgement.decision.value, "reason": judgement.reason, "winner": judgement.winner},
        "intervalsOverUtterances": judgement.over_utterances,
        "utterances": [one.id for one in utterances],
        "candidates": [
            {
                "candidate": one.name,
                "rank": one.rank,
                "modelDigest": one.measured.model_digest,
                "padding": one.measured.padding.value,
                "wer": _span(one.wer),
                "cer": _span(one.cer),
                "changeFromBaseline": None if one.change is None else _span(one.change),
                "sentenceAccuracy": one.measured.sentence_accuracy,
                "realTimeFactor": one.measured.real_time_factor,
                "workSeconds": one.measured.work_seconds,
                "audioSeconds": one.measured.audio_seconds,
                "failedGates": list(one.failed_gates),
                "utterancesByErrors": histogram(one.measured.words),
                "confusions": list(confusions[one.name]),
                # Of each utterance: hits, substitutions, deletions, insertions.
                "counts": [list(utterance.row) for utterance in one.measured.words],
            }
            for one in judgement.leaderboard
        ],
    }


def _span(interval: BootstrapInterval) -> dict[str, float | int]:
    return {"value": interval.value, "low": interval.low, "high": interval.high, "blocks": interval.blocks}
