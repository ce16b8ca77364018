"""Candidates hear a split: each as it would serve, cut off and resumed where it may be, heard before or anew."""

import gc
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import attune
import numpy as np
from attune.contract.environment import endpoint_variable
from attune.contract.exitcode import ExitCode
from attune.contract.job import EndpointInput, EvaluateCandidate, EvaluateRecipe
from attune.contract.measures import Metric
from attune.contract.training import Padding
from pydantic import TypeAdapter

from attune_trainer.data.dataset import Utterance, encode_audio, read_audio
from attune_trainer.failures import (
    NotFound,
    OutOfMemory,
    RecipeFailure,
    Terminated,
    is_disk_full,
    is_out_of_memory,
)
from attune_trainer.job import RecipeContext
from attune_trainer.modeling import load_recognizer
from attune_trainer.processors import describe_processors
from attune_trainer.scoring.endpoint import Endpoint, StoppableClock
from attune_trainer.scoring.errors import ErrorCounts, align, count_characters
from attune_trainer.scoring.figures import Measured
from attune_trainer.scoring.normaliser import NORMALISER, normalise
from attune_trainer.store import digest_directory, fetch_model

_log = logging.getLogger(__name__)

# Utterances handed over at a time: enough for full batches, few enough to stop and report soon.
_CHUNK: Final = 64
# What an eviction may cost at most, besides the chunk that was being heard.
_SAVE_SECONDS: Final = 30.0
# An endpoint answers so many requests at a time; one where its latency is asked for.
_CONCURRENT: Final = 4
# A model's latency is measured on so many clips, of all lengths.
_LATENCY_CLIPS: Final = 50
_NAMED_CONFUSIONS: Final = 20


@dataclass(frozen=True)
class Split:
    """What is heard.

    Attributes:
        utterances: of the split.
        references: normalised, in the same order.
        language: ISO 639 code of the Dataset.
        audio: folder in which the audio lies.
    """

    utterances: Sequence[Utterance]
    references: Sequence[str]
    language: str
    audio: Path


@dataclass(frozen=True)
class Answer:
    """What became of one utterance; no transcript, but the words that were taken for others.

    Attributes:
        words: hits, substitutions, deletions, insertions.
        characters: the same of characters.
        slots: where the word errors are (see errors.Alignment).
        substitutions: (word of the reference, word that it was taken for).
        seconds: that an endpoint took; None of a model, which hears many at once.
    """

    words: tuple[int, int, int, int]
    characters: tuple[int, int, int, int]
    slots: tuple[int, ...]
    substitutions: tuple[tuple[str, str], ...]
    seconds: float | None = None


@dataclass(frozen=True)
class Confusion:
    """A word that was taken for another.

    Attributes:
        reference: what was said.
        hypothesis: what was heard.
        times: how often.
        utterances: in how many different ones.
    """

    reference: str
    hypothesis: str
    times: int
    utterances: int


@dataclass(frozen=True)
class Heard:
    """A candidate's measurements.

    Attributes:
        measured: what figures are made of.
        confusion_counts: how often each confusion happened, largest first.
        confusions: the commonest ones; only those that two utterances share, so that no single one is told of.
    """

    measured: Measured
    confusion_counts: tuple[int, ...]
    confusions: tuple[Confusion, ...]


@dataclass
class _Course:
    """What a candidate has heard so far; as it is kept in the store."""

    answers: dict[int, Answer] = field(default_factory=dict)
    work_seconds: float = 0.0
    padding: Padding | None = None
    latencies: tuple[float, ...] = ()
    complete: bool = False


_COURSE: TypeAdapter[_Course] = TypeAdapter(_Course)
# Gives transcripts of clips, and the seconds that each of them took where they are taken one by one.
_Hear = Callable[[Sequence[int]], list[tuple[str, float | None]]]


def hear(
    candidate: EvaluateCandidate, position: int, recipe: EvaluateRecipe, context: RecipeContext, split: Split
) -> Heard:
    """Lets one candidate hear the split, or reads what this very model heard before; a failure names the candidate.

    What a model heard lies beside the Dataset's revision, so that an attempt that was cut off goes on where it was, and
    another Evaluation of the same model on the same split need not hear it again; nor fetch it, where the candidate
    names its digest. What stands behind an endpoint may change any day, so what it answered serves this run alone.

    Raises:
        RecipeFailure: that names the candidate.
        Terminated: when the Job was asked to end; what was heard so far is kept.
    """
    try:
        if candidate.endpoint is not None:
            heard = _hear_endpoint(candidate.endpoint, position, recipe, context, split)
        else:
            heard = _hear_model(candidate, position, recipe, context, split)
    except Terminated:
        raise
    except RecipeFailure as failure:
        raise _named(candidate.name, failure) from failure
    except Exception as error:
        explained = _explain(candidate.name, error)
        if explained is None:
            raise
        raise explained from error
    return _summarise(candidate.name, heard, split)


@dataclass(frozen=True)
class _Finished:
    course: _Course
    digest: str | None


def _named(name: str, failure: RecipeFailure) -> RecipeFailure:
    return RecipeFailure(failure.code, failure.reason, f"candidate {name}: {failure.message}", failure.rejections)


def _explain(name: str, error: Exception) -> RecipeFailure | None:
    """Says what an unexpected error of a candidate means; None where it is none of the candidate's."""
    if is_out_of_memory(error):
        return OutOfMemory(
            f"candidate {name} needs more memory than the pod has: raise the memory in spec.resources.limits, or "
            "evaluate a smaller model"
        )
    if is_disk_full(error):
        return None
    _log.error("candidate failed", exc_info=error, extra={"candidate": name})
    return RecipeFailure(
        ExitCode.UNSUPPORTED_MODEL,
        "CandidateFailed",
        f"candidate {name}: its model ended with an unexpected {type(error).__name__}; the Job's log has the traceback",
    )


def _hear_model(
    candidate: EvaluateCandidate, position: int, recipe: EvaluateRecipe, context: RecipeContext, split: Split
) -> _Finished:
    model = candidate.model
    if model is None:
        raise RecipeFailure(
            ExitCode.INVALID_INPUT, "InvalidEvaluation", "it has neither a model nor an endpoint; give it one"
        )
    context.reporter.update(stage="LoadingModel", percent=begun(recipe, position))
    folder = context.directory("models") / str(position)
    digest = model.digest or digest_directory(fetch_model(context.store, model.uri, folder))
    question = _question(recipe, model=digest)
    key = _key(question, f"{recipe.dataset.uri.rstrip('/')}/measured")
    course = _read_course(context, key, question)
    try:
        if not course.complete:
            if model.digest:
                fetch_model(context.store, model.uri, folder, model.digest)
            with _freed():
                _transcribe(course, folder, key, question, position, recipe, context, split)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _Finished(course, digest)


def _transcribe(
    course: _Course,
    folder: Path,
    key: str,
    question: dict[str, Any],
    position: int,
    recipe: EvaluateRecipe,
    context: RecipeContext,
    split: Split,
) -> None:
    recognizer = load_recognizer(folder)
    language = split.language.partition("-")[0]
    course.padding = recognizer.padding
    recognizer.warm_up()

    def read(place: int) -> Any:
        return read_audio(context.store, split.utterances[place], split.audio)

    def transcribe(places: Sequence[int]) -> list[tuple[str, float | None]]:
        clips = [read(place) for place in places]
        began = time.perf_counter()
        texts = recognizer.transcribe(clips, language=language)
        course.work_seconds += time.perf_counter() - began
        return [(text, None) for text in texts]

    _go_through(course, transcribe, key, question, position, recipe, context, split)
    if _wants(recipe, Metric.LATENCY):
        course.latencies = tuple(
            _time_each(lambda place: recognizer.transcribe([read(place)], language=language), context, split)
        )
    _save(course, key, question, context, complete=True)


def _time_each(transcribe: Callable[[int], Any], context: RecipeContext, split: Split) -> Iterator[float]:
    """Times clips of all lengths one at a time; spread evenly over the split, the same ones each time."""
    order = _order(split)
    step = max(1, len(order) // _LATENCY_CLIPS)
    for place in order[::step][:_LATENCY_CLIPS]:
        context.raise_if_stopped()
        began = time.perf_counter()
        transcribe(place)
        yield time.perf_counter() - began


@contextmanager
def _freed() -> Iterator[None]:
    """Gives a model's memory back when it is done with, or has failed."""
    try:
        yield
    finally:
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()


def _hear_endpoint(
    told: EndpointInput, position: int, recipe: EvaluateRecipe, context: RecipeContext, split: Split
) -> _Finished:
    context.reporter.update(stage="AskingEndpoint", percent=begun(recipe, position))
    key_of_api = os.environ.get(endpoint_variable(told.key_index)) if told.key_index is not None else None
    question = _question(recipe, endpoint=told.url, served=told.model, run=recipe.output_prefix)
    key = _key(question, f"{recipe.output_prefix.rstrip('/')}/measured")
    course = _read_course(context, key, question)
    if course.complete:
        return _Finished(course, None)
    language = split.language.partition("-")[0]
    with ExitStack() as stack:
        endpoint = Endpoint(told, key_of_api, StoppableClock(context.stop))
        stack.callback(endpoint.close)
        threads = 1 if _wants(recipe, Metric.LATENCY) else _CONCURRENT
        pool = ThreadPoolExecutor(threads, thread_name_prefix="endpoint")
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)

        def ask(place: int) -> tuple[str, float]:
            utterance = split.utterances[place]
            samples = read_audio(context.store, utterance, split.audio)
            whole = np.clip(np.round(samples * 32768.0), -32768, 32767).astype(np.int16)
            return endpoint.transcribe(encode_audio(whole), f"{utterance.id}.flac", language)

        def transcribe(places: Sequence[int]) -> list[tuple[str, float | None]]:
            answers: list[tuple[str, float | None]] = list(pool.map(ask, places))
            course.work_seconds += sum(seconds or 0.0 for _, seconds in answers)
            return answers

        _go_through(course, transcribe, key, question, position, recipe, context, split)
    _save(course, key, question, context, complete=True)
    return _Finished(course, None)


def _go_through(
    course: _Course,
    transcribe: _Hear,
    key: str,
    question: dict[str, Any],
    position: int,
    recipe: EvaluateRecipe,
    context: RecipeContext,
    split: Split,
) -> None:
    """Hears what has not been heard yet, chunk by chunk, and keeps it now and then."""
    share = begun(recipe, 1) - begun(recipe, 0)
    left = [place for place in _order(split) if place not in course.answers]
    context.reporter.update(stage="Transcribing", step=len(course.answers), total_steps=len(split.utterances))
    saved = time.monotonic()
    try:
        for start in range(0, len(left), _CHUNK):
            context.raise_if_stopped()
            chunk = left[start : start + _CHUNK]
            for place, (text, seconds) in zip(chunk, transcribe(chunk), strict=True):
                course.answers[place] = _answer(split.references[place], text, seconds, split.language)
            heard = len(course.answers)
            context.reporter.update(step=heard, percent=begun(recipe, position) + share * heard / len(split.utterances))
            if time.monotonic() - saved > _SAVE_SECONDS:
                _save(course, key, question, context)
                saved = time.monotonic()
    except Terminated:
        _save(course, key, question, context)
        raise


def _order(split: Split) -> list[int]:
    """Clips of like length together: a batch is as long as its longest."""
    return sorted(
        range(len(split.utterances)), key=lambda place: (split.utterances[place].seconds, split.utterances[place].id)
    )


def _answer(reference: str, text: str, seconds: float | None, language: str) -> Answer:
    hypothesis = normalise(text, language)
    aligned = align(reference, hypothesis)
    return Answer(
        words=aligned.counts.row,
        characters=count_characters(reference, hypothesis, language).row,
        slots=aligned.slots,
        substitutions=aligned.substitutions,
        seconds=seconds,
    )


def _wants(recipe: EvaluateRecipe, metric: Metric) -> bool:
    return metric in {*recipe.metrics, *(gate.metric for gate in recipe.gates)}


def _question(recipe: EvaluateRecipe, **whom: str) -> dict[str, Any]:
    """Names everything that what is heard depends on; with the machine, where its speed counts too."""
    question: dict[str, Any] = {
        "attune": attune.__version__,
        "dataset": recipe.dataset.revision,
        "split": recipe.split.value,
        "normaliser": NORMALISER,
        "form": 2,
        **whom,
    }
    for metric in (Metric.REAL_TIME_FACTOR, Metric.LATENCY):
        if _wants(recipe, metric):
            question["machine"] = describe_processors()
            question[metric.value] = True
    return question


def _key(question: dict[str, Any], folder: str) -> str:
    name = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:32]
    return f"{folder}/{name}.json"


def begun(recipe: EvaluateRecipe, position: int) -> float:
    """Gives the progress in percent at which a candidate's turn begins; all of them take 5 to 95."""
    return 5 + 90 / len(recipe.candidates) * position


def _save(
    course: _Course, key: str, question: dict[str, Any], context: RecipeContext, *, complete: bool = False
) -> None:
    course.complete = complete
    context.publish(key, {"question": question, "heard": _COURSE.dump_python(course, mode="json")})


def _read_course(context: RecipeContext, key: str, question: dict[str, Any]) -> _Course:
    """Gives what was heard before, where it answers the same question; else an empty course."""
    try:
        content = json.loads(context.store.read_bytes(key))
        if content["question"] != question:
            return _Course()
        course = _COURSE.validate_python(content["heard"])
    except NotFound:
        return _Course()
    except (ValueError, KeyError, TypeError):
        _log.warning("what was heard before is not readable; hearing it again", extra={"key": key})
        return _Course()
    _log.info("heard before", extra={"key": key, "utterances": len(course.answers)})
    return course


def _summarise(name: str, finished: _Finished, split: Split) -> Heard:
    course = finished.course
    answers = [course.answers[place] for place in range(len(split.utterances))]
    times: Counter[tuple[str, str]] = Counter()
    places: Counter[tuple[str, str]] = Counter()
    for one in answers:
        times.update(one.substitutions)
        places.update(set(one.substitutions))
    latencies = course.latencies or tuple(one.seconds for one in answers if one.seconds is not None)
    shared = [
        Confusion(*pair, count, places[pair])
        for pair, count in sorted(times.items(), key=lambda item: (-item[1], item[0]))
        if places[pair] > 1
    ]
    return Heard(
        measured=Measured(
            name=name,
            model_digest=finished.digest,
            padding=course.padding,
            words=tuple(ErrorCounts.from_row(one.words) for one in answers),
            characters=tuple(ErrorCounts.from_row(one.characters) for one in answers),
            work_seconds=course.work_seconds,
            audio_seconds=sum(one.seconds for one in split.utterances),
            slots=tuple(one.slots for one in answers),
            latencies=latencies,
        ),
        confusion_counts=tuple(sorted(times.values(), reverse=True)),
        confusions=tuple(shared[:_NAMED_CONFUSIONS]),
    )
