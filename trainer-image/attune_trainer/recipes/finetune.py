"""finetune: a base model and training splits become a tuned model, and adapters where the method has them."""

import json
import logging
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import attune
from attune.contract.exitcode import ExitCode
from attune.contract.job import DatasetInput, FinetuneRecipe
from attune.contract.result import Estimate, FinetuneResult
from attune.contract.training import Distributed, Method, NoiseKind, Precision

from attune_trainer.augmentation.augmenter import TALKERS
from attune_trainer.augmentation.recordings import LONGEST_NOISE_SECONDS, LONGEST_ROOM_SECONDS, fetch_recordings
from attune_trainer.data.dataset import DatasetManifest, Utterance, audio_name, fetch_audio, load_manifest
from attune_trainer.decimals import decimal_string
from attune_trainer.failures import InvalidInput, PeerLost, RecipeFailure, StoreUnavailable, Terminated
from attune_trainer.job import RecipeContext, read_published
from attune_trainer.lineage import MAX_GENERATIONS, Generation, TrainedOn, read_history
from attune_trainer.store import digest_directory, digest_weights, fetch_model
from attune_trainer.training import checkpoints
from attune_trainer.training.checkpoints import TrainingState
from attune_trainer.training.corpus import choose_corpus
from attune_trainer.training.gang import Gang, Place, open_gang
from attune_trainer.training.launch import TrainingProcesses, count_gpus
from attune_trainer.training.licence import read_licence
from attune_trainer.training.report import (
    CountedDataset,
    TrainingReport,
    why_irreproducible,
    write_card,
    write_report,
)
from attune_trainer.training.settings import (
    ADAPTER_FOLDER,
    MODEL_FOLDER,
    Keeping,
    TrainingSettings,
    TrainingUtterance,
    fingerprint,
)

_log = logging.getLogger(__name__)

_CURVE_FILE: Final = "curve.json"
# Several pods.
_LOOK_SECONDS: Final = 2.0  # between two looks into the store
_PART_SECONDS: Final = 600.0  # for another pod's part of a checkpoint
_FREE_LOSSES: Final = 3  # without a checkpoint in between


@dataclass(frozen=True)
class _Inputs:
    """What a run begins with, and what its report has to say of that."""

    settings: TrainingSettings
    base_digest: str
    licence: str | None
    datasets: tuple[CountedDataset, ...]
    blocks: tuple[str, ...]


def run(recipe: FinetuneRecipe, context: RecipeContext) -> FinetuneResult:
    """Trains, and publishes what came out below <output prefix>/<attempt uid>.

    An attempt goes on from the newest unharmed checkpoint below the checkpoint prefix; they are all removed once the
    Result is in the store. Of several pods the first publishes, and the others end once its Result is there.

    Raises:
        RecipeFailure: with exit code DIVERGED, OUT_OF_MEMORY, UNSUPPORTED_MODEL, INVALID_INPUT, GANG_INCOMPLETE,
            PEER_LOST, or the store's.
        Terminated: after a checkpoint, when this pod or another one of the run was asked to end.
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
    nodes = recipe.distributed.nodes
    place = Place.from_environment(nodes) if nodes > 1 else None
    context.reporter.update(stage="Downloading", percent=0)
    try:
        with open_gang(place, context.attempt_uid) as gang:
            inputs, outcome = _train(recipe, context, place, gang)
            if not gang.leads:
                return _await_published(context, gang)
            checkpoint_prefix = f"{recipe.checkpoint_prefix.rstrip('/')}/"
            context.once_published.append(lambda: checkpoints.delete_all(context.store, checkpoint_prefix))
            return _publish(recipe, context, inputs, outcome)
    except _PublishedElsewhere as elsewhere:
        return elsewhere.result
    except RecipeFailure as failure:
        if failure.code is ExitCode.PEER_LOST and place is not None and place.index == 0:
            _check_losses(recipe, context)
        raise


class _PublishedElsewhere(Exception):  # noqa: N818 (no error: there is nothing left to do)
    """Another pod of the run has published the Result."""

    def __init__(self, result: FinetuneResult) -> None:
        super().__init__()
        self.result = result


def _train(
    recipe: FinetuneRecipe, context: RecipeContext, place: Place | None, gang: Gang
) -> tuple[_Inputs, dict[str, Any]]:
    """Trains to the end; gives what the run began with and what the training processes said of its end."""
    directory, processes = context.directory("training"), recipe.distributed.processes_per_node
    with TrainingProcesses(directory, processes, place) as training:
        inputs = _fetch_inputs(recipe, context, training.stop_file, gang)
        context.raise_if_stopped()
        training.begin(inputs.settings)
        if not gang.leads:
            context.reporter.update(stage="Training", percent=20)
        follower = _Follower(recipe, context, gang)
        try:
            training.follow(follower.on_event, context.stop.is_set, gang.raise_if_lost)
        except Terminated:
            follower.finish(strict=True)  # what is not in the store now is lost with the pod
            raise
        except RecipeFailure:
            follower.finish(strict=False)
            raise
        gang.finish_training()
        follower.finish(strict=False)
    return inputs, follower.outcome


def _await_published(context: RecipeContext, gang: Gang) -> FinetuneResult:
    """Waits until the first pod has published, and gives its Result: until then this pod may be needed again.

    Raises:
        PeerLost: when the first pod goes before it has.
    """
    context.reporter.update(stage="Waiting", percent=95)
    while True:
        lost = None
        try:
            gang.raise_if_lost()
        except PeerLost as error:  # perhaps since it is done
            lost = error
        published = _read_published(context)
        if published is not None:
            return published
        if lost is not None:
            raise lost
        context.raise_if_stopped()
        context.stop.wait(_LOOK_SECONDS)


def _read_published(context: RecipeContext) -> FinetuneResult | None:
    published = read_published(context.spec, context.store)
    return published if isinstance(published, FinetuneResult) else None


def _check_losses(recipe: FinetuneRecipe, context: RecipeContext) -> None:
    """Passes while losing other pods is bad luck: their ends cost the retries, and this one's costs none.

    Raises:
        RecipeFailure: GangIncomplete, which costs one, when pods lose each other and none of them gets anywhere.
    """
    losses = checkpoints.count_loss(context.store, recipe.checkpoint_prefix)
    if losses > _FREE_LOSSES:
        message = (
            f"the pods of this run have lost each other {losses} times without a checkpoint in between; see what their "
            "logs say, and whether their network holds connections; spec.checkpoint.everySteps makes more checkpoints"
        )
        raise RecipeFailure(ExitCode.GANG_INCOMPLETE, "GangIncomplete", message)


class _Follower:
    """Turns events of the training processes into progress, and uploads checkpoints while training goes on."""

    def __init__(self, recipe: FinetuneRecipe, context: RecipeContext, gang: Gang) -> None:
        self._recipe = recipe
        self._context = context
        self._gang = gang
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._uploads: list[Future[None]] = []
        self.outcome: dict[str, Any] = {}

    def on_event(self, event: dict[str, Any]) -> None:
        """Takes one event."""
        kind = event.pop("kind")
        if kind == "progress":
            self._context.reporter.update(**event)
        elif kind == "baseline":
            names = {"wer": "baselineWer", "oldWer": "oldBaselineWer"}
            self._context.reporter.update(metrics={names[name]: value for name, value in event.items()})
        elif kind == "validated":
            self._context.reporter.update(epoch=event.pop("epoch"), metrics=event)
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
        deadline = time.monotonic() + _PART_SECONDS

        def wait() -> None:
            self._gang.raise_if_lost()
            if time.monotonic() > deadline:
                message = f"a pod has not uploaded its part of a checkpoint within {_PART_SECONDS / 60:.0f} min"
                raise StoreUnavailable("CheckpointIncomplete", message)
            _pause.wait(_LOOK_SECONDS / 4)

        checkpoints.upload(
            self._context.store, folder, self._recipe.checkpoint_prefix, self._recipe.checkpoint.keep, wait
        )
        shutil.rmtree(folder, ignore_errors=True)


def _fetch_inputs(recipe: FinetuneRecipe, context: RecipeContext, stop_file: Path, gang: Gang) -> _Inputs:
    """Brings model, audio and the newest checkpoint to the disk; of several pods, each to its own."""
    store = context.store
    base = fetch_model(store, recipe.base.uri, context.directory("base"), recipe.base.digest)
    base_digest = recipe.base.digest or digest_directory(base)
    context.reporter.update(percent=3)
    history = read_history(base)
    manifests = [load_manifest(store, dataset) for dataset in _all_datasets(recipe)]
    language = _read_language(manifests)
    corpus = choose_corpus(store, recipe, history)
    folder = context.directory("audio")
    _fetch_audio(context, corpus.utterances(), folder, (3.0, 9.0))
    noises, rooms = _fetch_recordings(recipe, context, len(corpus.train))
    mark = mark_run(recipe, base_digest, (*noises, *rooms))
    resume = _agree_on_checkpoint(recipe, context, gang, mark)
    # An attempt of the same pod that died may have left some.
    shutil.rmtree(context.directory("checkpoints"))
    retention = recipe.retention
    settings = TrainingSettings(
        base=base,
        base_uri=recipe.base.uri,
        model_id=recipe.model_id,
        language=language,
        train=tuple(_local(one, folder, part) for part, one in corpus.train),
        validation=tuple(_local(one, folder) for _, one in corpus.validation),
        method=recipe.method,
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
        mark=gang.mark,
        augmentation=recipe.augmentation,
        noises=noises,
        rooms=rooms,
        mixture=corpus.mixture,
        keeping=Keeping(
            validation=tuple(_local(one, folder) for one in corpus.old_validation),
            ewc=retention.ewc,
            sample=tuple(_local(one, folder) for one in corpus.sample),
        )
        if retention is not None
        else None,
        history=(_describe_generation(recipe, base_digest), *history)[:MAX_GENERATIONS],
    )
    return _Inputs(
        settings=settings,
        base_digest=base_digest,
        licence=read_licence(base),
        datasets=tuple(
            CountedDataset.from_manifest(dataset, manifest)
            for dataset, manifest in zip(_all_datasets(recipe), manifests, strict=True)
        ),
        blocks=tuple(
            f"{recipe.datasets[number].name}/{one.block(manifests[number].by)}" for number, one in corpus.validation
        ),
    )


def _agree_on_checkpoint(recipe: FinetuneRecipe, context: RecipeContext, gang: Gang, mark: str) -> Path | None:
    """Brings the checkpoint to the disk that all pods go on from, once all of them are there.

    Raises:
        RecipeFailure: CheckpointDamaged, when it does not arrive here as it did elsewhere; GangIncomplete, PeerLost.
        _PublishedElsewhere: when the others are done already.
    """
    store, prefix, directory = context.store, recipe.checkpoint_prefix, context.directory("resume")

    def download(name: str | None) -> Path | None:
        if name is None:
            return checkpoints.download_newest(store, prefix, directory, mark)
        found = checkpoints.download(store, prefix, name, directory, mark)
        if found is None:
            message = f"checkpoint {name}, which the first pod goes on from, is gone or has not arrived unharmed"
            raise StoreUnavailable("CheckpointDamaged", message)
        return found

    looked = time.monotonic()

    def check() -> None:
        nonlocal looked
        context.raise_if_stopped()
        if time.monotonic() - looked > _LOOK_SECONDS and not gang.leads:
            looked = time.monotonic()
            published = _read_published(context)
            if published is not None:
                raise _PublishedElsewhere(published)

    if recipe.distributed.nodes > 1:
        context.reporter.update(stage="Gathering", percent=9)
    return gang.agree(download, check)


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


def _read_language(manifests: Sequence[DatasetManifest]) -> str:
    """Gives the language of all Datasets.

    Raises:
        InvalidInput: MixedLanguages.
    """
    languages = {manifest.language for manifest in manifests}
    if len(languages) != 1:
        message = f"the Datasets are in several languages ({', '.join(sorted(languages))}); tune one model for each"
        raise InvalidInput("MixedLanguages", message)
    return languages.pop()


def _all_datasets(recipe: FinetuneRecipe) -> list[DatasetInput]:
    """Lists what is trained on and, last, the old domain's."""
    return [*recipe.datasets, *([recipe.retention.dataset] if recipe.retention is not None else [])]


def mark_run(recipe: FinetuneRecipe, base_digest: str, recordings: Sequence[Path] = ()) -> str:
    """Gives what a checkpoint must carry for this run to go on from it.

    Options that are not set have no part in it, so that the run goes on where another release of this image began it.
    """
    parts = (
        recipe.lora,
        recipe.hyperparameters,
        recipe.distributed,
        recipe.early_stopping,
        recipe.augmentation,
        recipe.retention,
    )
    shares = (recipe.dataset_temperature, *(one.weight for one in recipe.datasets))
    limits = recipe.budget.limits() if recipe.budget is not None else {}
    return fingerprint(
        base_digest,
        *(dataset.revision for dataset in recipe.datasets),
        *(
            part.model_dump_json(exclude_none=True, exclude=set(part.unsaid) if isinstance(part, Distributed) else None)
            for part in parts
            if part is not None
        ),
        recipe.padding,
        *(() if recipe.method is Method.LORA else (recipe.method,)),
        *((json.dumps(shares),) if any(shares) else ()),
        *((json.dumps(limits),) if limits else ()),
        *(file.stem for file in recordings),
    )


def _describe_generation(recipe: FinetuneRecipe, base_digest: str) -> Generation:
    retention = recipe.retention
    heard = _all_datasets(recipe) if retention is not None and retention.replay is not None else recipe.datasets
    return Generation(
        model_id=recipe.model_id,
        base_model=recipe.base.uri,
        base_digest=base_digest,
        datasets=tuple(TrainedOn(name=one.name, revision=one.revision, uri=one.uri) for one in heard),
    )


def _fetch_audio(
    context: RecipeContext, utterances: Sequence[Utterance], folder: Path, percent: tuple[float, float]
) -> None:
    """Downloads the audio of utterances."""
    low, high = percent

    def report(fetched: int) -> None:
        context.raise_if_stopped()
        context.reporter.update(percent=low + (high - low) * fetched / len(utterances))

    fetch_audio(context.store, utterances, folder, report)


def _local(utterance: Utterance, folder: Path, part: int = 0) -> TrainingUtterance:
    return TrainingUtterance(
        audio=folder / audio_name(utterance.audio_digest), text=utterance.text, seconds=utterance.seconds, part=part
    )


def _publish(
    recipe: FinetuneRecipe, context: RecipeContext, inputs: _Inputs, outcome: dict[str, Any]
) -> FinetuneResult:
    """Uploads model, adapter where there is one, curve, report and model card below this attempt's own prefix."""
    context.reporter.update(stage="Publishing", percent=95)
    prefix = f"{recipe.output_prefix.rstrip('/')}/{context.attempt_uid}"
    output = inputs.settings.output
    adapter, model = output / ADAPTER_FOLDER, output / MODEL_FOLDER
    has_adapter = adapter.is_dir()
    state = TrainingState.model_validate_json((output / checkpoints.STATE_FILE).read_bytes())
    adapter_uri = context.store.upload_directory(adapter, f"{prefix}/{ADAPTER_FOLDER}") if has_adapter else None
    model_uri = context.store.upload_directory(model, f"{prefix}/{MODEL_FOLDER}")
    seconds = round(outcome["training_seconds"])
    gpu_seconds = seconds * outcome["gpus"]
    cost = recipe.budget.cost(gpu_seconds) if recipe.budget is not None else None
    old_wer, old_baseline_wer = state.best_metrics.get("oldWer"), state.baseline_metrics.get("oldWer")
    result = FinetuneResult(
        model_id=recipe.model_id,
        model_uri=model_uri,
        model_digest=digest_directory(model),
        adapter_uri=adapter_uri,
        adapter_digest=digest_directory(adapter) if has_adapter else None,
        base_digest=inputs.base_digest,
        padding=recipe.padding,
        baseline_wer=decimal_string(outcome["baseline_wer"]),
        wer=decimal_string(outcome["wer"]),
        old_baseline_wer=None if old_baseline_wer is None else decimal_string(old_baseline_wer),
        old_wer=None if old_wer is None else decimal_string(old_wer),
        steps=outcome["steps"],
        total_steps=outcome["total_steps"],
        epochs=decimal_string(outcome["epochs"]),
        training_seconds=seconds,
        gpu_seconds=gpu_seconds,
        audio_seconds_per_second=decimal_string(outcome["audio_seconds_per_second"], 3),
        stopped_early=outcome["stopped_early"],
        weights_digest=digest_weights(model),
        budget_reached=state.budget_reached,
        cost=None if cost is None else decimal_string(cost, 2),
        peak_memory_bytes=state.peak_memory_bytes,
        estimate=state.estimate,
        curve_uri=_publish_curve(state, context, prefix),
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
        blocks=inputs.blocks,
    )
    return result.model_copy(update={"report_uri": _publish_report(report, context, prefix)})


def _publish_curve(state: TrainingState, context: RecipeContext, prefix: str) -> str:
    """Writes down what each validation gave, the base model's first; gives the address."""
    curve = [{"epoch": one.epoch, **one.metrics} for one in state.course.validations]
    return context.publish(f"{prefix}/{_CURVE_FILE}", json.dumps(curve, indent=1), "application/json")


def _publish_report(report: TrainingReport, context: RecipeContext, prefix: str) -> str | None:
    """Writes README.md and report.html beside the model; gives the report's address."""
    try:
        card, page = write_card(report), write_report(report, context.work_directory)
    except Exception:  # noqa: BLE001 (a page that cannot be made must not cost a model)
        _log.exception("no report")
        return None
    context.publish(f"{prefix}/README.md", card, "text/markdown; charset=utf-8")
    return context.publish(f"{prefix}/report.html", page, "text/html; charset=utf-8")


_pause = threading.Event()  # never set: wait() is a sleep that a test may cut short
