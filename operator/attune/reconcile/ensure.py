"""Creates children that never change once they are there, but for a Job that is suspended or goes on."""

import logging

from attune.adapters.cluster import (
    CONFIG_MAP,
    FIELD_MANAGER,
    JOB,
    Cluster,
    Object,
    find_setter,
    is_owned_by,
    type_of,
)
from attune.contract.job import Owner
from attune.domain.actions import EnsureJob
from attune.errors import AlreadyExists, Conflict, NotOurs
from attune.render.job import build_config_map, build_gang_service, build_job
from attune.render.names import LABEL_QUEUE
from attune.settings import Settings

_log = logging.getLogger(__name__)


def ensure_job(cluster: Cluster, settings: Settings, action: EnsureJob) -> bool:
    """Makes a Job and what its pods need exist, running or suspended; tells whether anything was written.

    A Job in a queue is created and never changed, and none is resumed that somebody else has suspended.

    Raises:
        NotOurs: when an object of that name has another owner.
    """
    owner = action.spec.owner
    # job.json first: a pod without it could not start.
    wrote = _ensure_config(cluster, owner, build_config_map(action))
    if action.nodes > 1:
        wrote = ensure_created(cluster, owner, build_gang_service(action)) is None or wrote
    present = ensure_created(cluster, owner, build_job(action, settings))
    if present is None:
        _log.info("created", extra={"object": f"Job/{action.name}", "namespace": owner.namespace})
        return True
    if bool(present["spec"].get("suspend")) != action.suspended and not is_held_by_others(present):
        cluster.patch(JOB, owner.namespace, action.name, {"spec": {"suspend": action.suspended}})
        verb = "suspended" if action.suspended else "resumed"
        _log.info(verb, extra={"object": f"Job/{action.name}", "namespace": owner.namespace})
        return True
    return wrote


def is_held_by_others(job: Object) -> bool:
    """Tells whether spec.suspend of a Job is not this operator's to change.

    A queue may have been named by somebody else: Kueue can be told to put every Job of a namespace into one.
    """
    return LABEL_QUEUE in (job["metadata"].get("labels") or {}) or find_suspender(job) is not None


def find_suspender(job: Object) -> str | None:
    """Names who has suspended a Job, where that was not this operator."""
    setter = find_setter(job, "spec", "suspend") if job["spec"].get("suspend") else None
    return None if setter == FIELD_MANAGER else setter


def _ensure_config(cluster: Cluster, owner: Owner, wanted: Object) -> bool:
    """Makes the ConfigMap exist that a Job of its name is to read; tells whether anything was written.

    One that an earlier Job of this name has left may hold what was wanted then, and is replaced: somebody has deleted
    that Job to have it done anew. What a Job reads that is still there never changes.
    """
    present = ensure_created(cluster, owner, wanted)
    if present is None:
        return True
    namespace, name = owner.namespace, wanted["metadata"]["name"]
    if present.get("data") == wanted["data"] or cluster.get(JOB, namespace, name) is not None:
        return False
    cluster.delete(CONFIG_MAP, namespace, name, uid=present["metadata"]["uid"])
    cluster.create(wanted)
    return True


def ensure_created(cluster: Cluster, owner: Owner, obj: Object) -> Object | None:
    """Creates an object that never changes; gives None when it was created, or the one that is already there.

    Raises:
        NotOurs: when the one that is there has another owner.
        Conflict: when it vanished in between.
    """
    try:
        cluster.create(obj)
    except AlreadyExists:
        metadata = obj["metadata"]
        present = cluster.get(type_of(obj), metadata["namespace"], metadata["name"])
        if present is None:
            raise Conflict(f"{obj['kind']} {metadata['name']} has just gone") from None
        if not is_owned_by(present, owner.uid):
            raise NotOurs(
                f"{obj['kind']} {metadata['name']} exists and is not owned by {owner.kind} {owner.name}; "
                "delete or rename it"
            ) from None
        return present
    return None
