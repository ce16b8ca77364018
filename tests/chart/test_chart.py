"""The chart: what it renders with which values, and what it refuses."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from attune.contract import metrics
from attune.settings import Settings
from attune.telemetry import Metrics
from prometheus_client import generate_latest

from devcluster import binaries
from tests.chart.rendering import CHART, NAMESPACE, ROOT, Helm, Object, Rendered

EVERYTHING: Object = {
    "replicas": 2,
    "podDisruptionBudget": {"enabled": True},
    "networkPolicy": {"enabled": True, "metricsFrom": [{"namespaceSelector": {}}]},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "grafanaDashboard": {"enabled": True},
}
NAMESPACED: Object = {"watchNamespaces": ["speech", "calls"], "gatewayNamespaces": ["gateway", "speech"]}


def test_lint_has_nothing_to_say(helm: Helm) -> None:
    for values in ({}, EVERYTHING, NAMESPACED):
        said = helm.run("lint", "--strict", str(CHART), "--values", "-", stdin=json.dumps(values))
        assert "0 chart(s) failed" in said
        assert "[WARNING]" not in said


def test_default_values_render_what_an_operator_needs_and_no_more(helm: Helm) -> None:
    rendered = helm.render()
    assert rendered.kinds() == {
        "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Deployment", "Role", "RoleBinding",
        "Service", "ServiceAccount",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"podDisruptionBudget": {"enabled": True}}, "PodDisruptionBudget"),
        ({"networkPolicy": {"enabled": True}}, "NetworkPolicy"),
        ({"serviceMonitor": {"enabled": True}}, "ServiceMonitor"),
        ({"prometheusRule": {"enabled": True}}, "PrometheusRule"),
        ({"grafanaDashboard": {"enabled": True}}, "ConfigMap"),
    ],
)
def test_each_toggle_adds_one_object(helm: Helm, values: Object, kind: str) -> None:
    added = helm.render(values).kinds() - helm.render().kinds()
    assert added == {kind}


def test_crds_are_those_of_the_repository_and_outlive_the_release(helm: Helm) -> None:
    rendered = helm.render({"crds": {"annotations": {"team": "speech"}}}).all("CustomResourceDefinition")
    committed = [yaml.safe_load(file.read_text()) for file in sorted((ROOT / "crds").glob("*.yaml"))]
    for crd in rendered:
        assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep", "team": "speech"}
    assert sorted(rendered, key=_name) == sorted(committed, key=_name)
    assert helm.render({"crds": {"install": False}}).all("CustomResourceDefinition") == []


def _name(obj: Object) -> str:
    return str(obj["metadata"]["name"])


def test_every_object_of_the_release_is_labelled_and_placed(helm: Helm) -> None:
    for obj in helm.render({**EVERYTHING, **NAMESPACED}):
        if obj["kind"] == "CustomResourceDefinition":
            continue
        labels = obj["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "attune"
        assert labels["app.kubernetes.io/instance"] == "attune"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["app.kubernetes.io/version"]
        assert obj["metadata"].get("namespace"), obj["kind"]


def policy_rules(rendered: Rendered) -> Iterator[tuple[str, Object]]:
    for kind in ("Role", "ClusterRole"):
        for role in rendered.all(kind):
            for rule in role["rules"]:
                yield f"{kind}/{_name(role)}", rule


@pytest.mark.parametrize("values", [{}, NAMESPACED], ids=["cluster-wide", "namespaced"])
def test_rights_hold_no_wildcard_no_secret_and_no_way_to_more_rights(helm: Helm, values: Object) -> None:
    rules = list(policy_rules(helm.render(values)))
    assert rules
    for where, rule in rules:
        text = json.dumps(rule)
        assert "*" not in text, where
        assert "nonResourceURLs" not in rule, where
        assert not set(rule["verbs"]) & {"escalate", "bind", "impersonate", "deletecollection"}, where
        assert not set(rule["resources"]) & {
            "secrets", "serviceaccounts", "serviceaccounts/token", "pods/exec", "pods/attach", "pods/proxy",
            "nodes", "namespaces", "roles", "rolebindings", "clusterroles", "clusterrolebindings",
            "customresourcedefinitions",
        }, where  # fmt: skip
        if "attune.dev" in rule["apiGroups"]:
            writes = set(rule["verbs"]) - {"get", "list", "watch"}
            assert writes in (set(), {"patch"})
            if writes:
                assert all(one.endswith("/status") for one in rule["resources"]), "specs are people's"


def test_namespaced_mode_needs_nothing_cluster_wide(helm: Helm) -> None:
    rendered = helm.render(NAMESPACED)
    assert not rendered.kinds() & {"ClusterRole", "ClusterRoleBinding"}
    places = {(_name(role), role["metadata"]["namespace"]) for role in rendered.all("Role")}
    assert places == {
        ("attune", "speech"),
        ("attune", "calls"),
        ("attune-gateways", "gateway"),
        ("attune-lease", NAMESPACE),
    }
    gateways = rendered.one("Role", "attune-gateways")
    assert gateways["rules"] == [
        {"apiGroups": ["gateway.networking.k8s.io"], "resources": ["gateways"], "verbs": ["get"]}
    ]
    for binding in rendered.all("RoleBinding"):
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "attune", "namespace": NAMESPACE}]
        assert (binding["roleRef"]["name"], binding["metadata"]["namespace"]) in places
    assert environment(rendered)["ATTUNE_WATCH_NAMESPACES"] == "speech,calls"


def test_the_lease_is_the_only_one_that_may_be_written(helm: Helm) -> None:
    rendered = helm.render()
    rules = rendered.one("Role", "attune-lease")["rules"]
    named = [rule for rule in rules if set(rule["verbs"]) != {"create"}]
    assert [rule["resourceNames"] for rule in named] == [[environment(rendered)["ATTUNE_LEASE_NAME"]]]


def test_rights_can_be_left_to_somebody_else(helm: Helm) -> None:
    rendered = helm.render({"rbac": {"create": False}, "serviceAccount": {"create": False, "name": "mine"}})
    assert not rendered.kinds() & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "ServiceAccount"}
    assert pod_of(rendered.one("Deployment"))["serviceAccountName"] == "mine"


def pod_of(obj: Object) -> Object:
    pod: Object = obj["spec"]["template"]["spec"] if obj["kind"] == "Deployment" else obj["spec"]
    return pod


def environment(rendered: Rendered) -> dict[str, str]:
    container = pod_of(rendered.one("Deployment"))["containers"][0]
    return {one["name"]: one.get("value", "") for one in container["env"]}


def test_the_operator_understands_every_variable_and_the_chart_sets_every_setting(helm: Helm) -> None:
    given = environment(helm.render(NAMESPACED))
    settings = Settings.from_environment({**given, "ATTUNE_LEASE_NAMESPACE": NAMESPACE, "POD_NAME": "attune-0"})
    assert settings.watch_namespaces == ("speech", "calls")
    assert settings.trainer_image == "ghcr.io/attune/trainer:0.1.0"
    assert settings.inference_image == "ghcr.io/attune/inference:0.1.0"
    # Fixed by the chart's probes, or found out in the pod.
    elsewhere = {"identity", "http_host", "http_port"}
    assert {name.removeprefix("ATTUNE_").lower() for name in given if name.startswith("ATTUNE_")} == (
        Settings.model_fields.keys() - elsewhere
    )


def test_settings_have_the_operators_own_defaults(helm: Helm) -> None:
    by_chart = Settings.from_environment({**environment(helm.render()), "ATTUNE_LEASE_NAMESPACE": NAMESPACE})
    chosen = {"trainer_image", "inference_image", "lease_namespace"}
    for name, field in Settings.model_fields.items():
        if name not in chosen and not field.is_required():
            assert getattr(by_chart, name) == field.default, name


@pytest.mark.parametrize("kind", ["Deployment", "Pod"])
def test_pods_keep_pod_security_restricted_with_a_read_only_root(helm: Helm, kind: str) -> None:
    pod = pod_of(helm.render(tests=True).one(kind))
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"]["memory"]
    for volume in pod.get("volumes", []):
        assert volume.keys() <= {"name", "emptyDir"}


def test_probes_metrics_service_and_selectors_meet(helm: Helm) -> None:
    rendered = helm.render(EVERYTHING)
    deployment = rendered.one("Deployment")
    container = pod_of(deployment)["containers"][0]
    assert container["ports"] == [{"name": "http", "containerPort": Settings.model_fields["http_port"].default}]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for kind, path in (("Service", ("selector",)), ("NetworkPolicy", ("podSelector", "matchLabels"))):
        selector = rendered.one(kind)["spec"]
        for step in path:
            selector = selector[step]
        assert selector.items() <= labels.items(), kind
    assert rendered.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    service = rendered.one("Service")
    monitor = rendered.one("ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]


def test_whoever_may_read_metrics_the_test_pod_may_ask_whether_the_operator_is_ready(helm: Helm) -> None:
    rendered = helm.render(EVERYTHING, tests=True)
    labels = rendered.one("Pod")["metadata"]["labels"]
    (rule,) = rendered.one("NetworkPolicy")["spec"]["ingress"]
    given, own = rule["from"]
    assert [given] == EVERYTHING["networkPolicy"]["metricsFrom"]
    assert own["podSelector"]["matchLabels"].items() <= labels.items()
    assert "from" not in helm.render({"networkPolicy": {"enabled": True}}).one("NetworkPolicy")["spec"]["ingress"][0]


def test_a_digest_goes_before_a_tag(helm: Helm) -> None:
    digest = f"sha256:{'a' * 64}"
    image = {"repository": "registry.example.com/attune", "tag": "x", "digest": digest}
    container = pod_of(helm.render({"image": image}).one("Deployment"))["containers"][0]
    assert container["image"] == f"registry.example.com/attune@{digest}"


def test_the_demonstrations_values_are_accepted(helm: Helm) -> None:
    values = yaml.safe_load((ROOT / "examples" / "telephone-prompts" / "operator-values.yaml").read_text())
    rendered = helm.render(values)
    assert environment(rendered)["ATTUNE_TRAINER_IMAGE"] == "localhost/attune/trainer:dev"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"replica": 2}, "replica"),
        ({"image": {"tagg": "x"}}, "tagg"),
        ({"settings": {"logLevel": "LOUD"}}, "logLevel"),
        ({"settings": {"workers": 0}}, "workers"),
        ({"settings": {"prometheusHosts": ["http://prometheus:9090"]}}, "prometheusHosts"),
        ({"watchNamespaces": "speech"}, "watchNamespaces"),
        ({"watchNamespaces": ["Speech"]}, "watchNamespaces"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"podDisruptionBudget": {"on": True}}, "on"),
        ({"crds": {"keep": False}}, "keep"),
        ({"resources": {"memory": "1Gi"}}, "memory"),
    ],
)
def test_values_that_the_chart_does_not_know_are_refused_by_name(helm: Helm, values: Object, says: str) -> None:
    with pytest.raises(AssertionError, match="don't meet the specifications of the schema") as refusal:
        helm.render(values)
    assert says in str(refusal.value)


def objects(schema: Any) -> Iterator[Object]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from objects(value)


def test_schema_and_values_name_the_same_keys() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(part: Object, value: Object, path: str) -> None:
        known = part["properties"].keys() - {"global", "claims"}
        assert known == value.keys(), path or "values.yaml"
        for key in known:
            if "properties" in part["properties"][key]:
                compare(part["properties"][key], value[key], f"{path}.{key}")

    compare(schema, values, "")
    closed = [one for one in objects(schema) if "properties" in one]
    assert len(closed) > 10
    assert all(one["additionalProperties"] is False for one in closed)


def test_every_value_is_used_by_a_template() -> None:
    text = "".join(file.read_text() for file in (CHART / "templates").rglob("*") if file.is_file())
    text += "".join(file.read_text() for file in (CHART / "files").glob("*"))
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for key, value in values.items():
        if isinstance(value, dict) and value and f".Values.{key} |" not in text:
            unused = [f"{key}.{name}" for name in value if f".Values.{key}.{name}" not in text]
        else:
            unused = [] if f".Values.{key}" in text else [key]
        assert unused == []


def alerts(helm: Helm) -> list[Object]:
    found: list[Object] = helm.render(EVERYTHING).one("PrometheusRule")["spec"]["groups"][0]["rules"]
    return found


def test_every_alert_has_a_runbook_entry_and_the_runbook_no_other(helm: Helm) -> None:
    page = (ROOT / "docs" / "runbook.md").read_text()
    entries = set(re.findall(r"^## (Attune\w+)$", page, flags=re.MULTILINE))
    assert {rule["alert"] for rule in alerts(helm)} == entries
    for rule in alerts(helm):
        assert rule["annotations"]["runbook_url"].endswith(f"docs/runbook.md#{rule['alert'].lower()}")
        assert "{{" not in rule["annotations"]["runbook_url"]


def exported() -> set[str]:
    """Names of all series that operator and scorer export."""
    operator = Metrics()
    operator.reconciles.labels("Dataset", "changed")
    operator.duration.labels("Dataset")
    operator.errors.labels("Dataset", "Unavailable")
    text = generate_latest(operator.registry).decode()
    names = set(re.findall(r"^([a-z_]+)(?:\{| )", text, flags=re.MULTILINE))
    return names | {value for value in vars(metrics).values() if isinstance(value, str)}


def test_alerts_and_dashboard_ask_for_series_that_exist(helm: Helm) -> None:
    rendered = helm.render(EVERYTHING)
    dashboard = json.loads(rendered.one("ConfigMap")["data"]["attune.json"])
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"] for variable in dashboard["templating"]["list"]]
    asked += [rule["expr"] for rule in alerts(helm)]
    labels = {metrics.LABEL_NAMESPACE, metrics.LABEL_CANARY, metrics.LABEL_ROLLOUT}
    names = {name for expression in asked for name in re.findall(r"\battune_[a-z_]+", expression)} - labels
    assert len(names) >= 8
    assert names <= exported()


@pytest.mark.slow
def test_alerts_fire_when_they_should(helm: Helm, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "attune", "rules": alerts(helm)}]}))

    def series(name: str, values: str) -> Object:
        return {"series": name, "values": values}

    labels = 'attune_namespace="speech",attune_canary="prod-voice",attune_rollout="r",track="canary"'
    cases = [
        ("AttuneNobodyLeads", series("attune_leader", "0x30"), {"severity": "critical"}),
        (
            "AttuneReconcileErrors",
            series('attune_reconcile_errors_total{kind="Canary",reason="Unavailable"}', "0+3x30"),
            {"severity": "warning", "kind": "Canary", "reason": "Unavailable"},
        ),
        ("AttuneQueueStuck", series("attune_workqueue_oldest_seconds", "300x30"), {"severity": "warning"}),
        (
            "AttuneReconcileSlow",
            series('attune_reconcile_duration_seconds_bucket{kind="Canary",le="30"}', "0+10x30"),
            {"severity": "warning", "kind": "Canary"},
        ),
        (
            "AttuneScorerFailing",
            series(f"attune_score_failed_requests_total{{{labels}}}", "0+5x30"),
            {"severity": "warning", "track": "canary", "attune_namespace": "speech", "attune_canary": "prod-voice"},
        ),
        (
            "AttuneRolloutRolledBack",
            series('attune_rollouts_total{outcome="RolledBack"}', "0x28 1x2"),
            {"severity": "info"},
        ),
    ]
    assert {case[0] for case in cases} == {rule["alert"] for rule in alerts(helm)}
    healthy = [
        series("attune_leader", "1x30"),
        series("attune_workqueue_oldest_seconds", "0x30"),
        series(f"attune_scored_utterances_total{{{labels}}}", "0+10x30"),
    ]
    tests = []
    for alert, broken, expected in cases:
        name = broken["series"].partition("{")[0]
        inputs = [one for one in healthy if not one["series"].startswith(name)]
        if alert == "AttuneReconcileSlow":
            inputs.append({**broken, "series": broken["series"].replace('le="30"', 'le="+Inf"')})
        shown = {"alertname": alert, "alertstate": "firing", **expected}
        firing = ",".join(f'{label}="{value}"' for label, value in shown.items())
        tests.append(
            {
                "name": alert,
                "interval": "1m",
                "input_series": [*inputs, broken],
                "promql_expr_test": [
                    {
                        "expr": f'ALERTS{{alertname="{alert}"}}',
                        "eval_time": "30m",
                        "exp_samples": [{"labels": f"ALERTS{{{firing}}}", "value": 1}],
                    }
                ],
            }
        )
    tests.append(
        {
            "name": "nothing fires while all is well",
            "interval": "1m",
            "input_series": healthy,
            "promql_expr_test": [{"expr": "count(ALERTS)", "eval_time": "30m", "exp_samples": []}],
        }
    )
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(document))
    binaries.ensure(["promtool"])
    command = [str(binaries.find("promtool")), "test", "rules", "tests.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
