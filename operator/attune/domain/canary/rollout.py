"""Takes a rollout one pass further: prepare the arm, raise the weight step by step, hold, or wait for pods."""

from dataclasses import replace

from attune.api.canary import AnalysisVerdict, ArmModel, Phase
from attune.contract.metrics import Track
from attune.domain.actions import CanaryAction, EnsureArm, EnsureRoute, RolloutRecord
from attune.domain.canary.analysis import find_failure, judge_rollout, may_go_on
from attune.domain.canary.ending import roll_back
from attune.domain.canary.models import choose_trial_template, ensure_stable
from attune.domain.canary.next import SOON_SECONDS, WAIT_SECONDS, Next, Problem
from attune.domain.canary.observed import ObservedCanary, has_all_pods
from attune.domain.canary.promotion import start_promotion
from attune.domain.canary.reasons import (
    CANARY_NOT_READY,
    GOLDEN_SET_TOO_SMALL,
    NO_DATA,
    NOT_ENOUGH_EVIDENCE,
    ROLLOUT_PROGRESSING,
)
from attune.domain.canary.record import compute_weight, restart_clock
from attune.domain.canary.rest import rest
from attune.domain.canary.scorer import delete_other_scorers, ensure_scorer
from attune.domain.canary.standing import describe_problem
from attune.domain.jobs import Standing
from attune.domain.times import format_time
from attune.domain.verdict import Judgement


def begin_rollout(o: ObservedCanary, identity: str, target: ArmModel) -> Next:
    """Takes all weight from whatever was on trial, and writes down that a rollout has begun."""
    moment = format_time(o.now)
    record = RolloutRecord(id=identity, step=None, started=moment, step_started=moment)
    return _prepare(o, record, target)


def continue_rollout(
    o: ObservedCanary, record: RolloutRecord, target: ArmModel | None, blocked: Problem | None = None
) -> Next:
    """Takes a rollout one pass further. blocked: the model that is wanted can't be told; nothing goes up then."""
    record = restart_clock(o, record)
    model = target or (o.trial.model if o.trial is not None else None)
    if model is None:
        # Neither the wanted model nor the one on trial is known.
        return rest(o, describe_problem(o, blocked or Problem(CANARY_NOT_READY, "the canary arm is gone")), record)
    trial = o.trial if o.trial is not None and o.trial.model.revision == model.revision else None
    judgement = judge_rollout(o, record)
    decided = blocked is None and trial is not None and may_go_on(o, record, trial, judgement)
    failure = find_failure(o, record, trial, judgement, decided=decided)
    if failure is not None:
        return roll_back(o, record, failure, judgement)
    if record.step is None:
        if not has_all_pods(o, trial) or blocked is not None:
            return _prepare(o, record, model, blocked)
        return _advance(o, record, model, 0, judgement)
    at_weight = o.route is not None and o.route.canary_weight > 0
    weight = _limit_weight(o, record, judgement)
    if not has_all_pods(o, trial) and not (at_weight and trial is not None and trial.ready > 0):
        return _await_capacity(o, record, model, judgement, since_now=at_weight)
    if decided:
        following = record.step + 1
        if following < len(o.spec.steps):
            return _advance(o, record, model, following, judgement)
        return start_promotion(o, record, model, judgement)
    return _hold(o, record, model, weight, judgement, blocked)


def _limit_weight(o: ObservedCanary, record: RolloutRecord, judgement: Judgement) -> int:
    """Gives the weight of the present step, as far as it may be given now.

    Other steps in the spec are no evidence: they take weight away at once, and add none before a Pass. Nor is it any
    that lost pods are back: the canary gets again what it had, once anything at all is known of it.
    """
    weight = compute_weight(o.spec.steps, record.step)
    if judgement.verdict is AnalysisVerdict.PASS:
        return weight
    present = o.route.canary_weight if o.route is not None else 0
    regained = 0 if judgement.verdict is AnalysisVerdict.UNKNOWN else record.reached
    return min(weight, present or regained)


def _prepare(o: ObservedCanary, record: RolloutRecord, target: ArmModel, blocked: Problem | None = None) -> Next:
    """Brings the canary arm up; no request reaches it yet."""
    moved = o.route is not None and o.route.canary_weight == 0 and o.route.settled
    actions: list[CanaryAction] = [ensure_stable(o), EnsureRoute(100, 0, record, "the canary arm is prepared")]
    # An arm that still gets requests must not change its model under them.
    if o.trial is None or moved or o.trial.model.revision == target.revision:
        actions.append(EnsureArm(Track.CANARY, target, o.template, o.spec.replicas))
    actions += delete_other_scorers(o, record)
    ailment = o.trial.problem if o.trial is not None and o.trial.model.revision == target.revision else None
    why = f": {ailment.message}" if ailment is not None else ""
    starts = f"model {target.model_id} starts; it gets requests when all of its pods are ready{why}"
    held = f"model {target.model_id} gets no requests: {blocked.message}" if blocked is not None else starts
    standing = Standing(
        "True" if o.stable_ready else "False",
        Phase.PROGRESSING,
        blocked.reason if blocked is not None else ROLLOUT_PROGRESSING,
        held,
        working=True,
        warning=ailment is not None or (blocked is not None and not blocked.waits),
    )
    waiting = Judgement(AnalysisVerdict.UNKNOWN, NO_DATA, "the canary is not ready yet; nothing has been compared")
    return Next(tuple(actions), standing, 0, record, waiting, SOON_SECONDS if not moved else WAIT_SECONDS)


def _advance(o: ObservedCanary, record: RolloutRecord, model: ArmModel, step: int, judgement: Judgement) -> Next:
    record = replace(record, step=step, step_started=format_time(o.now), losses=0)
    return _hold(o, record, model, compute_weight(o.spec.steps, step), judgement, None)


def _hold(
    o: ObservedCanary,
    record: RolloutRecord,
    model: ArmModel,
    weight: int,
    judgement: Judgement,
    blocked: Problem | None,
) -> Next:
    """Keeps arms, scorer and route as the present step wants them."""
    record = replace(record, reached=weight or record.reached)
    steps = o.spec.steps
    index = min(record.step or 0, len(steps) - 1)
    pausing = steps[index].pause is not None
    where = f"model {model.model_id} gets {weight} % of requests (step {index + 1} of {len(steps)})"
    said = blocked.message if blocked is not None else judgement.message
    trouble = _find_trouble(judgement)
    reason = blocked.reason if blocked is not None else trouble or ROLLOUT_PROGRESSING
    standing = Standing(
        "True" if o.stable_ready or weight > 0 else "False",
        Phase.PAUSED if pausing else Phase.PROGRESSING,
        reason,
        f"{where}: {said}",
        working=True,
        warning=trouble is not None or (blocked is not None and not blocked.waits),
    )
    actions: list[CanaryAction] = [
        ensure_stable(o),
        EnsureArm(Track.CANARY, model, choose_trial_template(o, model), o.spec.replicas),
        *ensure_scorer(o, record, model),
        EnsureRoute(100 - weight, weight, record, judgement.reason),
    ]
    actions += delete_other_scorers(o, record)
    return Next(tuple(actions), standing, weight, record, judgement, float(o.spec.analysis.interval_seconds))


def _find_trouble(judgement: Judgement) -> str | None:
    """Names what keeps the analysis from ever deciding, unless somebody helps; None while evidence may still come."""
    if judgement.golden_needed is not None:
        return GOLDEN_SET_TOO_SMALL
    if judgement.verdict in {AnalysisVerdict.PASS, AnalysisVerdict.FAIL}:
        return None
    # That nobody has scored anything yet is how every rollout begins.
    return judgement.reason if judgement.reason not in {NO_DATA, NOT_ENOUGH_EVIDENCE} else None


def _await_capacity(
    o: ObservedCanary, record: RolloutRecord, model: ArmModel, judgement: Judgement, *, since_now: bool
) -> Next:
    """Takes the weight from a canary that has lost its pods; it gets it back when they are all ready again."""
    if since_now:
        record = replace(record, step_started=format_time(o.now), losses=record.losses + 1)
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
        ensure_stable(o),
        EnsureArm(Track.CANARY, model, choose_trial_template(o, model), o.spec.replicas),
        *ensure_scorer(o, record, model),
    )
    return Next(actions, standing, 0, record, judgement, float(o.spec.analysis.interval_seconds))
