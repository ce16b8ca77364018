"""Gives stable the model that has passed; or its former one again, where that cannot be done and is not wanted."""

from dataclasses import replace

from attune.api.canary import ArmModel, Phase
from attune.contract.metrics import Track
from attune.domain.actions import CanaryAction, EnsureArm, EnsureRoute, FormerArm, RolloutRecord
from attune.domain.arms import ObservedArm
from attune.domain.canary.ending import roll_back
from attune.domain.canary.models import choose_trial_template, ensure_stable, resolve_stable
from attune.domain.canary.next import MESSAGE_CHARACTERS, WAIT_SECONDS, Next, Problem
from attune.domain.canary.observed import ObservedCanary
from attune.domain.canary.reasons import PROMOTING, PROMOTION_GIVEN_UP, STABLE_NOT_READY
from attune.domain.canary.record import find_start, restart_clock
from attune.domain.canary.rest import rest
from attune.domain.canary.standing import describe_rest
from attune.domain.jobs import Standing
from attune.domain.times import format_time
from attune.domain.verdict import Judgement


def start_promotion(o: ObservedCanary, record: RolloutRecord, model: ArmModel, judgement: Judgement) -> Next:
    """Writes the promotion down on the route, then gives stable the new model."""
    return _promote(o, replace(record, promoting=True, step_started=format_time(o.now)), model, judgement)


def continue_promotion(o: ObservedCanary, record: RolloutRecord, target: ArmModel | Problem) -> Next:
    """Finishes a promotion before anything else, since stable is between two models; or takes it back.

    It is taken back where it cannot be finished and another model is wanted. Nobody has tried that one: stable gets its
    former model, which needs no trial, and the next rollout begins where every rollout does. Until stable has it, the
    promotion is taken up again when its own model is wanted again.
    """
    record = restart_clock(o, record)
    model = o.trial.model if o.trial is not None else resolve_stable(o)
    if isinstance(target, Problem):
        return _go_back(o, record) if record.failed_reason is not None else _promote(o, record, model, blocked=target)
    other = target.revision != model.revision
    if record.failed_reason is not None:
        if other or o.trial is None:
            return _go_back(o, record)
        record = replace(record, failed_reason=None, failed_message=None, step_started=format_time(o.now))
    elif other and _may_go_back(o, record, model):
        return _go_back(o, _give_up(o, record))
    return _promote(o, record, model)


def _promote(
    o: ObservedCanary,
    record: RolloutRecord,
    model: ArmModel,
    judgement: Judgement | None = None,
    blocked: Problem | None = None,
) -> Next:
    """Replaces stable's pods by ones with the new model while the canary keeps the weight of the last step.

    The weight need not be raised: stable's Deployment surges (one more pod, none unavailable), so that its Service has
    ready pods all the time. Only when the last of them has the new model does the route go back to stable, and only
    after that do the canary arm and the scorer go. blocked: the model that is wanted can't be told.
    """
    stable = o.stable if o.stable is not None and o.stable.model.revision == model.revision else None
    if stable is not None and stable.rolled_out:
        return rest(o, describe_rest(o, model), None)
    weight = _choose_weight(o)
    if stable is None:
        # In the request that takes it away, stable's model is written down.
        former = FormerArm(o.stable.model, o.stable.template) if o.stable is not None else None
        arm = EnsureArm(Track.STABLE, model, choose_trial_template(o, model), o.spec.replicas, former)
    else:
        arm = EnsureArm(Track.STABLE, model, stable.template, o.spec.replicas, stable.former)
    stuck = stable is not None and _is_stuck(o, record)
    reason, why = _explain(stable, STABLE_NOT_READY if stuck else PROMOTING)
    where = f"the canary has {weight} % of requests until they are ready"
    message = f"stable's pods get model {model.model_id}; {where}{why}"
    if stuck:
        message += _describe_way_out(arm.former, blocked)
    standing = _describe(o, Phase.PROMOTING, reason, message, stuck=stuck, warning=reason != PROMOTING)
    return _replace_stable(o, record, arm, weight, standing, judgement)


def _go_back(o: ObservedCanary, record: RolloutRecord) -> Next:
    """Gives stable its former model again; once it has as many pods as are wanted, the rollout has failed.

    Some of them may serve the promoted model, as in every replacement of pods: waiting for the last of them could be in
    vain where the canary arm takes the room.
    """
    stable = o.stable
    former = stable.former if stable is not None else None
    if stable is not None and former is None and stable.ready >= o.spec.replicas:
        failure = Problem(record.failed_reason or STABLE_NOT_READY, record.failed_message or "")
        return roll_back(o, record, failure)
    arm = EnsureArm(Track.STABLE, *former, o.spec.replicas) if former is not None else ensure_stable(o)
    weight = _choose_weight(o)
    _, why = _explain(stable if former is None else None, "")
    where = f"the canary has {weight} % of requests until stable has its pods ({o.spec.replicas}) again"
    message = f"{record.failed_message}. Stable goes back to model {arm.model.model_id}; {where}{why}"
    stuck = former is None and _is_stuck(o, record)
    if stuck:
        message += ". Mend that, or make room for one more pod; or go back to the model that was promoted"
    standing = _describe(o, Phase.ROLLING_BACK, PROMOTION_GIVEN_UP, message, stuck=stuck, warning=True)
    return _replace_stable(o, record, arm, weight, standing)


def _may_go_back(o: ObservedCanary, record: RolloutRecord, model: ArmModel) -> bool:
    """Whether stable still has its former model, or can have it again and does not get ready with the new one."""
    stable = o.stable
    if stable is None:
        return False
    return stable.model.revision != model.revision or (stable.former is not None and _is_stuck(o, record))


def _is_stuck(o: ObservedCanary, record: RolloutRecord) -> bool:
    """Whether stable's pods do not become ready with the model that it was given last."""
    stable = o.stable
    if stable is None or stable.rolled_out:
        return False
    # The Deployment's own deadline may never come: for a pod that quota forbids, or while its controller is away.
    waited = (o.now - find_start(o, record)).total_seconds()
    none = not any(pod.ready for pod in stable.pods if pod.revision == stable.model.revision)
    return stable.stuck or (none and waited > 2 * o.spec.progress_deadline_seconds)


def _give_up(o: ObservedCanary, record: RolloutRecord) -> RolloutRecord:
    """Writes down why a promotion is taken back."""
    reason, why = _explain(o.stable, STABLE_NOT_READY)
    message = f"the model has passed, but stable's pods were not ready with it when another was asked for{why}"
    return replace(
        record,
        step_started=format_time(o.now),
        failed_reason=reason,
        failed_message=message[:MESSAGE_CHARACTERS],
    )


def _choose_weight(o: ObservedCanary) -> int:
    """The canary's weight while stable's pods are replaced: what it has, but none for an arm that does not serve.

    All of it is not too much for a model that has passed every step.
    """
    trial_ready = o.trial is not None and o.trial.ready > 0
    if o.stable_ready == trial_ready:
        return o.route.canary_weight if o.route is not None else 0
    return 100 if trial_ready else 0


def _explain(arm: ObservedArm | None, otherwise: str) -> tuple[str, str]:
    """Gives the reason why an arm's pods are not ready, and the end of a sentence that says so."""
    ailment = arm.problem if arm is not None else None
    return (ailment.reason, f": {ailment.message}") if ailment is not None else (otherwise, "")


def _describe_way_out(former: FormerArm | None, blocked: Problem | None) -> str:
    mend = ". They do not become ready by themselves: mend that, or make room for one more pod"
    if blocked is not None:
        return f"{mend}. Another model cannot be told: {blocked.message}"
    if former is None:
        return mend
    return f"{mend}; or change spec.model, and stable first goes back to model {former.model.model_id}"


def _describe(o: ObservedCanary, phase: Phase, reason: str, message: str, *, stuck: bool, warning: bool) -> Standing:
    if stuck:
        return Standing("False", phase, reason, message, stalled=True)
    served = o.stable_ready or (o.trial is not None and o.trial.ready > 0)
    return Standing("True" if served else "False", phase, reason, message, working=True, warning=warning)


def _replace_stable(
    o: ObservedCanary,
    record: RolloutRecord,
    arm: EnsureArm,
    weight: int,
    standing: Standing,
    judgement: Judgement | None = None,
) -> Next:
    """Writes down what happens to stable before it does; the canary arm stays until it is done."""
    actions: list[CanaryAction] = [EnsureRoute(100 - weight, weight, record, standing.reason), arm]
    if o.trial is not None:
        actions.append(EnsureArm(Track.CANARY, o.trial.model, o.trial.template, max(o.trial.replicas, 1)))
    return Next(tuple(actions), standing, weight, record, judgement, WAIT_SECONDS)
