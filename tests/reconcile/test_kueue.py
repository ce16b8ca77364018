"""Jobs that wait for their turn in Kueue's queues, against a real API server and Job controller."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from attune.adapters.cluster import EVENT, JOB, POD, Cluster, Object
from attune.contract.result import Summary
from attune.errors import Refused
from attune.reconcile.boundary import Outcome, reconcile
from attune.reconcile.queue import Key
from attune.settings import Settings

from tests.reconcile import kueue
from tests.reconcile.conftest import OperatorProcess
from tests.reconcile.kubelet import Namespace, find_condition, wait_for
from tests.reconcile.kueue import Kueue
from tests.reconcile.samples import DATASET, PREPARED

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(240)]

QUEUED: dict[str, Any] = {**DATASET, "queueName": "speech"}
PENDING = "couldn't assign flavors to pod set main: insufficient unused quota for cpu in flavor gpus, 1 more needed"
PREEMPTED = "Preempted to accommodate a workload (UID: 1) due to prioritization in the ClusterQueue"


@pytest.fixture
def no_kueue(cluster: Cluster) -> Iterator[None]:
    """A cluster that may get Kueue in the test, and does not keep it."""
    assert cluster.find_version(kueue.GROUP) is None
    yield
    kueue.remove(cluster)


@pytest.fixture
def controller(no_kueue: None, namespace: Namespace) -> Kueue:
    """A cluster with Kueue, and a queue in the test's namespace."""
    kueue.install(namespace.cluster)
    playing = Kueue(namespace)
    playing.open_queue("speech")
    return playing


def step(cluster: Cluster, settings: Settings, namespace: Namespace, later: float = 0) -> Outcome:
    """One pass over the Dataset calls, so many seconds from now."""
    now = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=later)
    return reconcile(cluster, settings, Key("Dataset", namespace.name, "calls"), now)


def settle(cluster: Cluster, settings: Settings, namespace: Namespace) -> dict[str, Any]:
    """Passes until one changes nothing; gives the terminal condition."""
    wait_for(lambda: step(cluster, settings, namespace).result == "unchanged", "rest")
    return find_condition(namespace.get("Dataset", "calls"), "Ready")


def live(namespace: Namespace, job: Object) -> Object:
    found = namespace.cluster.get(JOB, namespace.name, job["metadata"]["name"])
    assert found is not None
    return found


def setters(job: Object) -> set[str]:
    """Who has set spec.suspend as it is."""
    managed = job["metadata"]["managedFields"]
    return {one["manager"] for one in managed if "f:suspend" in one["fieldsV1"].get("f:spec", {})}


def test_a_job_waits_for_kueue_and_follows_it_from_its_arrival_to_the_end(
    no_kueue: None, namespace: Namespace, start_operator: Callable[..., OperatorProcess]
) -> None:
    operator = start_operator(namespace, resync_seconds="1")
    namespace.apply("Dataset", "calls", QUEUED)
    missing = namespace.wait_reason("Dataset", "calls", "QueueNotServed")
    assert "Kueue is not installed" in missing["message"]
    job = namespace.wait_job("calls")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "speech"
    assert "kueue.x-k8s.io/queue-name" not in job["spec"]["template"]["metadata"]["labels"]

    kueue.install(namespace.cluster)
    controller = Kueue(namespace)
    namespace.wait_reason("Dataset", "calls", "QueueNotFound")
    controller.open_queue("speech")
    namespace.wait_reason("Dataset", "calls", "Queued")
    controller.take_up(job, PENDING)
    namespace.wait("Dataset", "calls", lambda one: "1 more needed" in find_condition(one, "Ready")["message"])

    for _ in range(2):
        controller.admit(job)
        namespace.start(job)
        namespace.wait_reason("Dataset", "calls", "Preparing")
        assert live(namespace, job)["spec"]["template"]["spec"]["nodeSelector"] == {"pool": "gpus"}
        assert setters(live(namespace, job)) == {kueue.MANAGER}
        controller.preempt(job, PREEMPTED)
        lost = namespace.wait_reason("Dataset", "calls", "Preempted")
        assert lost["message"].startswith(PREEMPTED)
        assert namespace.get("Dataset", "calls")["status"]["phase"] == "Queued"
        wait_for(lambda: not namespace.pods(job), "the pods of a preempted Job to go")
        assert setters(live(namespace, job)) == {kueue.MANAGER}
    controller.admit(job)
    namespace.finish(job, Summary(result=PREPARED))
    namespace.wait_reason("Dataset", "calls", "Prepared")
    assert live(namespace, job)["metadata"]["uid"] == job["metadata"]["uid"]

    said = [one for one in namespace.cluster.list(EVENT, namespace.name) if one["involvedObject"]["name"] == "calls"]
    reasons = {one["reason"]: one["type"] for one in said}
    assert {"Queued", "Preempted", "Preparing", "Prepared"} <= set(reasons)
    assert {reason for reason, kind in reasons.items() if kind == "Warning"} == {"QueueNotServed", "QueueNotFound"}
    log = operator.log.read_text()
    assert '"level": "ERROR"' not in log
    assert '"level": "WARNING"' not in log


def test_a_job_that_waits_costs_no_write(controller: Kueue, namespace: Namespace, settings: Settings) -> None:
    namespace.apply("Dataset", "calls", QUEUED)
    step(namespace.cluster, settings, namespace)
    controller.take_up(namespace.wait_job("calls"), PENDING)
    assert "1 more needed" in settle(namespace.cluster, settings, namespace)["message"]
    before = namespace.get("Dataset", "calls")["metadata"]["resourceVersion"]
    outcomes = [step(namespace.cluster, settings, namespace, later) for later in (30, 300, 3000)]
    assert [one.result for one in outcomes] == ["unchanged"] * 3
    assert all(one.look_again_seconds for one in outcomes)
    assert namespace.get("Dataset", "calls")["metadata"]["resourceVersion"] == before


def test_suspending_frees_the_place_in_the_queue_and_resuming_waits_for_the_last_pod_and_a_new_place(
    controller: Kueue, namespace: Namespace, settings: Settings
) -> None:
    cluster = namespace.cluster
    namespace.apply("Dataset", "calls", QUEUED)
    step(cluster, settings, namespace)
    job = namespace.wait_job("calls")
    controller.take_up(job, PENDING)
    controller.admit(job)
    name = namespace.start(job)["metadata"]["name"]
    # A pod that saves a checkpoint is there for a while.
    cluster.patch(POD, namespace.name, name, {"metadata": {"finalizers": ["test.attune.dev/saves"]}})
    namespace.apply("Dataset", "calls", {**QUEUED, "suspend": True})
    assert settle(cluster, settings, namespace)["reason"] == "Suspended"
    wait_for(
        lambda: (cluster.get(POD, namespace.name, name) or {})["metadata"].get("deletionTimestamp"),
        "the pod to be told to stop",
    )

    namespace.apply("Dataset", "calls", QUEUED)
    assert settle(cluster, settings, namespace)["reason"] == "Queued"
    assert live(namespace, job)["metadata"]["uid"] == job["metadata"]["uid"]
    assert live(namespace, job)["metadata"]["deletionTimestamp"]
    cluster.patch(POD, namespace.name, name, {"metadata": {"finalizers": None}})
    wait_for(lambda: cluster.get(JOB, namespace.name, job["metadata"]["name"]) is None, "the Job's end")
    settle(cluster, settings, namespace)
    again = namespace.wait_job("calls")
    assert again["metadata"]["name"] == job["metadata"]["name"]
    assert again["metadata"]["uid"] != job["metadata"]["uid"]
    assert again["spec"]["suspend"] is True


@pytest.mark.parametrize("in_queue", [True, False])
def test_what_others_have_suspended_is_not_resumed(
    no_kueue: None,
    namespace: Namespace,
    settings: Settings,
    in_queue: bool,  # noqa: FBT001 (a column of the table)
) -> None:
    """Kueue can be told to manage Jobs that name no queue, and may put them into one."""
    cluster, controller = namespace.cluster, Kueue(namespace)
    namespace.apply("Dataset", "calls", DATASET)
    settle(cluster, settings, namespace)
    job = namespace.wait_job("calls")
    if in_queue:
        controller.put_in_queue(job, "default")
    else:
        controller.suspend(job)
    ready = settle(cluster, settings, namespace)
    assert ready["reason"] == ("QueueNotServed" if in_queue else "SuspendedByOthers")
    assert live(namespace, job)["spec"]["suspend"] is True
    assert setters(live(namespace, job)) == {kueue.MANAGER}


class BlindCluster(Cluster):
    """May read nothing of Kueue."""

    def _request(self, method: str, path: str, **more: Any) -> tuple[int, Object]:
        if kueue.GROUP in path:
            raise Refused("forbidden")
        return super()._request(method, path, **more)


def test_an_operator_that_may_not_read_kueue_says_where_to_look(
    controller: Kueue, namespace: Namespace, kubeconfig: Path, settings: Settings
) -> None:
    blind = BlindCluster.connect(kubeconfig=str(kubeconfig))
    namespace.apply("Dataset", "calls", QUEUED)
    ready = settle(blind, settings, namespace)
    assert ready["reason"] == "Queued"
    assert "kubectl get workloads" in ready["message"]
    blind.close()


def test_a_priority_class_that_is_not_there_is_named(namespace: Namespace, settings: Settings) -> None:
    namespace.apply("Dataset", "calls", {**DATASET, "priorityClassName": "nobody-made-it"})

    def told() -> dict[str, Any] | None:
        ready = settle(namespace.cluster, settings, namespace)
        return ready if ready["reason"] == "PodNotCreated" else None

    ready = wait_for(told, "the Job controller's Event")
    job = namespace.wait_job("calls")
    assert "no PriorityClass with name nobody-made-it" in ready["message"]
    assert "correct spec.priorityClassName" in ready["message"]
    # The name of the pod that was refused differs from one attempt to the next.
    assert f'"{job["metadata"]["name"]}"' in ready["message"]
    assert namespace.pods(job) == []
