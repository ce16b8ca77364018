"""The installed chart on a real node."""

import json

import pytest

from devcluster import client

pytestmark = pytest.mark.node

NAMESPACE = "attune-system"


def test_helm_test_finds_the_operator_ready_and_its_kinds_served(cluster: None) -> None:
    said = client.run("helm", "test", "attune", "--namespace", NAMESPACE, "--timeout", "2m")
    assert "Succeeded" in said


def test_the_operator_runs_under_its_own_account_where_pod_security_is_restricted(cluster: None) -> None:
    client.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted", "--overwrite")
    client.kubectl("rollout", "restart", "deployment/attune", "-n", NAMESPACE)
    client.kubectl("rollout", "status", "deployment/attune", "-n", NAMESPACE, "--timeout=120s")
    pods = json.loads(
        client.kubectl("get", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=attune", "-o", "json")
    )
    running = [pod for pod in pods["items"] if "deletionTimestamp" not in pod["metadata"]]
    assert [pod["spec"]["serviceAccountName"] for pod in running] == ["attune"]
    log = client.kubectl("logs", "-n", NAMESPACE, "deployment/attune")
    assert "forbidden" not in log.lower()
