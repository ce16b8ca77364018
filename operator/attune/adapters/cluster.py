"""The Kubernetes API in a few typed methods over plain dicts; every call has a time limit."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.client import responses
from typing import Any, Final
from urllib.parse import quote, urlencode

import urllib3
from kubernetes import config
from kubernetes.client import ApiClient, Configuration

from attune.api import KINDS
from attune.api.meta import GROUP, VERSION
from attune.errors import AlreadyExists, Conflict, NotServed, Refused, Unavailable

FIELD_MANAGER: Final = "attune"

Object = dict[str, Any]


@dataclass(frozen=True)
class ResourceType:
    """A kind of object and where the API server serves it."""

    api_version: str
    kind: str
    plural: str

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """Builds the URL path of a collection or an object."""
        parts = ["/api" if "/" not in self.api_version else "/apis", self.api_version]
        if namespace is not None:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        if name is not None:
            parts.append(quote(name, safe=""))
        if subresource is not None:
            parts.append(subresource)
        return "/".join(parts)


CONFIG_MAP = ResourceType("v1", "ConfigMap", "configmaps")
EVENT = ResourceType("v1", "Event", "events")
POD = ResourceType("v1", "Pod", "pods")
SERVICE = ResourceType("v1", "Service", "services")
JOB = ResourceType("batch/v1", "Job", "jobs")
DEPLOYMENT = ResourceType("apps/v1", "Deployment", "deployments")
LEASE = ResourceType("coordination.k8s.io/v1", "Lease", "leases")
GATEWAY = ResourceType("gateway.networking.k8s.io/v1", "Gateway", "gateways")
HTTP_ROUTE = ResourceType("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes")
CUSTOM: Final = {model.KIND: ResourceType(f"{GROUP}/{VERSION}", model.KIND, model.PLURAL) for model in KINDS}

_TYPES: Final = {
    (known.api_version, known.kind): known
    for known in (CONFIG_MAP, EVENT, POD, SERVICE, JOB, DEPLOYMENT, LEASE, GATEWAY, HTTP_ROUTE, *CUSTOM.values())
}

_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"
# Besides 5xx: what another try may change.
_PASSING: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.GONE, HTTPStatus.TOO_MANY_REQUESTS})


def type_of(obj: Mapping[str, Any]) -> ResourceType:
    """Gives the type of an object by its apiVersion and kind."""
    return _TYPES[(obj["apiVersion"], obj["kind"])]


def is_owned_by(obj: Mapping[str, Any], uid: str) -> bool:
    """Tells whether an object's controller is the object with this uid."""
    references = obj.get("metadata", {}).get("ownerReferences") or []
    return any(one.get("uid") == uid and one.get("controller") for one in references)


def find_setter(obj: Mapping[str, Any], *path: str) -> str | None:
    """Names the field manager that has set a field as it is now, this operator before others that agree with it.

    None where nobody says so. find_setter(job, "spec", "suspend") -> "kubectl-patch".
    """
    managers = []
    for entry in obj.get("metadata", {}).get("managedFields") or []:
        fields = entry.get("fieldsV1") or {}
        for part in path:
            fields = fields.get(f"f:{part}") if isinstance(fields, Mapping) else None
        if fields is not None:
            managers.append(str(entry.get("manager")))
    return FIELD_MANAGER if FIELD_MANAGER in managers else next(iter(managers), None)


def read_condition(obj: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Gives the condition of a type from an object's status; an empty one where it has not been written."""
    conditions = (obj.get("status") or {}).get("conditions") or []
    return next((one for one in conditions if one.get("type") == kind), {})


def is_true(obj: Mapping[str, Any], kind: str) -> bool:
    """Tells whether an object's condition of a type is True."""
    return read_condition(obj, kind).get("status") == "True"


class Cluster:
    """A cluster, as far as the operator needs it. Safe to use from several threads.

    fence is called before each write and raises when this process may no longer write.

    Every method raises Unavailable when the API server does not answer in time or says that it can't now, Conflict when
    an object has changed in between, Refused when the request is forbidden, over quota or invalid, and NotServed when
    the kind is unknown to the API server.
    """

    def __init__(self, client: ApiClient, *, request_seconds: float, fence: Callable[[], None] = lambda: None) -> None:
        self._client = client
        self._timeout = request_seconds
        self._fence = fence

    @classmethod
    def connect(
        cls,
        *,
        request_seconds: float = 10,
        workers: int = 4,
        fence: Callable[[], None] = lambda: None,
        kubeconfig: str | None = None,
    ) -> "Cluster":
        """Connects with the pod's ServiceAccount, or else with a kubeconfig file: this one, or KUBECONFIG's.

        Raises:
            Unavailable: when neither is there.
        """
        configuration = Configuration()
        try:
            try:
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException:
                config.load_kube_config(config_file=kubeconfig, client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            raise Unavailable(f"no cluster: neither in a pod nor with a usable KUBECONFIG ({error})") from error
        configuration.connection_pool_maxsize = workers + 2
        # One attempt a request: reconciles repeat as a whole, and a write must not be sent twice unseen.
        configuration.retries = urllib3.Retry(total=None, connect=1, read=0, redirect=0, status=0, other=0)
        return cls(ApiClient(configuration), request_seconds=request_seconds, fence=fence)

    def get(self, kind: ResourceType, namespace: str, name: str) -> Object | None:
        """Reads an object; None when there is none, or the cluster does not serve the kind."""
        status, answer = self._request("GET", kind.path(namespace, name))
        return None if status == HTTPStatus.NOT_FOUND else answer

    def list(
        self,
        kind: ResourceType,
        namespace: str | None = None,
        labels: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> list[Object]:
        """Reads the objects of a namespace (None: of all namespaces) with all of these labels and fields.

        Raises:
            NotServed: when the API server does not know the kind.
        """
        query = {
            selector: ",".join(f"{key}={value}" for key, value in wanted.items())
            for selector, wanted in (("labelSelector", labels), ("fieldSelector", fields))
            if wanted
        }
        found: list[Object] = []
        while True:
            status, answer = self._request("GET", kind.path(namespace), query={**query, "limit": "500"})
            if status == HTTPStatus.NOT_FOUND:
                raise NotServed(f"the cluster does not serve {kind.kind} ({kind.api_version})")
            # The items of a list carry neither, and what reads them wants both.
            found += [{"apiVersion": kind.api_version, "kind": kind.kind, **item} for item in answer["items"]]
            token = answer.get("metadata", {}).get("continue")
            if not token:
                return found
            query = {**query, "continue": token}

    def is_served(self, kind: ResourceType) -> bool:
        """Tells whether the API server knows a kind; needs no right but that of discovery."""
        prefix = "/api" if "/" not in kind.api_version else "/apis"
        status, answer = self._request("GET", f"{prefix}/{kind.api_version}")
        if status == HTTPStatus.NOT_FOUND:
            return False
        return any(one.get("name") == kind.plural for one in answer.get("resources", []))

    def find_version(self, group: str) -> str | None:
        """Gives the version of an API group that the API server prefers; None when it serves nothing of it."""
        status, answer = self._request("GET", f"/apis/{quote(group, safe='')}")
        if status == HTTPStatus.NOT_FOUND:
            return None
        version: str | None = (answer.get("preferredVersion") or {}).get("version")
        return version

    def create(self, obj: Mapping[str, Any]) -> Object:
        """Creates an object and gives it as stored.

        Raises:
            AlreadyExists: when there is one of that name.
        """
        kind = type_of(obj)
        namespace = obj["metadata"]["namespace"]
        return self._write("POST", kind.path(namespace), kind, obj, query={"fieldManager": FIELD_MANAGER})

    def apply(self, obj: Mapping[str, Any], *, force: bool = True) -> Object:
        """Creates or updates an object by server-side apply (manager attune); gives it as stored.

        With metadata.uid or metadata.resourceVersion in it, it is written only if they are still the object's. force
        takes fields over from others; without it, a field that another manager has set otherwise is a Conflict.
        """
        return self._apply(obj, subresource=None, force=force)

    def apply_status(self, obj: Mapping[str, Any]) -> Object:
        """Writes the status of an object by server-side apply; fields that are left out are removed."""
        return self._apply(obj, subresource="status")

    def patch(
        self, kind: ResourceType, namespace: str, name: str, body: Mapping[str, Any], subresource: str | None = None
    ) -> Object | None:
        """Merge-patches an object and gives it as stored; None when there is none."""
        self._fence()
        status, answer = self._request(
            "PATCH",
            kind.path(namespace, name, subresource),
            query={"fieldManager": FIELD_MANAGER},
            body=body,
            content_type=_MERGE,
        )
        return None if status == HTTPStatus.NOT_FOUND else answer

    def replace(self, obj: Mapping[str, Any]) -> Object:
        """Replaces an object whose resourceVersion is still the one given."""
        kind = type_of(obj)
        metadata = obj["metadata"]
        path = kind.path(metadata["namespace"], metadata["name"])
        return self._write("PUT", path, kind, obj, query={"fieldManager": FIELD_MANAGER})

    def delete(
        self,
        kind: ResourceType,
        namespace: str,
        name: str,
        uid: str | None = None,
        *,
        dependents_first: bool = False,
    ) -> bool:
        """Deletes an object, its dependents after it or first; False when it was not there. With uid: only that one."""
        self._fence()
        policy = "Foreground" if dependents_first else "Background"
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": policy}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        status, _ = self._request("DELETE", kind.path(namespace, name), body=body)
        return status != HTTPStatus.NOT_FOUND

    def _apply(self, obj: Mapping[str, Any], subresource: str | None, *, force: bool = True) -> Object:
        kind = type_of(obj)
        metadata = obj["metadata"]
        path = kind.path(metadata["namespace"], metadata["name"], subresource)
        query = {"fieldManager": FIELD_MANAGER, "force": str(force).lower()}
        return self._write("PATCH", path, kind, obj, query=query, content_type=_APPLY)

    def _write(
        self,
        method: str,
        path: str,
        kind: ResourceType,
        body: Mapping[str, Any],
        *,
        query: Mapping[str, str],
        content_type: str = "application/json",
    ) -> Object:
        self._fence()
        status, answer = self._request(method, path, query=query, body=body, content_type=content_type)
        if status == HTTPStatus.NOT_FOUND:
            if answer.get("details", {}).get("name"):
                raise Conflict(f"{kind.kind} {answer['details']['name']} has gone")
            raise NotServed(f"the cluster does not serve {kind.kind} ({kind.api_version})")
        return answer

    def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> tuple[int, Object]:
        """Sends a request; gives the HTTP status (2xx or 404) and the decoded answer."""
        url = self._client.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": "attune-operator"}
        self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        with _translated(method, path):
            # The client's own request() writes no bodies of type apply-patch, and raises before it has read an answer.
            response = self._client.rest_client.pool_manager.request(
                method,
                url,
                headers=headers,
                body=None if body is None else json.dumps(body).encode(),
                timeout=urllib3.Timeout(connect=self._timeout, read=self._timeout),
            )
        return response.status, _judge(method, path, response.status, response.data)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()


@contextlib.contextmanager
def _translated(method: str, path: str) -> Iterator[None]:
    try:
        yield
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Unavailable(f"{method} {path}: the API server did not answer ({type(error).__name__})") from error


def _judge(method: str, path: str, status: int, raw: bytes) -> Object:
    """Gives the decoded answer, or raises the error that the HTTP status stands for."""
    try:
        answer = json.loads(raw) if raw else {}
    except ValueError:
        # A 404 of an unknown path is plain text.
        answer = {}
    if not isinstance(answer, dict):
        answer = {}
    if status < HTTPStatus.MULTIPLE_CHOICES or status == HTTPStatus.NOT_FOUND:
        return answer
    # A proxy in between may answer with a status that no standard knows.
    message = str(answer.get("message") or responses.get(status, "no reason given"))
    if status == HTTPStatus.CONFLICT:
        if answer.get("reason") == "AlreadyExists":
            raise AlreadyExists(message)
        raise Conflict(message)
    # 410: the list has changed too much since its first page, and is to be read from the start.
    if status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise Unavailable(f"{method} {path}: {status} {message}")
    raise Refused(message)
