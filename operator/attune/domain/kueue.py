"""What Kueue says of a Job that waits in one of its queues, in the words of a condition."""

from dataclasses import dataclass
from typing import Final

QUEUED: Final = "Queued"
ADMITTED: Final = "Admitted"
PREEMPTED: Final = "Preempted"
EVICTED: Final = "Evicted"
DEACTIVATED: Final = "Deactivated"
QUEUE_NOT_FOUND: Final = "QueueNotFound"
QUEUE_NOT_SERVED: Final = "QueueNotServed"

# Why a Workload was evicted, in Kueue's API: for another one of higher priority.
_EVICTED_BY_PREEMPTION: Final = "Preempted"


@dataclass(frozen=True)
class ObservedWorkload:
    """Kueue's Workload of a Job, as far as decisions read it.

    waiting: Kueue's own words on what it waits for. evicted_*: while it has lost its place and has not got another.
    """

    name: str
    active: bool = True
    waiting: str = ""
    evicted_reason: str | None = None
    evicted_message: str = ""


@dataclass(frozen=True)
class ObservedQueue:
    """The queue that a Job is in. All but its name is read only while the Job waits.

    served: Kueue's kinds are installed. readable: the operator may read them. exists: the LocalQueue is there.
    """

    name: str
    served: bool = True
    readable: bool = True
    exists: bool = True
    workload: ObservedWorkload | None = None


@dataclass(frozen=True)
class Wait:
    """Why a Job still waits. warning: somebody has to do something."""

    reason: str
    message: str
    warning: bool = False


def describe_wait(job: str, queue: ObservedQueue) -> Wait:
    """Says why a Job waits in its queue."""
    waits = f"Job {job} waits in queue {queue.name}"
    if not queue.served:
        message = (
            f"{waits}, but Kueue is not installed in this cluster (it serves no kueue.x-k8s.io): install it, or remove "
            "spec.queueName; the Job goes on by itself"
        )
        return Wait(QUEUE_NOT_SERVED, message, warning=True)
    if not queue.readable:
        return Wait(QUEUED, f"{waits}; this operator may not read why: kubectl get workloads.kueue.x-k8s.io does")
    if not queue.exists:
        message = (
            f"there is no LocalQueue {queue.name} in this namespace; create it or correct spec.queueName, and Job "
            f"{job} goes on by itself"
        )
        return Wait(QUEUE_NOT_FOUND, message, warning=True)
    workload = queue.workload
    if workload is None:
        return Wait(QUEUED, f"{waits}; Kueue has not taken it up yet")
    if not workload.active:
        why = f" ({workload.evicted_message})" if workload.evicted_message else ""
        message = f"Kueue holds Job {job} back{why} until spec.active of Workload {workload.name} is true again"
        return Wait(DEACTIVATED, message, warning=True)
    # Right after an eviction Kueue repeats its message as what is waited for.
    waiting = f": {workload.waiting}" if workload.waiting not in ("", workload.evicted_message) else ""
    if workload.evicted_reason is None:
        return Wait(QUEUED, f"{waits}{waiting}")
    reason = PREEMPTED if workload.evicted_reason == _EVICTED_BY_PREEMPTION else EVICTED
    lost = workload.evicted_message or f"evicted by Kueue ({workload.evicted_reason})"
    return Wait(reason, f"{lost}; Job {job} waits in queue {queue.name} again{waiting}")
