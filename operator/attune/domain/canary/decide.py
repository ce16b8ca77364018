"""Chooses what a Canary does next: first model, rest, rollout, promotion or suspension."""

from attune.api.canary import ArmModel
from attune.domain.actions import Plan, RolloutRecord
from attune.domain.canary.identity import is_same_pair, name_pair, name_rollout
from attune.domain.canary.initial import initialize, replace_broken
from attune.domain.canary.models import resolve_stable, resolve_target
from attune.domain.canary.next import Next, Problem
from attune.domain.canary.observed import ObservedCanary, is_serving
from attune.domain.canary.preflight import PREFLIGHT
from attune.domain.canary.promotion import continue_promotion
from attune.domain.canary.reasons import STABLE_NOT_READY
from attune.domain.canary.record import restore_record
from attune.domain.canary.rest import rest, suspend
from attune.domain.canary.rollout import begin_rollout, continue_rollout
from attune.domain.canary.standing import describe_failed, describe_problem, describe_rest
from attune.domain.canary.status import tell


def decide_canary(o: ObservedCanary) -> Plan:
    """Decides what to do now. Total: every observation has a plan, and a plan that was carried out changes nothing."""
    if o.canary.metadata.deletion_timestamp is not None:
        # Everything is owned by the Canary: the garbage collector clears it away.
        return Plan((), o.status)
    if not o.spec.suspend and is_serving(o):
        o = restore_record(o)
    return tell(o, _choose(o))


def _choose(o: ObservedCanary) -> Next:
    target = resolve_target(o)
    if o.spec.suspend:
        return suspend(o)
    if not is_serving(o):
        return initialize(o, target)
    record = o.route.rollout if o.route is not None else None
    stable = resolve_stable(o)
    if record is not None and record.promoting:
        return continue_promotion(o, record, target)
    if isinstance(target, Problem):
        if record is not None and not record.failed_reason:
            return continue_rollout(o, record, None, blocked=target)
        return rest(o, describe_problem(o, target), record)
    if target.revision == stable.revision:
        return rest(o, describe_rest(o, stable), None)
    return _choose_rollout(o, record, stable, target)


def _choose_rollout(o: ObservedCanary, record: RolloutRecord | None, stable: ArmModel, target: ArmModel) -> Next:
    """Another model than stable's is wanted."""
    pair = name_pair(o.canary.metadata.uid, stable.revision, target.revision)
    if record is not None and is_same_pair(record.id, pair):
        if record.failed_reason is not None:
            return rest(o, describe_failed(o, record), record)
        return continue_rollout(o, record, target)
    problem = next((found for check in PREFLIGHT if (found := check(o)) is not None), None)
    if problem is None:
        return begin_rollout(o, name_rollout(pair, o.now), target)
    if problem.reason == STABLE_NOT_READY and o.stable is not None and o.stable.broken:
        return replace_broken(o, target)
    return rest(o, describe_problem(o, problem), None)
