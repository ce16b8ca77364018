"""What becomes of a pass that cannot go on: what is told, what is tried again, and what stays as it was."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from attune.adapters.cluster import Object, ResourceType
from attune.api.canary import ArmStatus
from attune.domain.actions import Plan
from attune.reconcile.boundary import UNKNOWN_ATTEMPTS, Outcome, reconcile
from attune.reconcile.dispatch import RECONCILERS
from attune.reconcile.queue import Key
from attune.settings import Settings

from tests.reconcile.samples import DATASET, PREPARED

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
KEY = Key("Dataset", "team", "calls")
SETTINGS = Settings(trainer_image="registry.test/trainer:1", inference_image="registry.test/inference:1")


class Shelf:
    """Holds one object, and keeps what is written."""

    def __init__(self, body: Object) -> None:
        self.body = body
        self.statuses: list[dict[str, Any]] = []
        self.events: list[str] = []

    def get(self, _kind: ResourceType, _namespace: str, _name: str) -> Object:
        return self.body

    def create(self, obj: Object) -> Object:
        self.events.append(obj["reason"])
        return obj

    def apply_status(self, obj: Object) -> Object:
        self.statuses.append(obj["status"])
        return obj


def put(**spec: Any) -> Shelf:
    """A Dataset that is ready, with this in its spec besides."""
    status = {"revision": PREPARED.revision, "uri": PREPARED.uri, "jobName": "calls-prepare-1-2"}
    return Shelf(
        {
            "apiVersion": "attune.dev/v1alpha1",
            "kind": "Dataset",
            "metadata": {"name": "calls", "namespace": "team", "uid": "u", "resourceVersion": "7", "generation": 2},
            "spec": {**DATASET, **spec},
            "status": status,
        }
    )


def look(shelf: Shelf, failures: int = 0) -> Outcome:
    cluster: Any = shelf
    return reconcile(cluster, SETTINGS, KEY, NOW, failures)


def test_spec_of_a_later_release_costs_nothing_that_was_made() -> None:
    """The operator was rolled back, its CRDs were not."""
    shelf = put(ofALaterRelease="yes")
    outcome = look(shelf)
    assert (outcome.error, outcome.look_again_seconds) == ("InvalidSpec", None)
    (status,) = shelf.statuses
    assert {one["type"]: one["reason"] for one in status["conditions"]}["Ready"] == "InvalidSpec"
    assert status["revision"] == PREPARED.revision
    assert status["jobName"] == "calls-prepare-1-2"
    assert shelf.events == ["InvalidSpec"]


def test_status_that_cannot_be_read_stops_nothing() -> None:
    shelf = put(ofALaterRelease="yes")
    shelf.body["status"] = {"conditions": [{"type": "Ready", "status": "Perhaps"}], "revision": 7}
    assert look(shelf).error == "InvalidSpec"
    assert shelf.statuses[0]["phase"] == "Failed"


def test_models_own_error_is_the_operators_and_not_the_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(_: object) -> Plan:
        ArmStatus(revision="r", model_id="m", uri="s3://m", weight=1000)
        raise AssertionError("1000 % is no weight")

    reconciler = replace(RECONCILERS["Dataset"], observe=lambda *_: None, decide=decide)
    monkeypatch.setitem(RECONCILERS, "Dataset", reconciler)
    shelf = put()
    first = look(shelf)
    assert first.error == "ValidationError"
    assert first.look_again_seconds is not None
    assert shelf.statuses == []
    assert look(shelf, UNKNOWN_ATTEMPTS - 1).look_again_seconds is None
    assert {one["type"]: one["reason"] for one in shelf.statuses[0]["conditions"]}["Ready"] == "InternalError"
