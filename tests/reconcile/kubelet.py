"""Plays the kubelet's part where there is no node: says of pods what a kubelet would say."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from attune.adapters.cluster import (
    CONFIG_MAP,
    CUSTOM,
    DEPLOYMENT,
    HTTP_ROUTE,
    JOB,
    POD,
    SERVICE,
    Cluster,
    Object,
    ResourceType,
    is_owned_by,
)
from attune.contract.result import Summary
from attune.render.job import CONTAINER
from attune.render.names import LABEL_OWNER_UID

T = TypeVar("T")
REPLICA_SET = ResourceType("apps/v1", "ReplicaSet", "replicasets")
CHILDREN = (JOB, CONFIG_MAP, DEPLOYMENT, REPLICA_SET, SERVICE, HTTP_ROUTE, POD)
IMAGE_ID = "registry.test/trainer@sha256:" + "f" * 64
SECONDS = 120.0  # far more than it takes; the machine may have other work


def wait_for(look: Callable[[], T | None], what: str, seconds: float = SECONDS) -> T:
    """Looks again and again until there is something to see; says what was waited for where there never is."""
    deadline = time.monotonic() + seconds
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)  # between two looks


def find_condition(resource: Object, kind: str) -> dict[str, Any]:
    conditions = (resource.get("status") or {}).get("conditions") or []
    return next((one for one in conditions if one["type"] == kind), {})


class Namespace:
    """A namespace of a test's own, with what a test does in it."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name

    def apply(self, kind: str, name: str, spec: dict[str, Any]) -> Object:
        """Applies a custom resource as a person would: the operator's field manager is another."""
        return self.cluster.apply(
            {
                "apiVersion": CUSTOM[kind].api_version,
                "kind": kind,
                "metadata": {"name": name, "namespace": self.name},
                "spec": spec,
            }
        )

    def get(self, kind: str, name: str) -> Object:
        found = self.cluster.get(CUSTOM[kind], self.name, name)
        assert found is not None, f"{kind} {name} has gone"
        return found

    def wait(self, kind: str, name: str, until: Callable[[Object], bool], seconds: float = SECONDS) -> Object:
        """Waits until a resource is as wanted; the failure shows its last status."""
        last: Object = {}

        def look() -> Object | None:
            last.clear()
            last.update(self.get(kind, name))
            return last if until(last) else None

        try:
            return dict(wait_for(look, f"{kind} {name}", seconds))
        except AssertionError as error:
            raise AssertionError(f"{error}; its status: {last.get('status')}") from None

    def wait_reason(self, kind: str, name: str, reason: str, seconds: float = SECONDS) -> dict[str, Any]:
        """Waits until the terminal condition has this reason; gives the condition."""
        terminal = "Ready" if kind in ("Dataset", "Canary") else "Succeeded"
        found = self.wait(kind, name, lambda one: find_condition(one, terminal).get("reason") == reason, seconds)
        return find_condition(found, terminal)

    def delete(self, kind: str, name: str, propagation: str = "Background") -> None:
        """Deletes a custom resource and waits until it, and all that the operator made for it, has gone."""
        uid = self.get(kind, name)["metadata"]["uid"]
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        self.cluster._request("DELETE", CUSTOM[kind].path(self.name, name), body=body)
        self.wait_gone(kind, name, uid)

    def wait_gone(self, kind: str, name: str, uid: str) -> None:
        """Waits until a custom resource and everything that carries its uid has gone."""
        wait_for(lambda: self.cluster.get(CUSTOM[kind], self.name, name) is None, f"the end of {kind} {name}")
        try:
            wait_for(lambda: not self.children(uid), "the garbage collector")
        except AssertionError as error:
            raise AssertionError(f"{error}; left are {self.children(uid)}") from None

    def children(self, uid: str) -> list[str]:
        """Names whatever was made for the custom resource with this uid, Events aside."""
        kinds = [one for one in CHILDREN if one is not HTTP_ROUTE or self.cluster.is_served(one)]
        found = [one for kind in kinds for one in self.cluster.list(kind, self.name, {LABEL_OWNER_UID: uid})]
        return [f"{one['kind']}/{one['metadata']['name']}" for one in found]

    def jobs(self, owner: str) -> list[Object]:
        """The Jobs of a custom resource of this name that are not on their way out."""
        found = self.cluster.list(JOB, self.name, {"attune.dev/name": owner})
        return [one for one in found if not one["metadata"].get("deletionTimestamp")]

    def wait_job(self, owner: str, without: str | None = None) -> Object:
        """Waits for the one Job of a custom resource (other than the one named)."""

        def look() -> Object | None:
            found = [one for one in self.jobs(owner) if one["metadata"]["name"] != without]
            return found[0] if len(found) == 1 else None

        try:
            return wait_for(look, f"a Job of {owner}")
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.describe()}") from None

    def describe(self) -> str:
        """The reasons of all resources, for a failure's message."""
        found = [one for kind in CUSTOM.values() for one in self.cluster.list(kind, self.name)]
        return "; ".join(
            f"{one['kind']} {one['metadata']['name']}: "
            + ", ".join(c["reason"] for c in one.get("status", {}).get("conditions", []))
            for one in found
        )

    def pods(self, job: Object) -> list[Object]:
        return [one for one in self.cluster.list(POD, self.name) if is_owned_by(one, job["metadata"]["uid"])]

    def wait_pod(self, job: Object) -> Object:
        """Waits for a Job's pod that has not ended: the Job controller makes it."""

        def look() -> Object | None:
            return next(
                (
                    one
                    for one in self.pods(job)
                    if one["status"]["phase"] not in ("Succeeded", "Failed")
                    and not one["metadata"].get("deletionTimestamp")
                ),
                None,
            )

        return wait_for(look, f"a pod of {job['metadata']['name']}")

    def say(self, pod: Object, status: dict[str, Any]) -> None:
        """Writes a pod's status, as its kubelet would."""
        self.cluster.patch(POD, self.name, pod["metadata"]["name"], {"status": status}, subresource="status")

    def start(self, job: Object, ip: str | None = None) -> Object:
        """Lets a Job's pod run."""
        pod = self.wait_pod(job)
        status = container_status({"running": {"startedAt": now()}})
        self.say(pod, {"phase": "Running", **status, **({"podIP": ip, "podIPs": [{"ip": ip}]} if ip else {})})
        return pod

    def block(self, job: Object, reason: str, message: str) -> Object:
        """Lets a Job's pod wait for a reason."""
        pod = self.wait_pod(job)
        self.say(pod, {"phase": "Pending", **container_status({"waiting": {"reason": reason, "message": message}})})
        return pod

    def end(self, job: Object, code: int, message: str = "", reason: str | None = None) -> Object:
        """Ends a Job's pod with an exit code and a termination message."""
        pod = self.wait_pod(job)
        ended = {
            "exitCode": code,
            "reason": reason or ("Completed" if code == 0 else "Error"),
            "message": message,
            "startedAt": now(),
            "finishedAt": now(),
        }
        phase = "Succeeded" if code == 0 else "Failed"
        self.say(pod, {"phase": phase, **container_status({"terminated": ended})})
        return pod

    def finish(self, job: Object, summary: Summary) -> Object:
        """Ends a Job well, with its result."""
        return self.end(job, 0, summary.to_message())


def container_status(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "containerStatuses": [
            {
                "name": CONTAINER,
                "image": "trainer",
                "imageID": IMAGE_ID,
                "ready": "running" in state,
                "restartCount": 0,
                "started": "running" in state,
                "state": state,
            }
        ]
    }


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
