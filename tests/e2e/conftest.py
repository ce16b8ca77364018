"""One real node, the platform, the operator from its chart, and the Mini model in the bucket."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster import client
from tests.assets.mini_model import ensure_mini_corpus, ensure_mini_model

ROOT = Path(__file__).resolve().parents[2]
VALUES = ROOT / "examples" / "telephone-prompts" / "operator-values.yaml"
STORE = """
apiVersion: v1
kind: Namespace
metadata:
  name: {namespace}
  labels: {{pod-security.kubernetes.io/enforce: restricted}}
---
apiVersion: v1
kind: Secret
metadata: {{name: attune-store, namespace: {namespace}}}
stringData:
  endpoint: http://s3.storage.svc.cluster.local:9000
  bucket: attune
  region: us-east-1
  accessKey: attune
  secretKey: attune-example-only
"""


def make_namespace(name: str) -> None:
    """Makes a namespace with a store, empty of everything else."""
    client.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait=true", "--timeout=120s")
    client.kubectl("apply", "-f", "-", text=STORE.format(namespace=name))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Brings the cluster up, as `make up` does, and takes it down unless it was there before."""
    status = subprocess.run([sys.executable, "-m", "devcluster", "status"], cwd=ROOT, check=False, capture_output=True)
    was_there = status.returncode == 0
    subprocess.run([sys.executable, "-m", "devcluster", "up"], cwd=ROOT, check=True)
    client.load_cluster_environment()
    client.install_operator(VALUES)
    client.kubectl("rollout", "restart", "deployment", "-n", "attune-system")
    client.kubectl("rollout", "status", "deployment", "-n", "attune-system", "--timeout=120s")
    yield
    if not was_there and not os.environ.get("ATTUNE_KEEP"):
        subprocess.run([sys.executable, "-m", "devcluster", "down"], cwd=ROOT, check=True)


@pytest.fixture(scope="session")
def assets(cluster: None) -> None:
    """Puts the Mini model and its corpus into the bucket."""
    from attune_trainer.store import Store  # noqa: PLC0415 (not wanted by tests that are deselected)

    make_namespace("attune-e2e-assets")
    with client.store_on_loopback("attune-e2e-assets"):
        store = Store.from_environment()
        store.upload_directory(ensure_mini_model(), "e2e/mini")
        store.upload_directory(ensure_mini_corpus("new-voices"), "e2e/new-voices")


@pytest.fixture
def namespace(assets: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """Gives a namespace of the test's own; it is kept when the test fails, for a look (ATTUNE_KEEP keeps the node)."""
    failed = request.session.testsfailed
    name = "e2e-" + request.node.name.replace("_", "-").removeprefix("test-")[:40].strip("-")
    make_namespace(name)
    yield name
    if request.session.testsfailed == failed:
        client.kubectl("delete", "namespace", name, "--wait=false")
