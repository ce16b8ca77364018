"""Plays Kueue where there is none: its kinds, reduced to what is read of them, and what its controller does to Jobs."""

from typing import Any, Final

from attune.adapters.cluster import JOB, Cluster, Object, ResourceType
from attune.errors import Refused

from tests.reconcile.kubelet import Namespace, now, wait_for

GROUP: Final = "kueue.x-k8s.io"
MANAGER: Final = "kueue"
DEFINITION: Final = ResourceType("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions")
WORKLOAD: Final = ResourceType(f"{GROUP}/v1beta1", "Workload", "workloads")
LOCAL_QUEUE: Final = ResourceType(f"{GROUP}/v1beta1", "LocalQueue", "localqueues")
_MERGE: Final = "application/merge-patch+json"


def install(cluster: Cluster) -> None:
    """Makes the API server know Kueue's kinds."""
    for kind in (WORKLOAD, LOCAL_QUEUE):
        definition = {
            "apiVersion": DEFINITION.api_version,
            "kind": DEFINITION.kind,
            "metadata": {"name": f"{kind.plural}.{GROUP}"},
            "spec": {
                "group": GROUP,
                "scope": "Namespaced",
                "names": {"kind": kind.kind, "plural": kind.plural, "singular": kind.kind.lower()},
                "versions": [
                    {
                        "name": "v1beta1",
                        "served": True,
                        "storage": True,
                        "subresources": {"status": {}},
                        "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
                    }
                ],
            },
        }
        cluster._write("POST", DEFINITION.path(None), DEFINITION, definition, query={})
    wait_for(lambda: cluster.is_served(WORKLOAD) and cluster.is_served(LOCAL_QUEUE), "Kueue's kinds")


def remove(cluster: Cluster) -> None:
    """Makes the API server forget them, and every object of theirs."""
    for kind in (WORKLOAD, LOCAL_QUEUE):
        cluster._request("DELETE", DEFINITION.path(None, f"{kind.plural}.{GROUP}"))
    wait_for(lambda: cluster.find_version(GROUP) is None, "Kueue's kinds to go")


class Kueue:
    """Kueue's controller in a test's namespace, one act at a time."""

    def __init__(self, namespace: Namespace) -> None:
        self._cluster = namespace.cluster
        self._namespace = namespace.name

    def open_queue(self, name: str) -> None:
        """Creates a LocalQueue, as an administrator would."""
        self._create(LOCAL_QUEUE, {"metadata": {"name": name}, "spec": {"clusterQueue": "gpus"}})

    def take_up(self, job: Object, message: str) -> None:
        """Makes the Workload of a Job, which waits for quota."""
        metadata = job["metadata"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata["uid"]}
        self._create(
            WORKLOAD,
            {
                "metadata": {
                    "name": self._name(job),
                    "labels": {f"{GROUP}/job-uid": metadata["uid"]},
                    "ownerReferences": [{**owner, "controller": True}],
                },
                "spec": {"queueName": metadata["labels"][f"{GROUP}/queue-name"], "active": True},
            },
        )
        self.say(job, QuotaReserved=("False", "Pending", message))

    def say(self, job: Object, **conditions: tuple[str, str, str]) -> None:
        """Sets all conditions of a Job's Workload: type=(status, reason, message)."""
        listed = [
            {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now()}
            for kind, (status, reason, message) in conditions.items()
        ]
        self._patch(WORKLOAD, self._name(job), {"status": {"conditions": listed}}, subresource="status")

    def admit(self, job: Object) -> None:
        """Lets a Job run, on the nodes of the flavor that it was given."""
        admitted = ("True", "Admitted", "The workload is admitted")
        self.say(job, QuotaReserved=("True", "QuotaReserved", "Quota reserved in ClusterQueue gpus"), Admitted=admitted)
        template = {"spec": {"nodeSelector": {"pool": "gpus"}}, "metadata": {"labels": {f"{GROUP}/podset": "main"}}}
        self._patch(JOB, job["metadata"]["name"], {"spec": {"suspend": False, "template": template}})

    def preempt(self, job: Object, message: str) -> None:
        """Takes a Job's turn away, and its pods' placement with it."""
        name = job["metadata"]["name"]
        self.say(
            job, Evicted=("True", "Preempted", message), QuotaReserved=("False", "Pending", message),
        )  # fmt: skip
        self._patch(JOB, name, {"spec": {"suspend": True}})
        template = {"spec": {"nodeSelector": None}, "metadata": {"labels": {f"{GROUP}/podset": None}}}

        def restore() -> bool:
            # A Job keeps its template as long as it counts as begun.
            try:
                self._patch(JOB, name, {"status": {"startTime": None}}, subresource="status")
                self._patch(JOB, name, {"spec": {"template": template}})
            except Refused:
                return False
            return True

        wait_for(restore, "a suspended Job to get its template back")

    def suspend(self, job: Object) -> None:
        """Suspends a Job that it found in no queue."""
        self._patch(JOB, job["metadata"]["name"], {"spec": {"suspend": True}})

    def put_in_queue(self, job: Object, name: str) -> None:
        """Names the queue of a Job that has none, and lets it wait."""
        labels = {f"{GROUP}/queue-name": name}
        self._patch(JOB, job["metadata"]["name"], {"metadata": {"labels": labels}, "spec": {"suspend": True}})

    @staticmethod
    def _name(job: Object) -> str:
        return f"job-{job['metadata']['uid']}"

    def _create(self, kind: ResourceType, body: dict[str, Any]) -> None:
        obj = {"apiVersion": kind.api_version, "kind": kind.kind, **body}
        self._cluster._write("POST", kind.path(self._namespace), kind, obj, query={"fieldManager": MANAGER})

    def _patch(self, kind: ResourceType, name: str, body: dict[str, Any], subresource: str | None = None) -> None:
        self._cluster._request(
            "PATCH",
            kind.path(self._namespace, name, subresource),
            query={"fieldManager": MANAGER},
            body=body,
            content_type=_MERGE,
        )
