"""Runs the recipe that a JobSpec asks for, and says what came of it."""

import importlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attune.contract.environment import (
    ATTEMPT_UID,
    TERMINATION_MESSAGE_BYTES,
    TERMINATION_MESSAGE_FILE,
    TERMINATION_MESSAGE_VARIABLE,
    WORK_DIRECTORY_VARIABLE,
)
from attune.contract.job import JobSpec
from attune.contract.result import EvaluateResult, Failure, LeaderboardRow, PrepareResult, Result, Summary
from pydantic import TypeAdapter, ValidationError

from attune_trainer.failures import InvalidInput, NotFound, RecipeFailure, Terminated
from attune_trainer.progress import ProgressReporter
from attune_trainer.recipes import RECIPES
from attune_trainer.store import Store

_log = logging.getLogger(__name__)
_RESULT: TypeAdapter[Any] = TypeAdapter(Result)


@dataclass(frozen=True)
class RecipeContext:
    """What a recipe works with besides its own parameters.

    Attributes:
        spec: the whole JobSpec.
        store: the namespace's store.
        reporter: takes progress; answered over HTTP while the recipe runs.
        work_directory: scratch space on disk; contents of an earlier attempt in the same pod may be there.
        attempt_uid: the pod's uid; part of every key that an attempt writes before its result is published.
        stop: set on SIGTERM. A recipe polls it, saves what it needs, and calls raise_if_stopped.
        once_published: what a recipe wants done after its Result is in the store, such as removing what only an
            unfinished attempt needs.
    """

    spec: JobSpec
    store: Store
    reporter: ProgressReporter
    work_directory: Path
    attempt_uid: str
    stop: threading.Event
    once_published: list[Callable[[], None]] = field(default_factory=list)

    def raise_if_stopped(self) -> None:
        """Ends the recipe with exit code 143 when the pod has been asked to end.

        Raises:
            Terminated: when stop is set.
        """
        if self.stop.is_set():
            raise Terminated

    def directory(self, name: str) -> Path:
        """Gives a directory of this name below the work directory, created where it is not there."""
        path = self.work_directory / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, key: str, content: bytes | str | dict[str, Any], content_type: str | None = None) -> str:
        """Writes a small object (text, or JSON from a dict) to the store; gives its URI."""
        if isinstance(content, dict):
            text = json.dumps(content, ensure_ascii=False, sort_keys=True, indent=1)
            return self.store.write_bytes(key, text.encode(), content_type or "application/json")
        if isinstance(content, str):
            return self.store.write_bytes(key, content.encode(), content_type or "text/plain; charset=utf-8")
        return self.store.write_bytes(key, content, content_type or "application/octet-stream")


def load_recipe(name: str) -> Callable[[Any, RecipeContext], Any]:
    """Imports the module of a recipe and gives its `run`; what other recipes need stays unimported."""
    run: Callable[[Any, RecipeContext], Any] = importlib.import_module(RECIPES[name]).run
    return run


def read_published(spec: JobSpec, store: Store) -> Any | None:
    """Gives the Result that an earlier attempt published, or None.

    A Result in another shape than this image writes counts as none: the recipe runs again and overwrites it.
    """
    try:
        raw = store.read_bytes(spec.result_key)
    except NotFound as error:
        if error.reason != "ObjectNotFound":
            raise
        return None
    try:
        result = _RESULT.validate_json(raw)
    except ValidationError:
        _log.warning("published result is not readable; running again", extra={"key": spec.result_key})
        return None
    return result if result.recipe == spec.recipe.recipe else None


def run(
    spec: JobSpec,
    store: Store,
    reporter: ProgressReporter,
    *,
    work_directory: Path | None = None,
    attempt_uid: str | None = None,
    stop: threading.Event | None = None,
) -> Any:
    """Runs the spec's recipe and publishes its Result, last; one that is published already is given again instead.

    Args:
        spec: what to do.
        store: the namespace's store.
        reporter: takes progress.
        work_directory: scratch space; ATTUNE_WORK_DIRECTORY, or a new temporary one, by default.
        attempt_uid: ATTUNE_ATTEMPT_UID by default.
        stop: set by whoever wants the recipe to end early.

    Raises:
        RecipeFailure: with an exit code, a reason and a message.
    """
    published = read_published(spec, store)
    if published is not None:
        _log.info("result is already published", extra={"key": spec.result_key})
        reporter.update(stage="Finished", percent=100)
        return published
    context = RecipeContext(
        spec=spec,
        store=store,
        reporter=reporter,
        work_directory=work_directory or _work_directory(),
        attempt_uid=attempt_uid or os.environ.get(ATTEMPT_UID) or "local",
        stop=stop or threading.Event(),
    )
    context.work_directory.mkdir(parents=True, exist_ok=True)
    result = load_recipe(spec.recipe.recipe)(spec.recipe, context)
    reporter.update(stage="Publishing")
    result = _publish_result(spec, store, result)
    for clean_up in context.once_published:
        try:
            clean_up()
        except RecipeFailure as failure:  # the work is done and stays done
            _log.warning("not cleaned up", extra={"reason": failure.reason})
    reporter.update(stage="Finished", percent=100)
    return result


def _publish_result(spec: JobSpec, store: Store, result: Any) -> Any:
    """Writes a Result, last of all that an attempt writes; gives the one that counts.

    A pod that was thought lost may come to its end after the one that replaced it: what the operator may have read by
    then stays as it is.
    """
    published = read_published(spec, store)
    if published is not None:
        if published != result:
            _log.warning("another attempt has published its result first", extra={"key": spec.result_key})
        return published
    store.write_bytes(
        spec.result_key,
        _RESULT.dump_json(result, by_alias=True, exclude_none=True, indent=1),
        content_type="application/json",
    )
    return result


def _work_directory() -> Path:
    configured = os.environ.get(WORK_DIRECTORY_VARIABLE)
    return Path(configured) if configured else Path(tempfile.mkdtemp(prefix="attune-"))


def read_spec(path: Path) -> JobSpec:
    """Reads a job.json.

    Raises:
        RecipeFailure: InvalidJob, when it is missing or does not fit this image's contract.
    """
    try:
        return JobSpec.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InvalidInput("InvalidJob", f"{path} cannot be read ({type(error).__name__})") from error
    except ValidationError as error:
        places = ", ".join(sorted({".".join(map(str, one["loc"])) or "the whole" for one in error.errors()})[:5])
        raise InvalidInput(
            "InvalidJob", f"job.json does not fit this image's contract at {places}; use images of one release"
        ) from error


def summarise(result: Any | None = None, failure: Failure | None = None) -> Summary:
    """Builds the Summary that fits in a termination message, leaving out first what the full Result repeats.

    Raises:
        ValueError: when it is too long even so.
    """
    summary = Summary(result=result, failure=failure)
    if _fits(summary):
        return summary
    field = "result" if failure is None else "failure"
    for part in _shorter_forms(result if failure is None else failure):
        summary = summary.model_copy(update={field: part})
        if _fits(summary):
            return summary
    summary.to_message()  # raises
    return summary


def _fits(summary: Summary) -> bool:
    return len(summary.model_dump_json(by_alias=True, exclude_none=True).encode()) <= TERMINATION_MESSAGE_BYTES


def _shorter_forms(part: Any) -> Iterator[Any]:
    """Yields ever shorter forms of a result or a failure."""
    if isinstance(part, EvaluateResult):
        yield from _shorter_leaderboards(part)
    elif isinstance(part, PrepareResult | Failure):
        for examples, characters, listed in ((3, 48, 16), (1, 48, 16), (0, 0, 16), (0, 0, 0)):
            fewer = [
                one.model_copy(update={"examples": [text[:characters] for text in one.examples[:examples]]})
                for one in part.rejections[:listed]
            ]
            part = part.model_copy(update={"rejections": fewer})
            yield part
    if isinstance(part, PrepareResult):
        yield part.model_copy(update={"warnings": []})
    if isinstance(part, Failure):
        # A character takes up to six bytes in JSON.
        yield part.model_copy(update={"message": part.message[: TERMINATION_MESSAGE_BYTES // 8]})


def _shorter_leaderboards(result: EvaluateResult) -> Iterator[EvaluateResult]:
    """Leaves out what decided nothing: most failed gates, side figures, digests' tails and intervals of the others."""
    first = next((row.candidate for row in result.leaderboard if row.candidate == result.winner), None)
    first = first or result.leaderboard[0].candidate
    side = ("cer", "sentence_accuracy", "entity_accuracy")
    ends: dict[str, Any] = dict.fromkeys(f"{name}_{end}" for name in side for end in ("low", "high"))
    others = ("entities", "real_time_factor", "latency_seconds", "p_value", "detectable_change")
    figures: dict[str, Any] = ends | dict.fromkeys((*side, *others))

    def change(step: Callable[[LeaderboardRow], dict[str, Any]]) -> EvaluateResult:
        rows = [row.model_copy(update=step(row)) for row in result.leaderboard]
        return result.model_copy(update={"leaderboard": rows})

    yield (result := change(lambda row: {"failed_gates": [text[:64] for text in row.failed_gates[:2]]}))
    yield (result := change(lambda row: {} if row.candidate == first else ends))
    yield (result := change(lambda row: {} if row.candidate == first else figures))
    for characters in (128, 64):
        told = [one.model_copy(update={"message": one.message[:characters]}) for one in result.failed]
        yield (result := result.model_copy(update={"failed": told}))
    for gaps in (4, 1, 0):
        yield (result := result.model_copy(update={"gaps": result.gaps[:gaps]}))
    yield (result := change(lambda _: {"failed_gates": []} | figures))
    yield (
        result := change(
            lambda row: (
                {} if row.candidate == first or row.model_digest is None else {"model_digest": row.model_digest[:19]}
            )
        )
    )
    yield (result := change(lambda row: {} if row.candidate == first else {"change_low": None, "change_high": None}))
    verdict = result.verdict.model_copy(update={"would_change": None})
    yield result.model_copy(update={"normaliser": None, "verdict": verdict})


def write_termination_message(summary: Summary) -> None:
    """Leaves the Summary where the kubelet reads it; outside a pod, where there is no such file, it is skipped."""
    configured = os.environ.get(TERMINATION_MESSAGE_VARIABLE)
    path = Path(configured or TERMINATION_MESSAGE_FILE)
    if not configured and not path.exists():  # the kubelet puts the file there; to create it would litter /dev
        return
    try:
        path.write_text(summary.to_message(), encoding="utf-8")
    except OSError as error:
        _log.warning("no termination message written", extra={"path": str(path), "error": type(error).__name__})
