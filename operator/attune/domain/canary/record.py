"""Reads a rollout's record: the weight of its step, its clock, and what the status remembers of a lost one."""

from dataclasses import replace
from datetime import datetime

from attune.api.canary import Canary, Outcome, RolloutStatus, Step
from attune.domain.actions import RolloutRecord
from attune.domain.arms import ObservedRoute
from attune.domain.canary.observed import ObservedCanary
from attune.domain.conditions import find_condition
from attune.domain.jobs import SUSPENDED
from attune.domain.times import format_time, parse_time


def compute_weight(steps: list[Step], index: int | None) -> int:
    """The canary's weight in a step: that of the last step with a weight up to it.

    Steps 5, 25, pause, 50: index 0 -> 5, 2 (the pause) -> 25, 3 -> 50; None (nothing has begun) -> 0.
    """
    if index is None:
        return 0
    return next((step.weight for step in reversed(steps[: index + 1]) if step.weight is not None), 0)


def restore_record(o: ObservedCanary) -> ObservedCanary:
    """Gives a route that somebody has deleted its record back, as far as the status remembers it."""
    if o.route is not None:
        return o
    record = None
    newest = o.status.history[0] if o.status.history else None
    if o.status.rollout is not None:
        record = replace(recall_record(o.status.rollout), step=None, step_started=format_time(o.now))
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


def recall_record(rollout: RolloutStatus) -> RolloutRecord:
    """Makes a record again from what the status says of its rollout."""
    return RolloutRecord(
        id=rollout.id,
        step=rollout.step,
        started=rollout.started_time,
        step_started=rollout.step_started_time,
        promoting=rollout.promoting,
    )


def find_start(o: ObservedCanary, record: RolloutRecord) -> datetime:
    """When the present step began to run out of time.

    What took longer while no operator looked is not late: after a crash of its node the operator may be back before the
    pods and Prometheus are, and would end the rollout at its first look.
    """
    return max(parse_time(record.step_started), o.looking_since)


def restart_clock(o: ObservedCanary, record: RolloutRecord) -> RolloutRecord:
    """Restarts the step's clock after a suspension, during which no step could be decided."""
    ready = find_condition(o.status.conditions, Canary.TERMINAL_CONDITION)
    if ready is not None and ready.reason == SUSPENDED:
        return replace(record, step_started=format_time(o.now))
    return record
