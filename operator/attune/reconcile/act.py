"""Carries out a Plan: its actions in order, the status last. Every write may be repeated without harm."""

import logging
from datetime import datetime, timedelta
from typing import Any, assert_never

from attune.adapters.cluster import CONFIG_MAP, EVENT, JOB, Cluster, is_owned_by
from attune.api import Canary
from attune.api.meta import GROUP, VERSION, Resource, Status
from attune.contract.job import Owner
from attune.domain.actions import (
    Action,
    DeleteArm,
    DeleteJob,
    EmitEvent,
    EnsureArm,
    EnsureJob,
    EnsureRoute,
    EnsureScorer,
    Plan,
)
from attune.domain.conditions import find_condition
from attune.domain.times import format_time, parse_time
from attune.errors import AlreadyExists, Refused
from attune.reconcile import act_canary
from attune.reconcile.ensure import ensure_job
from attune.render.event import build_event
from attune.settings import Settings

_log = logging.getLogger(__name__)

# The same announcement within this time is one occurrence: that of an operator which was killed before it had written
# the status, and announces again.
_SAME_OCCURRENCE = timedelta(seconds=60)


def act(cluster: Cluster, settings: Settings, resource: Resource, plan: Plan, now: datetime) -> bool:
    """Carries out a plan; tells whether anything was written.

    Raises:
        AttuneError: the first failure ends the pass; the next pass decides anew from what is then there. An Event
            that is refused is none.
    """
    wrote = False
    for action in plan.actions:
        wrote = _act_once(cluster, settings, resource, action, now) or wrote
    return write_status(cluster, resource, plan.status) or wrote


def _act_once(cluster: Cluster, settings: Settings, resource: Resource, action: Action, now: datetime) -> bool:
    owner = resource.owner()
    match action:
        case EnsureJob():
            return ensure_job(cluster, settings, action)
        case DeleteJob():
            return delete_job(cluster, owner, action.name, pods_first=action.pods_first)
        case EmitEvent():
            return _try_event(cluster, settings, owner, action, now)
        case EnsureArm():
            return act_canary.ensure_arm(cluster, settings, _canary(resource), action)
        case DeleteArm():
            return act_canary.delete_arm(cluster, settings, _canary(resource), action)
        case EnsureRoute():
            return act_canary.ensure_route(cluster, settings, _canary(resource), action)
        case EnsureScorer():
            return act_canary.ensure_scorer(cluster, settings, _canary(resource), action)
        case _:
            assert_never(action)


def _canary(resource: Resource) -> Canary:
    if not isinstance(resource, Canary):
        raise TypeError(f"{resource.KIND} has no arms and no route")
    return resource


def delete_job(cluster: Cluster, owner: Owner, name: str, *, pods_first: bool = False) -> bool:
    """Deletes a Job of this owner, its pods and its ConfigMap; tells whether anything was there.

    pods_first: the Job, on its way out, is there until its pods have ended.
    """
    wrote = False
    for kind in (JOB, CONFIG_MAP):
        present = cluster.get(kind, owner.namespace, name)
        if present is None or not is_owned_by(present, owner.uid) or present["metadata"].get("deletionTimestamp"):
            continue
        if cluster.delete(kind, owner.namespace, name, uid=present["metadata"]["uid"], dependents_first=pods_first):
            wrote = True
            if kind is JOB:
                _log.info("deleted", extra={"object": f"Job/{name}", "namespace": owner.namespace})
    return wrote


def _try_event(cluster: Cluster, settings: Settings, owner: Owner, action: EmitEvent, now: datetime) -> bool:
    """Posts an Event; one that is refused (forbidden, over quota) must not keep the status from saying the same."""
    try:
        return emit_event(cluster, settings, owner, action, now)
    except Refused as error:
        extra = {"object": f"{owner.kind}/{owner.name}", "namespace": owner.namespace, "reason": action.reason}
        _log.warning("event refused", extra={**extra, "error": str(error)})
        return False


def emit_event(cluster: Cluster, settings: Settings, owner: Owner, action: EmitEvent, now: datetime) -> bool:
    """Posts an Event, or counts the one that says the same already; tells whether anything was written."""
    event = build_event(owner, action, format_time(now), settings.identity)
    try:
        cluster.create(event)
    except AlreadyExists:
        name = event["metadata"]["name"]
        present = cluster.get(EVENT, owner.namespace, name)
        if present is None or now - parse_time(present["lastTimestamp"]) < _SAME_OCCURRENCE:
            return False
        count = {"count": int(present.get("count") or 1) + 1, "lastTimestamp": event["lastTimestamp"]}
        cluster.patch(EVENT, owner.namespace, name, count)
    _log.info(
        "announced",
        extra={"object": f"{owner.kind}/{owner.name}", "namespace": owner.namespace, "reason": action.reason},
    )
    return True


def write_status(cluster: Cluster, resource: Resource, status: Status) -> bool:
    """Writes a status that differs from the one that was read; tells whether it did.

    It is written against the resourceVersion that was read: a decision on an older state is never stored.

    Raises:
        Conflict: when the object has changed since.
    """
    content = dump_status(status)
    if content == dump_status(resource.status):
        return False
    metadata = resource.metadata
    cluster.apply_status(
        {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": resource.KIND,
            "metadata": {
                "name": metadata.name,
                "namespace": metadata.namespace,
                "uid": metadata.uid,
                "resourceVersion": metadata.resource_version,
            },
            "status": content,
        }
    )
    terminal = find_condition(status.conditions, resource.TERMINAL_CONDITION)
    # Progress alone is no line in the log: it would be one every few seconds.
    _log.log(
        logging.DEBUG if status.conditions == resource.status.conditions else logging.INFO,
        "status written",
        extra={
            "object": f"{resource.KIND}/{metadata.name}",
            "namespace": metadata.namespace,
            "phase": status.phase,
            "reason": terminal.reason if terminal else None,
        },
    )
    return True


def dump_status(status: Status) -> dict[str, Any]:
    """Gives a status as it is stored."""
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)
