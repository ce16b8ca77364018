"""Small worlds for decisions: resources, Jobs and pods as an API server would show them."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from attune.api import Dataset, Evaluation, FineTune
from attune.api.meta import Status
from attune.contract.job import ModelInput
from attune.contract.result import Summary
from attune.domain.actions import DeleteJob, EnsureJob, Plan
from attune.domain.dataset import ObservedDataset, decide_dataset
from attune.domain.evaluation import ObservedEvaluation, decide_evaluation
from attune.domain.finetune import ObservedDatasetRef, ObservedFineTune, ObservedFineTuneRef, decide_finetune
from attune.domain.jobs import ObservedJob, ObservedPod, Surroundings
from attune.domain.kueue import ObservedQueue

from tests.reconcile.samples import DATASET, EVALUATED, EVALUATION, FINE_TUNE, PREPARED, TRAINED

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
SURROUNDINGS = Surroundings(store_secret="attune-store", retry_seconds=300, progress_seconds=10)  # noqa: S106 (a name)
REVISION = ObservedDatasetRef("calls", "Ready", PREPARED.revision, PREPARED.uri)
MODEL = ObservedFineTuneRef("lora", "Ready", ModelInput(uri=TRAINED.model_uri, digest=TRAINED.model_digest))
KINDS = ("Dataset", "FineTune", "Evaluation")
TERMINAL = {"Dataset": "Ready", "FineTune": "Succeeded", "Evaluation": "Succeeded"}
RESULTS = {"Dataset": PREPARED, "FineTune": TRAINED, "Evaluation": EVALUATED}

Observed = ObservedDataset | ObservedFineTune | ObservedEvaluation


def metadata(name: str, generation: int = 1) -> dict[str, Any]:
    return {"name": name, "namespace": "team", "uid": f"uid-of-{name}", "generation": generation}


def make_dataset(**spec: Any) -> Dataset:
    return Dataset.model_validate({"metadata": metadata("calls"), "spec": {**DATASET, **spec}})


def make_fine_tune(**spec: Any) -> FineTune:
    return FineTune.model_validate({"metadata": metadata("lora"), "spec": {**FINE_TUNE, **spec}})


def make_evaluation(**spec: Any) -> Evaluation:
    return Evaluation.model_validate({"metadata": metadata("holdout"), "spec": {**EVALUATION, **spec}})


def observe(kind: str, *jobs: ObservedJob, **spec: Any) -> Observed:
    """A resource of this kind on its first visit, its inputs ready."""
    match kind:
        case "Dataset":
            return ObservedDataset(make_dataset(**spec), jobs, NOW, SURROUNDINGS)
        case "FineTune":
            return ObservedFineTune(make_fine_tune(**spec), (REVISION,), jobs, NOW, SURROUNDINGS)
        case _:
            return ObservedEvaluation(make_evaluation(**spec), REVISION, (MODEL,), jobs, NOW, SURROUNDINGS)


def decide(observed: Observed) -> Plan:
    match observed:
        case ObservedDataset():
            return decide_dataset(observed)
        case ObservedFineTune():
            return decide_finetune(observed)
        case ObservedEvaluation():
            return decide_evaluation(observed)


def enact(observed: Observed, plan: Plan) -> Observed:
    """The world after a plan: what it asked for is there, and its status is stored."""
    jobs = {job.name: job for job in observed.jobs}
    for action in plan.actions:
        match action:
            case EnsureJob():
                queue = ObservedQueue(action.queue) if action.queue is not None else None
                new = ObservedJob(action.name, suspended=action.suspended or queue is not None, queue=queue)
                present = jobs.get(action.name, new)
                theirs = present.queue is not None or (present.suspended and present.suspended_by is not None)
                suspended = present.suspended if theirs else action.suspended
                jobs[action.name] = replace(present, suspended=suspended, config_present=True)
            case DeleteJob():
                jobs.pop(action.name, None)
            case _:
                pass
    resource = observed.resource.model_copy(update={"status": plan.status})
    return replace(observed, resource=resource, jobs=tuple(jobs.values()))  # type: ignore[arg-type]


def condition(status: Status, kind: str) -> tuple[str, str, str]:
    found = next(one for one in status.conditions if one.type == kind)
    return found.status, found.reason, found.message


def settle(observed: Observed, rounds: int = 6) -> Observed:
    """Decides and enacts until a decision asks for nothing more."""
    for _ in range(rounds):
        plan = decide(observed)
        if not plan.actions and plan.status == observed.resource.status:
            return observed
        observed = enact(observed, plan)
    raise AssertionError(f"does not settle: {decide(observed)}")


def wanted_name(kind: str, **spec: Any) -> str:
    """The Job that a resource of this kind asks for."""
    return settle(observe(kind, **spec)).jobs[0].name


def pod(**fields: Any) -> ObservedPod:
    return ObservedPod(**{"name": "pod", "created": "2026-11-21T11:59:00Z", "phase": "Pending", **fields})


def finished(name: str, kind: str) -> ObservedJob:
    """A Job that left its result."""
    message = Summary(result=RESULTS[kind]).to_message()
    ended = pod(phase="Succeeded", exit_code=0, termination_message=message)
    return ObservedJob(name, complete=True, finished=NOW, pods=(ended,))
