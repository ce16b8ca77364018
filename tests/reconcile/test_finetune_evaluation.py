"""FineTune and Evaluation against a real API server: the test plays the kubelet and the recipes."""

import http.server
import threading
from collections.abc import Iterator

import pytest
from attune.adapters.cluster import CONFIG_MAP, CUSTOM, JOB, POD, Object
from attune.contract.exitcode import ExitCode
from attune.contract.job import EvaluateRecipe, FinetuneRecipe, JobSpec
from attune.contract.result import Failure, MetricValue, Progress, Summary

from tests.reconcile.conftest import OperatorProcess
from tests.reconcile.kubelet import IMAGE_ID, Namespace, find_condition, wait_for
from tests.reconcile.samples import DATASET, EVALUATED, EVALUATION, FINE_TUNE, PREPARED, TRAINED, TRAINED_ON_GPUS

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(180)]


def read_spec(namespace: Namespace, job: Object) -> JobSpec:
    config = namespace.cluster.get(CONFIG_MAP, namespace.name, job["metadata"]["name"])
    assert config is not None
    return JobSpec.model_validate_json(config["data"]["job.json"])


def test_the_chain_from_audio_to_verdict(namespace: Namespace, operator: OperatorProcess) -> None:
    # Applied in the wrong order on purpose: each waits for what it needs.
    namespace.apply("Evaluation", "holdout", EVALUATION)
    namespace.wait_reason("Evaluation", "holdout", "DatasetNotFound")
    namespace.apply("FineTune", "lora", FINE_TUNE)
    missing = namespace.wait_reason("FineTune", "lora", "DatasetNotFound")
    assert "calls" in missing["message"]
    namespace.apply("Dataset", "calls", DATASET)
    namespace.wait_reason("FineTune", "lora", "DatasetNotReady")
    namespace.finish(namespace.wait_job("calls"), Summary(result=PREPARED))

    training = namespace.wait_job("lora")
    recipe = read_spec(namespace, training).recipe
    assert isinstance(recipe, FinetuneRecipe)
    assert recipe.datasets[0].revision == PREPARED.revision
    assert recipe.output_prefix.startswith(f"models/{namespace.name}/finetune/lora/")
    namespace.wait_reason("Evaluation", "holdout", "FineTuneNotFinished")
    namespace.finish(training, Summary(result=TRAINED_ON_GPUS))
    done = namespace.wait_reason("FineTune", "lora", "BudgetReached")
    assert done["status"] == "True"
    assert "0.113" in done["message"]
    status = namespace.get("FineTune", "lora")["status"]
    assert status["report"] == TRAINED_ON_GPUS.report_uri
    assert status["model"]["weightsDigest"] == TRAINED_ON_GPUS.weights_digest
    assert status["estimate"] == {"seconds": 90, "gpuHours": "0.2", "memoryBytes": 3_000_000_000}
    assert status["usage"]["peakMemoryBytes"] == 2_500_000_000
    assert status["lineage"]["imageDigest"] == IMAGE_ID.partition("@")[2]
    assert status["lineage"]["configDigest"] == recipe.config_digest()
    assert status["lineage"]["hardware"]["processes"] == 8
    assert status["model"]["digest"] == TRAINED.model_digest
    assert status["lineage"]["datasets"] == [{"name": "calls", "revision": PREPARED.revision, "uri": PREPARED.uri}]

    judging = namespace.wait_job("holdout")
    judged = read_spec(namespace, judging).recipe
    assert isinstance(judged, EvaluateRecipe)
    assert judged.candidates[1].model.uri == TRAINED.model_uri
    assert judged.candidates[1].model.digest == TRAINED.model_digest
    namespace.finish(judging, Summary(result=EVALUATED))
    verdict = namespace.wait_reason("Evaluation", "holdout", "Evaluated")
    assert verdict["message"].startswith("Promote: ")
    status = namespace.get("Evaluation", "holdout")["status"]
    assert status["winner"] == "tuned"
    assert status["verdict"]["wouldChange"] == EVALUATED.verdict.would_change
    # The API server drops what the CRD does not have.
    assert status["gaps"] == [one.model_dump(by_alias=True) for one in EVALUATED.gaps]
    assert status["failed"] == [one.model_dump(by_alias=True) for one in EVALUATED.failed]
    assert status["normaliser"] == EVALUATED.normaliser


def test_revision_is_fixed_when_the_run_begins(namespace: Namespace, operator: OperatorProcess) -> None:
    namespace.apply("Dataset", "calls", DATASET)
    first = namespace.wait_job("calls")
    namespace.finish(first, Summary(result=PREPARED))
    namespace.apply("FineTune", "lora", FINE_TUNE)
    training = namespace.wait_job("lora")
    namespace.start(training)
    namespace.wait_reason("FineTune", "lora", "Training")
    namespace.apply("Dataset", "calls", {**DATASET, "language": "de"})
    second = namespace.wait_job("calls", without=first["metadata"]["name"])
    newer = PREPARED.model_copy(update={"revision": "sha256:" + "b" * 64})
    namespace.finish(second, Summary(result=newer))
    namespace.wait("Dataset", "calls", lambda one: one["status"]["revision"] == newer.revision)
    assert namespace.cluster.delete(CUSTOM["Dataset"], namespace.name, "calls")
    namespace.finish(training, Summary(result=TRAINED))
    namespace.wait_reason("FineTune", "lora", "Trained")
    assert [one["metadata"]["uid"] for one in namespace.jobs("lora")] == [training["metadata"]["uid"]]


def test_the_next_generation_waits_for_its_parent_and_begins_with_its_model(
    namespace: Namespace, operator: OperatorProcess
) -> None:
    next_one = {
        "baseModel": {"fineTuneRef": {"name": "lora"}},
        "datasets": [{"name": "calls", "weight": "2"}],
        "retention": {"replay": {"datasetRef": {"name": "general"}, "ratio": "0.25"}},
    }
    namespace.apply("FineTune", "next", next_one)
    namespace.apply("Dataset", "calls", DATASET)
    namespace.finish(namespace.wait_job("calls"), Summary(result=PREPARED))
    namespace.wait_reason("FineTune", "next", "DatasetNotFound")
    namespace.apply("Dataset", "general", DATASET)
    old = PREPARED.model_copy(update={"revision": "sha256:" + "b" * 64})
    namespace.finish(namespace.wait_job("general"), Summary(result=old))
    namespace.wait_reason("FineTune", "next", "FineTuneNotFound")
    namespace.apply("FineTune", "lora", FINE_TUNE)
    namespace.wait_reason("FineTune", "next", "FineTuneNotFinished")
    namespace.finish(namespace.wait_job("lora"), Summary(result=TRAINED))

    training = namespace.wait_job("next")
    recipe = read_spec(namespace, training).recipe
    assert isinstance(recipe, FinetuneRecipe)
    assert (recipe.base.uri, recipe.base.digest) == (TRAINED.model_uri, TRAINED.model_digest)
    assert recipe.datasets[0].weight == "2"
    assert recipe.retention is not None
    assert recipe.retention.dataset.revision == old.revision
    # What it began with is written down: the parent may go.
    assert namespace.cluster.delete(CUSTOM["FineTune"], namespace.name, "lora")
    result = TRAINED.model_copy(update={"old_baseline_wer": "0.05", "old_wer": "0.06", "curve_uri": "s3://attune/c"})
    namespace.finish(training, Summary(result=result))
    namespace.wait_reason("FineTune", "next", "Trained")
    status = namespace.get("FineTune", "next")["status"]
    assert status["lineage"]["parent"]["digest"] == TRAINED.model_digest
    assert status["lineage"]["retained"]["revision"] == old.revision
    assert (status["metrics"]["oldWer"], status["curve"]) == ("0.06", "s3://attune/c")
    assert [one["metadata"]["uid"] for one in namespace.jobs("next")] == [training["metadata"]["uid"]]


def test_failed_dataset_holds_its_finetune_until_it_is_mended(namespace: Namespace, operator: OperatorProcess) -> None:
    namespace.apply("FineTune", "lora", FINE_TUNE)
    namespace.apply("Dataset", "calls", DATASET)
    first = namespace.wait_job("calls")
    failure = Failure(reason="TooManyRejected", message="3 of 10 lines are bad")
    namespace.end(first, ExitCode.INVALID_INPUT, Summary(failure=failure).to_message())
    held = namespace.wait_reason("FineTune", "lora", "DatasetFailed")
    assert held["status"] == "False"
    namespace.apply("Dataset", "calls", {**DATASET, "maxRejectedShare": "0.5"})
    second = namespace.wait_job("calls", without=first["metadata"]["name"])
    namespace.finish(second, Summary(result=PREPARED))
    assert namespace.wait_job("lora")["metadata"]["name"].startswith("lora-finetune-")


def test_pod_that_goes_before_its_result_was_read_costs_one_more_job(
    namespace: Namespace, operator: OperatorProcess
) -> None:
    namespace.apply("Dataset", "calls", DATASET)
    namespace.finish(namespace.wait_job("calls"), Summary(result=PREPARED))
    namespace.apply("FineTune", "lora", FINE_TUNE)
    job = namespace.wait_job("lora")
    operator.stop()
    pod = namespace.finish(job, Summary(result=TRAINED))

    def complete() -> bool:
        found = namespace.cluster.get(JOB, namespace.name, job["metadata"]["name"])
        return found is not None and find_condition(found, "Complete").get("status") == "True"

    wait_for(complete, "the Job to be complete")
    namespace.cluster.delete(POD, namespace.name, pod["metadata"]["name"])
    wait_for(lambda: not namespace.pods(job), "the pod's end")
    operator.again()

    def second() -> Object | None:
        found = namespace.jobs("lora")
        return found[0] if found and found[0]["metadata"]["uid"] != job["metadata"]["uid"] else None

    again = wait_for(second, "a second Job of the same name")
    assert again["metadata"]["name"] == job["metadata"]["name"]
    namespace.finish(again, Summary(result=TRAINED))
    namespace.wait_reason("FineTune", "lora", "Trained")


@pytest.fixture
def progress() -> Iterator[Progress]:
    """Answers /progress as a pod would, on the port that the contract names."""
    told = Progress(
        stage="Training",
        percent=62,
        step=31,
        total_steps=50,
        epoch="1.9",
        estimated_remaining_seconds=84,
        metrics=[MetricValue(name="wer", value="0.131")],
    )

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = told.model_dump_json(by_alias=True, exclude_none=True).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.2", 9400), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield told
    server.shutdown()
    server.server_close()


def test_progress_of_the_pod_reaches_the_status(
    namespace: Namespace, operator: OperatorProcess, progress: Progress
) -> None:
    namespace.apply("Dataset", "calls", DATASET)
    namespace.finish(namespace.wait_job("calls"), Summary(result=PREPARED))
    namespace.apply("FineTune", "lora", FINE_TUNE)
    namespace.start(namespace.wait_job("lora"), ip="127.0.0.2")
    found = namespace.wait("FineTune", "lora", lambda one: "progress" in (one.get("status") or {}))
    assert found["status"]["progress"]["percent"] == 62
    assert found["status"]["progress"]["metrics"] == [{"name": "wer", "value": "0.131"}]
    version = found["metadata"]["resourceVersion"]
    looked = count_looks(operator)
    wait_for(lambda: count_looks(operator) >= looked + 3, "three more looks")
    # The pod says the same as before: a new time alone is no reason to write.
    assert namespace.get("FineTune", "lora")["metadata"]["resourceVersion"] == version


def count_looks(operator: OperatorProcess) -> int:
    prefix = 'attune_reconcile_total{kind="FineTune",result="unchanged"}'
    lines = [line for line in operator.read("/metrics").splitlines() if line.startswith(prefix)]
    return int(float(lines[0].split()[-1])) if lines else 0


def test_failed_training_says_what_to_change(namespace: Namespace, operator: OperatorProcess) -> None:
    namespace.apply("Dataset", "calls", DATASET)
    namespace.finish(namespace.wait_job("calls"), Summary(result=PREPARED))
    namespace.apply("FineTune", "lora", FINE_TUNE)
    namespace.end(namespace.wait_job("lora"), 137, "", "OOMKilled")
    failed = namespace.wait_reason("FineTune", "lora", "OutOfMemory")
    assert "spec.resources.limits.memory" in failed["message"]
    namespace.apply("Evaluation", "holdout", EVALUATION)
    held = namespace.wait_reason("Evaluation", "holdout", "FineTuneFailed")
    assert held["status"] == "False"
