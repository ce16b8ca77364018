"""The whole, on a real node: a tuned model is promoted, a worse one rolled back, and the operator dies in both."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from devcluster import client

pytestmark = [pytest.mark.node, pytest.mark.timeout(1500)]
STORY = Path(__file__).with_name("story.yaml")


def has(kind: str, value: str = "True") -> Callable[[client.Resource], bool]:
    return lambda resource: client.condition(resource, kind).get("status") == value


def phase(resource: client.Resource) -> str:
    return str(resource.get("status", {}).get("phase"))


def kill_operator() -> str:
    """Kills the operator without notice and returns the name of the pod that died."""
    pods = json.loads(
        client.kubectl("get", "pods", "-n", "attune-system", "-l", "app.kubernetes.io/name=attune", "-o", "json")
    )
    names = [pod["metadata"]["name"] for pod in pods["items"]]
    assert names
    client.kubectl("delete", "pod", *names, "-n", "attune-system", "--grace-period=0", "--force")
    return str(names[0])


class Rollout:
    """Follows a rollout; kills the operator once, as soon as the canary gets traffic."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.killed = ""
        self.weights: list[int] = []

    def watch(self, _: client.Resource) -> None:
        route = client.get("httproute", "voice", self.namespace)
        weights = {each["name"]: each["weight"] for each in route["spec"]["rules"][0]["backendRefs"]}
        assert sum(weights.values()) == 100
        weight = weights["voice-canary"]
        if not self.weights or self.weights[-1] != weight:
            self.weights.append(weight)
        if weight > 0 and not self.killed:
            self.killed = kill_operator()

    def run(self, model: dict[str, object]) -> client.Resource:
        before = client.get("canary", "voice", self.namespace)
        known = {entry["id"] for entry in before["status"].get("history", [])}
        patch = [{"op": "replace", "path": "/spec/model", "value": model}]
        client.kubectl("patch", "canary", "voice", "-n", self.namespace, "--type=json", "-p", json.dumps(patch))
        return client.wait(
            "canary",
            "voice",
            self.namespace,
            until=lambda found: (
                phase(found) in {"Healthy", "Degraded"}
                and any(entry["id"] not in known for entry in found["status"].get("history", []))
            ),
            describe=phase,
            seconds=600,
            each=self.watch,
        )


def test_tuned_model_is_promoted_and_a_worse_one_rolled_back(namespace: str) -> None:
    client.kubectl("apply", "-n", namespace, "-f", str(STORY))
    client.wait("dataset", "voices", namespace, until=has("Ready"), fails=has("Stalled"), describe=phase, seconds=300)
    base = client.wait(
        "evaluation", "base", namespace, until=has("Succeeded"), fails=has("Stalled"), describe=phase, seconds=300
    )
    assert base["status"]["verdict"]["decision"] == "FineTune"
    tuned = client.wait(
        "finetune", "tuned", namespace, until=has("Succeeded"), fails=has("Stalled"), describe=phase, seconds=600
    )
    assert float(tuned["status"]["metrics"]["wer"]) < float(tuned["status"]["metrics"]["baselineWer"])
    both = client.wait(
        "evaluation", "base-and-tuned", namespace, until=has("Succeeded"), fails=has("Stalled"), describe=phase,
        seconds=300,
    )  # fmt: skip
    assert both["status"]["winner"] == "tuned"
    assert both["status"]["verdict"]["decision"] == "Promote"
    client.wait("canary", "voice", namespace, until=has("Ready"), fails=has("Stalled"), describe=phase, seconds=300)

    promotion = Rollout(namespace)
    canary = promotion.run({"fineTuneRef": {"name": "tuned"}})
    assert promotion.killed
    assert canary["status"]["history"][0]["outcome"] == "Promoted"
    assert canary["status"]["phase"] == "Healthy"
    assert canary["status"]["stable"]["digest"] == tuned["status"]["model"]["digest"]
    reached = promotion.weights[: promotion.weights.index(max(promotion.weights)) + 1]
    assert reached == sorted(reached), promotion.weights
    assert max(reached) == 100
    assert promotion.weights[-1] == 0

    rollback = Rollout(namespace)
    canary = rollback.run({"uri": "s3://attune/e2e/mini"})
    assert rollback.killed
    assert canary["status"]["history"][0]["outcome"] == "RolledBack"
    assert canary["status"]["history"][0]["reason"] == "WordErrorRateTooHigh"
    assert canary["status"]["phase"] == "Degraded"
    assert canary["status"]["stable"]["digest"] == tuned["status"]["model"]["digest"]
    assert rollback.weights[-1] == 0
    assert max(rollback.weights) < 100, rollback.weights

    assert_at_rest(namespace)
    client.kubectl("delete", "canary,evaluation,finetune,dataset", "--all", "-n", namespace, "--timeout=60s")


def assert_at_rest(namespace: str) -> None:
    """Asserts that nothing is written while nothing changes: resource versions stand still over several looks."""

    def versions() -> dict[str, str]:
        kinds = "ads,aft,aev,acn,httproutes,deployments,services,configmaps,jobs"
        found = json.loads(client.kubectl("get", kinds, "-n", namespace, "-o", "json"))
        return {
            f"{each['kind']}/{each['metadata']['name']}": each["metadata"]["resourceVersion"] for each in found["items"]
        }

    # The end of a rollout removes the canary's pods; only then is it at rest.
    deadline = time.monotonic() + 120
    before = versions()
    while time.monotonic() < deadline:
        time.sleep(15)  # longer than an analysis interval: what would write by itself has had its turn
        now = versions()
        if now == before:
            return
        before = now
    raise AssertionError("resources were still being written after two minutes")
