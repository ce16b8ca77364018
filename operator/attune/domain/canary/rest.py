"""Lets a Canary rest: stable keeps all requests and a rollout's leftovers go; suspended, nothing changes at all."""

from attune.api.canary import Phase
from attune.contract.metrics import Track
from attune.domain.actions import CanaryAction, DeleteArm, DeleteJob, EnsureRoute, RolloutRecord
from attune.domain.canary.models import ensure_stable, resolve_stable, resolve_target
from attune.domain.canary.next import SOON_SECONDS, WAIT_SECONDS, Next, Problem
from attune.domain.canary.observed import ObservedCanary, is_serving
from attune.domain.conditions import State
from attune.domain.jobs import SUSPENDED, Standing


def rest(o: ObservedCanary, standing: Standing, record: RolloutRecord | None) -> Next:
    """Stable serves everything; what a rollout has left goes once no request can reach it."""
    actions: list[CanaryAction] = [
        ensure_stable(o),
        EnsureRoute(100, 0, record, standing.reason),
    ]
    look_again = None if standing.state == "True" and not standing.working else WAIT_SECONDS
    if o.trial is not None:
        if o.route is not None and o.route.canary_weight == 0 and o.route.settled:
            actions.append(DeleteArm(Track.CANARY))
        look_again = SOON_SECONDS
    actions += [DeleteJob(job.name) for job in o.scorers if not job.deleting]
    return Next(tuple(actions), standing, 0, record, look_again_seconds=look_again)


def suspend(o: ObservedCanary) -> Next:
    """Changes nothing, and says what stays."""
    weight = o.route.canary_weight if o.route is not None else 0
    message = f"spec.suspend is true: everything stays as it is, with {weight} % of requests on the canary"
    record = o.route.rollout if o.route is not None else None
    target = resolve_target(o)
    as_wanted = not isinstance(target, Problem) and record is None and target.revision == resolve_stable(o).revision
    serving = is_serving(o) and o.stable_ready
    state: State = ("True" if as_wanted else "Unknown") if serving else "False"
    standing = Standing(state, Phase.PAUSED, SUSPENDED, message)
    return Next((), standing, weight, record)
