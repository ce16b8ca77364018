"""Builds the HTTPRoute that divides requests between the arms, and reads it back."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

from attune.api.canary import Canary
from attune.contract.metrics import Track
from attune.render.inference import name_arm
from attune.render.names import COMPONENT_SERVE, build_labels, build_owner_reference

# The rollout's record: on the route, so that it changes in the same request as the weights.
ANNOTATION_ROLLOUT: Final = "attune.dev/rollout"
ANNOTATION_STEP: Final = "attune.dev/step"
ANNOTATION_STARTED: Final = "attune.dev/rollout-started"
ANNOTATION_STEP_STARTED: Final = "attune.dev/step-started"
ANNOTATION_REACHED: Final = "attune.dev/reached-weight"
ANNOTATION_LOSSES: Final = "attune.dev/losses-in-step"
ANNOTATION_PROMOTING: Final = "attune.dev/promoting"
ANNOTATION_FAILED: Final = "attune.dev/failed-rollout"
ANNOTATION_FAILED_REASON: Final = "attune.dev/failed-reason"
ANNOTATION_FAILED_MESSAGE: Final = "attune.dev/failed-message"


class Record(Protocol):
    """What is written of a rollout; the domain's RolloutRecord is one."""

    @property
    def id(self) -> str:
        """Its name."""

    @property
    def step(self) -> int | None:
        """Index of the present step."""

    @property
    def started(self) -> str:
        """RFC 3339."""

    @property
    def step_started(self) -> str:
        """RFC 3339."""

    @property
    def reached(self) -> int:
        """Weight that the canary was last given."""

    @property
    def losses(self) -> int:
        """How often it has lost its pods in this step."""

    @property
    def promoting(self) -> bool:
        """Whether stable is getting the model."""

    @property
    def failed_reason(self) -> str | None:
        """Why it has failed."""

    @property
    def failed_message(self) -> str | None:
        """The same for people."""


@dataclass(frozen=True)
class RouteContent:
    """What an HTTPRoute of ours says: the weights, and the fields of the record where there is one."""

    stable_weight: int
    canary_weight: int
    record: dict[str, Any] | None


def build_route(canary: Canary, stable_weight: int, canary_weight: int, record: Record | None) -> dict[str, Any]:
    """Builds the HTTPRoute (gateway.networking.k8s.io/v1): one rule, two weighted backends."""
    owner, traffic = canary.owner(), canary.spec.traffic
    parent: dict[str, Any] = {
        "group": "gateway.networking.k8s.io",
        "kind": "Gateway",
        "name": traffic.gateway_ref.name,
    }
    if traffic.gateway_ref.namespace is not None:
        parent["namespace"] = traffic.gateway_ref.namespace
    if traffic.gateway_ref.section_name is not None:
        parent["sectionName"] = traffic.gateway_ref.section_name

    def backend(track: Track, weight: int) -> dict[str, Any]:
        name = name_arm(owner.name, track)
        return {"group": "", "kind": "Service", "name": name, "port": canary.spec.service.port, "weight": weight}

    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {
            "name": owner.name,
            "namespace": owner.namespace,
            "labels": build_labels(owner, COMPONENT_SERVE),
            "annotations": _build_annotations(record),
            "ownerReferences": [build_owner_reference(owner)],
        },
        "spec": {
            "parentRefs": [parent],
            "hostnames": list(traffic.hostnames),
            "rules": [
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
                    "backendRefs": [backend(Track.STABLE, stable_weight), backend(Track.CANARY, canary_weight)],
                }
            ],
        },
    }


def _build_annotations(record: Record | None) -> dict[str, str]:
    if record is None:
        return {}
    annotations = {
        ANNOTATION_ROLLOUT: record.id,
        ANNOTATION_STARTED: record.started,
        ANNOTATION_STEP_STARTED: record.step_started,
    }
    if record.step is not None:
        annotations[ANNOTATION_STEP] = str(record.step)
    if record.reached:
        annotations[ANNOTATION_REACHED] = str(record.reached)
    if record.losses:
        annotations[ANNOTATION_LOSSES] = str(record.losses)
    if record.promoting:
        annotations[ANNOTATION_PROMOTING] = "true"
    if record.failed_reason is not None:
        annotations[ANNOTATION_FAILED] = record.id
        annotations[ANNOTATION_FAILED_REASON] = record.failed_reason
        annotations[ANNOTATION_FAILED_MESSAGE] = record.failed_message or ""
    return annotations


def read_route(body: Mapping[str, Any]) -> RouteContent:
    """Reads weights, in percent, and record back; whatever somebody has made of the route by hand.

    Weights of backends that are not the arms' don't count; of an arm that is listed twice, the sum does. The
    canary has 1 % at least where it gets any requests: weights 999 and 1 are 99 % and 1 %. A record of which a part is
    missing or broken is none, unless it says that the rollout has failed: that is never forgotten.
    """
    metadata = body["metadata"]
    weights = {Track.STABLE: 0, Track.CANARY: 0}
    for rule in body.get("spec", {}).get("rules") or []:
        for backend in rule.get("backendRefs") or []:
            for track in weights:
                if backend.get("name") == name_arm(metadata["name"], track):
                    weights[track] += int(backend.get("weight", 1))
    total, canary = sum(weights.values()), weights[Track.CANARY]
    percent = -(-100 * canary // total) if total else 0
    stable = 100 - percent if total else 0
    return RouteContent(stable, percent, _read_record(metadata.get("annotations") or {}))


def _read_record(annotations: Mapping[str, str]) -> dict[str, Any] | None:
    failed = annotations.get(ANNOTATION_FAILED)
    identity = failed or annotations.get(ANNOTATION_ROLLOUT)
    started = _read_time(annotations, ANNOTATION_STARTED)
    step_started = _read_time(annotations, ANNOTATION_STEP_STARTED) or started
    if not identity or ((started is None or step_started is None) and not failed):
        return None
    beginning = "1970-01-01T00:00:00Z"
    return {
        "id": identity,
        "step": _read_count(annotations, ANNOTATION_STEP),
        "started": started or beginning,
        "step_started": step_started or beginning,
        "reached": min(_read_count(annotations, ANNOTATION_REACHED) or 0, 100),
        "losses": _read_count(annotations, ANNOTATION_LOSSES) or 0,
        "promoting": annotations.get(ANNOTATION_PROMOTING) == "true",
        "failed_reason": annotations.get(ANNOTATION_FAILED_REASON, "RolledBack") if failed else None,
        "failed_message": annotations.get(ANNOTATION_FAILED_MESSAGE, "") if failed else None,
    }


def _read_count(annotations: Mapping[str, str], name: str) -> int | None:
    text = annotations.get(name, "")
    return int(text) if text.isdecimal() else None


def _read_time(annotations: Mapping[str, str], name: str) -> str | None:
    """Gives a time as it stands there; None where it is none, or says no offset from UTC."""
    text = annotations.get(name, "")
    try:
        return text if datetime.fromisoformat(text).tzinfo is not None else None
    except ValueError:
        return None
