"""Ends a rollout: back to stable's model, or stable gets the new one."""

from dataclasses import replace

from attune.api.canary import ArmModel, Phase
from attune.contract.metrics import Track
from attune.domain.actions import CanaryAction, EnsureArm, EnsureRoute, RolloutRecord
from attune.domain.canary.models import choose_trial_template, ensure_stable
from attune.domain.canary.next import MESSAGE_CHARACTERS, SOON_SECONDS, WAIT_SECONDS, Next, Problem
from attune.domain.canary.observed import ObservedCanary
from attune.domain.canary.reasons import PROMOTING
from attune.domain.canary.rest import rest
from attune.domain.canary.standing import describe_failed, describe_rest
from attune.domain.jobs import Standing
from attune.domain.verdict import Judgement


def roll_back(o: ObservedCanary, record: RolloutRecord, failure: Problem, judgement: Judgement) -> Next:
    """Gives stable everything, and writes in the same request that this rollout has failed."""
    failed = replace(
        record,
        promoting=False,
        failed_reason=failure.reason,
        failed_message=failure.message[:MESSAGE_CHARACTERS],
    )
    actions = (EnsureRoute(100, 0, failed, failure.reason), ensure_stable(o))
    standing = replace(describe_failed(o, failed), phase=Phase.ROLLING_BACK)
    return Next(actions, standing, 0, failed, judgement, SOON_SECONDS)


def start_promotion(o: ObservedCanary, record: RolloutRecord, model: ArmModel, judgement: Judgement) -> Next:
    """Writes the promotion down on the route, then gives stable the new model."""
    return promote(o, replace(record, promoting=True), model, judgement)


def promote(o: ObservedCanary, record: RolloutRecord, model: ArmModel, judgement: Judgement | None = None) -> Next:
    """Replaces stable's pods by ones with the new model while the canary keeps the weight of the last step.

    The weight is not raised beyond what the last step allows, and need not be: stable's Deployment surges (one more
    pod, none unavailable), so that its Service has ready pods all the time. Only when the last of them has the new
    model does the route go back to stable, and only after that do the canary arm and the scorer go.
    """
    stable = o.stable
    done = stable is not None and stable.model.revision == model.revision and stable.rolled_out
    if done:
        return rest(o, describe_rest(o, model), None)
    changed = stable is not None and stable.model.revision == model.revision
    template = stable.template if changed and stable is not None else choose_trial_template(o, model)
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
    return Next(tuple(actions), standing, weight, record, judgement, WAIT_SECONDS)
