"""The chart in a real API server: installed, upgraded, rolled back and uninstalled by Helm, its rights exercised."""

import base64
import copy
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml
from kubernetes import config
from kubernetes.client import ApiClient

from devcluster import binaries, controlplane
from tests.chart.rendering import CHART, NAMESPACE, RELEASE, Helm, Object

pytestmark = pytest.mark.apiserver

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"
KINDS = "/apis/attune.dev/v1alpha1"
DATASET: Object = {
    "apiVersion": "attune.dev/v1alpha1",
    "kind": "Dataset",
    "metadata": {"name": "calls", "namespace": "speech"},
    "spec": {"sources": [{"s3": {"uri": "s3://calls/"}, "format": "Directory"}], "language": "en"},
}
SECONDS = 60.0


def wait_for(look: Callable[[], Any], what: str) -> Any:
    """Looks again and again until there is something to see."""
    deadline = time.monotonic() + SECONDS
    while not (seen := look()):
        assert time.monotonic() < deadline, f"waited {SECONDS:.0f} s for {what}"
        time.sleep(0.1)  # between two looks
    return seen


@dataclass(frozen=True)
class Server:
    """An API server, and Helm pointed at it."""

    kubeconfig: Path
    helm: Helm
    client: ApiClient

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Object]:
        response = self.client.rest_client.pool_manager.request(
            method,
            self.client.configuration.host + path,
            headers={"Accept": "application/json", "Content-Type": "application/json"},
            body=None if body is None else json.dumps(body).encode(),
            timeout=urllib3.Timeout(connect=10, read=30),
        )
        return response.status, json.loads(response.data)

    def get(self, path: str) -> Object:
        status, body = self.request("GET", path)
        assert status == 200, body
        return body

    def create_namespace(self, name: str) -> None:
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
        status, answer = self.request("POST", "/api/v1/namespaces", body)
        assert status in {201, 409}, answer

    def install(self, values: Object) -> None:
        self.helm.run(
            "upgrade", "--install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--create-namespace",
            "--values", "-", stdin=json.dumps(values), kubeconfig=self.kubeconfig,
        )  # fmt: skip

    def uninstall(self) -> None:
        self.helm.run("uninstall", RELEASE, "--namespace", NAMESPACE, kubeconfig=self.kubeconfig)

    def may(self, verb: str, resource: str, namespace: str, name: str = "") -> bool:
        """Asks the API server what the operator's account may do."""
        group, _, plural = resource.rpartition("/") if resource.count("/") == 1 else ("", "", resource)
        plural, _, subresource = plural.partition(":")
        attributes = {
            "verb": verb, "group": group, "resource": plural, "subresource": subresource, "namespace": namespace,
            "name": name,
        }  # fmt: skip
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}", "system:authenticated"]
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {"user": ACCOUNT, "groups": groups, "resourceAttributes": attributes},
        }
        status, answer = self.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
        assert status == 201, answer
        return bool(answer["status"]["allowed"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, helm: Helm) -> Iterator[Server]:
    state = tmp_path_factory.mktemp("control-plane")
    try:
        kubeconfig = controlplane.start(state)
        server = Server(kubeconfig, helm, config.new_client_from_config(str(kubeconfig)))
        for name in ("speech", "other", "gateway"):
            server.create_namespace(name)
        yield server
    finally:
        controlplane.stop(state)


@pytest.fixture
def release(server: Server) -> Iterator[Callable[[Object], None]]:
    """Installs the chart with values; uninstalls it at the end."""
    installed = []

    def install(values: Object) -> None:
        server.install(values)
        installed.append(values)

    yield install
    if installed:
        server.uninstall()


NAMESPACED: Object = {"watchNamespaces": ["speech"], "gatewayNamespaces": ["gateway"]}
OURS = ("datasets", "finetunes", "evaluations", "canaries")

# What the operator's code does (reconcile/, adapters/), and nothing else.
NEEDED: tuple[tuple[str, str], ...] = (
    *((verb, f"attune.dev/{kind}") for kind in OURS for verb in ("get", "list", "watch")),
    *(("patch", f"attune.dev/{kind}:status") for kind in OURS),
    *((verb, "batch/jobs") for verb in ("get", "list", "watch", "create", "patch", "delete")),
    *((verb, "apps/deployments") for verb in ("get", "list", "watch", "create", "patch", "delete")),
    *((verb, "gateway.networking.k8s.io/httproutes") for verb in ("get", "list", "watch", "create", "patch")),
    *((verb, "services") for verb in ("get", "create", "patch")),
    *((verb, "configmaps") for verb in ("get", "create", "delete")),
    *((verb, "pods") for verb in ("get", "list", "watch")),
    *((verb, "events") for verb in ("get", "list", "create", "patch")),
    ("get", "gateway.networking.k8s.io/gateways"),
    ("get", "kueue.x-k8s.io/localqueues"),
    ("list", "kueue.x-k8s.io/workloads"),
)
FORBIDDEN: tuple[tuple[str, str], ...] = (
    *((verb, "secrets") for verb in ("get", "list", "watch", "create", "update", "patch", "delete")),
    *((verb, f"attune.dev/{kind}") for kind in OURS for verb in ("create", "update", "patch", "delete")),
    *((verb, "pods") for verb in ("create", "update", "patch", "delete")),
    ("create", "pods:exec"),
    ("get", "pods:log"),
    ("get", "pods:proxy"),
    ("create", "serviceaccounts:token"),
    ("deletecollection", "batch/jobs"),
    ("list", "namespaces"),
    ("create", "rbac.authorization.k8s.io/roles"),
    ("create", "rbac.authorization.k8s.io/rolebindings"),
    ("update", "gateway.networking.k8s.io/gateways"),
    ("list", "coordination.k8s.io/leases"),
    *(
        (verb, f"kueue.x-k8s.io/{kind}")
        for kind in ("workloads", "localqueues")
        for verb in ("create", "update", "patch", "delete")
    ),
)


def test_namespaced_mode_gives_the_rights_that_are_used_where_they_are_used(
    server: Server, release: Callable[[Object], None]
) -> None:
    release(NAMESPACED)
    assert [right for right in NEEDED if not server.may(*right, "speech")] == []
    assert [right for right in FORBIDDEN if server.may(*right, "speech")] == []
    elsewhere = [right for right in NEEDED for place in ("other", NAMESPACE, "") if server.may(*right, place)]
    assert elsewhere == []
    assert [right for right in NEEDED if server.may(*right, "gateway")] == [
        ("get", "gateway.networking.k8s.io/gateways")
    ]


def test_cluster_mode_gives_the_same_rights_everywhere(server: Server, release: Callable[[Object], None]) -> None:
    release({})
    for place in ("speech", "other"):
        assert [right for right in NEEDED if not server.may(*right, place)] == []
        assert [right for right in FORBIDDEN if server.may(*right, place)] == []


def test_the_lease_is_its_own_and_no_other(server: Server, release: Callable[[Object], None]) -> None:
    release(NAMESPACED)
    lease = "coordination.k8s.io/leases"
    assert server.may("create", lease, NAMESPACE)
    for verb in ("get", "update"):
        assert server.may(verb, lease, NAMESPACE, "attune-operator")
        assert not server.may(verb, lease, NAMESPACE, "somebody-elses")
        assert not server.may(verb, lease, "speech", "attune-operator")


def test_pod_security_restricted_admits_operator_and_test_pod(server: Server, helm: Helm) -> None:
    rendered = helm.render(tests=True)
    pods = {
        "operator": {**rendered.one("Deployment")["spec"]["template"], "apiVersion": "v1", "kind": "Pod"},
        "test": rendered.one("Pod"),
    }
    wait_for(lambda: server.request("GET", "/api/v1/namespaces/other/serviceaccounts/default")[0] == 200, "account")
    for name, template in pods.items():
        pod = copy.deepcopy(template)
        pod["metadata"].update(name=name, namespace="other")
        pod["spec"]["serviceAccountName"] = "default"
        status, answer = server.request("POST", "/api/v1/namespaces/other/pods?dryRun=All", pod)
        assert status == 201, answer
    # The same test can fail.
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    status, answer = server.request("POST", "/api/v1/namespaces/other/pods?dryRun=All", pod)
    assert status == 403
    assert "restricted" in answer["message"]


def test_upgrade_rollback_and_uninstall_keep_every_resource(server: Server) -> None:
    server.install(NAMESPACED)
    path = f"{KINDS}/namespaces/speech/datasets"
    wait_for(lambda: server.request("GET", path)[0] == 200, "the CRDs")
    status, before = server.request("POST", path, DATASET)
    assert status == 201, before

    server.install({**NAMESPACED, "settings": {"workers": 8}, "crds": {"annotations": {"team": "speech"}}})
    crd = server.get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/datasets.attune.dev")
    assert crd["metadata"]["annotations"]["team"] == "speech"
    server.helm.run("rollback", RELEASE, "1", "--namespace", NAMESPACE, kubeconfig=server.kubeconfig)
    deployment = server.get(f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/attune")
    variables = {
        one["name"]: one.get("value") for one in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert variables["ATTUNE_WORKERS"] == "4"

    server.uninstall()
    assert server.request("GET", f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/attune")[0] == 404
    after = server.get(f"{path}/calls")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    # A later release takes the CRDs over again.
    server.install(NAMESPACED)
    server.uninstall()
    status, _ = server.request("DELETE", f"{path}/calls")
    assert status == 200


def test_plain_manifests_can_be_applied_without_a_release(server: Server, helm: Helm) -> None:
    text = yaml.safe_dump_all(helm.render({**NAMESPACED, "crds": {"install": False}}))
    kubectl = [str(binaries.find("kubectl")), "--kubeconfig", str(server.kubeconfig)]

    def run(*arguments: str, text: str | None = None) -> str:
        done = subprocess.run([*kubectl, *arguments], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    server.create_namespace(NAMESPACE)
    run("apply", "-f", str(CHART.parent.parent / "crds"))
    assert "deployment.apps/attune serverside-applied" in run("apply", "--server-side", "-f", "-", text=text)
    # Again: nothing changes.
    version = server.get(f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/attune")["metadata"]["generation"]
    run("apply", "--server-side", "-f", "-", text=text)
    assert server.get(f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/attune")["metadata"]["generation"] == version
    run("delete", "-f", "-", text=text)


@pytest.mark.parametrize("values", [NAMESPACED, {}], ids=["namespaced", "cluster-wide"])
def test_the_operator_works_with_the_charts_rights_alone(
    server: Server, release: Callable[[Object], None], tmp_path: Path, values: Object
) -> None:
    release({**values, "settings": {"leaseSeconds": 5}})
    path = f"{KINDS}/namespaces/speech/datasets"
    wait_for(lambda: server.request("GET", path)[0] == 200, "the CRDs")
    log = tmp_path / "operator.log"
    deployment = server.get(f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/attune")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    environment = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    environment |= {
        "KUBECONFIG": str(_as_operator(server, tmp_path)),
        "POD_NAME": "attune-0",
        "POD_NAMESPACE": NAMESPACE,
        "ATTUNE_LEASE_NAMESPACE": NAMESPACE,
        "ATTUNE_HTTP_HOST": "127.0.0.1",
        "ATTUNE_HTTP_PORT": "0",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "attune"], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        name = f"calls-{len(values)}"
        body = {**DATASET, "metadata": {"name": name, "namespace": "speech"}}
        status, answer = server.request("POST", path, body)
        assert status == 201, answer

        def conditions() -> Any:
            assert process.poll() is None, log.read_text()
            return (server.get(f"{path}/{name}").get("status") or {}).get("conditions")

        said = {one["type"]: one for one in wait_for(conditions, "the operator's first visit")}
        assert said["Stalled"]["status"] == "False", said
        assert said["Reconciling"]["status"] == "True", said
        jobs = server.get("/apis/batch/v1/namespaces/speech/jobs")["items"]
        mine = [one for one in jobs if one["metadata"]["ownerReferences"][0]["name"] == name]
        assert len(mine) == 1
        assert server.get(f"/api/v1/namespaces/speech/configmaps/{mine[0]['metadata']['name']}")["immutable"] is True
        lease = server.get(f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/attune-operator")
        assert lease["spec"]["holderIdentity"] == "attune-0"
        events = server.get("/api/v1/namespaces/speech/events")["items"]
        assert [one for one in events if one["involvedObject"]["name"] == name]
        port = re.search(r'"port": (\d+)', log.read_text())
        assert port is not None
        assert _check_installation(server, tmp_path, f"http://127.0.0.1:{port[1]}/readyz") == (
            0,
            "the operator is ready, and its four kinds are served\n",
        )
        server.request("DELETE", f"{path}/{name}")
    finally:
        process.terminate()
        code = process.wait(30)
    text = log.read_text()
    assert code == 0, text
    for word in ("forbidden", "Forbidden", "Refused", "permissions", "Traceback"):
        assert word not in text


def _check_installation(server: Server, folder: Path, ready: str) -> tuple[int, str]:
    """Runs what `helm test` runs, with a pod's surroundings."""
    document = yaml.safe_load((folder / "kubeconfig").read_text())
    (folder / "token").write_text(document["users"][0]["user"]["token"])
    (folder / "ca.crt").write_bytes(base64.b64decode(document["clusters"][0]["cluster"]["certificate-authority-data"]))
    host, port = server.client.configuration.host.removeprefix("https://").rsplit(":", 1)
    script = (CHART / "files" / "check_installation.py").read_text()
    done = subprocess.run(
        [sys.executable, "-c", script.replace("/var/run/secrets/kubernetes.io/serviceaccount", str(folder))],
        env={"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port, "READY_URL": ready},
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    return done.returncode, done.stdout + done.stderr


def _as_operator(server: Server, folder: Path) -> Path:
    """A kubeconfig with the token of the operator's ServiceAccount, which has the chart's rights and no other."""
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    status, answer = server.request("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{RELEASE}/token", request)
    assert status == 201, answer
    document = yaml.safe_load(server.kubeconfig.read_text())
    for user in document["users"]:
        user["user"] = {"token": answer["status"]["token"]}
    file = folder / "kubeconfig"
    file.write_text(yaml.safe_dump(document))
    return file
