"""One training run of two pods on a real node: what they learn, and what becomes of it when one of them goes."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from devcluster import client

pytestmark = [pytest.mark.node, pytest.mark.timeout(1500)]

VOICES = """
apiVersion: attune.dev/v1alpha1
kind: Dataset
metadata: {name: voices}
spec:
  sources:
    - s3: {uri: "s3://attune/e2e/new-voices/"}
      format: Manifest
      manifest: transcripts.jsonl
  language: en
  splits: {by: Speaker, validation: "0.15", holdout: "0.3", seed: 7}
"""
FINE_TUNE = """
apiVersion: attune.dev/v1alpha1
kind: FineTune
metadata: {{name: {name}}}
spec:
  baseModel: {{uri: "s3://attune/e2e/mini"}}
  datasets:
    - {{name: voices}}
  lora: {{rank: 8, alpha: 16}}
  padding: Window
  hyperparameters: {{learningRate: "1e-3", precision: Fp32, batchSize: 16, maxBatchSeconds: 96, {more}}}
  checkpoint: {{everySteps: 5, keep: 2}}
  distributed: {distributed}
"""
# Ends the training process of its pod as a defect in a library would.
CRASH = """
import os, pathlib, signal
for entry in pathlib.Path("/proc").iterdir():
    if entry.name.isdigit() and b"training.worker" in (entry / "cmdline").read_bytes():
        if b"deepspeed.launcher" not in (entry / "cmdline").read_bytes():
            os.kill(int(entry.name), signal.SIGSEGV)
            break
else:
    raise SystemExit("no training process")
"""


def succeeded(resource: client.Resource) -> bool:
    return bool(client.condition(resource, "Succeeded").get("status") == "True")


def stalled(resource: client.Resource) -> bool:
    return bool(client.condition(resource, "Stalled").get("status") == "True")


def prepare(namespace: str) -> None:
    client.kubectl("apply", "-n", namespace, "-f", "-", text=VOICES)
    client.wait(
        "dataset",
        "voices",
        namespace,
        until=lambda one: client.condition(one, "Ready").get("status") == "True",
        fails=stalled,
        describe=client.explain,
        seconds=300,
    )


def start(namespace: str, name: str, distributed: str, more: str) -> None:
    text = FINE_TUNE.format(name=name, distributed=distributed, more=more)
    client.kubectl("apply", "-n", namespace, "-f", "-", text=text)


def finish(namespace: str, name: str) -> client.Resource:
    return client.wait(
        "finetune", name, namespace, until=succeeded, fails=stalled, describe=client.explain, seconds=600
    )


def read_adapter(namespace: str, tune: client.Resource, folder: Path) -> dict[str, np.ndarray]:
    from attune_trainer.store import Store  # noqa: PLC0415 (not wanted by tests that are deselected)

    with client.store_on_loopback(namespace):
        Store.from_environment().download_prefix(tune["status"]["model"]["adapterUri"], folder)
    return load_file(folder / "adapter_model.safetensors")


def list_pods(namespace: str, name: str) -> list[client.Resource]:
    found = json.loads(client.kubectl("get", "pods", "-n", namespace, "-l", f"attune.dev/name={name}", "-o", "json"))
    items: list[client.Resource] = found["items"]
    return sorted(items, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))


def running(namespace: str, name: str) -> dict[int, str]:
    """Names the pods that run, by their index."""
    return {
        int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]): str(pod["metadata"]["name"])
        for pod in list_pods(namespace, name)
        if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
    }


def wait_step(namespace: str, name: str, step: int) -> client.Resource:
    """Waits until a run says that it has trained so many steps."""

    def reached(one: client.Resource) -> bool:
        return int(one.get("status", {}).get("progress", {}).get("step") or 0) >= step and not succeeded(one)

    return client.wait("finetune", name, namespace, until=reached, fails=stalled, describe=client.explain, seconds=300)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_pods_learn_what_one_with_both_their_batches_learns(namespace: str, tmp_path: Path, stage: int) -> None:
    prepare(namespace)
    start(namespace, "alone", "{}", "epochs: 1, gradientAccumulation: 2")
    start(namespace, "together", f"{{nodes: 2, deepspeed: {{zeroStage: {stage}}}}}", "epochs: 1")
    alone, together = finish(namespace, "alone"), finish(namespace, "together")
    assert together["status"]["progress"]["step"] == alone["status"]["progress"]["step"]
    whole = read_adapter(namespace, alone, tmp_path / "alone")
    shared = read_adapter(namespace, together, tmp_path / "together")
    assert {name: one.shape for name, one in shared.items()} == {name: one.shape for name, one in whole.items()}
    distance = sum(float(np.square(shared[name] - one).sum()) for name, one in whole.items())
    length = sum(float(np.square(one).sum()) for one in whole.values())
    assert np.sqrt(distance / length) < 0.02
    assert float(together["status"]["metrics"]["wer"]) == pytest.approx(
        float(alone["status"]["metrics"]["wer"]), abs=0.02
    )
    job = client.get("job", together["status"]["jobName"], namespace)
    assert (job["spec"]["completions"], job["status"]["succeeded"]) == (2, 2)
    assert not job["status"].get("failed")
    client.kubectl("delete", "finetune", "--all", "-n", namespace, "--timeout=60s", "--cascade=foreground")
    assert list_pods(namespace, "together") == []


def test_a_pod_that_is_evicted_costs_no_retry_and_one_that_crashes_costs_one_for_both(namespace: str) -> None:
    prepare(namespace)
    start(namespace, "together", "{nodes: 2, deepspeed: {zeroStage: 2}}", "epochs: 8")
    first = wait_step(namespace, "together", 6)
    job, before = first["status"]["jobName"], running(namespace, "together")
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": before[1], "namespace": namespace}}
    path = f"/api/v1/namespaces/{namespace}/pods/{before[1]}/eviction"
    client.kubectl("create", "--raw", path, "-f", "-", text=json.dumps(eviction))

    def are_new(_: client.Resource) -> bool:
        after = running(namespace, "together")
        return len(after) == 2 and not set(after.values()) & set(before.values())

    client.wait("finetune", "together", namespace, until=are_new, fails=stalled, describe=client.explain, seconds=240)
    assert not client.get("job", job, namespace)["status"].get("failed")
    wait_step(namespace, "together", int(first["status"]["progress"]["step"]) + 6)
    crashed = running(namespace, "together")
    client.kubectl("exec", "-n", namespace, crashed[1], "--", "python", "-c", CRASH)
    finish(namespace, "together")
    status = client.get("job", job, namespace)["status"]
    assert (status["failed"], status["succeeded"]) == (1, 2)
    codes = {
        str(pod["metadata"]["name"]): pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
        for pod in list_pods(namespace, "together")
    }
    assert (codes[crashed[0]], codes[crashed[1]]) == (32, 1)
    assert list(codes.values()).count(0) == 2
    client.kubectl("delete", "finetune", "together", "-n", namespace, "--timeout=60s", "--cascade=foreground")
    assert list_pods(namespace, "together") == []
