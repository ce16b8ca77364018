"""What a Canary's objects look like, and that they are read back as they were written."""

from collections.abc import Callable
from typing import Any

import pytest
from attune.api import Canary
from attune.api.canary import ArmModel, PodTemplate
from attune.contract.metrics import Track
from attune.domain.actions import RolloutRecord
from attune.domain.canary.identity import fill_image
from attune.domain.times import parse_time
from attune.reconcile.drift import covers, sign
from attune.render.inference import build_deployment, build_service, dump_template, read_former
from attune.render.route import build_route, read_route
from attune.settings import Settings

Golden = Callable[[str, Any], None]
SETTINGS = Settings(
    trainer_image="registry.test/trainer:1",
    inference_image="registry.test/inference:1",
    image_pull_secrets=("pull",),
)
MODEL = ArmModel(revision="0123456789", model_id="ft:tiny:3f9c2a", uri="s3://attune/m", digest="sha256:" + "c" * 64)
RECORD = RolloutRecord("abcdef0123", 1, "2026-11-21T12:00:00Z", "2026-11-21T12:05:00Z")


@pytest.fixture
def canary() -> Canary:
    return Canary.model_validate(
        {
            "metadata": {
                "name": "prod-voice",
                "namespace": "speech",
                "uid": "5e1f",
                "labels": {"argocd.argoproj.io/instance": "voice", "app.kubernetes.io/managed-by": "Helm"},
                "annotations": {"meta.helm.sh/release-name": "voice"},
            },
            "spec": {
                "model": {"uri": "s3://attune/models/base"},
                "replicas": 3,
                "template": {
                    "metadata": {"labels": {"team": "voice", "attune.dev/track": "spoofed"}},
                    "spec": {
                        "containers": [
                            {
                                "name": "server",
                                "resources": {"limits": {"cpu": "1500m", "memory": "2Gi"}},
                                "env": [{"name": "TZ", "value": "UTC"}],
                            }
                        ],
                        "nodeSelector": {"gpu": "yes"},
                        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
                        "priorityClassName": "voice",
                    },
                },
                "service": {"port": 9000},
                "traffic": {
                    "gatewayRef": {"name": "public", "namespace": "gateway", "sectionName": "web"},
                    "hostnames": ["asr.example.com"],
                },
                "analysis": {
                    "prometheus": {"url": "http://prometheus:9090"},
                    "golden": {"datasetRef": {"name": "calls"}},
                },
            },
        }
    )


def build(canary: Canary) -> dict[str, Any]:
    template = fill_image(canary.spec.template, SETTINGS.inference_image)
    return build_deployment(canary, Track.CANARY, MODEL, template, 3, SETTINGS)


def test_the_deployment_is_as_reviewed(canary: Canary, golden: Golden) -> None:
    golden("canary-deployment", build(canary))


def test_the_services_are_as_reviewed(canary: Canary, golden: Golden) -> None:
    golden("canary-services", [build_service(canary, track) for track in Track])


def test_the_route_is_as_reviewed(canary: Canary, golden: Golden) -> None:
    golden("canary-route", build_route(canary, 75, 25, RECORD))


def test_labels_of_gitops_tools_are_never_copied(canary: Canary) -> None:
    for built in (build(canary), build_service(canary, Track.STABLE), build_route(canary, 100, 0, None)):
        text = str(built)
        assert "argocd" not in text
        assert "helm" not in text.lower()


def test_a_template_cannot_take_the_operators_labels(canary: Canary) -> None:
    labels = build(canary)["spec"]["template"]["metadata"]["labels"]
    assert labels["attune.dev/track"] == "canary"
    assert labels["team"] == "voice"


def test_the_selector_matches_the_arms_pods_and_not_the_other_arms(canary: Canary) -> None:
    deployment = build(canary)
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert build_service(canary, Track.CANARY)["spec"]["selector"].items() <= labels.items()
    assert not build_service(canary, Track.STABLE)["spec"]["selector"].items() <= labels.items()


def test_secrets_come_by_reference_and_never_by_value(canary: Canary) -> None:
    (container,) = build(canary)["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        if variable["name"].startswith("ATTUNE_STORE_"):
            assert "value" not in variable
            assert variable["valueFrom"]["secretKeyRef"]["name"] == SETTINGS.store_secret


def test_the_pods_fit_pod_security_restricted(canary: Canary) -> None:
    pod = build(canary)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False


def test_what_stable_served_before_is_read_back_as_it_was_written(canary: Canary) -> None:
    template = fill_image(canary.spec.template, "i:1")
    former = (MODEL, template)
    built = build_deployment(canary, Track.STABLE, MODEL, template, 3, SETTINGS, former)
    assert read_former(built["metadata"]["annotations"]["attune.dev/former"]) == former
    assert "attune.dev/former" not in build(canary)["metadata"]["annotations"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", '"model"', '{"model": {}}', '{"model": 1}'])
def test_what_somebody_has_made_of_it_is_nothing(text: str | None) -> None:
    assert read_former(text) is None


def test_a_template_is_read_back_as_it_was_written(canary: Canary) -> None:
    template = fill_image(canary.spec.template, "i:1")
    assert PodTemplate.model_validate_json(dump_template(template)) == template
    assert PodTemplate.model_validate_json(dump_template(PodTemplate())) == PodTemplate()


@pytest.mark.parametrize(
    "record",
    [
        None,
        RECORD,
        RolloutRecord("a", None, "2026-11-21T12:00:00Z", "2026-11-21T12:00:00Z"),
        RolloutRecord("a", 3, "2026-11-21T12:00:00Z", "2026-11-21T12:00:00Z", promoting=True),
        RolloutRecord("a", 3, "2026-11-21T12:00:00Z", "2026-11-21T12:00:00Z", reached=25, losses=2),
        RolloutRecord(
            "a",
            3,
            "2026-11-21T12:00:00Z",
            "2026-11-21T12:00:00Z",
            promoting=True,
            failed_reason="Unschedulable",
            failed_message="no node fits the pod",
        ),
        RolloutRecord(
            "a",
            0,
            "2026-11-21T12:00:00Z",
            "2026-11-21T12:00:00Z",
            failed_reason="WordErrorRateTooHigh",
            failed_message="34.1 %",
        ),
    ],
)
def test_a_record_is_read_back_as_it_was_written(canary: Canary, record: RolloutRecord | None) -> None:
    content = read_route(build_route(canary, 75, 25, record))
    assert (content.stable_weight, content.canary_weight) == (75, 25)
    assert (RolloutRecord(**content.record) if content.record else None) == record


def test_a_route_edited_by_hand_is_read_as_it_is(canary: Canary) -> None:
    route = build_route(canary, 75, 25, RECORD)
    backends = route["spec"]["rules"][0]["backendRefs"]
    backends[0].pop("weight")
    backends.append({"name": "somebody-else", "weight": 7})
    backends.append(dict(backends[1]))
    content = read_route(route)
    assert (content.stable_weight, content.canary_weight) == (1, 99)
    assert read_route({"metadata": {"name": "prod-voice"}}).record is None


@pytest.mark.parametrize(
    ("stable", "weight", "percent"),
    [(100, 0, (100, 0)), (95, 5, (95, 5)), (1, 1, (50, 50)), (999_999, 1, (99, 1)), (0, 7, (0, 100)), (0, 0, (0, 0))],
)
def test_weights_are_read_in_percent(canary: Canary, stable: int, weight: int, percent: tuple[int, int]) -> None:
    content = read_route(build_route(canary, stable, weight, None))
    assert (content.stable_weight, content.canary_weight) == percent


@pytest.mark.parametrize("name", ["attune.dev/rollout-started", "attune.dev/step-started"])
@pytest.mark.parametrize("text", ["", "yesterday", "2026-11-21T12:00:00"])
def test_a_time_that_is_none_is_not_read(canary: Canary, name: str, text: str) -> None:
    route = build_route(canary, 95, 5, RECORD)
    route["metadata"]["annotations"][name] = text
    record = read_route(route).record
    if name == "attune.dev/rollout-started":
        assert record is None
    else:
        assert record is not None
        assert record["step_started"] == RECORD.started
    route["metadata"]["annotations"]["attune.dev/failed-rollout"] = RECORD.id
    kept = read_route(route).record
    assert kept is not None
    assert parse_time(kept["step_started"]) <= parse_time(RECORD.step_started)


def test_a_fail_is_read_even_where_the_rest_of_the_record_is_gone(canary: Canary) -> None:
    route = build_route(canary, 100, 0, RECORD)
    route["metadata"]["annotations"] = {"attune.dev/failed-rollout": "abcdef0123", "attune.dev/step": "x"}
    record = read_route(route).record
    assert record is not None
    assert record["failed_reason"] == "RolledBack"
    assert record["step"] is None


# --- What is there already ---


def test_an_object_with_defaults_and_others_fields_covers_what_was_wanted(canary: Canary) -> None:
    wanted = build(canary)
    live = {**wanted, "status": {"replicas": 3}, "spec": {**wanted["spec"], "paused": False}}
    assert covers(live, wanted)


@pytest.mark.parametrize(
    ("live", "wanted", "same"),
    [
        ({"limits": {"cpu": "1", "memory": "1Gi"}}, {"limits": {"cpu": "1000m", "memory": "1024Mi"}}, True),
        ({"limits": {"cpu": "2"}}, {"limits": {"cpu": "1000m"}}, False),
        ({"limits": {}}, {"limits": {"cpu": "1"}}, False),
        ({"env": [{"name": "A"}]}, {"env": [{"name": "A", "value": ""}]}, True),
        (
            {"env": [{"name": "B", "value": "1"}, {"name": "A", "value": "1"}]},
            {"env": [{"name": "A", "value": "1"}]},
            True,
        ),
        ({"env": [{"name": "A", "value": "2"}]}, {"env": [{"name": "A", "value": "1"}]}, False),
        ({"args": ["serve", "-x"]}, {"args": ["serve"]}, False),
        ({}, {"resources": {}}, True),
        ({}, {"replicas": 0}, False),
        ({"replicas": 1}, {"replicas": 3}, False),
    ],
)
def test_what_is_there_is_compared_by_meaning(live: Any, wanted: Any, same: bool) -> None:  # noqa: FBT001
    assert covers(live, wanted) is same


def test_a_backend_too_many_is_found(canary: Canary) -> None:
    wanted = build_route(canary, 75, 25, None)
    rule = wanted["spec"]["rules"][0]
    extra = {**rule, "backendRefs": [*rule["backendRefs"], {"name": "somebody-else", "weight": 7}]}
    live = {**wanted, "spec": {**wanted["spec"], "rules": [extra]}}
    assert covers(live, wanted)
    assert not covers(live, wanted, exact_lists=True)


def test_a_field_that_is_no_longer_wanted_changes_the_signature(canary: Canary) -> None:
    wanted = build(canary)
    less = build(canary)
    del less["spec"]["template"]["spec"]["nodeSelector"]
    assert covers(sign(wanted), less)
    assert not covers(sign(wanted), sign(less))
