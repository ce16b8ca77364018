"""finetune: a base model and training splits become a tuned model, and adapters where the method has them."""

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attune.contract.job import DatasetInput, FinetuneRecipe, Split
from attune.contract.result import FinetuneResult
from attune.contract.training import Method, NoiseKind, Precision

from attune_trainer.augmentation.augmenter import TALKERS
from attune_trainer.augmentation.recordings import LONGEST_NOISE_SECONDS, LONGEST_ROOM_SECONDS, fetch_recordings
from attune_trainer.data.dataset import Utterance, audio_name, fetch_audio, load_manifest, load_split
from attune_trainer.decimals import decimal_string
from attune_trainer.failures import InvalidInput, RecipeFailure, Terminated
from attune_trainer.job import RecipeContext
from attune_trainer.store import digest_directory, fetch_model
from attune_trainer.training import checkpoints
from attune_trainer.training.launch import TrainingProcesses, count_gpus
from attune_trainer.training.settings import (
    ADAPTER_FOLDER,
    MODEL_FOLDER,
    TrainingSettings,
    TrainingUtterance,
    fingerprint,
)

_log = logging.getLogger(__name__)


def run(recipe: FinetuneRecipe, context: RecipeContext) -> FinetuneResult:
    """Trains, and publishes what came out below <output prefix>/<attempt uid>.

    An attempt goes on from the newest unharmed checkpoint below the checkpoint prefix; they are all removed once the
    Result is in the store.

    Raises:
        RecipeFailure: with exit code DIVERGED, OUT_OF_MEMORY, UNSUPPORTED_MODEL, INVALID_INPUT, or the store's.
        Terminated: after a checkpoint, when the pod was asked to end.
    """
    processes = recipe.distributed.processes_per_node
    gpus = count_gpus()
    if gpus and processes > gpus:
        message = f"spec.distributed.processesPerNode is {processes}, but the pod has {gpus} GPUs; lower it"
        raise InvalidInput("TooManyProcesses", message)
    if recipe.hyperparameters.precision is Precision.FP16 and not gpus:
        message = (
            "spec.hyperparameters.precision is Fp16, which needs a GPU, and the pod has none; choose Auto, or give the "
            "pod one with nvidia.com/gpu in spec.resources.limits"
        )
        raise InvalidInput("PrecisionUnsupported", message)
    context.reporter.update(stage="Downloading", percent=0)
    with TrainingProcesses(context.directory("training"), processes) as training:
        settings, base_digest = _fetch_inputs(recipe, context, training.stop_file)
        context.raise_if_stopped()
        training.begin(settings)
        follower = _Follower(recipe, context)
        try:
            training.follow(follower.on_event, context.stop.is_set)
        except Terminated:
            follower.finish(strict=True)  # what is not in the store now is lost with the pod
            raise
        except RecipeFailure:
            follower.finish(strict=False)
            raise
        follower.finish(strict=False)
    checkpoint_prefix = f"{recipe.checkpoint_prefix.rstrip('/')}/"
    context.once_published.append(lambda: checkpoints.delete_all(context.store, checkpoint_prefix))
    return _publish(recipe, context, settings, base_digest, follower.outcome)


class _Follower:
    """Turns events of the training processes into progress, and uploads checkpoints while training goes on."""

    def __init__(self, recipe: FinetuneRecipe, context: RecipeContext) -> None:
        self._recipe = recipe
        self._context = context
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._uploads: list[Future[None]] = []
        self.outcome: dict[str, Any] = {}

    def on_event(self, event: dict[str, Any]) -> None:
        """Takes one event."""
        kind = event.pop("kind")
        if kind == "progress":
            self._context.reporter.update(**event)
        elif kind == "baseline":
            self._context.reporter.update(metrics={"baselineWer": event["wer"]})
        elif kind == "validated":
            self._context.reporter.update(epoch=event["epoch"], metrics={"wer": event["wer"]})
        elif kind == "checkpoint":
            self._uploads.append(self._pool.submit(self._upload, Path(event["folder"])))
        elif kind == "finished":
            self.outcome = event

    def finish(self, *, strict: bool) -> None:
        """Waits for uploads; with `strict`, a last upload that failed is raised."""
        self._pool.shutdown(wait=True)
        for number, upload in enumerate(self._uploads, start=1):
            error = upload.exception()
            if error is None:
                continue
            if strict and number == len(self._uploads):
                raise error
            _log.warning("a checkpoint was not uploaded", extra={"error": type(error).__name__})

    def _upload(self, folder: Path) -> None:
        checkpoints.upload(self._context.store, folder, self._recipe.checkpoint_prefix, self._recipe.checkpoint.keep)
        shutil.rmtree(folder, ignore_errors=True)


def _fetch_inputs(recipe: FinetuneRecipe, context: RecipeContext, stop_file: Path) -> tuple[TrainingSettings, str]:
    """Brings model, audio and the newest checkpoint to the disk; gives the settings and the base's digest."""
    store = context.store
    base = fetch_model(store, recipe.base.uri, context.directory("base"), recipe.base.digest)
    base_digest = recipe.base.digest or digest_directory(base)
    context.reporter.update(percent=3)
    languages = {load_manifest(store, dataset).language for dataset in recipe.datasets}
    if len(languages) != 1:
        message = f"the Datasets are in several languages ({', '.join(sorted(languages))}); tune one model for each"
        raise InvalidInput("MixedLanguages", message)
    train = _utterances(context, recipe.datasets, Split.TRAIN, (3.0, 8.0))
    validation = _utterances(context, recipe.datasets, Split.VALIDATION, (8.0, 9.0))
    noises, rooms = _fetch_recordings(recipe, context, len(train))
    mark = mark_run(recipe, base_digest, (*noises, *rooms))
    resume = checkpoints.download_newest(store, recipe.checkpoint_prefix, context.directory("resume"), mark)
    # An attempt of the same pod that died may have left some.
    shutil.rmtree(context.directory("checkpoints"))
    settings = TrainingSettings(
        base=base,
        base_uri=recipe.base.uri,
        model_id=recipe.model_id,
        language=languages.pop(),
        train=train,
        validation=validation,
        method=recipe.method,
        lora=recipe.lora,
        hyperparameters=recipe.hyperparameters,
        padding=recipe.padding,
        early_stopping=recipe.early_stopping,
        checkpoint=recipe.checkpoint,
        distributed=recipe.distributed,
        fingerprint=mark,
        checkpoints=context.directory("checkpoints"),
        resume=resume,
        output=context.directory("output"),
        stop_file=stop_file,
        augmentation=recipe.augmentation,
        noises=noises,
        rooms=rooms,
    )
    return settings, base_digest


def mark_run(recipe: FinetuneRecipe, base_digest: str, recordings: Sequence[Path] = ()) -> str:
    """Gives what a checkpoint must carry for this run to go on from it.

    Options that are not set have no part in it, so that the run goes on where another release of this image began it.
    """
    parts = (recipe.lora, recipe.hyperparameters, recipe.distributed, recipe.early_stopping, recipe.augmentation)
    return fingerprint(
        base_digest,
        *(dataset.revision for dataset in recipe.datasets),
        *(part.model_dump_json(exclude_none=True) for part in parts if part is not None),
        recipe.padding,
        *(() if recipe.method is Method.LORA else (recipe.method,)),
        *(file.stem for file in recordings),
    )


def _fetch_recordings(
    recipe: FinetuneRecipe, context: RecipeContext, utterances: int
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Downloads own noises and impulse responses; checks that babble has talkers.

    Raises:
        RecipeFailure: TooFewTalkers, and as for fetch_recordings.
    """
    noises: tuple[Path, ...] = ()
    rooms: tuple[Path, ...] = ()
    if recipe.augmentation is None:
        return noises, rooms
    noise, room = recipe.augmentation.noise, recipe.augmentation.room_impulse_response
    if noise is not None and NoiseKind.BABBLE in noise.kinds and utterances <= TALKERS[0]:
        message = (
            f"spec.augmentation.noise.kinds has Babble, which lets {TALKERS[0]} or more other training utterances "
            f"speak at once, but the train split has {utterances}; leave Babble out, or give the Dataset more audio"
        )
        raise InvalidInput("TooFewTalkers", message)
    if noise is not None and noise.uri is not None:
        noises = fetch_recordings(
            context.store,
            noise.uri,
            context.directory("noises"),
            field="spec.augmentation.noise.uri",
            longest_seconds=LONGEST_NOISE_SECONDS,
            raise_if_stopped=context.raise_if_stopped,
        )
    if room is not None and room.uri is not None:
        rooms = fetch_recordings(
            context.store,
            room.uri,
            context.directory("rooms"),
            field="spec.augmentation.roomImpulseResponse.uri",
            longest_seconds=LONGEST_ROOM_SECONDS,
            raise_if_stopped=context.raise_if_stopped,
        )
    return noises, rooms


def _utterances(
    context: RecipeContext, datasets: Sequence[DatasetInput], split: Split, percent: tuple[float, float]
) -> tuple[TrainingUtterance, ...]:
    """Downloads the audio of a split of all datasets.

    Raises:
        InvalidInput: EmptySplit.
    """
    found: list[Utterance] = []
    for dataset in datasets:
        found += load_split(context.store, dataset, split)
    if split is Split.TRAIN and len(datasets) > 1:
        found = _without_held_out(context, datasets, found)
    if not found:
        message = f"the {split.value} split is empty; give the Dataset more audio, or other shares in spec.splits"
        raise InvalidInput("EmptySplit", message)
    folder = context.directory("audio")
    low, high = percent

    def report(fetched: int) -> None:
        context.raise_if_stopped()
        context.reporter.update(percent=low + (high - low) * fetched / len(found))

    fetch_audio(context.store, found, folder, report)
    return tuple(
        TrainingUtterance(audio=folder / audio_name(one.audio_digest), text=one.text, seconds=one.seconds)
        for one in found
    )


def _without_held_out(
    context: RecipeContext, datasets: Sequence[DatasetInput], train: Sequence[Utterance]
) -> list[Utterance]:
    """Leaves out recordings that another of the datasets validates on or holds out; each was divided by itself."""
    held_out = {
        one.audio_digest
        for dataset in datasets
        for split in (Split.VALIDATION, Split.HOLDOUT)
        for one in load_split(context.store, dataset, split)
    }
    kept = [one for one in train if one.audio_digest not in held_out]
    if len(kept) < len(train):
        _log.warning("utterances left out: another Dataset holds them out", extra={"count": len(train) - len(kept)})
    return kept


def _publish(
    recipe: FinetuneRecipe,
    context: RecipeContext,
    settings: TrainingSettings,
    base_digest: str,
    outcome: dict[str, Any],
) -> FinetuneResult:
    """Uploads the model and, where there is one, the adapter, and says what they are."""
    context.reporter.update(stage="Publishing", percent=95)
    prefix = f"{recipe.output_prefix.rstrip('/')}/{context.attempt_uid}"
    adapter, model = settings.output / ADAPTER_FOLDER, settings.output / MODEL_FOLDER
    has_adapter = adapter.is_dir()
    adapter_uri = context.store.upload_directory(adapter, f"{prefix}/{ADAPTER_FOLDER}") if has_adapter else None
    model_uri = context.store.upload_directory(model, f"{prefix}/{MODEL_FOLDER}")
    seconds = round(outcome["training_seconds"])
    return FinetuneResult(
        model_id=recipe.model_id,
        model_uri=model_uri,
        model_digest=digest_directory(model),
        adapter_uri=adapter_uri,
        adapter_digest=digest_directory(adapter) if has_adapter else None,
        base_digest=base_digest,
        padding=recipe.padding,
        baseline_wer=decimal_string(outcome["baseline_wer"]),
        wer=decimal_string(outcome["wer"]),
        steps=outcome["steps"],
        epochs=decimal_string(outcome["epochs"]),
        training_seconds=seconds,
        gpu_seconds=seconds * outcome["gpus"],
        audio_seconds_per_second=decimal_string(outcome["audio_seconds_per_second"], 3),
        stopped_early=outcome["stopped_early"],
    )
