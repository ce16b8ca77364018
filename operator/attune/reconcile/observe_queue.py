"""Reads what Kueue says of a Job that waits in one of its queues. A cluster without Kueue is nothing out of the way."""

from typing import Any, Final

from attune.adapters.cluster import Cluster, Object, ResourceType, is_owned_by
from attune.domain.kueue import ObservedQueue, ObservedWorkload
from attune.errors import NotServed, Refused
from attune.render.names import LABEL_JOB_UID, LABEL_QUEUE

GROUP: Final = "kueue.x-k8s.io"


def observe_queue(cluster: Cluster, job: Object) -> ObservedQueue | None:
    """Reads the queue that a Job is in, and while it waits there, why; None where it is in none."""
    metadata = job["metadata"]
    name = (metadata.get("labels") or {}).get(LABEL_QUEUE)
    if name is None or not job["spec"].get("suspend"):
        return ObservedQueue(name) if name is not None else None
    namespace, uid = metadata["namespace"], metadata["uid"]
    try:
        # What is read here is the same in each of its versions, and an installation serves only some of them.
        version = cluster.find_version(GROUP)
        if version is None:
            return ObservedQueue(name, served=False)
        local_queues, workloads = (
            ResourceType(f"{GROUP}/{version}", kind, plural)
            for kind, plural in (("LocalQueue", "localqueues"), ("Workload", "workloads"))
        )
        if cluster.get(local_queues, namespace, name) is None:
            return ObservedQueue(name, exists=False)
        found = cluster.list(workloads, namespace, {LABEL_JOB_UID: uid})
    except NotServed:
        return ObservedQueue(name, served=False)
    except Refused:
        return ObservedQueue(name, readable=False)
    workload = next((one for one in found if is_owned_by(one, uid)), None)
    return ObservedQueue(name, workload=observe_workload(workload) if workload is not None else None)


def observe_workload(body: Object) -> ObservedWorkload:
    """Makes an observation of a Workload that is not admitted."""
    status: dict[str, Any] = body.get("status") or {}
    conditions = {one["type"]: one for one in status.get("conditions") or []}
    evicted, reserved = conditions.get("Evicted", {}), conditions.get("QuotaReserved", {})
    waiting = reserved.get("message", "")
    if reserved.get("status") == "True":
        # Quota is set aside; what is left are admission checks, such as nodes that are yet to be provisioned.
        checks = [one for one in status.get("admissionChecks") or [] if one.get("state") != "Ready"]
        waiting = "; ".join(f"{one['name']}: {one.get('message') or one.get('state')}" for one in checks)
    gone = evicted.get("status") == "True"
    return ObservedWorkload(
        name=body["metadata"]["name"],
        active=(body.get("spec") or {}).get("active") is not False,
        waiting=waiting,
        evicted_reason=evicted.get("reason") if gone else None,
        evicted_message=evicted.get("message", "") if gone else "",
    )
