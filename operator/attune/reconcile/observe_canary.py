"""Reads everything that a decision on a Canary needs, once."""

from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from attune.adapters.cluster import (
    DEPLOYMENT,
    GATEWAY,
    HTTP_ROUTE,
    POD,
    Cluster,
    Object,
    is_owned_by,
    is_true,
    read_condition,
)
from attune.adapters.prometheus import UnusableAnswer, read_paired
from attune.api import Canary, Dataset, FineTune
from attune.api.canary import ArmModel, PodTemplate
from attune.contract.metrics import Track
from attune.contract.result import Failure
from attune.domain.actions import FormerArm, RolloutRecord
from attune.domain.arms import ObservedArm, ObservedGateway, ObservedRoute, ServingPod
from attune.domain.canary import ObservedCanary
from attune.domain.canary.preflight import refuse_prometheus
from attune.domain.jobs import parse_summary
from attune.domain.times import parse_time
from attune.domain.verdict import (
    REASON_INCONSISTENT,
    REASON_NO_DATA,
    REASON_PROMETHEUS_NOT_ALLOWED,
    REASON_PROMETHEUS_UNAVAILABLE,
    NoEvidence,
    PairedSums,
    read_sums,
)
from attune.errors import Refused, Unavailable
from attune.reconcile.observe import judge_availability, observe_jobs, read_resource, read_unschedulable
from attune.render.inference import (
    ANNOTATION_FORMER,
    ANNOTATION_MODEL_DIGEST,
    ANNOTATION_MODEL_ID,
    ANNOTATION_MODEL_URI,
    ANNOTATION_TEMPLATE,
    CONTAINER,
    LABEL_REVISION,
    name_arm,
    read_former,
    select_arm,
)
from attune.render.route import read_route
from attune.settings import Settings

# A scrape or two before the rollout began may still be looked at, and clocks differ.
_WINDOW_MARGIN_SECONDS = 30
# A replica that only waits for the Lease counts as well: the one that acts is away no longer than the Lease lasts.
_LOOKING_SINCE = datetime.now(UTC)


def observe_canary(cluster: Cluster, settings: Settings, canary: Canary, now: datetime) -> ObservedCanary:
    """Reads a Canary's referents, arms, route and scorer, and what Prometheus knows of the present rollout."""
    namespace, spec = canary.metadata.namespace, canary.spec
    tune = None
    if spec.model.fine_tune_ref is not None:
        tune = read_resource(cluster, FineTune, namespace, spec.model.fine_tune_ref.name)
    dataset = read_resource(cluster, Dataset, namespace, spec.analysis.golden.dataset_ref.name)
    route = observe_route(cluster, canary)
    record = route.rollout if route is not None else None
    return ObservedCanary(
        canary=canary,
        now=now,
        looking_since=_LOOKING_SINCE,
        inference_image=settings.inference_image,
        fine_tune=tune,
        fine_tune_state=judge_availability(tune) if tune is not None else "NotFound",
        dataset=dataset,
        dataset_state=judge_availability(dataset) if dataset is not None else "NotFound",
        gateway=observe_gateway(cluster, canary),
        stable=observe_arm(cluster, canary, Track.STABLE),
        trial=observe_arm(cluster, canary, Track.CANARY),
        route=route,
        scorers=observe_jobs(cluster, canary),
        evidence=observe_evidence(canary, record, now, settings.prometheus_hosts),
        prometheus_hosts=settings.prometheus_hosts,
    )


def observe_gateway(cluster: Cluster, canary: Canary) -> ObservedGateway:
    """Reads the Gateway that the route attaches to."""
    ref = canary.spec.traffic.gateway_ref
    try:
        body = cluster.get(GATEWAY, ref.namespace or canary.metadata.namespace, ref.name)
        if body is None:
            return ObservedGateway("NotFound" if cluster.is_served(GATEWAY) else "NotServed")
    except Refused:
        # A namespaced installation may not look into the Gateway's namespace; the route's status will tell.
        return ObservedGateway("Unreadable")
    if not is_true(body, "Programmed"):
        told = read_condition(body, "Programmed").get("message")
        return ObservedGateway("NotProgrammed", str(told or "no controller has taken it"))
    return ObservedGateway("Programmed")


def observe_route(cluster: Cluster, canary: Canary) -> ObservedRoute | None:
    """Reads the HTTPRoute; None when there is none of this Canary."""
    body = cluster.get(HTTP_ROUTE, canary.metadata.namespace, canary.metadata.name)
    if body is None or not is_owned_by(body, canary.metadata.uid) or body["metadata"].get("deletionTimestamp"):
        return None
    content = read_route(body)
    generation = body["metadata"].get("generation", 1)
    conditions = [
        condition
        for parent in (body.get("status") or {}).get("parents") or []
        for condition in parent.get("conditions") or []
        if condition.get("type") in {"Accepted", "ResolvedRefs"}
    ]
    rejected = [
        f"{condition.get('reason')}: {condition.get('message')}"
        for condition in conditions
        if condition.get("status") == "False" and condition.get("observedGeneration", generation) >= generation
    ]
    return ObservedRoute(
        stable_weight=content.stable_weight,
        canary_weight=content.canary_weight,
        rollout=RolloutRecord(**content.record) if content.record is not None else None,
        rejected="; ".join(rejected) or None,
        settled=all(condition.get("observedGeneration", generation) >= generation for condition in conditions),
    )


def observe_arm(cluster: Cluster, canary: Canary, track: Track) -> ObservedArm | None:
    """Reads an arm's Deployment and its pods; None when there is none of this Canary."""
    body = cluster.get(DEPLOYMENT, canary.metadata.namespace, name_arm(canary.metadata.name, track))
    if body is None or not is_owned_by(body, canary.metadata.uid) or body["metadata"].get("deletionTimestamp"):
        return None
    spec, status = body["spec"], body.get("status") or {}
    replicas = int(spec.get("replicas", 1))
    seen = status.get("observedGeneration", 0) >= body["metadata"].get("generation", 1)
    available, updated, total = (
        int(status.get(field, 0)) for field in ("availableReplicas", "updatedReplicas", "replicas")
    )
    pods = cluster.list(POD, canary.metadata.namespace, select_arm(canary.metadata.uid, track))
    former = read_former((body["metadata"].get("annotations") or {}).get(ANNOTATION_FORMER))
    return ObservedArm(
        model=_read_model(canary, track, body),
        template=_read_template(canary, _read_image(body), body),
        replicas=replicas,
        ready=available,
        rolled_out=seen and replicas > 0 and updated == available == total == replicas,
        deadline_exceeded=seen and read_condition(body, "Progressing").get("reason") == "ProgressDeadlineExceeded",
        pods=tuple(_observe_pod(pod) for pod in pods if not pod["metadata"].get("deletionTimestamp")),
        former=FormerArm(*former) if former is not None else None,
    )


def _read_image(body: Object) -> str | None:
    """Gives the image that an arm's Deployment runs."""
    containers = body["spec"]["template"]["spec"].get("containers") or []
    return next((one.get("image") for one in containers if one.get("name") == CONTAINER), None)


def _read_model(canary: Canary, track: Track, body: Object) -> ArmModel:
    """Reads what an arm serves; where somebody has removed it from the Deployment, the status remembers."""
    metadata = body["metadata"]
    annotations, labels = metadata.get("annotations") or {}, metadata.get("labels") or {}
    revision, uri = labels.get(LABEL_REVISION), annotations.get(ANNOTATION_MODEL_URI)
    if revision and uri:
        return ArmModel(
            revision=revision,
            model_id=annotations.get(ANNOTATION_MODEL_ID, uri),
            uri=uri,
            digest=annotations.get(ANNOTATION_MODEL_DIGEST),
        )
    told = canary.status.stable if track is Track.STABLE else canary.status.canary
    if told is not None:
        return ArmModel(revision=told.revision, model_id=told.model_id, uri=told.uri, digest=told.digest)
    return ArmModel(revision="unknown", model_id="unknown", uri=uri or "")


def _read_template(canary: Canary, image: str | None, body: Object) -> PodTemplate:
    text = (body["metadata"].get("annotations") or {}).get(ANNOTATION_TEMPLATE)
    try:
        return PodTemplate.model_validate_json(text or "")
    except ValidationError:
        spec = canary.spec.template.spec
        containers: list[dict[str, Any]] = [one.model_dump() for one in spec.containers] or [{"name": CONTAINER}]
        containers[0]["image"] = containers[0].get("image") or image
        return PodTemplate.model_validate(
            {**canary.spec.template.model_dump(), "spec": {**spec.model_dump(), "containers": containers}}
        )


def _observe_pod(body: Object) -> ServingPod:
    metadata, status = body["metadata"], body.get("status") or {}
    containers: list[dict[str, Any]] = status.get("containerStatuses") or []
    container = next((one for one in containers if one.get("name") == CONTAINER), {})
    state, last = container.get("state") or {}, container.get("lastState") or {}
    waiting = state.get("waiting") or {}
    ended = state.get("terminated") or last.get("terminated") or {}
    image = next((one.get("image") for one in body["spec"]["containers"] if one.get("name") == CONTAINER), None)
    return ServingPod(
        name=metadata["name"],
        revision=(metadata.get("labels") or {}).get(LABEL_REVISION, ""),
        image=image,
        ready=is_true(body, "Ready"),
        unschedulable=read_unschedulable(body),
        waiting_reason=waiting.get("reason"),
        waiting_message=waiting.get("message"),
        restarts=int(container.get("restartCount", 0)),
        ended_reason=ended.get("reason"),
        ended_code=ended.get("exitCode"),
        failure=_read_failure(ended.get("message")),
    )


def _read_failure(message: str | None) -> Failure | None:
    """Reads what the server says of its own end; anything else that may stand there is left alone."""
    summary = parse_summary(message) if message else None
    return summary.failure if summary is not None else None


def observe_evidence(
    canary: Canary, record: RolloutRecord | None, now: datetime, prometheus_hosts: tuple[str, ...]
) -> PairedSums | NoEvidence:
    """Asks Prometheus what is known of a rollout; never raises, since knowing nothing is a finding as well."""
    if record is None or record.step is None or record.failed_reason is not None:
        return NoEvidence(REASON_NO_DATA, "nothing has been compared yet")
    metadata, url = canary.metadata, canary.spec.analysis.prometheus.url
    refusal = refuse_prometheus(url, prometheus_hosts)
    if refusal is not None:
        return NoEvidence(REASON_PROMETHEUS_NOT_ALLOWED, refusal)
    window = int((now - parse_time(record.started)).total_seconds()) + _WINDOW_MARGIN_SECONDS
    try:
        reading = read_paired(url, metadata.namespace, metadata.name, record.id, window)
    except UnusableAnswer as error:
        return NoEvidence(REASON_INCONSISTENT, str(error))
    except Unavailable as error:
        return NoEvidence(REASON_PROMETHEUS_UNAVAILABLE, f"{error}; check spec.analysis.prometheus.url")
    if reading is None:
        return NoEvidence(REASON_NO_DATA, f"Prometheus at {url} has no series of rollout {record.id} yet")
    return read_sums(reading.values)
