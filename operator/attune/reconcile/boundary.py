"""The one place that turns errors into retries, and into conditions where a person has to help."""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from pydantic import ValidationError

from attune.adapters.cluster import CUSTOM, Cluster, Object
from attune.api import Canary
from attune.api.canary import Phase
from attune.api.meta import Metadata, Resource, Status
from attune.domain.actions import EmitEvent, Plan
from attune.domain.events import decide_events
from attune.domain.jobs import Standing
from attune.errors import AlreadyExists, AttuneError, Conflict, NotOurs, NotServed, Refused, Unavailable
from attune.reconcile.act import act
from attune.reconcile.dispatch import RECONCILERS
from attune.reconcile.observe import parse_resource, parse_status
from attune.reconcile.queue import Key
from attune.reconcile.references import find_references
from attune.settings import Settings

_log = logging.getLogger(__name__)

UNKNOWN_ATTEMPTS: Final = 5
_FIRST_DELAY: Final = 0.5  # seconds
_LONGEST_DELAY: Final = 60.0
_CONFLICT_DELAY: Final = 0.05


@dataclass(frozen=True)
class Outcome:
    """What came of a pass over a key.

    result: changed, unchanged, gone or error; error: the error's name. look_again_seconds: None for the next event or
    re-sync. ended_rollouts: outcomes of the rollouts that this pass has brought to an end.
    """

    result: str
    look_again_seconds: float | None = None
    error: str | None = None
    ended_rollouts: tuple[str, ...] = ()


def reconcile(
    cluster: Cluster,
    settings: Settings,
    key: Key,
    now: datetime,
    failures: int = 0,
    note_references: Callable[[frozenset[Key]], None] = lambda _: None,
) -> Outcome:
    """Brings one resource a step nearer to what it should be. Blocking; raises nothing but NotLeader.

    failures: how many passes over this key have failed in a row before this one. note_references is told what the
    resource refers to before any of that is read: a change of it after the reading must not pass unnoticed.
    """
    body: Object | None = None
    try:
        body = cluster.get(CUSTOM[key.kind], key.namespace, key.name)
        if body is None or body["metadata"].get("deletionTimestamp"):
            # Nothing outside the cluster needs cleaning, and the garbage collector takes the children.
            note_references(frozenset())
            return Outcome("gone")
        try:
            resource = parse_resource(RECONCILERS[key.kind].model, body)
        except ValidationError as error:
            places = ", ".join(sorted({".".join(map(str, one["loc"])) for one in error.errors()})[:5])
            _show(cluster, settings, key, body, "InvalidSpec", f"the spec does not fit this operator at {places}", now)
            return Outcome("error", error="InvalidSpec")
        note_references(find_references(resource))
        return _reconcile_resource(cluster, settings, resource, now)
    except Conflict as conflict:
        return Outcome("error", _backoff(failures, _CONFLICT_DELAY), error=type(conflict).__name__)
    except (Unavailable, AlreadyExists) as error:
        _log.warning("will try again", extra={"object": f"{key.kind}/{key.name}", "error": str(error)})
        return Outcome("error", _backoff(failures, _FIRST_DELAY), error=type(error).__name__)
    except (NotOurs, Refused, NotServed) as error:
        reason = type(error).__name__
        _show(cluster, settings, key, body, reason, str(error), now)
        return Outcome("error", _backoff(failures, _FIRST_DELAY), error=reason)
    except AttuneError:
        raise
    except Exception as error:  # noqa: BLE001 (a defect in the operator must not stop it)
        name = type(error).__name__
        _log.exception("pass failed", extra={"object": f"{key.kind}/{key.name}", "attempt": failures + 1})
        if failures + 1 < UNKNOWN_ATTEMPTS:
            return Outcome("error", _backoff(failures, _FIRST_DELAY), error=name)
        text = f"the operator failed on this resource ({name}); its log has the traceback. It is tried again by itself"
        _show(cluster, settings, key, body, "InternalError", text, now)
        return Outcome("error", error=name)


def _reconcile_resource(cluster: Cluster, settings: Settings, resource: Resource, now: datetime) -> Outcome:
    reconciler = RECONCILERS[resource.KIND]
    plan = reconciler.decide(reconciler.observe(cluster, settings, resource, now))
    changed = act(cluster, settings, resource, plan, now)
    return Outcome(
        "changed" if changed else "unchanged",
        plan.look_again_seconds,
        ended_rollouts=_find_ended(resource.status, plan.status),
    )


def _find_ended(before: Status, after: Status) -> tuple[str, ...]:
    """Outcomes of the rollouts that this pass has entered in a Canary's history."""
    # A rollout's name comes again, after 18 hours at the earliest.
    known = {(one.id, one.started_time) for one in getattr(before, "history", [])}
    entries = getattr(after, "history", [])
    return tuple(str(one.outcome) for one in entries if (one.id, one.started_time) not in known)


def _backoff(failures: int, first: float) -> float:
    """Seconds to wait: doubled with each failure, bounded, and spread so that many do not come back at once."""
    longest = min(_LONGEST_DELAY, first * 2.0 ** min(failures, 16))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 (spreads load, protects nothing)


def _show(
    cluster: Cluster, settings: Settings, key: Key, body: Object | None, reason: str, message: str, now: datetime
) -> None:
    """Makes an error that only a person can mend visible on the resource. What else its status says stays."""
    if body is None:
        _log.warning("cannot go on", extra={"object": f"{key.kind}/{key.name}", "reason": reason, "error": message})
        return
    model = RECONCILERS[key.kind].model
    # The spec may be what cannot be understood; what is written needs none.
    status = parse_status(model, body)
    resource = model.model_construct(metadata=Metadata.model_validate(body["metadata"]), status=status)
    terminal, generation = resource.TERMINAL_CONDITION, resource.metadata.generation
    phase = Phase.DEGRADED if key.kind == Canary.KIND else "Failed"
    standing = Standing("False", phase, reason, message, stalled=True)
    after = standing.conditions(status.conditions, terminal=terminal, generation=generation, now=now)
    events: tuple[EmitEvent, ...] = decide_events(status.conditions, after, terminal=terminal, kind="Warning")
    shown = status.model_copy(update={"observed_generation": generation, "phase": standing.phase, "conditions": after})
    try:
        act(cluster, settings, resource, Plan(actions=events, status=shown), now)
    except (Unavailable, Conflict, Refused, NotServed, AlreadyExists) as error:
        _log.warning("status not written", extra={"object": f"{key.kind}/{key.name}", "error": str(error)})
