"""A real API server with our CRDs."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from devcluster import controlplane
from tests.crd.client import GROUP_PATH, NAMESPACE, PLURALS, ROOT, Api

ESTABLISHED_SECONDS = 30.0


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An API server in which the committed CRDs are established."""
    state = tmp_path_factory.mktemp("control-plane")
    kubeconfig = controlplane.start(state)
    try:
        api = Api(kubeconfig)
        names = []
        for file in sorted((ROOT / "crds").glob("*.yaml")):
            definition = yaml.safe_load(file.read_text())
            answer = api.request("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
            assert answer.status == 201, answer.message
            assert answer.warnings == "", answer.warnings
            names.append(definition["metadata"]["name"])
        _wait_established(api, names)
        assert api.request("POST", "/api/v1/namespaces", _namespace()).status == 201
        yield api
    finally:
        controlplane.stop(state)


def _namespace() -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}


def _wait_established(api: Api, names: list[str]) -> None:
    """Waits until each CRD is established and served."""
    deadline = time.monotonic() + ESTABLISHED_SECONDS
    while True:
        served = {one["name"] for one in api.request("GET", GROUP_PATH).body.get("resources", [])}
        established = [name for name in names if _is_established(api, name)]
        if len(established) == len(names) and served >= set(PLURALS.values()):
            return
        assert time.monotonic() < deadline, f"established: {established}, served: {sorted(served)}"
        time.sleep(0.1)  # between two looks


def _is_established(api: Api, name: str) -> bool:
    body = api.request("GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}").body
    conditions = {one["type"]: one["status"] for one in body.get("status", {}).get("conditions", [])}
    return conditions.get("Established") == "True"
