"""Says how a Canary stands that no rollout moves: at rest, kept by a problem, or after a failure."""

from attune.api.canary import ArmModel, Phase
from attune.domain.actions import RolloutRecord
from attune.domain.canary.models import resolve_stable
from attune.domain.canary.next import Problem
from attune.domain.canary.observed import ObservedCanary, is_serving
from attune.domain.canary.preflight import check_gateway
from attune.domain.canary.reasons import CANARY_NOT_READY, HEALTHY, ROUTE_NOT_ACCEPTED, STABLE_NOT_READY
from attune.domain.conditions import State
from attune.domain.jobs import Standing


def describe_rest(o: ObservedCanary, stable: ArmModel) -> Standing:
    """How a Canary stands whose wanted model is the one that stable serves."""
    problem = check_gateway(o)
    if problem is not None:
        return describe_problem(o, problem)
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


def describe_problem(o: ObservedCanary, problem: Problem) -> Standing:
    """Where a problem leaves the Canary: what serves goes on serving."""
    serving = is_serving(o)
    if problem.waits:
        phase = Phase.HEALTHY if serving else Phase.INITIALIZING
        state: State = "True" if serving and o.stable_ready else "False"
        return Standing(state, phase, problem.reason, problem.message, working=True)
    phase = Phase.DEGRADED if serving else Phase.INITIALIZING
    return Standing("False", phase, problem.reason, problem.message, stalled=True)


def describe_failed(o: ObservedCanary, record: RolloutRecord) -> Standing:
    """How a Canary stands whose rollout has failed, until another model is wanted."""
    phase = Phase.ROLLING_BACK if o.trial is not None or o.scorers else Phase.DEGRADED
    message = (
        f"{record.failed_message}. Model {resolve_stable(o).model_id} serves all requests; change spec.model (or go "
        "back to it) to go on"
    )
    return Standing("False", phase, record.failed_reason or CANARY_NOT_READY, message, stalled=True)
