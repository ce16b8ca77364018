"""A thin client of an API server that shows its answers unchanged."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import config
from kubernetes.client import ApiClient

ROOT = Path(__file__).resolve().parents[2]
GROUP_PATH = "/apis/attune.dev/v1alpha1"
NAMESPACE = "crd-tests"


@dataclass(frozen=True)
class Answer:
    """What the API server said."""

    status: int
    body: dict[str, Any]
    warnings: str

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))


class Api:
    """Sends requests as kubectl does: fields that the schema does not know are an error."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self._client = config.new_client_from_config(str(kubeconfig))

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Answer:
        client: ApiClient = self._client
        response = client.rest_client.pool_manager.request(
            method,
            client.configuration.host + path,
            headers={"Accept": accept, "Content-Type": content_type},
            body=None if body is None else json.dumps(body).encode(),
            timeout=urllib3.Timeout(connect=10, read=30),
        )
        return Answer(response.status, json.loads(response.data), response.headers.get("Warning", ""))

    def create(self, obj: dict[str, Any], *, dry_run: bool = True) -> Answer:
        query = "fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
        return self.request("POST", f"{collection(obj['kind'])}?{query}", obj)

    def merge(self, kind: str, name: str, patch: dict[str, Any], *, subresource: str = "") -> Answer:
        path = f"{collection(kind)}/{name}{subresource}?fieldValidation=Strict"
        return self.request("PATCH", path, patch, content_type="application/merge-patch+json")


PLURALS = {"Dataset": "datasets", "FineTune": "finetunes", "Evaluation": "evaluations", "Canary": "canaries"}


def collection(kind: str) -> str:
    return f"{GROUP_PATH}/namespaces/{NAMESPACE}/{PLURALS[kind]}"
