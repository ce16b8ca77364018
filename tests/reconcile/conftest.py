"""A real control plane with our CRDs, an operator as a process of its own, and a namespace for each test."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from attune.adapters.cluster import CUSTOM, Cluster, ResourceType
from attune.errors import AlreadyExists
from attune.settings import Settings

from devcluster import controlplane
from tests.reconcile.kubelet import Namespace, wait_for

ROOT = Path(__file__).resolve().parents[2]
TYPE = ResourceType("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions")
NAMESPACE = ResourceType("v1", "Namespace", "namespaces")

SETTINGS = {
    "ATTUNE_TRAINER_IMAGE": "registry.test/trainer:1",
    "ATTUNE_INFERENCE_IMAGE": "registry.test/inference:1",
    "ATTUNE_HTTP_HOST": "127.0.0.1",
    "ATTUNE_HTTP_PORT": "0",
    "ATTUNE_PROGRESS_SECONDS": "1",
    "ATTUNE_LEASE_SECONDS": "5",
}


@pytest.fixture(scope="session")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """etcd, kube-apiserver and kube-controller-manager, with our CRDs.

    ATTUNE_TEST_CONTROL_PLANE names a folder whose control plane is used and left running: quicker while writing tests.
    """
    kept = os.environ.get("ATTUNE_TEST_CONTROL_PLANE")
    state = Path(kept) if kept else tmp_path_factory.mktemp("control-plane")
    try:
        path = controlplane.start(state)
        subprocess.run(
            [str(kubectl()), "--kubeconfig", str(path), "apply", "--server-side", "-f", str(ROOT / "crds")],
            check=True,
            capture_output=True,
            timeout=60,
        )
        connection = Cluster.connect(kubeconfig=str(path))
        wait_for(lambda: all(connection.is_served(one) for one in CUSTOM.values()), "the CRDs")
        connection.close()
        yield path
    finally:
        if not kept:
            controlplane.stop(state)


def kubectl() -> Path:
    from devcluster import binaries  # noqa: PLC0415 (builds what is missing: only where it is needed)

    return binaries.find("kubectl")


@pytest.fixture(scope="session")
def cluster(kubeconfig: Path) -> Iterator[Cluster]:
    """A connection with every right, for what a test does itself."""
    connection = Cluster.connect(kubeconfig=str(kubeconfig))
    yield connection
    connection.close()


@pytest.fixture
def namespace(cluster: Cluster, kubeconfig: Path, request: pytest.FixtureRequest) -> Iterator[Namespace]:
    """An empty namespace, named after the test."""
    yield from lend_namespace(cluster, re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:48].strip("-"))


def lend_namespace(cluster: Cluster, base: str) -> Iterator[Namespace]:
    """Gives an empty namespace of this name, or of this name with a number, and deletes it in the end."""
    name, number = base, 1
    while True:
        try:
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            cluster._write("POST", NAMESPACE.path(None), NAMESPACE, body, query={})
            break
        except AlreadyExists:
            number += 1
            name = f"{base}-{number}"
    yield Namespace(cluster, name)
    cluster._request("DELETE", NAMESPACE.path(None, name))


@dataclass
class OperatorProcess:
    """An operator that runs as its image would run it."""

    process: subprocess.Popen[bytes]
    log: Path
    again: "Callable[[], OperatorProcess]"

    def wait_leading(self, seconds: float = 120) -> None:
        self.wait_log('"message": "leading"', seconds)

    def wait_log(self, text: str, seconds: float = 120) -> None:
        def look() -> bool:
            assert self.process.poll() is None, f"the operator ended: {self.log.read_text()}"
            return text in self.log.read_text()

        wait_for(look, f"{text} in the operator's log", seconds)

    @property
    def port(self) -> int:
        found = re.search(r'"port": (\d+)', self.log.read_text())
        assert found is not None
        return int(found.group(1))

    def read(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture(scope="session")
def start_operator(
    kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., OperatorProcess]]:
    """Starts operators; those that still run at the end are stopped."""
    started: list[OperatorProcess] = []
    folder = tmp_path_factory.mktemp("operators")

    def start(namespace: Namespace, **settings: str) -> OperatorProcess:
        log = folder / f"{len(started)}.log"
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("ATTUNE_")},
            **SETTINGS,
            "KUBECONFIG": str(kubeconfig),
            "POD_NAME": f"operator-{len(started)}",
            "ATTUNE_WATCH_NAMESPACES": namespace.name,
            "ATTUNE_LEASE_NAMESPACE": namespace.name,
            **{f"ATTUNE_{key.upper()}": value for key, value in settings.items()},
        }
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "attune"], env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        operator = OperatorProcess(process, log, again=lambda: start(namespace, **settings))
        started.append(operator)
        return operator

    yield start
    for operator in started:
        operator.stop()


@pytest.fixture
def operator(start_operator: Callable[..., OperatorProcess], namespace: Namespace) -> Iterator[OperatorProcess]:
    """An operator that serves this test's namespace and no other: tests share a cluster and do not meet."""
    running = start_operator(namespace)
    running.wait_leading()
    yield running
    running.stop(signal.SIGKILL)


@pytest.fixture
def settings() -> Settings:
    """The settings of an operator that a test runs pass by pass."""
    return Settings.from_environment({**SETTINGS, "POD_NAME": "in-process"})
