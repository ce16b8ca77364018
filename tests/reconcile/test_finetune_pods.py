"""A FineTune of two pods against a real API server and Job controller: the test plays the kubelet."""

from typing import Any

import pytest
from attune.adapters.cluster import JOB, SERVICE, Object
from attune.contract.exitcode import ExitCode
from attune.contract.result import Failure, Summary
from attune.render.names import ANNOTATION_INDEX

from tests.reconcile.conftest import OperatorProcess
from tests.reconcile.kubelet import Namespace, container_status, now, wait_for
from tests.reconcile.samples import DATASET, FINE_TUNE, PREPARED, TRAINED

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(300)]


def wait_pods(namespace: Namespace, job: Object, *before: Object) -> dict[int, Object]:
    """Waits for one pod of each index that has not ended and was not there before."""
    known = {one["metadata"]["uid"] for one in before}

    def look() -> dict[int, Object] | None:
        found = {
            int(pod["metadata"]["annotations"][ANNOTATION_INDEX]): pod
            for pod in namespace.pods(job)
            if pod["metadata"]["uid"] not in known and pod["status"]["phase"] not in ("Succeeded", "Failed")
        }
        return found if set(found) == {0, 1} else None

    return wait_for(look, f"two new pods of {job['metadata']['name']}")


def end(namespace: Namespace, pod: Object, code: int, message: str) -> None:
    """Ends a pod with an exit code and a termination message."""
    ended = {"exitCode": code, "reason": "Error" if code else "Completed", "message": message}
    ended |= {"startedAt": now(), "finishedAt": now()}
    state = container_status({"terminated": ended})
    namespace.say(pod, {"phase": "Failed" if code else "Succeeded", **state})


def test_of_two_pods_that_end_together_one_costs_a_retry_and_nothing_is_left_of_them(
    namespace: Namespace, operator: OperatorProcess
) -> None:
    namespace.apply("Dataset", "calls", DATASET)
    namespace.finish(namespace.wait_job("calls"), Summary(result=PREPARED))
    namespace.apply("FineTune", "lora", {**FINE_TUNE, "distributed": {"nodes": 2}})
    job = namespace.wait_job("lora")
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 2, 2)
    pods = wait_pods(namespace, job)
    for index, pod in pods.items():
        assert pod["spec"]["hostname"] == f"{job['metadata']['name']}-{index}"
        service = namespace.cluster.get(SERVICE, namespace.name, pod["spec"]["subdomain"])
        assert service is not None
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        running: dict[str, Any] = container_status({"running": {"startedAt": now()}})
        namespace.say(pod, {"phase": "Running", **running})
    namespace.wait_reason("FineTune", "lora", "Training")

    crash = Summary(failure=Failure(reason="TrainingCrashed", message="the second pod crashed")).to_message()
    lost = Summary(failure=Failure(reason="PeerLost", message="pod 1 of this run is gone")).to_message()
    end(namespace, pods[1], ExitCode.INTERNAL_ERROR, crash)
    end(namespace, pods[0], ExitCode.PEER_LOST, lost)
    retrying = namespace.wait_reason("FineTune", "lora", "Retrying")
    assert "the second pod crashed; all 2 pods go back" in retrying["message"]
    again = wait_pods(namespace, job, *pods.values())
    counted = namespace.cluster.get(JOB, namespace.name, job["metadata"]["name"])
    assert counted is not None
    assert counted["status"]["failed"] == 1
    for pod in again.values():
        end(namespace, pod, 0, Summary(result=TRAINED).to_message())
    namespace.wait_reason("FineTune", "lora", "Trained")
    namespace.delete("FineTune", "lora")


def test_a_service_that_somebody_has_deleted_is_put_back(namespace: Namespace, operator: OperatorProcess) -> None:
    namespace.apply("Dataset", "calls", DATASET)
    namespace.finish(namespace.wait_job("calls"), Summary(result=PREPARED))
    namespace.apply("FineTune", "lora", {**FINE_TUNE, "distributed": {"nodes": 2}})
    job = namespace.wait_job("lora")
    name = job["spec"]["template"]["spec"]["subdomain"]
    first = wait_for(lambda: namespace.cluster.get(SERVICE, namespace.name, name), "the Service")
    namespace.cluster.delete(SERVICE, namespace.name, name)
    running: dict[str, Any] = container_status({"running": {"startedAt": now()}})
    for pod in wait_pods(namespace, job).values():
        namespace.say(pod, {"phase": "Running", **running})

    def is_back() -> bool:
        found = namespace.cluster.get(SERVICE, namespace.name, name)
        return found is not None and found["metadata"]["uid"] != first["metadata"]["uid"]

    wait_for(is_back, "the Service")
