"""What becomes of a pass that cannot go on: what is told, what is tried again, and what stays as it was."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from attune.adapters.cluster import Object, ResourceType
from attune.api.canary import ArmStatus, CanaryStatus, HistoryEntry
from attune.api.canary import Outcome as RolloutOutcome
from attune.api.dataset import DatasetStatus
from attune.domain.actions import EmitEvent, Plan
from attune.errors import Refused
from attune.reconcile.boundary import UNKNOWN_ATTEMPTS, Outcome, reconcile
from attune.reconcile.dispatch import RECONCILERS
from attune.reconcile.queue import Key
from attune.settings import Settings

from tests.reconcile.samples import DATASET, PREPARED
from tests.unit.canary_world import build_canary

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


def test_a_rollout_that_was_tried_again_is_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(started: str) -> HistoryEntry:
        return HistoryEntry(
            id="abcdef0123",
            revision="r",
            model_id="bad",
            outcome=RolloutOutcome.ROLLED_BACK,
            reason="WordErrorRateTooHigh",
            message="60 %",
            weight=5,
            started_time=started,
            finished_time=started,
        )

    first, second = entry("2026-11-21T10:00:00Z"), entry("2026-11-21T11:00:00Z")
    plan = Plan((), CanaryStatus(history=[second, first]))
    reconciler = replace(RECONCILERS["Canary"], observe=lambda *_: None, decide=lambda _: plan)
    monkeypatch.setitem(RECONCILERS, "Canary", reconciler)
    canary = build_canary().model_copy(update={"status": CanaryStatus(history=[first])})
    cluster: Any = Shelf(canary.model_dump(mode="json", by_alias=True, exclude_none=True))
    outcome = reconcile(cluster, SETTINGS, Key("Canary", "speech", "voice"), NOW)
    assert outcome.ended_rollouts == ("RolledBack",)


def test_an_event_that_is_refused_keeps_no_status_from_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Object) -> Object:
        raise Refused("events is forbidden: exceeded quota")

    plan = Plan((EmitEvent("Warning", "Refused", "no"),), DatasetStatus(phase="Failed"))
    reconciler = replace(RECONCILERS["Dataset"], observe=lambda *_: None, decide=lambda _: plan)
    monkeypatch.setitem(RECONCILERS, "Dataset", reconciler)
    shelf = put()
    monkeypatch.setattr(shelf, "create", refuse)
    outcome = look(shelf)
    assert (outcome.result, outcome.error) == ("changed", None)
    assert [one["phase"] for one in shelf.statuses] == ["Failed"]
