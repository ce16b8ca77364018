"""Ends a rollout that has failed: stable keeps its model and gets everything."""

from dataclasses import replace

from attune.api.canary import Phase
from attune.domain.actions import EnsureRoute, RolloutRecord
from attune.domain.canary.models import ensure_stable
from attune.domain.canary.next import MESSAGE_CHARACTERS, SOON_SECONDS, Next, Problem
from attune.domain.canary.observed import ObservedCanary
from attune.domain.canary.standing import describe_failed
from attune.domain.verdict import Judgement


def roll_back(o: ObservedCanary, record: RolloutRecord, failure: Problem, judgement: Judgement | None = None) -> Next:
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
