"""Evaluation: a Dataset's split and candidates -> an evaluate Job -> leaderboard, winner, verdict."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from attune.api.evaluation import (
    Candidate,
    Evaluation,
    EvaluationStatus,
    FailedCandidateStatus,
    LeaderboardRowStatus,
    SliceGapStatus,
    VerdictStatus,
)
from attune.contract.job import (
    DatasetInput,
    EndpointInput,
    Entities,
    EvaluateCandidate,
    EvaluateRecipe,
    ModelInput,
    Split,
)
from attune.contract.measures import Gate
from attune.contract.result import EvaluateResult
from attune.domain.actions import Access, EnsureJob, Plan
from attune.domain.conditions import State, find_condition
from attune.domain.finetune import ObservedDatasetRef, ObservedFineTuneRef
from attune.domain.jobs import (
    SUSPENDED,
    ObservedJob,
    Standing,
    Surroundings,
    Wording,
    build_ensure_job,
    build_key,
    build_plan,
    decide_course,
    decide_outdated,
    describe_availability,
)
from attune.domain.names import fingerprint, is_same_run

EVALUATED: Final = "Evaluated"
_RUN: Final = Wording(
    pending="Unknown",
    phase="Running",
    reason="Evaluating",
    does="judges the candidates",
    more_memory="raise spec.resources.limits.memory",
)


@dataclass(frozen=True)
class ObservedEvaluation:
    """An Evaluation, its Dataset, the FineTunes that its candidates name, and its Jobs."""

    resource: Evaluation
    dataset: ObservedDatasetRef
    fine_tunes: tuple[ObservedFineTuneRef, ...]
    jobs: tuple[ObservedJob, ...]
    now: datetime
    surroundings: Surroundings


def decide_evaluation(observed: ObservedEvaluation) -> Plan:
    """Decides the next step of an Evaluation. It follows its inputs: a new revision or model is judged anew.

    A verdict once given stays while inputs are missing or are being made again: it was true of what it judged.
    """
    evaluation = observed.resource
    status = evaluation.status
    blocked = _find_blocked(observed)
    if blocked is not None:
        standing = _describe_evaluated(status) if _is_judged(evaluation) else blocked
        return build_plan(evaluation, status, standing, observed.now, ())
    wanted = build_evaluate_job(observed)
    if status.verdict is not None and is_same_run(status.job_name, wanted.name):
        actions = decide_outdated(wanted.name, observed.jobs, keep_same_run=True)
        return build_plan(evaluation, status, _describe_evaluated(status), observed.now, actions)
    course = decide_course(wanted, observed.jobs, words=_RUN, now=observed.now, surroundings=observed.surroundings)
    if isinstance(course.result, EvaluateResult):
        status = _take_result(status, course.result, wanted.name, observed.dataset.revision)
        return build_plan(evaluation, status, _describe_evaluated(status), observed.now, course.actions)
    if status.verdict is None:
        status = status.model_copy(update={"job_name": wanted.name})
    return build_plan(evaluation, status, course.standing, observed.now, course.actions, course.look_again_seconds)


def _is_judged(evaluation: Evaluation) -> bool:
    """Tells whether the verdict in the status is one on the present spec, and nothing has been asked for since."""
    succeeded = find_condition(evaluation.status.conditions, Evaluation.TERMINAL_CONDITION)
    return (
        evaluation.status.verdict is not None
        and succeeded is not None
        and succeeded.status == "True"
        and succeeded.observed_generation == evaluation.metadata.generation
    )


def _find_blocked(observed: ObservedEvaluation) -> Standing | None:
    """Says what an Evaluation that has not begun waits for: the Dataset first, then FineTunes in the spec's order."""
    inputs = [
        ("Dataset", observed.dataset.name, observed.dataset.availability),
        *(("FineTune", one.name, one.availability) for one in observed.fine_tunes),
    ]
    for kind, name, availability in inputs:
        blocked = describe_availability(kind, name, availability)
        if blocked is None:
            continue
        if observed.resource.spec.suspend:
            return Standing(_RUN.pending, SUSPENDED, SUSPENDED, "spec.suspend is true; set it to false to go on")
        reason, message = blocked
        warning = availability != "NotReady"
        state: State = "False" if warning else _RUN.pending
        return Standing(state, "Pending", reason, message, working=True, warning=warning)
    return None


def build_evaluate_job(observed: ObservedEvaluation) -> EnsureJob:
    """Builds the wish for the Job that judges these candidates. Every input must be available.

    Raises:
        ValueError: when one is not.
    """
    evaluation, dataset = observed.resource, observed.dataset
    spec, owner = evaluation.spec, evaluation.owner()
    if dataset.revision is None or dataset.uri is None:
        raise ValueError(f"Dataset {dataset.name} has no revision")
    models = {one.name: one.model for one in observed.fine_tunes}
    recipe = EvaluateRecipe(
        dataset=DatasetInput(name=dataset.name, revision=dataset.revision, uri=dataset.uri),
        split=Split(spec.split),
        candidates=[_build_candidate(index, one, models) for index, one in enumerate(spec.candidates)],
        baseline=spec.baseline,
        metrics=spec.metrics,
        gates=[
            Gate(
                metric=one.metric,
                max=one.max,
                min=one.min,
                max_change_from_baseline=one.max_change_from_baseline,
                slice=one.slice,
            )
            for one in spec.gates
        ],
        slices=spec.slices,
        entities=None if spec.entities is None else Entities.model_validate(spec.entities.model_dump()),
        confidence=spec.confidence,
        output_prefix="",
    )
    run = fingerprint(owner.uid, recipe)
    keys = tuple(
        (index, one.endpoint.key_secret_ref.name)
        for index, one in enumerate(spec.candidates)
        if one.endpoint is not None and one.endpoint.key_secret_ref is not None
    )
    return build_ensure_job(
        owner,
        recipe.model_copy(update={"output_prefix": build_key("evaluations", owner, run)}),
        run,
        turn=spec,
        suspended=spec.suspend,
        resources=spec.resources,
        access=Access(endpoint_secrets=keys),
    )


def _build_candidate(index: int, candidate: Candidate, models: dict[str, ModelInput | None]) -> EvaluateCandidate:
    if candidate.endpoint is None:
        return EvaluateCandidate(name=candidate.name, model=_find_model(candidate, models))
    told = candidate.endpoint.model_dump(exclude={"key_secret_ref"})
    key_index = None if candidate.endpoint.key_secret_ref is None else index
    return EvaluateCandidate(name=candidate.name, endpoint=EndpointInput(**told, key_index=key_index))


def _find_model(candidate: Candidate, models: dict[str, ModelInput | None]) -> ModelInput:
    if candidate.model is not None:
        return ModelInput(uri=candidate.model.uri)
    model = models.get(candidate.fine_tune_ref.name) if candidate.fine_tune_ref is not None else None
    if model is None:
        raise ValueError(f"candidate {candidate.name} has no model")
    return model


def _take_result(
    status: EvaluationStatus, result: EvaluateResult, job_name: str, revision: str | None
) -> EvaluationStatus:
    return status.model_copy(
        update={
            "leaderboard": [LeaderboardRowStatus.model_validate(row.model_dump()) for row in result.leaderboard],
            "winner": result.winner,
            "verdict": VerdictStatus.model_validate(result.verdict.model_dump()),
            "gaps": [SliceGapStatus.model_validate(gap.model_dump()) for gap in result.gaps],
            "failed": [FailedCandidateStatus.model_validate(one.model_dump()) for one in result.failed],
            "normaliser": result.normaliser,
            "dataset_revision": revision,
            "report": result.report_uri,
            "job_name": job_name,
        }
    )


def _describe_evaluated(status: EvaluationStatus) -> Standing:
    verdict = status.verdict
    message = f"{verdict.decision}: {verdict.reason}" if verdict is not None else "judged"
    return Standing("True", "Succeeded", EVALUATED, message)
