"""Builds the Job of a recipe and the ConfigMap with its job.json."""

from typing import Any, Final, Protocol

from attune.api.meta import PodResources
from attune.contract.environment import (
    ATTEMPT_UID,
    ENDPOINT_SECRET_KEY,
    GANG_PORT,
    JOB_FILE,
    JOB_FILE_VARIABLE,
    LEADER_HOST,
    PROGRESS_PORT,
    STORE_ACCESS_KEY,
    STORE_ENDPOINT,
    STORE_REGION,
    STORE_SECRET_KEY,
    STORE_SECRET_KEYS,
    STORE_SECRET_REQUIRED,
    TERMINATION_MESSAGE_FILE,
    TERMINATION_MESSAGE_VARIABLE,
    TRAINING_PORT,
    WORK_DIRECTORY_VARIABLE,
    endpoint_variable,
    source_mount,
    source_variable,
)
from attune.contract.exitcode import KILLED, Disposition, ExitCode
from attune.contract.job import JobSpec
from attune.render.names import (
    LABEL_COMPONENT,
    LABEL_OWNER_UID,
    LABEL_QUEUE,
    LABEL_WORKLOAD_PRIORITY,
    build_gang_service_name,
    build_labels,
    build_owner_reference,
)
from attune.settings import Settings

CONTAINER: Final = "recipe"
BACKOFF_LIMIT: Final = 3
USER: Final = 65532

_WORK: Final = "/scratch"
_TEMPORARY: Final = "/tmp"  # noqa: S108 (a volume of the pod's own)
# A source's Secret brings these; the bucket is in the source's URI.
_SOURCE_VARIABLES: Final = (STORE_ENDPOINT, STORE_REGION, STORE_ACCESS_KEY, STORE_SECRET_KEY)


class JobRequest(Protocol):
    """What a Job is built from; the domain's EnsureJob is one."""

    @property
    def name(self) -> str:
        """Name of the Job and of its ConfigMap."""

    @property
    def spec(self) -> JobSpec:
        """What it is to do."""

    @property
    def suspended(self) -> bool:
        """Whether it waits."""

    @property
    def resources(self) -> PodResources | None:
        """Of its container."""

    @property
    def source_secrets(self) -> tuple[tuple[int, str], ...]:
        """(index of a source, Secret with its own credentials)."""

    @property
    def source_claims(self) -> tuple[tuple[int, str], ...]:
        """(index of a source, PersistentVolumeClaim that it is on)."""

    @property
    def endpoint_secrets(self) -> tuple[tuple[int, str], ...]:
        """(index of a candidate, Secret with its endpoint's key)."""

    @property
    def termination_grace_seconds(self) -> int:
        """Time to save a checkpoint in."""

    @property
    def queue(self) -> str | None:
        """Kueue's LocalQueue, where the Job is to wait for its turn in one."""

    @property
    def workload_priority_class(self) -> str | None:
        """Kueue's WorkloadPriorityClass."""

    @property
    def priority_class(self) -> str | None:
        """PriorityClass of the pod."""

    @property
    def nodes(self) -> int:
        """How many pods work together."""


def build_config_map(request: JobRequest) -> dict[str, Any]:
    """Builds the immutable ConfigMap that holds job.json, owned by the custom resource."""
    owner = request.spec.owner
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": request.name,
            "namespace": owner.namespace,
            "labels": build_labels(owner, request.spec.recipe.recipe),
            "ownerReferences": [build_owner_reference(owner)],
        },
        "immutable": True,
        "data": {"job.json": request.spec.model_dump_json(by_alias=True, exclude_none=True, indent=1)},
    }


def build_job(request: JobRequest, settings: Settings) -> dict[str, Any]:
    """Builds the Job, fit for Pod Security `restricted`."""
    owner = request.spec.owner
    labels = build_labels(owner, request.spec.recipe.recipe)
    several = request.nodes > 1
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": request.name,
            "namespace": owner.namespace,
            # Kueue's are the Job's alone: on a pod it would take that for a piece of work of its own.
            "labels": {**labels, **_build_queue_labels(request)},
            "ownerReferences": [build_owner_reference(owner)],
        },
        "spec": {
            "backoffLimit": BACKOFF_LIMIT,
            "completions": request.nodes,
            "parallelism": request.nodes,
            # Each pod has an index then, and a host name that ends with it.
            **({"completionMode": "Indexed"} if several else {}),
            # What is in a queue begins when Kueue says so.
            "suspend": request.suspended or request.queue is not None,
            # A second pod while the first still saves its checkpoint would train the same steps twice.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": build_pod_failure_policy(),
            "template": {
                "metadata": {
                    "labels": labels,
                    "annotations": {
                        "prometheus.io/scrape": "true",
                        "prometheus.io/port": str(PROGRESS_PORT),
                        "prometheus.io/path": "/metrics",
                    },
                },
                "spec": _build_pod(request, settings),
            },
        },
    }


def build_gang_service(request: JobRequest) -> dict[str, Any]:
    """Builds the headless Service that gives the pods of a Job host names: "<job>-0.<service>.<namespace>.svc".

    They are to find each other before any of them is ready, and an index that is begun again keeps its name.
    """
    owner = request.spec.owner
    component = request.spec.recipe.recipe
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": build_gang_service_name(owner),
            "namespace": owner.namespace,
            "labels": build_labels(owner, component),
            "ownerReferences": [build_owner_reference(owner)],
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {LABEL_OWNER_UID: owner.uid, LABEL_COMPONENT: component},
            "ports": [
                {"name": "gang", "port": GANG_PORT, "protocol": "TCP"},
                {"name": "training", "port": TRAINING_PORT, "protocol": "TCP"},
            ],
        },
    }


def _build_queue_labels(request: JobRequest) -> dict[str, str]:
    labels = {LABEL_QUEUE: request.queue, LABEL_WORKLOAD_PRIORITY: request.workload_priority_class}
    return {label: name for label, name in labels.items() if name is not None}


def build_pod_failure_policy() -> dict[str, Any]:
    """Renders ExitCode's dispositions; the first rule that fits a failed pod counts."""

    def on_exit(disposition: Disposition, codes: list[int]) -> dict[str, Any]:
        return {
            "action": disposition.value,
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": sorted(codes)},
        }

    def codes_of(disposition: Disposition) -> list[int]:
        return [int(code) for code in ExitCode if code is not ExitCode.OK and code.disposition is disposition]

    return {
        "rules": [
            # Evicted, preempted, drained: nobody's fault, and no retry is spent on it.
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            on_exit(Disposition.FAIL, [*codes_of(Disposition.FAIL), KILLED]),
            on_exit(Disposition.FREE, codes_of(Disposition.FREE)),
        ]
    }


def _build_pod(request: JobRequest, settings: Settings) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "serviceAccountName": settings.job_service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": request.termination_grace_seconds,
        "securityContext": build_pod_security(),
        "containers": [
            {
                "name": CONTAINER,
                "image": settings.trainer_image,
                "imagePullPolicy": settings.image_pull_policy,
                "env": _build_environment(request, settings),
                "ports": [{"name": "progress", "containerPort": PROGRESS_PORT, "protocol": "TCP"}],
                "resources": build_resources(request.resources),
                "securityContext": build_container_security(),
                "terminationMessagePath": TERMINATION_MESSAGE_FILE,
                "terminationMessagePolicy": "File",
                "volumeMounts": [
                    {"name": "job", "mountPath": JOB_FILE.rpartition("/")[0], "readOnly": True},
                    {"name": "temporary", "mountPath": _TEMPORARY},
                    {"name": "scratch", "mountPath": _WORK},
                    *(
                        {"name": f"source-{index}", "mountPath": source_mount(index), "readOnly": True}
                        for index, _ in request.source_claims
                    ),
                ],
            }
        ],
        "volumes": [
            {"name": "job", "configMap": {"name": request.name}},
            {"name": "temporary", "emptyDir": {}},
            {"name": "scratch", "emptyDir": {}},
            # Read-only in the volume too, or the kubelet would give all of its files to the pod's group.
            *(
                {"name": f"source-{index}", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
                for index, claim in request.source_claims
            ),
        ],
    }
    if request.nodes > 1:
        pod["subdomain"] = build_gang_service_name(request.spec.owner)
    if request.priority_class is not None:
        pod["priorityClassName"] = request.priority_class
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    return pod


def _build_environment(request: JobRequest, settings: Settings) -> list[dict[str, Any]]:
    plain = {
        JOB_FILE_VARIABLE: JOB_FILE,
        TERMINATION_MESSAGE_VARIABLE: TERMINATION_MESSAGE_FILE,
        WORK_DIRECTORY_VARIABLE: _WORK,
        "HOME": _TEMPORARY,
        **build_thread_environment(request.resources),
    }
    if request.nodes > 1:
        owner = request.spec.owner
        plain[LEADER_HOST] = f"{request.name}-0.{build_gang_service_name(owner)}.{owner.namespace}.svc"
    return [
        *({"name": name, "value": value} for name, value in plain.items()),
        {"name": ATTEMPT_UID, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
        *build_store_environment(settings.store_secret),
        *(
            # The endpoint is required, so that the pod waits for a Secret that is not there yet.
            _from_secret(
                source_variable(index, variable),
                secret,
                STORE_SECRET_KEYS[variable],
                optional=variable != STORE_ENDPOINT,
            )
            for index, secret in request.source_secrets
            for variable in _SOURCE_VARIABLES
        ),
        *(
            _from_secret(endpoint_variable(index), secret, ENDPOINT_SECRET_KEY, optional=False)
            for index, secret in request.endpoint_secrets
        ),
    ]


def build_store_environment(secret: str) -> list[dict[str, Any]]:
    """Builds the variables that the namespace's store Secret fills; only endpoint and bucket must be in it."""
    return [
        _from_secret(variable, secret, key, optional=variable not in STORE_SECRET_REQUIRED)
        for variable, key in STORE_SECRET_KEYS.items()
    ]


def _from_secret(variable: str, secret: str, key: str, *, optional: bool) -> dict[str, Any]:
    reference: dict[str, Any] = {"name": secret, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}


def build_thread_environment(resources: PodResources | None) -> dict[str, str]:
    """Tells numeric libraries how many threads to start: the container's CPU limit, at least 1.

    Without it they count the node's CPUs, and 64 threads on a limit of 2 CPUs are slower than 2.
    {"cpu": "1500m"} -> {"OMP_NUM_THREADS": "1"}; no limit, or one beyond any node ("2Gi") -> {}.
    """
    limit = (resources.limits or {}).get("cpu", "") if resources is not None else ""
    number = limit.removesuffix("m")
    if not number or number[-1].isalpha():
        return {}
    cpus = int(float(number) / (1000 if limit.endswith("m") else 1))
    return {"OMP_NUM_THREADS": str(max(1, cpus))}


def build_resources(resources: PodResources | None) -> dict[str, Any]:
    """Renders a container's resources; none is an empty object."""
    return resources.model_dump(mode="json", by_alias=True, exclude_none=True) if resources is not None else {}


def build_pod_security() -> dict[str, Any]:
    """The pod's part of Pod Security `restricted`."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def build_container_security() -> dict[str, Any]:
    """The container's part of Pod Security `restricted`, and a read-only root file system."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
