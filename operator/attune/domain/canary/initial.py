"""Gives stable a model without a trial: the first one, or one in place of a model that serves nothing."""

from dataclasses import replace

from attune.api.canary import ArmModel, Phase
from attune.contract.metrics import Track
from attune.domain.actions import EnsureArm, EnsureRoute
from attune.domain.canary.next import SOON_SECONDS, WAIT_SECONDS, Next, Problem
from attune.domain.canary.observed import ObservedCanary
from attune.domain.canary.preflight import check_gateway
from attune.domain.canary.reasons import INITIALIZING, STABLE_NOT_READY
from attune.domain.canary.rest import rest
from attune.domain.canary.standing import describe_problem
from attune.domain.jobs import Standing


def initialize(o: ObservedCanary, target: ArmModel | Problem) -> Next:
    """Brings stable up, and routes requests to it once all of its pods are ready."""
    if isinstance(target, Problem):
        return Next((), describe_problem(o, target), 0, look_again_seconds=WAIT_SECONDS)
    problem = check_gateway(o)
    if problem is not None:
        return Next((), describe_problem(o, problem), 0, look_again_seconds=WAIT_SECONDS)
    arm = EnsureArm(Track.STABLE, target, o.template, o.spec.replicas)
    if o.stable is None or o.stable.model.revision != target.revision or not o.stable.rolled_out:
        return Next((arm,), _describe_start(o, target), 0, look_again_seconds=WAIT_SECONDS)
    route = EnsureRoute(100, 0, None, "the first model is ready")
    message = f"model {target.model_id} is ready; its route is set up"
    standing = Standing("False", Phase.INITIALIZING, INITIALIZING, message, working=True)
    return Next((arm, route), standing, 0, look_again_seconds=SOON_SECONDS)


def replace_broken(o: ObservedCanary, target: ArmModel) -> Next:
    """Gives a stable arm that serves nothing, and would never again, the new model at once.

    There is nothing to compare with and nothing to protect; waiting for stable would wait for ever.
    """
    following = rest(o, _describe_start(o, target), None)
    arm = EnsureArm(Track.STABLE, target, o.template, o.spec.replicas)
    kept = tuple(one for one in following.actions if not (isinstance(one, EnsureArm) and one.track is Track.STABLE))
    return replace(following, actions=(arm, *kept))


def _describe_start(o: ObservedCanary, target: ArmModel) -> Standing:
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
