"""Builds the Deployment and the Service of an arm."""

import json
from typing import Any, Final

from attune.api.canary import ArmModel, Canary, EnvironmentVariable, PodTemplate, ServerContainer
from attune.contract.environment import (
    SERVE_MODEL_DIGEST,
    SERVE_MODEL_ID,
    SERVE_MODEL_URI,
    SERVE_PORT,
    SERVE_TRACK,
    TERMINATION_MESSAGE_FILE,
    TERMINATION_MESSAGE_VARIABLE,
    WORK_DIRECTORY_VARIABLE,
)
from attune.contract.metrics import Track
from attune.render.job import (
    build_container_security,
    build_pod_security,
    build_resources,
    build_store_environment,
    build_thread_environment,
)
from attune.render.names import (
    COMPONENT_SERVE,
    LABEL_COMPONENT,
    LABEL_OWNER_UID,
    build_labels,
    build_owner_reference,
)
from attune.settings import Settings

CONTAINER: Final = "server"
LABEL_TRACK: Final = "attune.dev/track"
LABEL_REVISION: Final = "attune.dev/revision"
# What the arm serves and was made from: the operator reads it back, and nothing else remembers it.
ANNOTATION_MODEL_ID: Final = "attune.dev/model-id"
ANNOTATION_MODEL_URI: Final = "attune.dev/model-uri"
ANNOTATION_MODEL_DIGEST: Final = "attune.dev/model-digest"
ANNOTATION_TEMPLATE: Final = "attune.dev/template"
# What stable served before a promotion that is not over: what it can go back to.
ANNOTATION_FORMER: Final = "attune.dev/former"

# The server goes on accepting for 5 s after SIGTERM, and then answers what it has accepted.
GRACE_SECONDS: Final = 90
# A pod that is ready for a moment only is not counted as capacity.
MIN_READY_SECONDS: Final = 2

_WORK: Final = "/work"
_TEMPORARY: Final = "/tmp"  # noqa: S108 (a volume of the pod's own)


def name_arm(canary: str, track: Track) -> str:
    """Names an arm's Deployment and Service: ("prod-voice", STABLE) -> "prod-voice-stable"."""
    return f"{canary}-{track.value}"


def select_arm(uid: str, track: Track) -> dict[str, str]:
    """Labels that all pods of an arm carry, and no other pods."""
    return {LABEL_OWNER_UID: uid, LABEL_COMPONENT: COMPONENT_SERVE, LABEL_TRACK: track.value}


def build_deployment(
    canary: Canary,
    track: Track,
    model: ArmModel,
    template: PodTemplate,
    replicas: int,
    settings: Settings,
    former: tuple[ArmModel, PodTemplate] | None = None,
) -> dict[str, Any]:
    """Builds an arm's Deployment, fit for Pod Security `restricted`.

    It surges: never is a pod taken away before its successor is ready. template has its image filled in. former is what
    the arm can go back to.
    """
    owner = canary.owner()
    labels = {**build_labels(owner, COMPONENT_SERVE), LABEL_TRACK: track.value}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name_arm(owner.name, track),
            "namespace": owner.namespace,
            "labels": {**labels, LABEL_REVISION: model.revision},
            "annotations": {
                ANNOTATION_MODEL_ID: model.model_id,
                ANNOTATION_MODEL_URI: model.uri,
                **({ANNOTATION_MODEL_DIGEST: model.digest} if model.digest is not None else {}),
                ANNOTATION_TEMPLATE: dump_template(template),
                **({ANNOTATION_FORMER: dump_former(*former)} if former is not None else {}),
            },
            "ownerReferences": [build_owner_reference(owner)],
        },
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": select_arm(owner.uid, track)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "minReadySeconds": MIN_READY_SECONDS,
            # Kubernetes wants the deadline to be the longer of the two.
            "progressDeadlineSeconds": max(canary.spec.progress_deadline_seconds, MIN_READY_SECONDS + 1),
            "revisionHistoryLimit": 2,
            "template": {
                "metadata": {
                    "labels": {**template.metadata.labels, **labels, LABEL_REVISION: model.revision},
                    "annotations": {
                        "prometheus.io/scrape": "true",
                        "prometheus.io/port": str(SERVE_PORT),
                        "prometheus.io/path": "/metrics",
                        **template.metadata.annotations,
                    },
                },
                "spec": _build_pod(track, model, template, settings),
            },
        },
    }


def build_service(canary: Canary, track: Track) -> dict[str, Any]:
    """Builds the Service in front of an arm; it stays while the arm has no pods, so that the route always resolves."""
    owner = canary.owner()
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name_arm(owner.name, track),
            "namespace": owner.namespace,
            "labels": {**build_labels(owner, COMPONENT_SERVE), LABEL_TRACK: track.value},
            "ownerReferences": [build_owner_reference(owner)],
        },
        "spec": {
            "type": "ClusterIP",
            "selector": select_arm(owner.uid, track),
            "ports": [{"name": "http", "port": canary.spec.service.port, "protocol": "TCP", "targetPort": "http"}],
        },
    }


def dump_template(template: PodTemplate) -> str:
    """Writes a template for the Deployment's annotation; PodTemplate reads it back."""
    return _dump(_reduce(template))


def dump_former(model: ArmModel, template: PodTemplate) -> str:
    """Writes what an arm served before, for the Deployment's annotation; read_former reads it back."""
    return _dump({"model": _reduce(model), "template": _reduce(template)})


def read_former(text: str | None) -> tuple[ArmModel, PodTemplate] | None:
    """Reads what an arm served before; None where nothing is written of that, or somebody has broken it."""
    try:
        plain = json.loads(text or "")
        return ArmModel.model_validate(plain["model"]), PodTemplate.model_validate(plain["template"])
    except (ValueError, TypeError, KeyError):
        return None


def _reduce(part: ArmModel | PodTemplate) -> dict[str, Any]:
    return part.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)


def _dump(plain: dict[str, Any]) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def _build_pod(track: Track, model: ArmModel, template: PodTemplate, settings: Settings) -> dict[str, Any]:
    wanted = template.spec
    server = wanted.containers[0] if wanted.containers else ServerContainer(name="server")
    pod: dict[str, Any] = {
        "serviceAccountName": wanted.service_account_name or settings.serve_service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": build_pod_security(),
        "containers": [_build_container(track, model, server, settings)],
        "volumes": [{"name": "temporary", "emptyDir": {}}, {"name": "work", "emptyDir": {}}],
    }
    if wanted.node_selector:
        pod["nodeSelector"] = dict(wanted.node_selector)
    if wanted.tolerations:
        pod["tolerations"] = [
            one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in wanted.tolerations
        ]
    if wanted.priority_class_name:
        pod["priorityClassName"] = wanted.priority_class_name
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    return pod


def _build_container(track: Track, model: ArmModel, server: ServerContainer, settings: Settings) -> dict[str, Any]:
    def probe(path: str, **numbers: int) -> dict[str, Any]:
        return {"httpGet": {"path": path, "port": "http"}, "timeoutSeconds": 5, **numbers}

    return {
        "name": CONTAINER,
        "image": server.image or settings.inference_image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": ["serve"],
        "env": _build_environment(track, model, server, settings),
        "ports": [{"name": "http", "containerPort": SERVE_PORT, "protocol": "TCP"}],
        "resources": build_resources(server.resources),
        # The server listens once the model is fetched and loaded, which may take minutes: liveness waits for that.
        "startupProbe": probe("/healthz", periodSeconds=2, failureThreshold=450),
        # A busy node answers late. Pods that go are taken out of the Service at once, without any probe.
        "readinessProbe": probe("/readyz", periodSeconds=3, failureThreshold=5),
        "livenessProbe": probe("/healthz", periodSeconds=10, failureThreshold=6),
        "securityContext": build_container_security(),
        "terminationMessagePath": TERMINATION_MESSAGE_FILE,
        "terminationMessagePolicy": "File",
        "volumeMounts": [
            {"name": "temporary", "mountPath": _TEMPORARY},
            {"name": "work", "mountPath": _WORK},
        ],
    }


def _build_environment(
    track: Track, model: ArmModel, server: ServerContainer, settings: Settings
) -> list[dict[str, Any]]:
    plain = {
        SERVE_MODEL_URI: model.uri,
        SERVE_MODEL_ID: model.model_id,
        SERVE_TRACK: track.value,
        WORK_DIRECTORY_VARIABLE: _WORK,
        TERMINATION_MESSAGE_VARIABLE: TERMINATION_MESSAGE_FILE,
        "HOME": _TEMPORARY,
        **({SERVE_MODEL_DIGEST: model.digest} if model.digest is not None else {}),
        **build_thread_environment(server.resources),
    }
    own: list[EnvironmentVariable] = [one for one in server.env if not one.name.startswith("ATTUNE_")]
    plain |= {one.name: one.value for one in own}
    return [
        *({"name": name, "value": value} for name, value in plain.items()),
        *build_store_environment(settings.store_secret),
    ]
