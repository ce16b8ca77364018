"""A Dataset against a real API server: the test plays the kubelet."""

from collections.abc import Callable

import pytest
from attune.adapters.cluster import CONFIG_MAP, CUSTOM, EVENT, JOB, Cluster
from attune.api import Dataset
from attune.contract.exitcode import ExitCode
from attune.contract.job import JobSpec
from attune.contract.result import Failure, Summary
from attune.domain.dataset import build_prepare_job

from tests.reconcile.conftest import OperatorProcess
from tests.reconcile.kubelet import Namespace, find_condition, wait_for
from tests.reconcile.samples import DATASET, PREPARED

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(180)]


def test_first_visit_sets_all_conditions_and_creates_the_job(namespace: Namespace, operator: OperatorProcess) -> None:
    namespace.apply("Dataset", "calls", DATASET)
    found = namespace.wait("Dataset", "calls", lambda one: "status" in one)
    assert {one["type"] for one in found["status"]["conditions"]} == {"Ready", "Reconciling", "Stalled"}
    assert all(one["observedGeneration"] == 1 for one in found["status"]["conditions"])
    assert found["status"]["observedGeneration"] == 1
    job = namespace.wait_job("calls")
    assert job["metadata"]["name"] == found["status"]["jobName"]
    config = namespace.cluster.get(CONFIG_MAP, namespace.name, job["metadata"]["name"])
    assert config is not None
    spec = JobSpec.model_validate_json(config["data"]["job.json"])
    assert spec.recipe.recipe == "prepare"
    assert spec.recipe.sources[0].uri == "s3://internal/calls/"


def test_result_reaches_the_status_and_survives_job_and_pod(namespace: Namespace, operator: OperatorProcess) -> None:
    namespace.apply("Dataset", "calls", DATASET)
    job = namespace.wait_job("calls")
    namespace.start(job)
    namespace.wait_reason("Dataset", "calls", "Preparing")
    namespace.finish(job, Summary(result=PREPARED))
    ready = namespace.wait_reason("Dataset", "calls", "Prepared")
    assert ready["status"] == "True"
    status = namespace.get("Dataset", "calls")["status"]
    assert status["revision"] == PREPARED.revision
    assert status["splits"]["holdout"]["utterances"] == PREPARED.splits.holdout.utterances
    assert status["quality"]["rejected"] == 1
    name = job["metadata"]["name"]
    assert namespace.cluster.delete(JOB, namespace.name, name)
    wait_for(lambda: namespace.cluster.get(JOB, namespace.name, name) is None, "the Job's end")
    operator.stop()
    assert namespace.get("Dataset", "calls")["status"] == status
    assert namespace.jobs("calls") == []


def test_resync_of_settled_resources_writes_nothing(
    namespace: Namespace, start_operator: Callable[..., OperatorProcess]
) -> None:
    running = start_operator(namespace, resync_seconds="1")
    namespace.apply("Dataset", "done", DATASET)
    namespace.apply("Dataset", "failed", DATASET)
    namespace.apply("Dataset", "busy", DATASET)
    namespace.finish(namespace.wait_job("done"), Summary(result=PREPARED))
    failure = Failure(reason="TooSmallToSplit", message="add speakers")
    namespace.end(namespace.wait_job("failed"), ExitCode.INVALID_INPUT, Summary(failure=failure).to_message())
    namespace.start(namespace.wait_job("busy"))
    namespace.wait_reason("Dataset", "done", "Prepared")
    namespace.wait_reason("Dataset", "failed", "TooSmallToSplit")
    namespace.wait_reason("Dataset", "busy", "Preparing")

    def versions() -> dict[str, str]:
        objects = [namespace.get("Dataset", name) for name in ("done", "failed", "busy")]
        objects += namespace.cluster.list(JOB, namespace.name)
        objects += namespace.cluster.list(EVENT, namespace.name)
        objects += namespace.cluster.list(CONFIG_MAP, namespace.name)
        return {f"{one['kind']}/{one['metadata']['name']}": one["metadata"]["resourceVersion"] for one in objects}

    passes = count_passes(running, "unchanged")
    # The Job controller may still be writing Jobs; what counts is that the operator adds nothing after that.
    wait_for(lambda: count_passes(running, "unchanged") >= passes + 6, "two re-syncs")
    before, passes, changed = versions(), count_passes(running, "unchanged"), count_passes(running, "changed")
    wait_for(lambda: count_passes(running, "unchanged") >= passes + 9, "three more re-syncs")
    assert versions() == before
    assert count_passes(running, "changed") == changed


def count_passes(operator: OperatorProcess, result: str) -> int:
    prefix = f'attune_reconcile_total{{kind="Dataset",result="{result}"}}'
    lines = [line for line in operator.read("/metrics").splitlines() if line.startswith(prefix)]
    return int(float(lines[0].split()[-1])) if lines else 0


def test_spec_change_makes_a_new_job_and_keeps_the_old_revision(
    namespace: Namespace, operator: OperatorProcess
) -> None:
    namespace.apply("Dataset", "calls", DATASET)
    first = namespace.wait_job("calls")
    namespace.finish(first, Summary(result=PREPARED))
    namespace.wait_reason("Dataset", "calls", "Prepared")
    namespace.apply("Dataset", "calls", {**DATASET, "language": "de"})
    second = namespace.wait_job("calls", without=first["metadata"]["name"])
    assert second["metadata"]["name"] != first["metadata"]["name"]
    status = namespace.wait("Dataset", "calls", lambda one: one["status"]["observedGeneration"] == 2)["status"]
    assert status["revision"] == PREPARED.revision
    assert find_condition({"status": status}, "Ready")["status"] == "False"
    newer = PREPARED.model_copy(update={"revision": "sha256:" + "b" * 64})
    namespace.finish(second, Summary(result=newer))
    namespace.wait("Dataset", "calls", lambda one: one["status"]["revision"] == newer.revision)


@pytest.mark.parametrize(
    ("waiting", "message", "reason", "says"),
    [
        ("CreateContainerConfigError", 'secret "attune-store" not found', "SecretNotFound", "attune-store"),
        (
            "CreateContainerConfigError",
            "couldn't find key bucket in Secret team/attune-store",
            "SecretKeyMissing",
            "no key bucket",
        ),
        ("ImagePullBackOff", "Back-off pulling image", "ImagePullFailed", "registry.test/trainer:1"),
    ],
)
def test_blocked_pod_says_what_to_change_and_goes_on(
    namespace: Namespace, operator: OperatorProcess, waiting: str, message: str, reason: str, says: str
) -> None:
    namespace.apply("Dataset", "calls", DATASET)
    job = namespace.wait_job("calls")
    namespace.block(job, waiting, message)
    ready = namespace.wait_reason("Dataset", "calls", reason)
    assert ready["status"] == "False"
    assert says in ready["message"]
    found = namespace.get("Dataset", "calls")
    assert find_condition(found, "Reconciling")["status"] == "True"
    assert find_condition(found, "Stalled")["status"] == "False"
    assert [one["type"] for one in events(namespace, "calls") if one["reason"] == reason] == ["Warning"]
    namespace.finish(job, Summary(result=PREPARED))
    namespace.wait_reason("Dataset", "calls", "Prepared")


def events(namespace: Namespace, name: str) -> list[dict[str, str]]:
    found = namespace.cluster.list(EVENT, namespace.name)
    return [one for one in found if one["involvedObject"]["name"] == name]


@pytest.mark.parametrize(
    ("code", "message", "killed", "reason", "says"),
    [
        (
            ExitCode.INVALID_INPUT,
            Summary(failure=Failure(reason="TooSmallToSplit", message="add speakers")).to_message(),
            None,
            "TooSmallToSplit",
            "add speakers",
        ),
        (ExitCode.UNSUPPORTED_MODEL, "this is no JSON", None, "UnsupportedModel", "code 14"),
        (137, "", "OOMKilled", "OutOfMemory", "limits.memory"),
    ],
)
def test_failed_job_is_stalled_with_the_recipes_reason(
    namespace: Namespace, operator: OperatorProcess, code: int, message: str, killed: str | None, reason: str, says: str
) -> None:
    namespace.apply("Dataset", "calls", DATASET)
    job = namespace.wait_job("calls")
    namespace.end(job, code, message, killed)
    ready = namespace.wait_reason("Dataset", "calls", reason)
    assert ready["status"] == "False"
    assert says in ready["message"]
    assert find_condition(namespace.get("Dataset", "calls"), "Stalled")["status"] == "True"
    # podFailurePolicy: no retry is spent on what cannot come out otherwise.
    assert len(namespace.pods(job)) == 1
    # More memory is a new placement of the same run.
    namespace.apply("Dataset", "calls", {**DATASET, "resources": {"limits": {"memory": "2Gi"}}})
    second = namespace.wait_job("calls", without=job["metadata"]["name"])
    namespace.finish(second, Summary(result=PREPARED))
    namespace.wait_reason("Dataset", "calls", "Prepared")


def test_store_failure_is_tried_again_after_a_while(
    namespace: Namespace, start_operator: Callable[..., OperatorProcess]
) -> None:
    start_operator(namespace, retry_seconds="2")
    namespace.apply("Dataset", "calls", DATASET)
    job = namespace.wait_job("calls")
    failure = Failure(reason="BucketNotFound", message="the bucket internal does not exist")
    namespace.end(job, ExitCode.NOT_FOUND, Summary(failure=failure).to_message())
    ready = namespace.wait_reason("Dataset", "calls", "BucketNotFound")
    assert "kubectl delete job" in ready["message"]

    def again() -> bool:
        return any(one["metadata"]["uid"] != job["metadata"]["uid"] for one in namespace.jobs("calls"))

    wait_for(again, "a second Job")
    namespace.finish(namespace.wait_job("calls"), Summary(result=PREPARED))
    namespace.wait_reason("Dataset", "calls", "Prepared")


def test_suspend_holds_the_job_and_resume_goes_on(namespace: Namespace, operator: OperatorProcess) -> None:
    namespace.apply("Dataset", "calls", {**DATASET, "suspend": True})
    namespace.wait_reason("Dataset", "calls", "Suspended")
    assert namespace.jobs("calls") == []
    namespace.apply("Dataset", "calls", DATASET)
    job = namespace.wait_job("calls")
    namespace.start(job)
    namespace.wait_reason("Dataset", "calls", "Preparing")
    namespace.apply("Dataset", "calls", {**DATASET, "suspend": True})
    namespace.wait_reason("Dataset", "calls", "Suspended")
    wait_for(lambda: namespace.wait_job("calls")["spec"]["suspend"], "the Job to be suspended")
    namespace.apply("Dataset", "calls", DATASET)
    wait_for(lambda: not namespace.wait_job("calls")["spec"].get("suspend"), "the Job to go on")
    assert namespace.wait_job("calls")["metadata"]["uid"] == job["metadata"]["uid"]
    namespace.finish(namespace.wait_job("calls"), Summary(result=PREPARED))
    namespace.wait_reason("Dataset", "calls", "Prepared")


def test_deletion_removes_job_and_config(namespace: Namespace, operator: OperatorProcess, cluster: Cluster) -> None:
    created = namespace.apply("Dataset", "calls", DATASET)
    job = namespace.wait_job("calls")
    name = job["metadata"]["name"]
    assert "finalizers" not in namespace.get("Dataset", "calls")["metadata"]
    assert "annotations" not in namespace.get("Dataset", "calls")["metadata"]
    assert delete(namespace, "calls")
    wait_for(lambda: cluster.get(JOB, namespace.name, name) is None, "the Job's end")
    wait_for(lambda: cluster.get(CONFIG_MAP, namespace.name, name) is None, "the ConfigMap's end")
    again = namespace.apply("Dataset", "calls", DATASET)
    assert again["metadata"]["uid"] != created["metadata"]["uid"]
    assert namespace.wait_job("calls")["metadata"]["name"] != name


def delete(namespace: Namespace, name: str) -> bool:
    return namespace.cluster.delete(CUSTOM["Dataset"], namespace.name, name)


def test_foreign_object_of_the_jobs_name_is_not_overwritten(namespace: Namespace, operator: OperatorProcess) -> None:
    namespace.apply("Dataset", "calls", {**DATASET, "suspend": True})
    namespace.wait_reason("Dataset", "calls", "Suspended")
    operator.stop()
    name = job_name_of(namespace)
    foreign = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace.name},
        "data": {"mine": "yes"},
    }
    namespace.cluster.create(foreign)
    namespace.apply("Dataset", "calls", DATASET)
    second = operator.again()
    second.wait_leading()
    ready = namespace.wait_reason("Dataset", "calls", "NotOurs")
    assert name in ready["message"]
    config = namespace.cluster.get(CONFIG_MAP, namespace.name, name)
    assert config is not None
    assert config["data"] == {"mine": "yes"}
    assert namespace.cluster.delete(CONFIG_MAP, namespace.name, name)
    namespace.finish(namespace.wait_job("calls"), Summary(result=PREPARED))
    namespace.wait_reason("Dataset", "calls", "Prepared")


def job_name_of(namespace: Namespace) -> str:
    return build_prepare_job(Dataset.model_validate(namespace.get("Dataset", "calls"))).name
