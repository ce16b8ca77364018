"""Killed at any write, run twice, cut off: the end is the same."""

import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from attune.adapters.cluster import CUSTOM, EVENT, JOB, LEASE, Cluster, Object, ResourceType
from attune.api import Dataset
from attune.contract.result import Summary
from attune.domain.actions import Plan
from attune.errors import Conflict
from attune.reconcile.boundary import UNKNOWN_ATTEMPTS, Outcome, reconcile
from attune.reconcile.dispatch import RECONCILERS
from attune.reconcile.queue import Key
from attune.settings import Settings

from tests.reconcile.conftest import OperatorProcess
from tests.reconcile.kubelet import Namespace, find_condition, wait_for
from tests.reconcile.samples import DATASET, PREPARED

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(240)]


class Killed(BaseException):
    """The process ends here."""


class FusedCluster(Cluster):
    """Counts what was written, and ends the process before the write that it is set to."""

    writes = 0
    attempts = 0
    blows_at: int | None = None

    def _request(self, method: str, path: str, **more: Any) -> tuple[int, Object]:
        if method == "GET":
            return super()._request(method, path, **more)
        self.attempts += 1
        if self.attempts == self.blows_at:
            raise Killed
        answer = super()._request(method, path, **more)
        self.writes += 1
        return answer


def run_to_rest(cluster: Cluster, settings: Settings, key: Key) -> None:
    """Passes until one changes nothing."""
    for _ in range(20):
        outcome = step(cluster, settings, key)
        if outcome.result == "unchanged":
            return
    raise AssertionError(f"{key} does not come to rest")


def step(cluster: Cluster, settings: Settings, key: Key) -> Outcome:
    return reconcile(cluster, settings, key, datetime.now(UTC).replace(microsecond=0))


def live(kubeconfig: str, settings: Settings, namespace: Namespace, name: str, blows_at: int | None) -> int:
    """Brings a Dataset from nothing to ready, killed before one of its writes; gives the number of writes done."""
    cluster = FusedCluster.connect(kubeconfig=kubeconfig)
    assert isinstance(cluster, FusedCluster)
    cluster.blows_at = blows_at
    key = Key("Dataset", namespace.name, name)

    def run() -> None:
        try:
            run_to_rest(cluster, settings, key)
        except Killed:
            # A new process starts with nothing in its memory.
            run_to_rest(cluster, settings, key)

    namespace.apply("Dataset", name, DATASET)
    run()
    job = namespace.wait_job(name)
    namespace.finish(job, Summary(result=PREPARED))

    def complete() -> bool:
        found = namespace.cluster.get(JOB, namespace.name, job["metadata"]["name"])
        return found is not None and find_condition(found, "Complete").get("status") == "True"

    wait_for(complete, "the Job to be complete")
    run()
    cluster.close()
    return cluster.writes


def test_killed_before_any_write_the_end_is_the_same(
    namespace: Namespace, kubeconfig: Path, settings: Settings
) -> None:
    undisturbed = live(str(kubeconfig), settings, namespace, "undisturbed", None)
    expected = namespace.get("Dataset", "undisturbed")["status"]
    assert undisturbed >= 6  # ConfigMap, Job, Event, status; Event, status
    for number in range(1, undisturbed + 1):
        name = f"killed-{number}"
        assert live(str(kubeconfig), settings, namespace, name, number) == undisturbed, f"killed before write {number}"
        status = namespace.get("Dataset", name)["status"]
        assert {key: status[key] for key in ("phase", "revision", "stats")} == {
            key: expected[key] for key in ("phase", "revision", "stats")
        }
        assert len(namespace.jobs(name)) == 1
        said = [one for one in namespace.cluster.list(EVENT, namespace.name) if one["involvedObject"]["name"] == name]
        assert sorted(one["reason"] for one in said) == ["Prepared", "Starting"]
        assert all(one["count"] == 1 for one in said)


def test_pass_on_a_stale_state_stores_nothing(namespace: Namespace, kubeconfig: Path, settings: Settings) -> None:
    namespace.apply("Dataset", "calls", {**DATASET, "suspend": True})
    connection = Cluster.connect(kubeconfig=str(kubeconfig))
    real = connection.apply_status

    def slow(obj: object) -> object:
        # Somebody changes the spec between this pass's read and its write.
        namespace.apply("Dataset", "calls", {**DATASET, "language": "de", "suspend": True})
        return real(obj)  # type: ignore[arg-type]

    connection.apply_status = slow  # type: ignore[method-assign,assignment]
    outcome = step(connection, settings, Key("Dataset", namespace.name, "calls"))
    assert outcome.error == "Conflict"
    assert outcome.look_again_seconds is not None
    assert outcome.look_again_seconds < 1
    assert "status" not in namespace.get("Dataset", "calls")
    connection.close()


def test_two_operators_make_one_job_and_the_standby_takes_over(
    namespace: Namespace, start_operator: Callable[..., OperatorProcess]
) -> None:
    first, second = start_operator(namespace), start_operator(namespace)

    def leaders() -> list[OperatorProcess]:
        return [one for one in (first, second) if '"message": "leading"' in one.log.read_text()]

    wait_for(leaders, "a leader")
    namespace.apply("Dataset", "calls", DATASET)
    job = namespace.wait_job("calls")
    namespace.start(job)
    namespace.wait_reason("Dataset", "calls", "Preparing")
    assert len(leaders()) == 1
    leader = leaders()[0]
    standby = second if leader is first else first
    wait_for(lambda: "waiting for the Lease" in standby.log.read_text(), "the other to wait")
    assert standby.read("/readyz") == "ok\n"
    assert "attune_leader 0.0" in standby.read("/metrics")
    assert "attune_leader 1.0" in leader.read("/metrics")
    leader.stop(signal.SIGKILL)
    namespace.finish(job, Summary(result=PREPARED))
    namespace.wait_reason("Dataset", "calls", "Prepared")
    assert leaders() == [first, second]
    assert len(namespace.jobs("calls")) == 1


def test_ended_operator_gives_the_lease_back(
    namespace: Namespace, start_operator: Callable[..., OperatorProcess]
) -> None:
    running = start_operator(namespace, lease_seconds="300")
    running.wait_leading()
    assert running.stop() == 0
    lease = namespace.cluster.get(LEASE, namespace.name, "attune-operator")
    assert lease is not None
    assert not lease["spec"].get("holderIdentity")
    again = running.again()
    again.wait_leading(30)


def test_operator_that_loses_its_lease_ends(
    namespace: Namespace, start_operator: Callable[..., OperatorProcess]
) -> None:
    running = start_operator(namespace)
    running.wait_leading()

    def steal() -> bool:
        lease = namespace.cluster.get(LEASE, namespace.name, "attune-operator")
        assert lease is not None
        spec = {**lease["spec"], "holderIdentity": "thief", "leaseDurationSeconds": 300}
        try:
            namespace.cluster.replace({**lease, "spec": spec})
        except Conflict:
            return False
        return True

    wait_for(steal, "the Lease to be taken")
    assert running.process.wait(30) == 1
    namespace.apply("Dataset", "calls", DATASET)
    assert "status" not in namespace.get("Dataset", "calls")


def test_restarted_operator_goes_on_where_it_was(
    namespace: Namespace, start_operator: Callable[..., OperatorProcess]
) -> None:
    running = start_operator(namespace)
    running.wait_leading()
    namespace.apply("Dataset", "calls", DATASET)
    job = namespace.wait_job("calls")
    running.stop(signal.SIGKILL)
    namespace.finish(job, Summary(result=PREPARED))
    namespace.apply("Dataset", "new", DATASET)
    running.again()
    namespace.wait_reason("Dataset", "calls", "Prepared")
    namespace.wait_job("new")
    assert len(namespace.jobs("calls")) == 1


def test_defect_in_the_operator_is_tried_again_and_then_shown(
    namespace: Namespace, kubeconfig: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace.apply("Dataset", "calls", {**DATASET, "suspend": True})
    connection = Cluster.connect(kubeconfig=str(kubeconfig))
    key = Key("Dataset", namespace.name, "calls")

    def decide(observed: object) -> Plan:
        raise ZeroDivisionError(str(observed))

    with monkeypatch.context() as patched:
        patched.setitem(RECONCILERS, "Dataset", replace(RECONCILERS["Dataset"], decide=decide))
        moment = datetime.now(UTC).replace(microsecond=0)
        delays = [
            reconcile(connection, settings, key, moment, failures).look_again_seconds
            for failures in range(UNKNOWN_ATTEMPTS)
        ]
        assert all(delay is not None and delay <= 60 for delay in delays[:-1])
        # From here on it is looked at as often as everything else is.
        assert delays[-1] is None
    shown = namespace.wait_reason("Dataset", "calls", "InternalError")
    assert "ZeroDivisionError" in shown["message"]
    assert "s3://" not in shown["message"]
    assert find_condition(namespace.get("Dataset", "calls"), "Stalled")["status"] == "True"
    run_to_rest(connection, settings, key)
    assert find_condition(namespace.get("Dataset", "calls"), "Ready")["reason"] == "Suspended"
    connection.close()


def test_spec_of_another_release_is_shown_and_mended(
    namespace: Namespace, kubeconfig: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stricter(Dataset):
        """A release that wants more than the CRD that is installed."""

        wanted_by_a_later_release: str

    namespace.apply("Dataset", "calls", {**DATASET, "suspend": True})
    connection = Cluster.connect(kubeconfig=str(kubeconfig))
    key = Key("Dataset", namespace.name, "calls")
    with monkeypatch.context() as patched:
        patched.setitem(RECONCILERS, "Dataset", replace(RECONCILERS["Dataset"], model=Stricter))
        assert step(connection, settings, key).error == "InvalidSpec"
    shown = namespace.wait_reason("Dataset", "calls", "InvalidSpec")
    assert "wantedByALaterRelease" in shown["message"]
    run_to_rest(connection, settings, key)
    assert find_condition(namespace.get("Dataset", "calls"), "Ready")["reason"] == "Suspended"
    connection.close()


def test_refused_request_is_shown_and_tried_again(namespace: Namespace, operator: OperatorProcess) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "no-jobs", "namespace": namespace.name},
        "spec": {"hard": {"count/jobs.batch": "0"}},
    }
    kind = ResourceType("v1", "ResourceQuota", "resourcequotas")
    namespace.cluster._write("POST", kind.path(namespace.name), kind, quota, query={})

    def counted() -> bool:
        found = namespace.cluster.get(kind, namespace.name, "no-jobs")
        return found is not None and "used" in found.get("status", {})

    wait_for(counted, "the quota to be counted")
    namespace.apply("Dataset", "calls", DATASET)
    ready = namespace.wait_reason("Dataset", "calls", "Refused")
    assert "no-jobs" in ready["message"]
    assert find_condition(namespace.get("Dataset", "calls"), "Stalled")["status"] == "True"
    namespace.cluster.delete(kind, namespace.name, "no-jobs")
    namespace.wait_job("calls")
    assert namespace.cluster.get(CUSTOM["Dataset"], namespace.name, "calls") is not None


def test_probes_and_metrics_answer(namespace: Namespace, operator: OperatorProcess) -> None:
    assert operator.read("/healthz") == "ok\n"
    assert operator.read("/readyz") == "ok\n"
    namespace.apply("Dataset", "calls", DATASET)
    namespace.wait_job("calls")
    metrics = operator.read("/metrics")
    assert "attune_workqueue_depth" in metrics
    for name in ("attune_reconcile_total{", "attune_reconcile_duration_seconds_bucket{"):
        wait_for(lambda name=name: name in operator.read("/metrics"), name)  # type: ignore[misc]
