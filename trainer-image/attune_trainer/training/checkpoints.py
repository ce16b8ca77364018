"""Checkpoints: complete and unharmed, or not used."""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from attune.contract.exitcode import ExitCode
from attune.contract.result import Estimate, Hardware
from pydantic import BaseModel, ConfigDict, ValidationError

from attune_trainer.failures import NotFound, RecipeFailure
from attune_trainer.store import Store, digest_file
from attune_trainer.training.course import Course

_log = logging.getLogger(__name__)

STATE_FILE: Final = "state.json"
SEAL_FILE: Final = "seal.json"
BEST_FILE: Final = "best.safetensors"
ENGINE_FOLDER: Final = "engine"
LOSSES_FILE: Final = "losses.json"  # beside the checkpoints

# Of each utterance of the validation split: hits, substitutions, deletions, insertions.
Counts = tuple[tuple[int, int, int, int], ...]


class TrainingState(BaseModel):
    """Where a run stands, beside the weights and the optimiser's state.

    Attributes:
        step: optimiser steps done.
        epoch: number of the epoch that goes on, from 0.
        step_in_epoch: steps of it that are done.
        baseline_wer: of the untuned model; fraction.
        best_wer: of the best epoch so far; None before the first validation.
        best_epoch: its number.
        stale_epochs: epochs since the WER last fell by min_delta, and the WER that it fell to.
        audio_seconds: trained on so far, without padding.
        step_seconds: time in optimiser steps so far, over all attempts.
        training_seconds: the same with validation.
        stopped_early: whether early stopping has ended the run.
        budget_reached: whether the budget has.
        course: losses and validations so far.
        baseline_counts: word errors of the untuned model, by utterance.
        best_counts: those of the best epoch.
        hardware: classes of hardware that have trained so far, each once.
        peak_memory_bytes: over all attempts; as in the contract's Estimate.
        estimate: of the whole run, once its first steps are done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    baseline_wer: float
    best_wer: float | None = None
    best_epoch: int | None = None
    reference_wer: float | None = None
    stale_epochs: int = 0
    audio_seconds: float = 0.0
    step_seconds: float = 0.0
    training_seconds: float = 0.0
    stopped_early: bool = False
    budget_reached: bool = False
    course: Course = Course()
    baseline_counts: Counts = ()
    best_counts: Counts = ()
    hardware: tuple[Hardware, ...] = ()
    peak_memory_bytes: int = 0
    estimate: Estimate | None = None

    @property
    def baseline_metrics(self) -> dict[str, float]:
        """What the validation of the untuned model gave; its WER alone where an earlier release measured it."""
        told = next((one.metrics for one in self.course.validations if not one.step), {})
        return {"wer": self.baseline_wer, **told}

    @property
    def best_metrics(self) -> dict[str, float]:
        """What the validation of the best weights gave; nothing where an earlier release measured them."""
        told = [one.metrics for one in self.course.validations if one.step and one.metrics["wer"] == self.best_wer]
        return told[-1] if told else {}


def digest_part(folder: Path) -> dict[str, str]:
    """Gives the SHA-256 of every file of a checkpoint that is on this disk, by its name."""
    return {name: digest_file(folder / name) for name in _files(folder)}


def seal(folder: Path, parts: Iterable[Mapping[str, str]] = ()) -> None:
    """Writes down the SHA-256 of every file of a checkpoint; without this file it counts as unfinished.

    Args:
        folder: what of the checkpoint is on this disk.
        parts: names and digests of what is on others'.
    """
    digests = {name: digest for part in (*parts, digest_part(folder)) for name, digest in part.items()}
    (folder / SEAL_FILE).write_text(json.dumps(digests, indent=1, sort_keys=True), encoding="utf-8")


def read_sealed(folder: Path, expected_fingerprint: str) -> TrainingState | None:
    """Gives a checkpoint's state when it is complete, unharmed, and of this very run; None otherwise."""
    try:
        digests = json.loads((folder / SEAL_FILE).read_bytes())
        if set(digests) != set(_files(folder)):
            _reject(folder, "files are missing or too many")
            return None
        if any(digest_file(folder / name) != digest for name, digest in digests.items()):
            _reject(folder, "a file was damaged")
            return None
        state = TrainingState.model_validate_json((folder / STATE_FILE).read_bytes())
    except (OSError, ValueError, ValidationError, AttributeError) as error:
        _reject(folder, type(error).__name__)
        return None
    if state.fingerprint != expected_fingerprint:
        _reject(folder, "it belongs to a run with other parameters, data or model")
        return None
    return state


def folder_name(step: int, epoch: int, mark: str = "") -> str:
    """Names a checkpoint's folder so that names sort by age.

    The last step of an epoch has two, before and after its validation: (12, 0) -> "step-00000012-0000", then
    (12, 1) -> "step-00000012-0001". A mark keeps apart what pods of different attempts upload of the same step.
    """
    return f"step-{step:08d}-{epoch:04d}" + (f"-{mark}" if mark else "")


def upload(store: Store, folder: Path, prefix: str, keep: int, wait: Callable[[], None] = lambda: None) -> None:
    """Uploads a checkpoint, its seal last, and removes those that are older than the newest `keep`.

    Of several pods each uploads its own part, and the one that has the seal waits for those of the others. The one
    just uploaded stays even where `keep` later ones are there: those could not be gone on from.

    Args:
        store: of the namespace.
        folder: what of it is on this disk; without a seal it is another pod's to complete.
        prefix: of all checkpoints of the run.
        keep: how many stay.
        wait: called between two looks for other pods' parts; what it raises ends the waiting.
    """
    root = prefix.rstrip("/")
    target = f"{root}/{folder.name}"
    for name in _files(folder):
        store.upload_file(folder / name, f"{target}/{name}")
    if not (folder / SEAL_FILE).exists():
        return
    sealed = set(json.loads((folder / SEAL_FILE).read_bytes()))
    while sealed - {key.removeprefix(f"{target}/") for key in store.list(f"{target}/")}:
        wait()
    store.upload_file(folder / SEAL_FILE, f"{target}/{SEAL_FILE}")
    steps = _stored_steps(store, prefix)
    # What has no seal and is later may be in the making, by pods that are ahead of this one.
    unfinished = [old for old in _stored_folders(store, prefix) if old < min(steps[:keep][-1], folder.name)]
    for old in (*steps[keep:], *(old for old in unfinished if old not in steps)):
        if old != folder.name:
            delete_all(store, f"{root}/{old}/")


def delete_all(store: Store, prefix: str) -> None:
    """Removes every object below a prefix, seals first, so that what is half removed counts as unfinished."""
    for key in sorted(store.list(prefix), key=lambda key: not key.endswith(f"/{SEAL_FILE}")):
        store.delete(key)


def download_newest(store: Store, prefix: str, directory: Path, expected_fingerprint: str) -> Path | None:
    """Gives the newest checkpoint that is complete, unharmed and of this very run; None where there is none.

    Raises:
        RecipeFailure: StoreUnavailable; to begin anew instead would cost all that was done.
    """
    for name in _stored_steps(store, prefix):
        folder = download(store, prefix, name, directory, expected_fingerprint)
        if folder is not None:
            return folder
    return None


def download(store: Store, prefix: str, name: str, directory: Path, expected_fingerprint: str) -> Path | None:
    """Gives the checkpoint of this name when it is complete, unharmed and of this very run; None otherwise.

    Raises:
        RecipeFailure: StoreUnavailable.
    """
    folder = directory / name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        store.download_prefix(f"{prefix.rstrip('/')}/{name}/", folder)
    except RecipeFailure as failure:
        if failure.code is ExitCode.STORE_UNAVAILABLE:
            raise
        _log.warning("checkpoint not downloaded", extra={"checkpoint": name, "reason": failure.reason})
        return None
    if read_sealed(folder, expected_fingerprint) is not None:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    return None


def count_loss(store: Store, prefix: str) -> int:
    """Counts that the pods of a run have lost each other; gives how often they have since the newest checkpoint."""
    key = f"{prefix.rstrip('/')}/{LOSSES_FILE}"
    newest = next(iter(_stored_steps(store, prefix)), "")
    before = {}
    with contextlib.suppress(NotFound, ValueError):
        before = json.loads(store.read_bytes(key))
    count = 1 + (int(before["count"]) if before.get("checkpoint") == newest else 0)
    store.write_bytes(key, json.dumps({"checkpoint": newest, "count": count}).encode(), "application/json")
    return count


def _stored_folders(store: Store, prefix: str) -> list[str]:
    """Lists names of checkpoints in the store, finished or not, the oldest first."""
    root = f"{prefix.rstrip('/')}/"
    tails = (key.removeprefix(root) for key in store.list(root))
    return sorted({tail.partition("/")[0] for tail in tails if "/" in tail})


def _stored_steps(store: Store, prefix: str) -> list[str]:
    """Lists names of sealed checkpoints in the store, the newest first."""
    root = f"{prefix.rstrip('/')}/"
    tails = (key.removeprefix(root) for key in store.list(root))
    return sorted((tail.partition("/")[0] for tail in tails if tail.endswith(f"/{SEAL_FILE}")), reverse=True)


def _files(folder: Path) -> list[str]:
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name != SEAL_FILE)


def _reject(folder: Path, why: str) -> None:
    _log.warning("checkpoint not used", extra={"checkpoint": folder.name, "why": why})
