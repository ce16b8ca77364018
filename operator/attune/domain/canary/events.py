"""Announces as Events what is new in a Canary's status."""

from typing import Final

from attune.api.canary import Canary, CanaryStatus, HistoryEntry, Outcome, RolloutStatus
from attune.domain.actions import EmitEvent
from attune.domain.canary.reasons import HEALTHY, PROMOTING, ROLLOUT_PROGRESSING
from attune.domain.conditions import find_condition
from attune.domain.jobs import Standing
from attune.domain.times import parse_time

_OUTCOME_EVENTS: Final = {
    Outcome.PROMOTED: "Promoted",
    Outcome.ROLLED_BACK: "RolledBack",
    Outcome.SUPERSEDED: "Superseded",
    Outcome.WITHDRAWN: "Withdrawn",
}


def announce(before: CanaryStatus, after: CanaryStatus, standing: Standing) -> tuple[EmitEvent, ...]:
    """Tells what is new as Events, from the difference of two statuses: what a crash has swallowed is told later."""
    events: list[EmitEvent] = []
    ended = after.history[0] if after.history and after.history[:1] != before.history[:1] else None
    if ended is not None:
        events.append(_announce_end(ended, after))
    rollout = after.rollout
    if rollout is not None:
        events += _announce_progress(before, after, rollout)
    old = find_condition(before.conditions, Canary.TERMINAL_CONDITION)
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
