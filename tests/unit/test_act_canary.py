"""How a Canary's objects are written."""

from collections.abc import Mapping
from typing import Any

import pytest
from attune.adapters.cluster import Object, ResourceType
from attune.api.canary import ArmModel
from attune.contract.metrics import Track
from attune.domain.actions import EnsureArm, EnsureRoute
from attune.domain.canary.identity import fill_image
from attune.errors import NotOurs
from attune.reconcile import act_canary
from attune.settings import Settings

from tests.unit.canary_world import build_canary

SETTINGS = Settings(trainer_image="registry.test/trainer:1", inference_image="registry.test/inference:1")
CANARY = build_canary()
ARM = EnsureArm(
    Track.STABLE,
    ArmModel(revision="r", model_id="base", uri="s3://attune/models/base"),
    fill_image(CANARY.spec.template, "i:1"),
    1,
)


class Shelf:
    """Holds objects, and knows of one way to write them: what a POST sets, no later apply can drop."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], Mapping[str, Any]] = {}
        self.applied: list[tuple[str, bool]] = []

    def get(self, kind: ResourceType, _namespace: str, name: str) -> Mapping[str, Any] | None:
        return self.held.get((kind.kind, name))

    def apply(self, obj: Object, *, force: bool = True) -> Object:
        name = obj["metadata"]["name"]
        self.applied.append((f"{obj['kind']}/{name}", force))
        self.held[obj["kind"], name] = obj
        return obj


def test_objects_are_created_and_changed_by_apply_and_forced_only_where_they_are_ours() -> None:
    shelf = Shelf()
    cluster: Any = shelf
    assert act_canary.ensure_arm(cluster, SETTINGS, CANARY, ARM)
    assert act_canary.ensure_route(cluster, SETTINGS, CANARY, EnsureRoute(100, 0, None, "first"))
    created = ["Service/voice-stable", "Deployment/voice-stable", "Service/voice-canary", "HTTPRoute/voice"]
    assert shelf.applied == [(name, False) for name in created]
    shelf.applied.clear()
    assert not act_canary.ensure_arm(cluster, SETTINGS, CANARY, ARM)
    assert act_canary.ensure_route(cluster, SETTINGS, CANARY, EnsureRoute(95, 5, None, "step"))
    assert shelf.applied == [("HTTPRoute/voice", True)]


def test_somebody_elses_object_is_left_alone() -> None:
    shelf = Shelf()
    cluster: Any = shelf
    shelf.held["Service", "voice-stable"] = {"metadata": {"name": "voice-stable"}}
    with pytest.raises(NotOurs, match="delete or rename it"):
        act_canary.ensure_arm(cluster, SETTINGS, CANARY, ARM)
    assert shelf.applied == []
