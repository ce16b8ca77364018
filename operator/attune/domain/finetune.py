"""FineTune: a base model and Datasets, fixed at their revisions -> a finetune Job -> a model."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from attune.api.finetune import (
    EstimateStatus,
    FineTune,
    FineTuneMetrics,
    FineTuneStatus,
    HardwareStatus,
    Lineage,
    LineageDataset,
    LineageParent,
    ModelStatus,
    ProgressMetric,
    ProgressStatus,
    Usage,
)
from attune.contract.costs import describe_break_even
from attune.contract.environment import STOP_SECONDS
from attune.contract.job import DatasetInput, FinetuneRecipe, ModelInput, Retention, TrainingInput
from attune.contract.result import Estimate, FinetuneResult, Progress
from attune.contract.training import Checkpointing, Ewc, Replay
from attune.domain.actions import EnsureJob, Plan
from attune.domain.conditions import State
from attune.domain.jobs import (
    SUSPENDED,
    Availability,
    ObservedJob,
    Standing,
    Surroundings,
    Wording,
    build_ensure_job,
    build_key,
    build_plan,
    decide_course,
    decide_expired,
    decide_outdated,
    describe_availability,
)
from attune.domain.names import fingerprint, is_same_run
from attune.domain.times import format_time, parse_time

TRAINED: Final = "Trained"
BUDGET_REACHED: Final = "BudgetReached"
DATASETS_FIXED: Final = "DatasetsFixed"
_RUN: Final = Wording(
    pending="Unknown",
    phase="Running",
    reason="Training",
    does="trains the model",
    more_memory=(
        "raise spec.resources.limits.memory, or create the FineTune anew with a smaller "
        "hyperparameters.maxBatchSeconds or batchSize"
    ),
)
# Time to write a checkpoint to the store when the pod is told to stop: a GPU is to be free again within a minute.
_GRACE_SECONDS: Final = STOP_SECONDS + 5
_BASE_CHARACTERS: Final = 100
_DIGEST: Final = re.compile("sha256:[0-9a-f]{64}$")


@dataclass(frozen=True)
class ObservedDatasetRef:
    """A Dataset that a FineTune or an Evaluation names. revision and uri are there when it is Ready."""

    name: str
    availability: Availability
    revision: str | None = None
    uri: str | None = None


@dataclass(frozen=True)
class ObservedFineTuneRef:
    """A FineTune that another resource names. model and adapter are there when it is Ready, that is, finished."""

    name: str
    availability: Availability
    model: ModelInput | None = None
    adapter: ModelInput | None = None


@dataclass(frozen=True)
class ObservedFineTune:
    """A FineTune, what it names, its Jobs, and how far its pod says it is.

    datasets are those of the spec, in its order; retained is the one of the old domain, parent the FineTune that makes
    the base model.
    """

    resource: FineTune
    datasets: tuple[ObservedDatasetRef, ...]
    jobs: tuple[ObservedJob, ...]
    now: datetime
    surroundings: Surroundings
    progress: Progress | None = None
    retained: ObservedDatasetRef | None = None
    parent: ObservedFineTuneRef | None = None


def decide_finetune(observed: ObservedFineTune) -> Plan:
    """Decides the next step of a FineTune: wait for its inputs, fix them as they are, train, take the result."""
    tune = observed.resource
    status = tune.status
    fixed = _find_fixed(tune)
    if fixed is None:
        return _decide_inputs(observed)
    wanted = build_finetune_job(tune, fixed)
    if status.model is not None and is_same_run(status.job_name, wanted.name):
        outdated = decide_outdated(wanted.name, observed.jobs, keep_same_run=True)
        kept = [one for one in observed.jobs if one.name not in {other.name for other in outdated}]
        expired, look_again = decide_expired(kept, tune.spec.ttl_seconds_after_finished, observed.now)
        actions = (*outdated, *expired)
        return build_plan(tune, status, _describe_trained(tune, status), observed.now, actions, look_again)
    course = decide_course(wanted, observed.jobs, words=_RUN, now=observed.now, surroundings=observed.surroundings)
    if isinstance(course.result, FinetuneResult):
        status = _take_result(_trace(status, wanted, observed.jobs), course.result, wanted.name)
        return build_plan(tune, status, _describe_trained(tune, status), observed.now, course.actions)
    if status.model is None:
        # With a model, these name the run that made it, until the next one has made its own.
        model_id = wanted.spec.recipe.model_id if isinstance(wanted.spec.recipe, FinetuneRecipe) else None
        status = _trace(status, wanted, observed.jobs)
        status = status.model_copy(update={"job_name": wanted.name, "model_id": model_id})
    look_again = course.look_again_seconds
    if course.standing.reason == _RUN.reason:
        status = _take_progress(status, observed)
        look_again = float(observed.surroundings.progress_seconds)
    return build_plan(tune, status, course.standing, observed.now, course.actions, look_again)


def _find_fixed(tune: FineTune) -> Lineage | None:
    """Gives the inputs that an earlier pass fixed for exactly this spec."""
    lineage, spec = tune.status.lineage, tune.spec
    if lineage is None or [one.name for one in lineage.datasets] != [one.name for one in spec.datasets]:
        return None
    old, parent = _name_of_retained(tune), spec.base_model.fine_tune_ref
    if (lineage.retained.name if lineage.retained is not None else None) != old:
        return None
    if parent is not None:
        return lineage if lineage.parent is not None and lineage.parent.name == parent.name else None
    return lineage if lineage.parent is None and lineage.base_uri == spec.base_model.uri else None


def _name_of_retained(tune: FineTune) -> str | None:
    reference = tune.spec.retention.dataset_ref if tune.spec.retention is not None else None
    return reference.name if reference is not None else None


def _decide_inputs(observed: ObservedFineTune) -> Plan:
    """Waits for the inputs, then writes down what they are now; the Job follows once that is stored.

    A Dataset may get a new revision at any time, and a FineTune of the same name another model; were they fixed by the
    Job alone, an operator that is killed between creating the Job and writing the status would start a second run on
    the new ones.
    """
    tune = observed.resource
    if tune.spec.suspend:
        held = Standing(_RUN.pending, SUSPENDED, SUSPENDED, "spec.suspend is true; set it to false to go on")
        return build_plan(tune, tune.status, held, observed.now, ())
    inputs = [("Dataset", one.name, one.availability) for one in (*observed.datasets, observed.retained) if one]
    if observed.parent is not None:
        inputs.append(("FineTune", observed.parent.name, observed.parent.availability))
    for kind, name, availability in inputs:
        blocked = describe_availability(kind, name, availability)
        if blocked is not None:
            reason, message = blocked
            warning = availability != "NotReady"
            state: State = "False" if warning else _RUN.pending
            waiting = Standing(state, "Pending", reason, message, working=True, warning=warning)
            return build_plan(tune, tune.status, waiting, observed.now, ())
    lineage = _fix_inputs(observed)
    names = ", ".join(one.name for one in observed.datasets)
    message = f"trains on {names} as prepared now"
    if lineage.parent is not None:
        message += f", from the model {lineage.parent.model_id or lineage.parent.name}"
    fixed = Standing(_RUN.pending, "Pending", DATASETS_FIXED, message, working=True)
    status = tune.status.model_copy(update={"lineage": lineage})
    return build_plan(tune, status, fixed, observed.now, (), look_again_seconds=0)


def _fix_inputs(observed: ObservedFineTune) -> Lineage:
    """Writes down what the inputs are now; all of them are available."""

    def fix(dataset: ObservedDatasetRef) -> LineageDataset:
        return LineageDataset(name=dataset.name, revision=dataset.revision or "", uri=dataset.uri or "")

    base = ModelInput(uri=observed.resource.spec.base_model.uri or "")
    parent = None
    if observed.parent is not None and observed.parent.model is not None:
        base, adapter = observed.parent.model, observed.parent.adapter
        parent = LineageParent(
            name=observed.parent.name,
            model_id=base.model_id,
            digest=base.digest or "",
            adapter_uri=adapter.uri if adapter is not None else None,
            adapter_digest=adapter.digest if adapter is not None else None,
        )
    return Lineage(
        base_uri=base.uri,
        base_digest=base.digest,
        parent=parent,
        datasets=[fix(one) for one in observed.datasets],
        retained=fix(observed.retained) if observed.retained is not None else None,
    )


def build_finetune_job(tune: FineTune, fixed: Lineage) -> EnsureJob:
    """Builds the wish for the Job that trains this spec on these inputs.

    Checkpointing is how, not what: a change of it makes a new Job of the same run, which goes on from the checkpoints.
    Prices change nothing but a report: a Job that is there goes on with those that it was given.
    """
    spec, owner, parent = tune.spec, tune.owner(), fixed.parent
    recipe = FinetuneRecipe(
        base=(
            ModelInput(uri=fixed.base_uri)
            if parent is None
            else ModelInput(uri=fixed.base_uri, digest=parent.digest, model_id=parent.model_id)
        ),
        datasets=[
            TrainingInput(name=one.name, revision=one.revision, uri=one.uri, weight=wish.weight)
            for one, wish in zip(fixed.datasets, spec.datasets, strict=True)
        ],
        dataset_temperature=spec.dataset_temperature,
        retention=_build_retention(tune, fixed),
        method=spec.method,
        lora=spec.lora,
        hyperparameters=spec.hyperparameters,
        padding=spec.padding,
        early_stopping=spec.early_stopping,
        augmentation=spec.augmentation,
        budget=spec.budget,
        distributed=spec.distributed,
        model_id="",
        output_prefix="",
        checkpoint_prefix="",
    )
    run = fingerprint(owner.uid, recipe)
    return build_ensure_job(
        owner,
        recipe.model_copy(
            update={
                "checkpoint": spec.checkpoint,
                "economics": spec.economics,
                "model_id": build_model_id(fixed.base_uri, run, parent.model_id if parent is not None else None),
                "output_prefix": build_key("models", owner, run),
                "checkpoint_prefix": build_key("checkpoints", owner, run),
            }
        ),
        run,
        turn=spec,
        suspended=spec.suspend,
        resources=spec.resources,
        termination_grace_seconds=_GRACE_SECONDS,
        placement=() if spec.checkpoint == Checkpointing() else (spec.checkpoint.model_dump_json(),),
        nodes=spec.distributed.nodes,
    )


def _build_retention(tune: FineTune, fixed: Lineage) -> Retention | None:
    wish, old = tune.spec.retention, fixed.retained
    if wish is None or old is None:
        return None
    return Retention(
        dataset=DatasetInput(name=old.name, revision=old.revision, uri=old.uri),
        replay=Replay(ratio=wish.replay.ratio) if wish.replay is not None else None,
        ewc=Ewc(strength=wish.ewc.strength, samples=wish.ewc.samples) if wish.ewc is not None else None,
    )


def build_model_id(base_uri: str, run: str, parent: str | None = None) -> str:
    """Names a tuned model after the model that the first generation began with.

    ("s3://models/whisper-tiny.en/", "3f9c2a1b") -> "ft:whisper-tiny.en:3f9c2a"; with the parent
    "ft:whisper-tiny.en:3f9c2a" and the run "77d0e1b2" -> "ft:whisper-tiny.en:77d0e1".
    """
    base = base_uri.rstrip("/").rpartition("/")[2].partition("@")[0]
    if parent is not None:
        base = parent.removeprefix("ft:").rpartition(":")[0] or base
    return f"ft:{base[:_BASE_CHARACTERS]}:{run[:6]}"


def _trace(status: FineTuneStatus, wanted: EnsureJob, jobs: tuple[ObservedJob, ...]) -> FineTuneStatus:
    """Writes down which configuration is trained, and by which image, once the kubelet has said it."""
    recipe, lineage = wanted.spec.recipe, status.lineage
    if lineage is None or not isinstance(recipe, FinetuneRecipe):
        return status
    update = {"config_digest": recipe.config_digest()}
    pod = next((one.newest_pod for one in jobs if one.name == wanted.name), None)
    image = _DIGEST.search(pod.image_id) if pod is not None and pod.image_id else None
    if image is not None:
        update["image_digest"] = image.group()
    return status.model_copy(update={"lineage": lineage.model_copy(update=update)})


def _take_result(status: FineTuneStatus, result: FinetuneResult, job_name: str) -> FineTuneStatus:
    made_by = {
        "base_digest": result.base_digest,
        "code_version": result.code_version,
        "hardware": HardwareStatus.model_validate(result.hardware.model_dump()) if result.hardware else None,
        "irreproducible": result.irreproducible,
    }
    return status.model_copy(
        update={
            "model_id": result.model_id,
            "model": ModelStatus(
                uri=result.model_uri,
                digest=result.model_digest,
                adapter_uri=result.adapter_uri,
                adapter_digest=result.adapter_digest,
                padding=result.padding,
                weights_digest=result.weights_digest,
            ),
            "lineage": status.lineage.model_copy(update=made_by) if status.lineage is not None else None,
            "metrics": FineTuneMetrics(
                baseline_wer=result.baseline_wer,
                wer=result.wer,
                old_baseline_wer=result.old_baseline_wer,
                old_wer=result.old_wer,
            ),
            "curve": result.curve_uri,
            "usage": Usage(
                training_seconds=result.training_seconds,
                gpu_seconds=result.gpu_seconds,
                audio_seconds_per_second=result.audio_seconds_per_second,
                peak_memory_bytes=result.peak_memory_bytes,
                cost=result.cost,
                budget_reached=result.budget_reached,
            ),
            "estimate": status.estimate or _read_estimate(result.estimate),
            "report": result.report_uri,
            "progress": ProgressStatus(
                stage="Finished",
                percent=100,
                step=result.steps,
                total_steps=result.total_steps,
                epoch=result.epochs,
            ),
            "job_name": job_name,
        }
    )


def _take_progress(status: FineTuneStatus, observed: ObservedFineTune) -> FineTuneStatus:
    """Takes over progress that says something new, at most once in progress_seconds."""
    progress, before = observed.progress, status.progress
    if progress is None:
        return status
    fresh = ProgressStatus(
        stage=progress.stage,
        percent=progress.percent,
        step=progress.step,
        total_steps=progress.total_steps,
        epoch=progress.epoch,
        estimated_remaining_seconds=progress.estimated_remaining_seconds,
        metrics=[ProgressMetric(name=one.name, value=one.value) for one in progress.metrics],
        last_updated_time=format_time(observed.now),
    )
    if before is not None and before.last_updated_time is not None:
        same = fresh.model_copy(update={"last_updated_time": before.last_updated_time}) == before
        pause = timedelta(seconds=observed.surroundings.progress_seconds)
        if same or observed.now - parse_time(before.last_updated_time) < pause:
            return status
    estimate = status.estimate or _read_estimate(progress.estimate)
    return status.model_copy(update={"progress": fresh, "estimate": estimate})


def _read_estimate(told: Estimate | None) -> EstimateStatus | None:
    return None if told is None else EstimateStatus.model_validate(told.model_dump())


def _describe_trained(tune: FineTune, status: FineTuneStatus) -> Standing:
    if status.metrics is None:
        return Standing("True", "Succeeded", TRAINED, f"{status.model_id} is in the store")
    figures = (
        f"{status.model_id}: word error rate {status.metrics.wer} on the validation split, "
        f"{status.metrics.baseline_wer} before"
    )
    if status.metrics.old_wer is not None:
        figures += f"; {status.metrics.old_wer} on the old domain's, {status.metrics.old_baseline_wer} before"
    spent = _describe_budget(status)
    message = "; ".join(filter(None, (figures, spent, _describe_worth(tune, status))))
    return Standing("True", "Succeeded", BUDGET_REACHED if spent else TRAINED, message)


def _describe_budget(status: FineTuneStatus) -> str:
    """Says where a budget has ended the run; nothing where none has."""
    usage, progress = status.usage, status.progress
    if usage is None or not usage.budget_reached:
        return ""
    steps = "" if progress is None else f", at step {progress.step} of {progress.total_steps}"
    return (
        f"spec.budget ended the run after {usage.training_seconds / 3600:.2f} h "
        f"({usage.gpu_seconds / 3600:.2f} GPU hours){steps}; the best checkpoint so far is the model"
    )


def _describe_worth(tune: FineTune, status: FineTuneStatus) -> str:
    """Says when the run has paid for itself, at the prices as they are now; nothing where none are given."""
    economics, budget, metrics, usage = tune.spec.economics, tune.spec.budget, status.metrics, status.usage
    cost = budget.cost(usage.gpu_seconds) if budget is not None and usage is not None else None
    if economics is None or budget is None or metrics is None or cost is None:
        return ""
    return describe_break_even(economics, budget, float(metrics.baseline_wer), float(metrics.wer), cost)
