"""Decides what a Canary does next: first model, rollout in steps, promotion, rollback.

What must survive the operator is in the cluster: models and templates are on the arms' Deployments, weights and the
rollout's record on the route, in one object and so in one write. The status is for people; decisions read from it only
what is harmless to lose: when the analysis last knew something, and how a rollout that has just ended should be told.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

from attune.api.canary import (
    AnalysisStatus,
    AnalysisVerdict,
    ArmModel,
    ArmStatus,
    Canary,
    CanarySpec,
    CanaryStatus,
    HistoryEntry,
    Outcome,
    Phase,
    PodTemplate,
    RolloutStatus,
    ServerContainer,
    Step,
)
from attune.api.dataset import Dataset, SplitStatus
from attune.api.finetune import FineTune
from attune.contract.job import DatasetInput, ScoreRecipe, Split
from attune.contract.metrics import Track
from attune.domain.actions import (
    CanaryAction,
    DeleteArm,
    DeleteJob,
    EmitEvent,
    EnsureArm,
    EnsureRoute,
    EnsureScorer,
    Plan,
    RolloutRecord,
)
from attune.domain.arms import ObservedArm, ObservedGateway, ObservedRoute
from attune.domain.conditions import State
from attune.domain.jobs import (
    SUSPENDED,
    Availability,
    ObservedJob,
    Standing,
    Wording,
    describe_availability,
    describe_failure,
)
from attune.domain.names import fingerprint
from attune.domain.times import format_time, parse_time
from attune.domain.verdict import REASON_NO_DATA, Judgement, NoEvidence, PairedSums, judge

INITIALIZING: Final = "Initializing"
HEALTHY: Final = "Healthy"
ROLLOUT_PROGRESSING: Final = "RolloutProgressing"
PROMOTING: Final = "Promoting"
STABLE_NOT_READY: Final = "StableNotReady"
CANARY_NOT_READY: Final = "CanaryNotReady"
ANALYSIS_TIMED_OUT: Final = "AnalysisTimedOut"
NO_DATA: Final = REASON_NO_DATA
GOLDEN_SET_TOO_SMALL: Final = "GoldenSetTooSmall"
GATEWAY_NOT_FOUND: Final = "GatewayNotFound"
GATEWAY_NOT_READY: Final = "GatewayNotReady"
ROUTE_NOT_ACCEPTED: Final = "RouteNotAccepted"

HISTORY_LENGTH: Final = 10
REVISION_DIGITS: Final = 10
_SOON_SECONDS: Final = 2.0
_WAIT_SECONDS: Final = 15.0
_MESSAGE_CHARACTERS: Final = 512
_SCORER_WORDS: Final = Wording("Unknown", "", "", "replays golden utterances", "use a smaller golden set")


@dataclass(frozen=True)
class ObservedCanary:
    """Everything that the decision on a Canary reads.

    fine_tune and dataset are the referents, None where they are missing, with whether they can be built on.
    """

    canary: Canary
    now: datetime
    inference_image: str
    fine_tune: FineTune | None
    fine_tune_state: Availability
    dataset: Dataset | None
    dataset_state: Availability
    gateway: ObservedGateway
    stable: ObservedArm | None
    trial: ObservedArm | None  # the canary arm
    route: ObservedRoute | None
    scorers: tuple[ObservedJob, ...]
    evidence: PairedSums | NoEvidence

    @property
    def spec(self) -> CanarySpec:
        """What is wanted."""
        return self.canary.spec

    @property
    def status(self) -> CanaryStatus:
        """What was written last."""
        return self.canary.status

    @property
    def template(self) -> PodTemplate:
        """The template that is wanted, its image filled in."""
        return fill_image(self.spec.template, self.inference_image)

    @property
    def stable_ready(self) -> bool:
        """Whether stable serves at all."""
        return self.stable is not None and self.stable.ready > 0


@dataclass(frozen=True)
class Problem:
    """Why something that is wanted can't be done. waits: it will be possible without anybody's help."""

    reason: str
    message: str
    waits: bool = False


@dataclass(frozen=True)
class _Next:
    """What comes next, before it is told in a status."""

    actions: tuple[CanaryAction, ...]
    standing: Standing
    weight: int  # of the canary, in percent, after the actions
    record: RolloutRecord | None = None
    judgement: Judgement | None = None
    look_again_seconds: float | None = None
    scorer_model: ArmModel | None = field(default=None)


def decide_canary(o: ObservedCanary) -> Plan:
    """Decides what to do now. Total: every observation has a plan, and a plan that was carried out changes nothing."""
    if o.canary.metadata.deletion_timestamp is not None:
        # Everything is owned by the Canary: the garbage collector clears it away.
        return Plan((), o.status)
    if not o.spec.suspend and _is_serving(o):
        o = _restore_record(o)
    return _tell(o, _choose(o))


def _choose(o: ObservedCanary) -> _Next:
    target = resolve_target(o)
    if o.spec.suspend:
        return _suspend(o)
    if not _is_serving(o):
        return _initialize(o, target)
    record = o.route.rollout if o.route is not None else None
    stable = _stable_model(o)
    if record is not None and record.promoting:
        # A promotion that has begun is finished before anything else: stable is between two models. It can be
        # finished, since the canary arm runs the very same pods.
        return _promote(o, record, o.trial.model if o.trial is not None else stable)
    if isinstance(target, Problem):
        if record is not None and not record.failed_reason:
            return _roll(o, record, None, blocked=target)
        return _rest(o, _standing_of(o, target), record)
    if target.revision == stable.revision:
        return _rest(o, _standing_at_rest(o, stable), None)
    return _choose_rollout(o, record, stable, target)


def _choose_rollout(o: ObservedCanary, record: RolloutRecord | None, stable: ArmModel, target: ArmModel) -> _Next:
    """Another model than stable's is wanted."""
    identity = name_rollout(o.canary.metadata.uid, stable.revision, target.revision)
    if record is not None and record.id == identity:
        if record.failed_reason is not None:
            return _rest(o, _standing_degraded(o, record), record)
        return _roll(o, record, target)
    problem = next((found for check in _PREFLIGHT if (found := check(o)) is not None), None)
    if problem is None:
        return _begin(o, identity, target)
    if problem.reason == STABLE_NOT_READY and o.stable is not None and o.stable.broken:
        return _replace_broken(o, target)
    return _rest(o, _standing_of(o, problem), None)


def name_rollout(uid: str, stable_revision: str, target_revision: str) -> str:
    """Names a rollout by what is compared: the same pair of models of the same Canary is the same question."""
    return fingerprint(uid, stable_revision, target_revision, digits=REVISION_DIGITS)


def compute_revision(uri: str, digest: str | None, template: PodTemplate) -> str:
    """Hashes a model and the pods that serve it. Fields left at their defaults don't count."""
    plain = template.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return fingerprint(uri, digest, plain, digits=REVISION_DIGITS)


def name_model(uri: str) -> str:
    """Names a model by the last part of its URI that says something.

    "s3://attune/models/whisper-tiny.en" -> "whisper-tiny.en"; "s3://b/3f9c2a/merged" -> "3f9c2a/merged".
    """
    parts = [part for part in uri.partition("://")[2].split("/") if part]
    generic = {"merged", "model", "final", "latest", "checkpoint"}
    return "/".join(parts[-2:] if parts[-1] in generic else parts[-1:])


def fill_image(template: PodTemplate, image: str) -> PodTemplate:
    """Writes the inference image into a template that names none, so that an arm keeps it for life."""
    containers = template.spec.containers or [ServerContainer(name="server")]
    filled = [one if one.image else one.model_copy(update={"image": image}) for one in containers]
    return template.model_copy(update={"spec": template.spec.model_copy(update={"containers": filled})})


def compute_weight(steps: list[Step], index: int | None) -> int:
    """The canary's weight in a step: that of the last step with a weight up to it.

    Steps 5, 25, pause, 50: index 0 -> 5, 2 (the pause) -> 25, 3 -> 50; None (nothing has begun) -> 0.
    """
    if index is None:
        return 0
    return next((step.weight for step in reversed(steps[: index + 1]) if step.weight is not None), 0)


def resolve_target(o: ObservedCanary) -> ArmModel | Problem:
    """Finds the model that the spec asks for, or says why there is none yet."""
    source = o.spec.model
    if source.uri is not None:
        revision = compute_revision(source.uri, None, o.spec.template)
        return ArmModel(revision=revision, model_id=name_model(source.uri), uri=source.uri)
    if source.fine_tune_ref is None:
        return Problem("ModelMissing", "spec.model names neither a uri nor a FineTune; give one of them")
    model = o.fine_tune.status.model if o.fine_tune is not None else None
    if o.fine_tune is not None and model is not None and o.fine_tune_state == "Ready":
        return ArmModel(
            revision=compute_revision(model.uri, model.digest, o.spec.template),
            model_id=o.fine_tune.status.model_id or name_model(model.uri),
            uri=model.uri,
            digest=model.digest,
        )
    return _unavailable(FineTune.KIND, source.fine_tune_ref.name, o.fine_tune_state)


def _unavailable(kind: str, name: str, state: Availability) -> Problem:
    # Said to be ready, but without what it should have made: that comes with its next pass.
    reason, message = describe_availability(kind, name, "NotReady" if state == "Ready" else state) or ("", "")
    return Problem(reason, message, waits=state in {"Ready", "NotReady"})


# --- What must hold before a rollout begins ---------------------------------------------------------------------------


def _check_gateway(o: ObservedCanary) -> Problem | None:
    ref = o.spec.traffic.gateway_ref
    where = f"Gateway {ref.name} in namespace {ref.namespace or o.canary.metadata.namespace}"
    if o.gateway.state == "NotServed":
        return Problem(GATEWAY_NOT_FOUND, "the cluster does not serve the Gateway API; install its CRDs")
    if o.gateway.state == "NotFound":
        return Problem(GATEWAY_NOT_FOUND, f"there is no {where}; create it or correct spec.traffic.gatewayRef")
    if o.gateway.state == "NotProgrammed":
        detail = f" ({o.gateway.message})" if o.gateway.message else ""
        return Problem(GATEWAY_NOT_READY, f"{where} is not programmed yet{detail}; waiting for it", waits=True)
    return None


def _check_golden_set(o: ObservedCanary) -> Problem | None:
    name = o.spec.analysis.golden.dataset_ref.name
    if _golden_input(o) is None or o.dataset_state != "Ready":
        return _unavailable(Dataset.KIND, name, o.dataset_state)
    split = _golden_split(o)
    needed = o.spec.analysis.wer.min_words
    if split is not None and split.words < needed:
        utterances = -(-needed * split.utterances // split.words) if split.words else needed
        return Problem(
            GOLDEN_SET_TOO_SMALL,
            f"the {o.spec.analysis.golden.split} split of Dataset {name} holds {split.utterances} utterances with "
            f"{split.words} words, and spec.analysis.wer.minWords asks for {needed}: no rollout could ever pass; use "
            f"about {utterances} utterances, or lower minWords",
        )
    return None


def _check_stable(o: ObservedCanary) -> Problem | None:
    if o.stable is not None and o.stable.rolled_out:
        return None
    ailment = o.stable.problem if o.stable is not None else None
    why = f" ({ailment.message})" if ailment is not None else ""
    message = f"stable's pods are not all ready{why}; the rollout begins when they are"
    return Problem(STABLE_NOT_READY, message, waits=True)


_PREFLIGHT: Final[tuple[Callable[[ObservedCanary], Problem | None], ...]] = (
    _check_gateway,
    _check_golden_set,
    _check_stable,
)


def _golden_split(o: ObservedCanary) -> SplitStatus | None:
    if o.dataset is None or o.dataset.status.splits is None:
        return None
    splits = o.dataset.status.splits
    return splits.holdout if o.spec.analysis.golden.split == Split.HOLDOUT.value else splits.validation


def _golden_input(o: ObservedCanary) -> DatasetInput | None:
    if o.dataset is None or o.dataset.status.revision is None or o.dataset.status.uri is None:
        return None
    status = o.dataset.status
    return DatasetInput(name=o.dataset.metadata.name, revision=status.revision or "", uri=status.uri or "")


# --- Before anything serves -------------------------------------------------------------------------------------------


def _is_serving(o: ObservedCanary) -> bool:
    """Whether requests have ever been routed here; before that a model needs no trial."""
    return o.route is not None or (o.status.stable is not None and o.status.stable.weight > 0)


def _initialize(o: ObservedCanary, target: ArmModel | Problem) -> _Next:
    if isinstance(target, Problem):
        return _Next((), _standing_of(o, target), 0, look_again_seconds=_WAIT_SECONDS)
    problem = _check_gateway(o)
    if problem is not None:
        return _Next((), _standing_of(o, problem), 0, look_again_seconds=_WAIT_SECONDS)
    arm = EnsureArm(Track.STABLE, target, o.template, o.spec.replicas)
    if o.stable is None or o.stable.model.revision != target.revision or not o.stable.rolled_out:
        return _Next((arm,), _standing_starting(o, target), 0, look_again_seconds=_WAIT_SECONDS)
    route = EnsureRoute(100, 0, None, "the first model is ready")
    message = f"model {target.model_id} is ready; its route is set up"
    standing = Standing("False", Phase.INITIALIZING, INITIALIZING, message, working=True)
    return _Next((arm, route), standing, 0, look_again_seconds=_SOON_SECONDS)


def _replace_broken(o: ObservedCanary, target: ArmModel) -> _Next:
    """Gives a stable arm that serves nothing, and would never again, the new model at once.

    There is nothing to compare with and nothing to protect; waiting for stable would wait for ever.
    """
    following = _rest(o, _standing_starting(o, target), None)
    arm = EnsureArm(Track.STABLE, target, o.template, o.spec.replicas)
    kept = tuple(one for one in following.actions if not (isinstance(one, EnsureArm) and one.track is Track.STABLE))
    return replace(following, actions=(arm, *kept))


def _standing_starting(o: ObservedCanary, target: ArmModel) -> Standing:
    arm = o.stable if o.stable is not None and o.stable.model.revision == target.revision else None
    problem = arm.problem if arm is not None else None
    late = arm is not None and (arm.deadline_exceeded or (problem is not None and problem.fatal))
    if problem is not None:
        message = f"model {target.model_id} does not start: {problem.message}"
        return Standing(
            "False", Phase.INITIALIZING, problem.reason, message, working=not late, stalled=late, warning=True
        )
    if late:
        message = (
            f"model {target.model_id} was not ready within {o.spec.progress_deadline_seconds} s; see kubectl describe "
            f"pod -l attune.dev/name={o.canary.metadata.name}"
        )
        return Standing("False", Phase.INITIALIZING, STABLE_NOT_READY, message, stalled=True)
    message = f"model {target.model_id} starts"
    return Standing("False", Phase.INITIALIZING, INITIALIZING, message, working=True)


# --- At rest ----------------------------------------------------------------------------------------------------------


def _rest(o: ObservedCanary, standing: Standing, record: RolloutRecord | None) -> _Next:
    """Stable serves everything; what a rollout has left goes once no request can reach it."""
    actions: list[CanaryAction] = [
        _ensure_stable(o),
        EnsureRoute(100, 0, record, standing.reason),
    ]
    look_again = None if standing.state == "True" and not standing.working else _WAIT_SECONDS
    if o.trial is not None:
        if o.route is not None and o.route.canary_weight == 0 and o.route.settled:
            actions.append(DeleteArm(Track.CANARY))
        look_again = _SOON_SECONDS
    actions += [DeleteJob(job.name) for job in o.scorers if not job.deleting]
    return _Next(tuple(actions), standing, 0, record, look_again_seconds=look_again)


def _ensure_stable(o: ObservedCanary) -> EnsureArm:
    """Stable as it is: its own model and template, and as many pods as are wanted now."""
    template = o.stable.template if o.stable is not None else o.template
    return EnsureArm(Track.STABLE, _stable_model(o), template, o.spec.replicas)


def _stable_model(o: ObservedCanary) -> ArmModel:
    if o.stable is not None:
        return o.stable.model
    told = o.status.stable
    if told is not None:
        return ArmModel(revision=told.revision, model_id=told.model_id, uri=told.uri, digest=told.digest)
    # Both the Deployment and the status are gone: the spec is all that is left.
    target = resolve_target(o)
    if isinstance(target, Problem):
        return ArmModel(revision="unknown", model_id="unknown", uri=o.spec.model.uri or "")
    return target


def _standing_at_rest(o: ObservedCanary, stable: ArmModel) -> Standing:
    problem = _check_gateway(o)
    if problem is not None:
        return _standing_of(o, problem)
    if o.route is not None and o.route.rejected is not None:
        message = f"the Gateway does not take the route: {o.route.rejected}"
        return Standing("False", Phase.DEGRADED, ROUTE_NOT_ACCEPTED, message, stalled=True)
    if o.stable is not None and o.stable.rolled_out:
        return Standing("True", Phase.HEALTHY, HEALTHY, f"model {stable.model_id} serves all requests")
    ailment = o.stable.problem if o.stable is not None else None
    reason = ailment.reason if ailment is not None else STABLE_NOT_READY
    why = f": {ailment.message}" if ailment is not None else ""
    if o.stable_ready:
        # Some pods are being replaced or added; requests are answered all the while.
        message = f"model {stable.model_id} serves all requests; not all of its pods are ready{why}"
        return Standing("True", Phase.HEALTHY, reason, message, working=True, warning=ailment is not None)
    message = f"no pod of model {stable.model_id} is ready{why}"
    return Standing("False", Phase.DEGRADED, reason, message, working=True, warning=True)


def _standing_of(o: ObservedCanary, problem: Problem) -> Standing:
    """Where a problem leaves the Canary: what serves goes on serving."""
    serving = _is_serving(o)
    if problem.waits:
        phase = Phase.HEALTHY if serving else Phase.INITIALIZING
        state: State = "True" if serving and o.stable_ready else "False"
        return Standing(state, phase, problem.reason, problem.message, working=True)
    phase = Phase.DEGRADED if serving else Phase.INITIALIZING
    return Standing("False", phase, problem.reason, problem.message, stalled=True)


def _standing_degraded(o: ObservedCanary, record: RolloutRecord) -> Standing:
    phase = Phase.ROLLING_BACK if o.trial is not None or o.scorers else Phase.DEGRADED
    message = (
        f"{record.failed_message}. Model {_stable_model(o).model_id} serves all requests; change spec.model (or go "
        "back to it) to go on"
    )
    return Standing("False", phase, record.failed_reason or CANARY_NOT_READY, message, stalled=True)


def _suspend(o: ObservedCanary) -> _Next:
    weight = o.route.canary_weight if o.route is not None else 0
    message = f"spec.suspend is true: everything stays as it is, with {weight} % of requests on the canary"
    record = o.route.rollout if o.route is not None else None
    target = resolve_target(o)
    as_wanted = not isinstance(target, Problem) and record is None and target.revision == _stable_model(o).revision
    serving = _is_serving(o) and o.stable_ready
    state: State = ("True" if as_wanted else "Unknown") if serving else "False"
    standing = Standing(state, Phase.PAUSED, SUSPENDED, message)
    return _Next((), standing, weight, record)


# --- A rollout --------------------------------------------------------------------------------------------------------


def _restore_record(o: ObservedCanary) -> ObservedCanary:
    """Gives a route that somebody has deleted its record back, as far as the status remembers it."""
    if o.route is not None:
        return o
    record = None
    newest = o.status.history[0] if o.status.history else None
    if o.status.rollout is not None:
        record = replace(_record_of(o.status.rollout), step=None, step_started=format_time(o.now))
    elif newest is not None and newest.outcome is Outcome.ROLLED_BACK:
        record = RolloutRecord(
            id=newest.id,
            step=None,
            started=newest.started_time,
            step_started=newest.finished_time,
            failed_reason=newest.reason,
            failed_message=newest.message,
        )
    return replace(o, route=ObservedRoute(100, 0, record, settled=False))


def _record_of(rollout: RolloutStatus) -> RolloutRecord:
    return RolloutRecord(
        id=rollout.id,
        step=rollout.step,
        started=rollout.started_time,
        step_started=rollout.step_started_time,
        promoting=rollout.promoting,
    )


def _begin(o: ObservedCanary, identity: str, target: ArmModel) -> _Next:
    """Takes all weight from whatever was on trial, and writes down that a rollout has begun."""
    moment = format_time(o.now)
    record = RolloutRecord(id=identity, step=None, started=moment, step_started=moment)
    return _prepare(o, record, target)


def _prepare(o: ObservedCanary, record: RolloutRecord, target: ArmModel) -> _Next:
    """Brings the canary arm up; no request reaches it yet."""
    moved = o.route is not None and o.route.canary_weight == 0
    actions: list[CanaryAction] = [_ensure_stable(o), EnsureRoute(100, 0, record, "the canary arm is prepared")]
    # An arm that still gets requests must not change its model under them.
    if o.trial is None or moved or o.trial.model.revision == target.revision:
        actions.append(EnsureArm(Track.CANARY, target, o.template, o.spec.replicas))
    actions += [DeleteJob(job.name) for job in o.scorers if job.name != _scorer_name(o, record) and not job.deleting]
    ailment = o.trial.problem if o.trial is not None and o.trial.model.revision == target.revision else None
    why = f": {ailment.message}" if ailment is not None else ""
    standing = Standing(
        "True" if o.stable_ready else "False",
        Phase.PROGRESSING,
        ROLLOUT_PROGRESSING,
        f"model {target.model_id} starts; it gets requests when all of its pods are ready{why}",
        working=True,
        warning=ailment is not None,
    )
    waiting = Judgement(AnalysisVerdict.UNKNOWN, NO_DATA, "the canary is not ready yet; nothing has been compared")
    return _Next(tuple(actions), standing, 0, record, waiting, _SOON_SECONDS if not moved else _WAIT_SECONDS)


def _roll(o: ObservedCanary, record: RolloutRecord, target: ArmModel | None, blocked: Problem | None = None) -> _Next:
    """Takes a rollout one pass further. blocked: the model that is wanted can't be told; nothing goes up then."""
    record = _resume(o, record)
    model = target or (o.trial.model if o.trial is not None else None)
    if model is None:
        # Neither the wanted model nor the one on trial is known.
        return _rest(o, _standing_of(o, blocked or Problem(CANARY_NOT_READY, "the canary arm is gone")), record)
    trial = o.trial if o.trial is not None and o.trial.model.revision == model.revision else None
    judgement = _judge(o, record)
    failure = _find_failure(o, record, trial, judgement)
    if failure is not None:
        return _roll_back(o, record, failure, judgement)
    if record.step is None:
        if trial is None or not trial.rolled_out or blocked is not None:
            return _prepare(o, record, model)
        return _advance(o, record, model, 0, judgement)
    weight = compute_weight(o.spec.steps, record.step)
    at_weight = o.route is not None and o.route.canary_weight > 0
    if trial is None or not (trial.rolled_out or (at_weight and trial.ready > 0)):
        return _await_capacity(o, record, model, judgement, since_now=at_weight)
    if blocked is None and _may_go_on(o, record, trial, judgement):
        following = record.step + 1
        if following < len(o.spec.steps):
            return _advance(o, record, model, following, judgement)
        return _start_promotion(o, record, model, judgement)
    return _hold(o, record, model, weight, judgement, blocked)


def _resume(o: ObservedCanary, record: RolloutRecord) -> RolloutRecord:
    """Restarts the step's clock after a suspension, during which no step could be decided."""
    ready = next((one for one in o.status.conditions if one.type == Canary.TERMINAL_CONDITION), None)
    if ready is not None and ready.reason == SUSPENDED:
        return replace(record, step_started=format_time(o.now))
    return record


def _judge(o: ObservedCanary, record: RolloutRecord) -> Judgement:
    judgement = judge(o.evidence, o.spec.analysis.wer)
    if judgement.verdict is not AnalysisVerdict.UNKNOWN:
        return judgement
    if record.step is None:
        return replace(judgement, message="the canary is not ready yet; nothing has been compared")
    name = _scorer_name(o, record)
    scorer = next((job for job in o.scorers if job.name == name), None)
    if scorer is not None and scorer.failed:
        reason, message, _ = describe_failure(scorer, _SCORER_WORDS)
        return replace(judgement, reason=reason, message=f"the scorer (Job {name}) failed: {message}")
    return judgement


def _find_failure(
    o: ObservedCanary, record: RolloutRecord, trial: ObservedArm | None, judgement: Judgement
) -> Problem | None:
    """Says why the rollout must end; None when it may go on."""
    if judgement.verdict is AnalysisVerdict.FAIL:
        return Problem(judgement.reason, judgement.message)
    return _find_pod_failure(o, record, trial) or _find_timeout(o, record, judgement)


def _find_pod_failure(o: ObservedCanary, record: RolloutRecord, trial: ObservedArm | None) -> Problem | None:
    ailment = trial.problem if trial is not None else None
    if ailment is not None and ailment.fatal:
        return Problem(ailment.reason, f"the canary's pods do not serve: {ailment.message}")
    deadline = o.spec.progress_deadline_seconds
    late = trial is not None and trial.deadline_exceeded and not trial.rolled_out
    if record.step is None:
        # The Deployment's own deadline may never come: for a pod that quota forbids, or while its controller is away.
        late = late or (o.now - parse_time(record.started)).total_seconds() > 2 * deadline
    elif trial is None or trial.ready == 0:
        # Its weight has been taken away, and the step's clock began anew with that.
        waits = o.route is not None and o.route.canary_weight == 0
        late = late or (waits and (o.now - parse_time(record.step_started)).total_seconds() > deadline)
    if not late:
        return None
    why = f": {ailment.message}" if ailment is not None else ""
    reason = ailment.reason if ailment is not None else CANARY_NOT_READY
    return Problem(reason, f"the canary's pods were not ready within {deadline} s{why}")


def _find_timeout(o: ObservedCanary, record: RolloutRecord, judgement: Judgement) -> Problem | None:
    if record.step is None:
        return None
    analysis = o.spec.analysis
    began = parse_time(record.step_started)
    silent = (o.now - max(began, _last_data(o, record, judgement))).total_seconds()
    if judgement.verdict is AnalysisVerdict.UNKNOWN and silent > analysis.no_data_timeout_seconds:
        return Problem(NO_DATA, f"nothing was known for {analysis.no_data_timeout_seconds} s: {judgement.message}")
    pause = o.spec.steps[min(record.step, len(o.spec.steps) - 1)].pause
    lasted = (o.now - began).total_seconds() - (pause.seconds if pause is not None else 0)
    if lasted > analysis.max_step_seconds:
        message = f"the step was undecided for {analysis.max_step_seconds} s: {judgement.message}"
        return Problem(ANALYSIS_TIMED_OUT, message)
    return None


def _last_data(o: ObservedCanary, record: RolloutRecord, judgement: Judgement) -> datetime:
    """When the analysis last knew something."""
    if judgement.verdict is not AnalysisVerdict.UNKNOWN:
        return o.now
    told = o.status.rollout
    if told is not None and told.id == record.id and told.last_data_time is not None:
        return parse_time(told.last_data_time)
    return parse_time(record.started)


def _may_go_on(o: ObservedCanary, record: RolloutRecord, trial: ObservedArm, judgement: Judgement) -> bool:
    """Whether the next step may begin: this one has lasted, both arms stand, and the test says Pass."""
    if record.step is None or o.stable is None or not o.stable.rolled_out or not trial.rolled_out:
        return False
    step = o.spec.steps[min(record.step, len(o.spec.steps) - 1)]
    lasts = step.pause.seconds if step.pause is not None else o.spec.analysis.interval_seconds
    if (o.now - parse_time(record.step_started)).total_seconds() < lasts:
        return False
    # A pause before the first weight has nothing to be judged by.
    nothing_yet = compute_weight(o.spec.steps, record.step) == 0
    return judgement.verdict is AnalysisVerdict.PASS or nothing_yet


def _advance(o: ObservedCanary, record: RolloutRecord, model: ArmModel, step: int, judgement: Judgement) -> _Next:
    record = replace(record, step=step, step_started=format_time(o.now))
    return _hold(o, record, model, compute_weight(o.spec.steps, step), judgement, None)


def _hold(
    o: ObservedCanary,
    record: RolloutRecord,
    model: ArmModel,
    weight: int,
    judgement: Judgement,
    blocked: Problem | None,
) -> _Next:
    """Keeps arms, scorer and route as the present step wants them."""
    steps = o.spec.steps
    index = min(record.step or 0, len(steps) - 1)
    pausing = steps[index].pause is not None
    where = f"model {model.model_id} gets {weight} % of requests (step {index + 1} of {len(steps)})"
    said = blocked.message if blocked is not None else judgement.message
    too_small = judgement.golden_needed is not None
    reason = blocked.reason if blocked is not None else GOLDEN_SET_TOO_SMALL if too_small else ROLLOUT_PROGRESSING
    standing = Standing(
        "True" if o.stable_ready or weight > 0 else "False",
        Phase.PAUSED if pausing else Phase.PROGRESSING,
        reason,
        f"{where}: {said}",
        working=True,
        warning=too_small or (blocked is not None and not blocked.waits),
    )
    actions: list[CanaryAction] = [
        _ensure_stable(o),
        EnsureArm(Track.CANARY, model, _trial_template(o, model), o.spec.replicas),
        *_ensure_scorer(o, record, model),
        EnsureRoute(100 - weight, weight, record, judgement.reason),
    ]
    actions += [DeleteJob(job.name) for job in o.scorers if job.name != _scorer_name(o, record) and not job.deleting]
    return _Next(tuple(actions), standing, weight, record, judgement, float(o.spec.analysis.interval_seconds))


def _trial_template(o: ObservedCanary, model: ArmModel) -> PodTemplate:
    if o.trial is not None and o.trial.model.revision == model.revision:
        return o.trial.template
    return o.template


def _await_capacity(
    o: ObservedCanary, record: RolloutRecord, model: ArmModel, judgement: Judgement, *, since_now: bool
) -> _Next:
    """Takes the weight from a canary that has lost its pods; it gets it back when they are all ready again."""
    if since_now:
        record = replace(record, step_started=format_time(o.now))
    standing = Standing(
        "True" if o.stable_ready else "False",
        Phase.PROGRESSING,
        CANARY_NOT_READY,
        f"no pod of model {model.model_id} is ready: stable gets all requests until they are",
        working=True,
        warning=True,
    )
    actions = (
        EnsureRoute(100, 0, record, CANARY_NOT_READY),
        _ensure_stable(o),
        EnsureArm(Track.CANARY, model, _trial_template(o, model), o.spec.replicas),
        *_ensure_scorer(o, record, model),
    )
    return _Next(actions, standing, 0, record, judgement, float(o.spec.analysis.interval_seconds))


def _scorer_name(o: ObservedCanary, record: RolloutRecord) -> str:
    return f"{o.canary.metadata.name}-score-{record.id}"


def _ensure_scorer(o: ObservedCanary, record: RolloutRecord, model: ArmModel) -> tuple[CanaryAction, ...]:
    """Asks for the scorer, unless it is there; without the golden set there is nothing to start."""
    name = _scorer_name(o, record)
    golden = _golden_input(o)
    if golden is None or any(job.name == name for job in o.scorers):
        return ()
    metadata = o.canary.metadata
    wanted = o.spec.analysis.golden

    def url(track: Track) -> str:
        return f"http://{metadata.name}-{track.value}.{metadata.namespace}.svc:{o.spec.service.port}"

    recipe = ScoreRecipe(
        dataset=golden,
        split=Split(wanted.split),
        stable_url=url(Track.STABLE),
        canary_url=url(Track.CANARY),
        stable_model_id=_stable_model(o).model_id,
        canary_model_id=model.model_id,
        requests_per_minute=wanted.requests_per_minute,
        canary=metadata.name,
        namespace=metadata.namespace,
        rollout=record.id,
    )
    return (EnsureScorer(name, recipe),)


# --- The end of a rollout ---------------------------------------------------------------------------------------------


def _roll_back(o: ObservedCanary, record: RolloutRecord, failure: Problem, judgement: Judgement) -> _Next:
    """Gives stable everything, and writes in the same request that this rollout has failed."""
    failed = replace(
        record,
        promoting=False,
        failed_reason=failure.reason,
        failed_message=failure.message[:_MESSAGE_CHARACTERS],
    )
    actions = (EnsureRoute(100, 0, failed, failure.reason), _ensure_stable(o))
    standing = replace(_standing_degraded(o, failed), phase=Phase.ROLLING_BACK)
    return _Next(actions, standing, 0, failed, judgement, _SOON_SECONDS)


def _start_promotion(o: ObservedCanary, record: RolloutRecord, model: ArmModel, judgement: Judgement) -> _Next:
    """Writes the promotion down on the route, then gives stable the new model."""
    return _promote(o, replace(record, promoting=True), model, judgement)


def _promote(o: ObservedCanary, record: RolloutRecord, model: ArmModel, judgement: Judgement | None = None) -> _Next:
    """Replaces stable's pods by ones with the new model while the canary keeps the weight of the last step.

    The weight is not raised beyond what the last step allows, and need not be: stable's Deployment surges (one more
    pod, none unavailable), so that its Service has ready pods all the time. Only when the last of them has the new
    model does the route go back to stable, and only after that do the canary arm and the scorer go.
    """
    stable = o.stable
    done = stable is not None and stable.model.revision == model.revision and stable.rolled_out
    if done:
        return _rest(o, _standing_at_rest(o, model), None)
    changed = stable is not None and stable.model.revision == model.revision
    template = stable.template if changed and stable is not None else _trial_template(o, model)
    observed = o.route.canary_weight if o.route is not None else 0
    lost = (o.trial is None or o.trial.ready == 0) and o.stable_ready
    weight = 0 if lost else observed
    ailment = stable.problem if changed and stable is not None else None
    why = f": {ailment.message}" if ailment is not None else ""
    standing = Standing(
        "True" if o.stable_ready or weight > 0 else "False",
        Phase.PROMOTING,
        ailment.reason if ailment is not None else PROMOTING,
        f"stable's pods get model {model.model_id}; the canary has {weight} % of requests until they are ready{why}",
        working=True,
        warning=ailment is not None,
    )
    actions: list[CanaryAction] = [
        EnsureRoute(100 - weight, weight, record, PROMOTING),
        EnsureArm(Track.STABLE, model, template, o.spec.replicas),
    ]
    if o.trial is not None:
        actions.append(EnsureArm(Track.CANARY, o.trial.model, o.trial.template, max(o.trial.replicas, 1)))
    return _Next(tuple(actions), standing, weight, record, judgement, _WAIT_SECONDS)


# --- Telling ----------------------------------------------------------------------------------------------------------


def _tell(o: ObservedCanary, following: _Next) -> Plan:
    """Writes the status and announces what is new in it."""
    metadata = o.canary.metadata
    before = o.status
    record = following.record
    analysis = _tell_analysis(following.judgement) or before.analysis
    serving = any(isinstance(action, EnsureRoute) for action in following.actions) or _is_serving(o)
    status = CanaryStatus(
        observed_generation=metadata.generation,
        phase=following.standing.phase,
        conditions=following.standing.conditions(
            before.conditions, terminal=Canary.TERMINAL_CONDITION, generation=metadata.generation, now=o.now
        ),
        stable=_tell_stable(o, following, 100 - following.weight if serving else 0),
        canary=_tell_trial(o, following),
        rollout=_tell_rollout(o, following),
        analysis=analysis,
        history=_tell_history(o, record, following.standing, analysis),
    )
    events = _announce(before, status, following.standing)
    return Plan((*following.actions, *events), status, following.look_again_seconds)


def _tell_stable(o: ObservedCanary, following: _Next, weight: int) -> ArmStatus | None:
    arm = next(
        (one for one in following.actions if isinstance(one, EnsureArm) and one.track is Track.STABLE),
        None,
    )
    model = arm.model if arm is not None else o.stable.model if o.stable is not None else None
    if model is None:
        return o.status.stable
    return _tell_arm(model, weight, o.stable)


def _tell_trial(o: ObservedCanary, following: _Next) -> ArmStatus | None:
    if any(isinstance(action, DeleteArm) for action in following.actions):
        return None
    arm = next(
        (one for one in following.actions if isinstance(one, EnsureArm) and one.track is Track.CANARY),
        None,
    )
    model = arm.model if arm is not None else o.trial.model if o.trial is not None else None
    return None if model is None else _tell_arm(model, following.weight, o.trial)


def _tell_arm(model: ArmModel, weight: int, arm: ObservedArm | None) -> ArmStatus:
    return ArmStatus(
        revision=model.revision,
        model_id=model.model_id,
        uri=model.uri,
        digest=model.digest,
        weight=weight,
        ready_replicas=arm.ready if arm is not None else 0,
    )


def _tell_rollout(o: ObservedCanary, following: _Next) -> RolloutStatus | None:
    record = following.record
    if record is None or record.failed_reason is not None:
        return None
    told = o.status.rollout
    last_data = told.last_data_time if told is not None and told.id == record.id else None
    if following.judgement is not None and following.judgement.verdict is not AnalysisVerdict.UNKNOWN:
        last_data = format_time(o.now)
    return RolloutStatus(
        id=record.id,
        step=record.step or 0,
        steps=len(o.spec.steps),
        started_time=record.started,
        step_started_time=record.step_started,
        last_data_time=last_data,
        promoting=record.promoting,
    )


def _tell_analysis(judgement: Judgement | None) -> AnalysisStatus | None:
    if judgement is None:
        return None
    return AnalysisStatus(
        verdict=judgement.verdict,
        message=judgement.message[:_MESSAGE_CHARACTERS],
        utterances=judgement.utterances,
        words=judgement.words,
        golden_utterances=judgement.golden_utterances,
        stable_wer=_decimal(judgement.stable_wer),
        canary_wer=_decimal(judgement.canary_wer),
        difference=_decimal(judgement.difference),
        low=_decimal(judgement.low),
        high=_decimal(judgement.high),
        needs_utterances=judgement.needs_utterances,
    )


def _decimal(value: float | None) -> str | None:
    """Writes a rate with four digits: 0.12345 -> "0.1235"; never "-0.0000"."""
    if value is None:
        return None
    text = f"{value:.4f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _tell_history(
    o: ObservedCanary, record: RolloutRecord | None, standing: Standing, analysis: AnalysisStatus | None
) -> list[HistoryEntry]:
    """Adds the rollout that has just ended.

    It ended when the route's record (or, where a write of the status was lost, the status) still had it and the plan
    has not, or has it as failed.
    """
    history = o.status.history
    on_route = o.route.rollout if o.route is not None else None
    past = on_route or (_record_of(o.status.rollout) if o.status.rollout is not None else None)
    if past is None or any((one.id, one.started_time) == (past.id, past.started) for one in history):
        return history
    same = record is not None and (record.id, record.started) == (past.id, past.started)
    if same and record is not None and record.failed_reason is None:
        return history
    outcome, reason, message = _name_outcome(o, past, record if same else None, standing)
    reached = max(compute_weight(o.spec.steps, past.step), o.route.canary_weight if o.route is not None else 0)
    trial = o.trial.model if o.trial is not None else o.status.canary
    model = _stable_model(o) if outcome is Outcome.PROMOTED or trial is None else trial
    compared = analysis is not None and analysis.utterances > 0
    entry = HistoryEntry(
        id=past.id,
        revision=model.revision,
        model_id=model.model_id,
        outcome=outcome,
        reason=reason,
        message=message[:_MESSAGE_CHARACTERS],
        weight=reached,
        started_time=past.started,
        finished_time=format_time(o.now),
        stable_wer=analysis.stable_wer if compared and analysis is not None else None,
        canary_wer=analysis.canary_wer if compared and analysis is not None else None,
        utterances=analysis.utterances if compared and analysis is not None else 0,
    )
    return [entry, *history][:HISTORY_LENGTH]


def _name_outcome(
    o: ObservedCanary, past: RolloutRecord, failed: RolloutRecord | None, standing: Standing
) -> tuple[Outcome, str, str]:
    if failed is not None:
        return Outcome.ROLLED_BACK, failed.failed_reason or standing.reason, failed.failed_message or ""
    if past.failed_reason is not None:
        return Outcome.ROLLED_BACK, past.failed_reason, past.failed_message or ""
    if past.promoting:
        figures = o.status.analysis.message if o.status.analysis is not None else "every step passed"
        return Outcome.PROMOTED, "Promoted", figures
    target = resolve_target(o)
    if isinstance(target, ArmModel) and target.revision == _stable_model(o).revision:
        return Outcome.WITHDRAWN, "Withdrawn", "spec.model went back to the model that stable serves"
    return Outcome.SUPERSEDED, "Superseded", "spec.model or spec.template was changed before the rollout had ended"


_OUTCOME_EVENTS: Final = {
    Outcome.PROMOTED: "Promoted",
    Outcome.ROLLED_BACK: "RolledBack",
    Outcome.SUPERSEDED: "Superseded",
    Outcome.WITHDRAWN: "Withdrawn",
}


def _announce(before: CanaryStatus, after: CanaryStatus, standing: Standing) -> tuple[EmitEvent, ...]:
    """Tells what is new as Events, from the difference of two statuses: what a crash has swallowed is told later."""
    events: list[EmitEvent] = []
    ended = after.history[0] if after.history and after.history[:1] != before.history[:1] else None
    if ended is not None:
        events.append(_announce_end(ended, after))
    rollout = after.rollout
    if rollout is not None:
        events += _announce_progress(before, after, rollout)
    old = next((one for one in before.conditions if one.type == Canary.TERMINAL_CONDITION), None)
    told = {ROLLOUT_PROGRESSING, PROMOTING} | ({ended.reason, HEALTHY} if ended is not None else set())
    if (old is None or old.reason != standing.reason) and standing.reason not in told:
        events.append(EmitEvent(standing.event_kind, standing.reason, standing.message))
    return tuple(events)


def _announce_end(ended: HistoryEntry, after: CanaryStatus) -> EmitEvent:
    serves = after.stable.model_id if after.stable is not None else "stable"
    took = int((parse_time(ended.finished_time) - parse_time(ended.started_time)).total_seconds())
    if ended.outcome is Outcome.PROMOTED:
        message = f"model {ended.model_id} is promoted after {took} s and serves all requests: {ended.message}"
        return EmitEvent("Normal", "Promoted", message)
    if ended.outcome is Outcome.ROLLED_BACK:
        message = (
            f"model {ended.model_id} is rolled back at {ended.weight} % after {took} s ({ended.reason}): "
            f"{ended.message}. Model {serves} serves all requests"
        )
        return EmitEvent("Warning", "RolledBack", message)
    message = f"the rollout of model {ended.model_id} ended at {ended.weight} %: {ended.message}"
    return EmitEvent("Normal", _OUTCOME_EVENTS[ended.outcome], message)


def _announce_progress(before: CanaryStatus, after: CanaryStatus, rollout: RolloutStatus) -> list[EmitEvent]:
    events: list[EmitEvent] = []
    model = after.canary.model_id if after.canary is not None else "the canary"
    same = before.rollout is not None and before.rollout.started_time == rollout.started_time
    if not same:
        serves = after.stable.model_id if after.stable is not None else "stable"
        message = f"rollout {rollout.id} of model {model} begins; model {serves} serves all requests until it is ready"
        events.append(EmitEvent("Normal", "RolloutStarted", message))
    old = before.canary.weight if before.canary is not None and same else 0
    new = after.canary.weight if after.canary is not None else 0
    if new != old:
        said = f": {after.analysis.message}" if after.analysis is not None and after.analysis.utterances else ""
        message = f"model {model} gets {new} % of requests after {old} %{said}"
        events.append(EmitEvent("Normal", "WeightChanged", message))
    if rollout.promoting and not (same and before.rollout is not None and before.rollout.promoting):
        said = after.analysis.message if after.analysis is not None else "every step passed"
        message = f"model {model} has passed every step; stable's pods get it now: {said}"
        events.append(EmitEvent("Normal", "Promoting", message))
    return events
