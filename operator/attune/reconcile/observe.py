"""Reads everything that a decision on a Dataset, FineTune or Evaluation needs, once."""

from datetime import datetime
from typing import Any, TypeVar

from pydantic import ValidationError

from attune.adapters.cluster import (
    CONFIG_MAP,
    CUSTOM,
    EVENT,
    JOB,
    POD,
    SERVICE,
    Cluster,
    Object,
    is_owned_by,
    is_true,
    read_condition,
)
from attune.adapters.progress import read_progress
from attune.api import Dataset, Evaluation, FineTune
from attune.api.meta import Condition, Resource, Status
from attune.contract.job import ModelInput
from attune.domain.conditions import STALLED, find_condition
from attune.domain.dataset import ObservedDataset
from attune.domain.evaluation import ObservedEvaluation
from attune.domain.finetune import ObservedDatasetRef, ObservedFineTune, ObservedFineTuneRef
from attune.domain.jobs import Availability, ObservedJob, ObservedPod, Surroundings
from attune.domain.kueue import ObservedQueue
from attune.domain.times import parse_time
from attune.errors import Refused
from attune.reconcile.ensure import find_suspender
from attune.reconcile.observe_queue import observe_queue
from attune.render.job import CONTAINER
from attune.render.names import ANNOTATION_INDEX, LABEL_OWNER_UID
from attune.settings import Settings

_R = TypeVar("_R", bound=Resource)


def observe_dataset(cluster: Cluster, settings: Settings, dataset: Dataset, now: datetime) -> ObservedDataset:
    """Reads a Dataset's Jobs."""
    return ObservedDataset(dataset, observe_jobs(cluster, dataset), now, describe_surroundings(settings))


def observe_finetune(cluster: Cluster, settings: Settings, tune: FineTune, now: datetime) -> ObservedFineTune:
    """Reads what a FineTune names, its Jobs, and the progress of the pod that trains."""
    namespace, spec = tune.metadata.namespace, tune.spec
    old, parent = spec.retention.dataset_ref if spec.retention is not None else None, spec.base_model.fine_tune_ref
    jobs = observe_jobs(cluster, tune)
    running = next((pod for job in jobs if (pod := job.running_pod) is not None), None)
    progress = read_progress(running.ip) if running is not None and running.ip is not None else None
    return ObservedFineTune(
        resource=tune,
        datasets=tuple(observe_dataset_ref(cluster, namespace, one.name) for one in spec.datasets),
        jobs=jobs,
        now=now,
        surroundings=describe_surroundings(settings),
        progress=progress,
        retained=observe_dataset_ref(cluster, namespace, old.name) if old is not None else None,
        parent=observe_fine_tune_ref(cluster, namespace, parent.name) if parent is not None else None,
    )


def observe_evaluation(
    cluster: Cluster, settings: Settings, evaluation: Evaluation, now: datetime
) -> ObservedEvaluation:
    """Reads an Evaluation's Dataset, the FineTunes of its candidates, and its Jobs."""
    namespace, spec = evaluation.metadata.namespace, evaluation.spec
    # dict.fromkeys: each once, in the order of the spec.
    tunes = dict.fromkeys(one.fine_tune_ref.name for one in spec.candidates if one.fine_tune_ref is not None)
    return ObservedEvaluation(
        resource=evaluation,
        dataset=observe_dataset_ref(cluster, namespace, spec.dataset_ref.name),
        fine_tunes=tuple(observe_fine_tune_ref(cluster, namespace, name) for name in tunes),
        jobs=observe_jobs(cluster, evaluation),
        now=now,
        surroundings=describe_surroundings(settings),
    )


def describe_surroundings(settings: Settings) -> Surroundings:
    """What decisions on Jobs need of the settings."""
    return Surroundings(
        store_secret=settings.store_secret,
        retry_seconds=settings.retry_seconds,
        progress_seconds=settings.progress_seconds,
    )


def observe_dataset_ref(cluster: Cluster, namespace: str, name: str) -> ObservedDatasetRef:
    """Reads a Dataset that another resource names."""
    dataset = read_resource(cluster, Dataset, namespace, name)
    if dataset is None:
        return ObservedDatasetRef(name, "NotFound")
    availability = judge_availability(dataset)
    if availability != "Ready" or dataset.status.revision is None or dataset.status.uri is None:
        return ObservedDatasetRef(name, "Failed" if availability == "Failed" else "NotReady")
    return ObservedDatasetRef(name, "Ready", dataset.status.revision, dataset.status.uri)


def observe_fine_tune_ref(cluster: Cluster, namespace: str, name: str) -> ObservedFineTuneRef:
    """Reads a FineTune that another resource names."""
    tune = read_resource(cluster, FineTune, namespace, name)
    if tune is None:
        return ObservedFineTuneRef(name, "NotFound")
    availability, model = judge_availability(tune), tune.status.model
    if availability != "Ready" or model is None:
        return ObservedFineTuneRef(name, "Failed" if availability == "Failed" else "NotReady")
    return ObservedFineTuneRef(
        name,
        "Ready",
        ModelInput(uri=model.uri, digest=model.digest, model_id=tune.status.model_id),
        ModelInput(uri=model.adapter_uri, digest=model.adapter_digest) if model.adapter_uri is not None else None,
    )


def read_resource(cluster: Cluster, model: type[_R], namespace: str, name: str) -> _R | None:
    """Reads a custom resource; None when it is not there, is being deleted, or cannot be understood."""
    body = cluster.get(CUSTOM[model.KIND], namespace, name)
    if body is None or body["metadata"].get("deletionTimestamp"):
        return None
    try:
        return parse_resource(model, body)
    except ValidationError:
        return None


def parse_resource(model: type[_R], body: Object) -> _R:
    """Makes a model of an object; a status that this release cannot read counts as none.

    Raises:
        ValidationError: when the spec does not fit.
    """
    return model.model_validate({**body, "status": parse_status(model, body)})


def parse_status(model: type[Resource], body: Object) -> Status:
    """Makes a model of an object's status, whatever its spec is; one that this release cannot read counts as none."""
    kind: type[Status] = type(model.model_fields["status"].default)
    try:
        return kind.model_validate(body.get("status") or {})
    except ValidationError:
        return kind()


def judge_availability(resource: Resource) -> Availability:
    """Tells whether a resource can be built on. What its conditions say of an older spec does not count."""
    generation = resource.metadata.generation

    def find(kind: str) -> Condition | None:
        return find_condition(resource.status.conditions, kind)

    terminal, stalled = find(resource.TERMINAL_CONDITION), find(STALLED)
    if terminal is None or stalled is None or terminal.observed_generation < generation:
        return "NotReady"
    if terminal.status == "True":
        return "Ready"
    return "Failed" if stalled.status == "True" else "NotReady"


def observe_jobs(cluster: Cluster, resource: Resource) -> tuple[ObservedJob, ...]:
    """Reads the Jobs that belong to a resource, each with its pods; both by owner uid, never by name alone."""
    namespace, uid = resource.metadata.namespace, resource.metadata.uid
    labels = {LABEL_OWNER_UID: uid}
    bodies = [body for body in cluster.list(JOB, namespace, labels) if is_owned_by(body, uid)]
    if not bodies:
        return ()
    pods = cluster.list(POD, namespace, labels)
    return tuple(
        observe_job(
            body,
            pods,
            config_present=_has_what_it_needs(cluster, body, uid),
            queue=observe_queue(cluster, body),
            refusal=_find_refusal(cluster, body, pods),
        )
        for body in sorted(bodies, key=lambda one: str(one["metadata"]["name"]))
    )


def _has_what_it_needs(cluster: Cluster, job: Object, uid: str) -> bool:
    """Tells whether a Job that may still start a pod has its job.json and, with several pods, their Service."""
    if is_true(job, "Complete") or is_true(job, "Failed"):
        return True
    namespace = job["metadata"]["namespace"]
    needed = [(CONFIG_MAP, job["metadata"]["name"])]
    service = job["spec"]["template"]["spec"].get("subdomain")
    if service is not None:
        needed.append((SERVICE, service))
    found = (cluster.get(kind, namespace, name) for kind, name in needed)
    return all(one is not None and is_owned_by(one, uid) for one in found)


def _find_refusal(cluster: Cluster, job: Object, pods: list[Object]) -> str | None:
    """Finds what the API server says to the Job controller where that may not create a pod: only its Event has it.

    None once the Job has had every pod that it is to have at a time.
    """
    metadata, started = job["metadata"], (job.get("status") or {}).get("startTime")
    ended = is_true(job, "Complete") or is_true(job, "Failed")
    if started is None or ended or job["spec"].get("suspend"):
        return None
    if len({read_index(pod) for pod in pods if is_owned_by(pod, metadata["uid"])}) >= job["spec"].get("parallelism", 1):
        return None
    fields = {"involvedObject.uid": metadata["uid"], "reason": "FailedCreate"}
    try:
        events = cluster.list(EVENT, metadata["namespace"], fields=fields)
    except Refused:
        return None
    told = [one for one in events if parse_time(one.get("lastTimestamp") or started) >= parse_time(started)]
    newest = max(told, key=lambda one: str(one.get("lastTimestamp")), default=None)
    return str(newest["message"]).removeprefix("Error creating: ") if newest is not None else None


def observe_job(
    body: Object,
    pods: list[Object],
    *,
    config_present: bool = True,
    queue: ObservedQueue | None = None,
    refusal: str | None = None,
) -> ObservedJob:
    """Makes an observation of a Job and of those of the pods that it controls."""
    metadata = body["metadata"]
    complete, failed = is_true(body, "Complete"), is_true(body, "Failed")
    ended = read_condition(body, "Complete" if complete else "Failed")
    return ObservedJob(
        name=metadata["name"],
        suspended=bool(body["spec"].get("suspend")),
        suspended_by=find_suspender(body),
        queue=queue,
        refusal=refusal,
        deleting=metadata.get("deletionTimestamp") is not None,
        complete=complete,
        failed=failed,
        failed_reason=ended.get("reason") if failed else None,
        failed_message=ended.get("message") if failed else None,
        finished=parse_time(ended["lastTransitionTime"]) if complete or failed else None,
        config_present=config_present,
        pods=tuple(observe_pod(pod) for pod in pods if is_owned_by(pod, metadata["uid"])),
    )


def observe_pod(body: Object) -> ObservedPod:
    """Makes an observation of a Job's pod."""
    metadata, status = body["metadata"], body.get("status") or {}
    statuses: list[dict[str, Any]] = status.get("containerStatuses") or []
    container = next((one for one in statuses if one.get("name") == CONTAINER), {})
    state = container.get("state") or {}
    terminated, waiting = state.get("terminated") or {}, state.get("waiting") or {}
    image = next((one.get("image") for one in body["spec"]["containers"] if one.get("name") == CONTAINER), None)
    return ObservedPod(
        name=metadata["name"],
        created=metadata["creationTimestamp"],
        phase=status.get("phase") or "Unknown",
        index=read_index(body),
        ip=status.get("podIP"),
        image=image,
        image_id=container.get("imageID") or None,
        waiting_reason=waiting.get("reason"),
        waiting_message=waiting.get("message"),
        unschedulable=read_unschedulable(body),
        exit_code=terminated.get("exitCode"),
        terminated_reason=terminated.get("reason"),
        termination_message=terminated.get("message"),
        disrupted=is_true(body, "DisruptionTarget"),
    )


def read_index(pod: Object) -> int:
    """Gives which one of an Indexed Job's pods this is; 0 for the pod of any other Job."""
    return int((pod["metadata"].get("annotations") or {}).get(ANNOTATION_INDEX, 0))


def read_unschedulable(pod: Object) -> str | None:
    """Gives the scheduler's message on a pod that it finds no node for; None for any other pod."""
    scheduled = read_condition(pod, "PodScheduled")
    waits = scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
    return str(scheduled.get("message", "")) if waits else None
