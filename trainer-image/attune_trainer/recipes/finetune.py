"""finetune: a base model and training splits become adapters and a merged model."""

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attune
from attune.contract.job import DatasetInput, FinetuneRecipe, Split
from attune.contract.result import Estimate, FinetuneResult
from pydantic.alias_generators import to_camel

from attune_trainer.data.dataset import Utterance, audio_name, fetch_audio, load_manifest, load_split
from attune_trainer.decimals import decimal_string
from attune_trainer.failures import InvalidInput, RecipeFailure, Terminated
from attune_trainer.job import RecipeContext
from attune_trainer.store import digest_directory, digest_weights, fetch_model
from attune_trainer.training import checkpoints
from attune_trainer.training.checkpoints import TrainingState
from attune_trainer.training.launch import TrainingProcesses, count_gpus
from attune_trainer.training.licence import read_licence
from attune_trainer.training.report import TrainedOn, TrainingReport, why_irreproducible, write_card, write_report
from attune_trainer.training.settings import TrainingSettings, TrainingUtterance, fingerprint

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Inputs:
    """What a run begins with, and what its report has to say of that."""

    settings: TrainingSettings
    base_digest: str
    licence: str | None
    datasets: tuple[TrainedOn, ...]


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
    context.reporter.update(stage="Downloading", percent=0)
    with TrainingProcesses(context.directory("training"), processes) as training:
        inputs = _fetch_inputs(recipe, context, training.stop_file)
        context.raise_if_stopped()
        training.begin(inputs.settings)
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
    return _publish(recipe, context, inputs, follower.outcome)


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
            epoch = event.pop("epoch")
            metrics = {to_camel(name): value for name, value in event.items() if value is not None}
            self._context.reporter.update(epoch=epoch, metrics=metrics)
        elif kind == "estimate":
            self._context.reporter.expect(Estimate.model_validate(event))
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


def _fetch_inputs(recipe: FinetuneRecipe, context: RecipeContext, stop_file: Path) -> _Inputs:
    """Brings model, audio and the newest checkpoint to the disk."""
    store = context.store
    base = fetch_model(store, recipe.base.uri, context.directory("base"), recipe.base.digest)
    base_digest = recipe.base.digest or digest_directory(base)
    context.reporter.update(percent=3)
    manifests = [load_manifest(store, dataset) for dataset in recipe.datasets]
    languages = {manifest.language for manifest in manifests}
    if len(languages) != 1:
        message = f"the Datasets are in several languages ({', '.join(sorted(languages))}); tune one model for each"
        raise InvalidInput("MixedLanguages", message)
    train = _utterances(context, recipe.datasets, Split.TRAIN, (3.0, 8.0))
    validation = _utterances(context, recipe.datasets, Split.VALIDATION, (8.0, 9.0))
    mark = fingerprint(
        base_digest,
        *(dataset.revision for dataset in recipe.datasets),
        *(
            part.model_dump_json()
            for part in (recipe.lora, recipe.hyperparameters, recipe.distributed, recipe.early_stopping)
            if part is not None
        ),
        recipe.padding,
    )
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
        lora=recipe.lora,
        hyperparameters=recipe.hyperparameters,
        padding=recipe.padding,
        early_stopping=recipe.early_stopping,
        budget=recipe.budget,
        checkpoint=recipe.checkpoint,
        distributed=recipe.distributed,
        fingerprint=mark,
        checkpoints=context.directory("checkpoints"),
        resume=resume,
        output=context.directory("output"),
        stop_file=stop_file,
    )
    return _Inputs(
        settings=settings,
        base_digest=base_digest,
        licence=read_licence(base),
        datasets=tuple(
            TrainedOn.from_manifest(dataset, manifest)
            for dataset, manifest in zip(recipe.datasets, manifests, strict=True)
        ),
    )


def _utterances(
    context: RecipeContext, datasets: Sequence[DatasetInput], split: Split, percent: tuple[float, float]
) -> tuple[TrainingUtterance, ...]:
    """Downloads the audio of a split of all datasets.

    Raises:
        InvalidInput: EmptySplit.
    """
    found: list[Utterance] = []
    blocks: dict[str, str] = {}
    for dataset in datasets:
        by, part = load_manifest(context.store, dataset).by, load_split(context.store, dataset, split)
        blocks |= {one.id: f"{dataset.name}/{one.block(by)}" for one in part}
        found += part
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
        TrainingUtterance(
            audio=folder / audio_name(one.audio_digest), text=one.text, seconds=one.seconds, block=blocks[one.id]
        )
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
    recipe: FinetuneRecipe, context: RecipeContext, inputs: _Inputs, outcome: dict[str, Any]
) -> FinetuneResult:
    """Uploads adapter, merged model, report and model card below this attempt's own prefix, and says what they are."""
    context.reporter.update(stage="Publishing", percent=95)
    prefix = f"{recipe.output_prefix.rstrip('/')}/{context.attempt_uid}"
    output = inputs.settings.output
    adapter, merged = output / "adapter", output / "merged"
    state = TrainingState.model_validate_json((output / checkpoints.STATE_FILE).read_bytes())
    adapter_uri = context.store.upload_directory(adapter, f"{prefix}/adapter")
    model_uri = context.store.upload_directory(merged, f"{prefix}/merged")
    seconds = round(outcome["training_seconds"])
    gpu_seconds = seconds * outcome["gpus"]
    cost = recipe.budget.cost(gpu_seconds) if recipe.budget is not None else None
    result = FinetuneResult(
        model_id=recipe.model_id,
        model_uri=model_uri,
        model_digest=digest_directory(merged),
        adapter_uri=adapter_uri,
        adapter_digest=digest_directory(adapter),
        base_digest=inputs.base_digest,
        padding=recipe.padding,
        baseline_wer=decimal_string(outcome["baseline_wer"]),
        wer=decimal_string(outcome["wer"]),
        steps=outcome["steps"],
        total_steps=outcome["total_steps"],
        epochs=decimal_string(outcome["epochs"]),
        training_seconds=seconds,
        gpu_seconds=gpu_seconds,
        audio_seconds_per_second=decimal_string(outcome["audio_seconds_per_second"], 3),
        stopped_early=outcome["stopped_early"],
        weights_digest=digest_weights(merged),
        budget_reached=state.budget_reached,
        cost=None if cost is None else decimal_string(cost, 2),
        peak_memory_bytes=state.peak_memory_bytes,
        estimate=state.estimate,
        code_version=attune.__version__,
        hardware=state.hardware[-1],
        irreproducible=why_irreproducible(state, outcome["gpus"]),
    )
    report = TrainingReport(
        title=f"{context.spec.owner.namespace}/{context.spec.owner.name}",
        recipe=recipe,
        result=result,
        state=state,
        language=inputs.settings.language,
        licence=inputs.licence,
        datasets=inputs.datasets,
        blocks=[one.block for one in inputs.settings.validation],
    )
    return result.model_copy(update={"report_uri": _publish_report(report, context, prefix)})


def _publish_report(report: TrainingReport, context: RecipeContext, prefix: str) -> str | None:
    """Writes README.md and report.html beside the model; gives the report's address."""
    try:
        card, page = write_card(report), write_report(report, context.work_directory)
    except Exception:  # noqa: BLE001 (a page that cannot be made must not cost a model)
        _log.exception("no report")
        return None
    context.publish(f"{prefix}/README.md", card, "text/markdown; charset=utf-8")
    return context.publish(f"{prefix}/report.html", page, "text/html; charset=utf-8")
