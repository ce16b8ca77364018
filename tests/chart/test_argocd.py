"""Argo CD's health script, run in Lua, against every state that the operator can write."""

import itertools
from collections.abc import Iterator
from typing import Any

import lupa.lua51
import pytest
import yaml
from attune.api import KINDS
from attune.domain.conditions import decide_conditions

from tests.chart.rendering import ROOT, Object

ARGOCD = ROOT / "examples" / "argocd"
SCRIPT = (ARGOCD / "health.lua").read_text()
TERMINAL = {kind.KIND: kind.TERMINAL_CONDITION for kind in KINDS}
NOW = "2026-11-21T12:00:00Z"


def judge(obj: Object) -> tuple[str, str]:
    """Argo CD's answer; its Lua is 5.1 and has no way out either."""
    lua = lupa.lua51.LuaRuntime(
        register_eval=False, register_builtins=False, unpack_returned_tuples=True, attribute_filter=_refuse
    )
    lua.globals().obj = lua.table_from(obj, recursive=True)
    answer = lua.execute(SCRIPT)
    return str(answer["status"]), str(answer["message"])


def _refuse(*_: Any) -> str:
    raise AttributeError("the script reaches for Python")


def kstatus(obj: Object) -> str:
    """The rules of kstatus (sigs.k8s.io/cli-utils) for a custom resource."""
    status = obj.get("status") or {}
    if "observedGeneration" in status and status["observedGeneration"] != obj["metadata"]["generation"]:
        return "InProgress"
    conditions = {one["type"]: one["status"] for one in status.get("conditions") or []}
    if conditions.get("Reconciling") == "True":
        return "InProgress"
    if conditions.get("Stalled") == "True":
        return "Failed"
    return "Current" if conditions.get("Ready", "True") == "True" else "InProgress"


def kubectl_waits(obj: Object) -> bool:
    """Whether `kubectl wait --for=condition=<terminal>` goes on waiting: what it reads is condition and generation."""
    for one in (obj.get("status") or {}).get("conditions") or []:
        if one["type"] == TERMINAL[obj["kind"]] and one["observedGeneration"] >= obj["metadata"]["generation"]:
            return bool(one["status"] != "True")
    return True


def states() -> Iterator[Any]:
    """Every object that the operator can leave behind: all that decide_conditions gives, for each kind."""
    for kind, state, working, stalled, current, suspend in itertools.product(
        TERMINAL, ("True", "False", "Unknown"), (False, True), (False, True), (False, True), (False, True)
    ):
        generation = 3 if current else 2
        try:
            conditions = decide_conditions(
                [],
                terminal=TERMINAL[kind],
                state=state,  # type: ignore[arg-type]
                reason="Because",
                message="it is so",
                working=working,
                stalled=stalled,
                generation=generation,
                now=NOW,
            )
        except ValueError:
            continue
        obj = {
            "kind": kind,
            "metadata": {"name": "one", "generation": 3},
            "spec": {"suspend": suspend},
            "status": {
                "observedGeneration": generation,
                "conditions": [one.model_dump(by_alias=True) for one in conditions],
            },
        }
        words = [kind, state, *(("working",) * working), *(("stalled",) * stalled)]
        words += ["current" if current else "stale", *(("suspended",) * suspend)]
        yield pytest.param(obj, id="-".join(words))


AGREED = {"Healthy": "Current", "Degraded": "Failed", "Progressing": "InProgress", "Suspended": "InProgress"}


@pytest.mark.parametrize("obj", list(states()))
def test_argo_kstatus_and_kubectl_wait_agree(obj: Object) -> None:
    health, message = judge(obj)
    assert AGREED[health] == kstatus(obj)
    assert (health == "Healthy") == (not kubectl_waits(obj))
    assert message
    conditions = {one["type"]: one["status"] for one in obj["status"]["conditions"]}
    if obj["status"]["observedGeneration"] != obj["metadata"]["generation"]:
        assert health == "Progressing"
    else:
        assert (health == "Degraded") == (conditions["Stalled"] == "True")
        assert message.startswith("Because: it is so")
        if health == "Suspended":
            assert obj["spec"]["suspend"]


def test_every_answer_is_met() -> None:
    assert {judge(param.values[0])[0] for param in states()} == set(AGREED)


@pytest.mark.parametrize("kind", TERMINAL)
@pytest.mark.parametrize(
    "rest",
    [
        {},
        {"status": {}},
        {"status": {"conditions": []}},
        {"status": {"observedGeneration": 1}},
        {"status": {"observedGeneration": 1, "conditions": []}},
        {"status": {"observedGeneration": 1, "conditions": [{"type": "Reconciling"}]}},
        {"status": {"observedGeneration": 1, "conditions": [{"type": "Ready", "status": "Unknown"}]}},
        {"spec": {}, "metadata": {}},
    ],
    ids=str,
)
def test_whatever_is_missing_the_script_answers_progressing(kind: str, rest: Object) -> None:
    assert judge({"kind": kind, "metadata": {"generation": 1}, **rest})[0] == "Progressing"


def test_a_suspended_resource_that_nobody_has_looked_at_is_not_taken_for_suspended() -> None:
    assert judge({"kind": "FineTune", "metadata": {"generation": 1}, "spec": {"suspend": True}})[0] == "Progressing"


@pytest.mark.parametrize(("file", "path"), [("argocd-cm.yaml", ("data",)), ("values.yaml", ("configs", "cm"))])
def test_configuration_carries_the_script_for_every_kind(file: str, path: tuple[str, ...]) -> None:
    place: Object = yaml.safe_load((ARGOCD / file).read_text())
    for step in path:
        place = place[step]
    prefix = "resource.customizations.health.attune.dev_"
    scripts = {key.removeprefix(prefix): value for key, value in place.items() if key.startswith(prefix)}
    assert scripts == dict.fromkeys(TERMINAL, SCRIPT)
    assert place["application.resourceTrackingMethod"] == "annotation"


def test_applications_ask_for_no_ignored_differences_and_point_into_the_repository() -> None:
    applications = list(yaml.safe_load_all((ARGOCD / "applications.yaml").read_text()))
    assert [one["metadata"]["name"] for one in applications] == ["attune", "speech"]
    for one in applications:
        assert "ignoreDifferences" not in one["spec"]
        assert (ROOT / one["spec"]["source"]["path"]).is_dir()


def test_argo_never_prunes_the_crds() -> None:
    operator = next(yaml.safe_load_all((ARGOCD / "applications.yaml").read_text()))
    assert operator["spec"]["syncPolicy"]["automated"]["prune"] is True
    annotations = operator["spec"]["source"]["helm"]["valuesObject"]["crds"]["annotations"]
    assert annotations == {"argocd.argoproj.io/sync-options": "Prune=false"}
