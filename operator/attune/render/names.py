"""Labels and owner references of everything that the operator creates."""

import hashlib
from typing import Any, Final

from attune.api.meta import GROUP, VERSION
from attune.contract.job import Owner

LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
LABEL_COMPONENT: Final = "attune.dev/component"  # prepare, finetune, evaluate, score, serve
LABEL_KIND: Final = "attune.dev/kind"
LABEL_NAME: Final = "attune.dev/name"
LABEL_OWNER_UID: Final = "attune.dev/owner-uid"

# Kueue's: the LocalQueue and the WorkloadPriorityClass of a Job, and on a Workload the Job that it speaks for.
LABEL_QUEUE: Final = "kueue.x-k8s.io/queue-name"
LABEL_WORKLOAD_PRIORITY: Final = "kueue.x-k8s.io/priority-class"
LABEL_JOB_UID: Final = "kueue.x-k8s.io/job-uid"

# The Job controller's, on the pods of an Indexed Job: which of them this is.
ANNOTATION_INDEX: Final = "batch.kubernetes.io/job-completion-index"

COMPONENT_SERVE: Final = "serve"


def build_labels(owner: Owner, component: str) -> dict[str, str]:
    """Labels of a child: enough to find it by its owner, and its owner by it.

    The owner's own labels are not copied: with them a GitOps tool would take the child for one of its own.
    """
    return {
        LABEL_MANAGED_BY: "attune",
        LABEL_COMPONENT: component,
        LABEL_KIND: owner.kind,
        LABEL_NAME: owner.name,
        LABEL_OWNER_UID: owner.uid,
    }


def build_gang_service_name(owner: Owner) -> str:
    """Names the Service through which pods of one Job find each other: one for all Jobs of an owner.

    Not after the owner itself: a Service's name has to begin with a letter.
    """
    return f"gang-{hashlib.sha256(owner.uid.encode()).hexdigest()[:12]}"


def build_owner_reference(owner: Owner) -> dict[str, Any]:
    """The reference by which the garbage collector deletes a child after its owner.

    blockOwnerDeletion is false: it would need a right on the owner's finalizers, and nothing waits for children.
    """
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": owner.kind,
        "name": owner.name,
        "uid": owner.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }
