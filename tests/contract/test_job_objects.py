"""The Job and its job.json: what the operator writes is what the trainer reads."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attune.api.dataset import PipelineStep
from attune.api.meta import PodResources
from attune.contract.environment import STOP_SECONDS, STORE_SECRET_KEYS, endpoint_variable
from attune.contract.exitcode import Disposition, ExitCode
from attune.contract.job import EvaluateRecipe, FinetuneRecipe, JobSpec, PrepareRecipe, PrepareVolume
from attune.contract.result import Summary
from attune.domain.actions import EnsureJob
from attune.domain.names import build_job_name, is_same_run
from attune.render.job import (
    CONTAINER,
    build_config_map,
    build_gang_service,
    build_job,
    build_pod_failure_policy,
    build_thread_environment,
)
from attune.settings import Settings
from attune_trainer.job import read_spec, summarise
from attune_trainer.store import Store
from attune_trainer.training.gang import Place
from pydantic.alias_generators import to_camel

from tests.reconcile.samples import EVALUATED, PREPARED, TRAINED, TRAINED_ON_GPUS
from tests.unit.worlds import decide, enact, observe

SETTINGS = Settings(trainer_image="registry.test/trainer:1", inference_image="registry.test/inference:1")
PODS = {"nodes": 2, "deepspeed": {"zeroStage": 2}}
SOURCES = [
    {"s3": {"uri": "s3://internal/calls/"}, "format": "Manifest", "manifest": "transcripts.jsonl"},
    {"s3": {"uri": "s3://partner/", "credentialsSecretRef": {"name": "partner"}}, "format": "Directory"},
]

ENDPOINT = {
    "candidates": [
        {"name": "base", "model": {"uri": "s3://models/whisper"}},
        {
            "name": "vendor",
            "endpoint": {
                "url": "https://asr.example.com/v1",
                "keySecretRef": {"name": "vendor-key"},
                "requestsPerMinute": 60,
            },
        },
    ],
    "metrics": ["Wer", "EntityAccuracy", "Latency"],
    "slices": ["accent"],
    "entities": {"terms": ["metformin"], "numbers": True},
    "gates": [{"metric": "Wer", "maxChangeFromBaseline": "0.02", "slice": "accent"}],
}


def wanted(kind: str, **spec: Any) -> EnsureJob:
    """The wish for a Job that a resource of this kind has."""
    world = observe(kind, **spec)
    for _ in range(3):
        plan = decide(world)
        for action in plan.actions:
            if isinstance(action, EnsureJob):
                return action
        world = enact(world, plan)
    raise AssertionError(f"{kind} wants no Job")


@pytest.mark.parametrize(
    ("name", "kind", "spec"),
    [
        ("job-prepare", "Dataset", {"sources": SOURCES, "resources": {"limits": {"cpu": "2", "memory": "2Gi"}}}),
        ("job-finetune", "FineTune", {"earlyStopping": {"patience": 2}, "checkpoint": {"everySteps": 20}}),
        ("job-evaluate", "Evaluation", {"gates": [{"metric": "Wer", "maxChangeFromBaseline": "-0.05"}]}),
        ("job-evaluate-endpoint", "Evaluation", ENDPOINT),
    ],
)
def test_objects_are_as_reviewed(
    golden: Callable[[str, Any], None], name: str, kind: str, spec: dict[str, Any]
) -> None:
    action = wanted(kind, **spec)
    config = build_config_map(action)
    spec_file = json.loads(config["data"].pop("job.json"))
    golden(name, {"job": build_job(action, SETTINGS), "config": config, "job.json": spec_file})


def test_objects_of_a_run_of_several_pods_are_as_reviewed(golden: Callable[[str, Any], None]) -> None:
    action = wanted("FineTune", method="Full", distributed=PODS)
    golden("job-finetune-pods", {"job": build_job(action, SETTINGS), "service": build_gang_service(action)})


def test_pods_of_a_run_find_their_place_where_the_operator_has_put_them(monkeypatch: pytest.MonkeyPatch) -> None:
    action = wanted("FineTune", distributed=PODS)
    job, service = build_job(action, SETTINGS), build_gang_service(action)
    pod = job["spec"]["template"]["spec"]
    for variable in pod["containers"][0]["env"]:
        if "value" in variable:
            monkeypatch.setenv(variable["name"], variable["value"])
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")  # the Job controller's part
    place = Place.from_environment(2)
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    assert place.leader_host == f"{job['metadata']['name']}-0.{name}.{namespace}.svc"
    assert pod["subdomain"] == name
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert {one["port"] for one in service["spec"]["ports"]} == {place.gang_port, place.training_port}
    assert service["spec"]["publishNotReadyAddresses"]
    # The uid is of the FineTune: another one's Service has another name, and begins with a letter as all must.
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)


def test_host_name_of_the_last_pod_is_short_enough_for_the_api_server() -> None:
    name = build_job_name("a" * 60, "finetune", "1a2b3c4d", "5e6f7", nodes=64)
    assert len(f"{name}-63") == 63


def test_number_of_pods_makes_the_run_and_one_pod_is_what_it_was() -> None:
    plain, one, two = (wanted("FineTune", distributed={"nodes": nodes}) for nodes in (1, 1, 2))
    assert plain.name == one.name == wanted("FineTune").name != two.name
    assert "subdomain" not in build_job(one, SETTINGS)["spec"]["template"]["spec"]
    recipes = [action.spec.recipe for action in (one, two)]
    assert all(isinstance(recipe, FinetuneRecipe) for recipe in recipes)
    first, second = recipes
    assert isinstance(first, FinetuneRecipe)
    assert isinstance(second, FinetuneRecipe)
    assert first.config_digest() != second.config_digest()
    assert first.distributed.unsaid == {"nodes"}
    assert second.distributed.unsaid == frozenset()


@pytest.mark.parametrize("kind", ["Dataset", "FineTune", "Evaluation"])
def test_trainer_reads_what_the_operator_writes(kind: str, tmp_path: Path) -> None:
    action = wanted(kind)
    file = tmp_path / "job.json"
    file.write_text(build_config_map(action)["data"]["job.json"])
    assert read_spec(file) == action.spec
    assert JobSpec.model_validate_json(file.read_text()).owner.kind == kind


def test_what_a_fine_tune_asks_for_reaches_its_run_and_what_it_does_not_is_not_named() -> None:
    def recipe(**spec: Any) -> dict[str, Any]:
        return wanted("FineTune", **spec).spec.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)

    assert "augmentation" not in recipe()
    assert "dropout" not in recipe()["hyperparameters"]
    asked = recipe(augmentation={"noise": {"snrDbMin": 10}}, hyperparameters={"dropout": "0.1"})
    assert list(asked["augmentation"]) == ["noise"]
    assert asked["augmentation"]["noise"]["snrDbMin"] == 10
    assert asked["hyperparameters"]["dropout"] == "0.1"


def test_environment_of_the_pod_is_what_the_trainer_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    action = wanted("Dataset", sources=SOURCES)
    (container,) = build_job(action, SETTINGS)["spec"]["template"]["spec"]["containers"]
    secrets = {
        "attune-store": {"endpoint": "http://s3:9000", "bucket": "attune", "accessKey": "a", "secretKey": "b"},
        "partner": {"endpoint": "https://partner", "accessKey": "c", "secretKey": "d"},
    }
    for variable in container["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference is None:
            continue
        value = secrets[reference["name"]].get(reference["key"])
        assert value is not None or reference.get("optional"), f"{variable['name']} would hold the pod back"
        if value is not None:
            monkeypatch.setenv(variable["name"], value)
    store = Store.from_environment()
    assert (store.endpoint, store.bucket) == ("http://s3:9000", "attune")
    source = Store.from_environment("ATTUNE_SOURCE_1_", bucket="partner", like=store)
    assert source.endpoint == "https://partner"
    assert set(STORE_SECRET_KEYS) <= {one["name"] for one in container["env"]}


def test_a_volume_is_mounted_read_only_where_the_trainer_looks_for_it() -> None:
    sources = [*SOURCES, {"persistentVolumeClaim": {"claimName": "corpora", "path": "a/b"}, "format": "Kaldi"}]
    action = wanted("Dataset", sources=sources)
    assert isinstance(action.spec.recipe, PrepareRecipe)
    told = action.spec.recipe.sources[2]
    assert (told.uri, told.volume) == ("pvc://corpora/a/b", PrepareVolume(mount="/sources/2", path="a/b"))
    pod = build_job(action, SETTINGS)["spec"]["template"]["spec"]
    (mount,) = [one for one in pod["containers"][0]["volumeMounts"] if one["mountPath"].startswith("/sources")]
    assert mount == {"name": "source-2", "mountPath": "/sources/2", "readOnly": True}
    (volume,) = [one for one in pod["volumes"] if one["name"] == "source-2"]
    assert volume["persistentVolumeClaim"] == {"claimName": "corpora", "readOnly": True}


def test_every_field_of_a_dataset_reaches_its_job() -> None:
    """Each field changes what the Job is told, and makes another run."""
    fields: list[tuple[str, Any, str, str]] = [
        ("Normalize", "loudnessLufs", "-23", "normalization"),
        ("Normalize", "keepSilenceSeconds", "0.2", "normalization"),
        ("Filter", "minCharactersPerSecond", "2", "rules"),
        ("Filter", "maxCharactersPerSecond", "30", "rules"),
        ("Filter", "maxClippedShare", "0.01", "rules"),
        ("Filter", "minLevelDb", "-45", "rules"),
        ("Filter", "minSnrDb", "5", "rules"),
        ("Filter", "matchLanguage", True, "rules"),
        ("Filter", "maxSameText", 3, "rules"),
        ("Filter", "similarAudio", True, "rules"),
    ]
    told = {field for _, field, _, _ in fields} | {"sampleRate", "minSeconds", "maxSeconds", "contradiction", "step"}
    assert {to_camel(name) for name in PipelineStep.model_fields} == told
    names = {wanted("Dataset").name}
    for step, field, value, part in fields:
        action = wanted("Dataset", pipeline=[{"step": step, field: value}])
        recipe = action.spec.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
        assert recipe[part][field] == value
        names.add(action.name)
    contradiction = {"modelUri": "s3://models/base", "maxWordErrorRate": "0.8"}
    action = wanted("Dataset", pipeline=[{"step": "Filter", "contradiction": contradiction}])
    recipe = action.spec.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert recipe["rules"]["contradiction"] == {"model": {"uri": "s3://models/base"}, "maxWordErrorRate": "0.8"}
    names.add(action.name)
    changes: list[dict[str, Any]] = [
        {"slices": ["accent"]},
        {"knownWords": {"uri": "s3://attune/words.txt", "format": "Lexicon"}},
        {"sources": [{**SOURCES[0], "tarShards": True}]},
        {"sources": [{**SOURCES[0], "channels": "PerSpeaker"}]},
    ]
    names |= {wanted("Dataset", **changed).name for changed in changes}
    assert len(names) == 1 + len(fields) + 1 + len(changes)


def test_missing_secret_holds_the_pod_back_instead_of_failing_it() -> None:
    (container,) = build_job(wanted("Dataset", sources=SOURCES), SETTINGS)["spec"]["template"]["spec"]["containers"]
    required = {
        reference["name"]
        for variable in container["env"]
        if (reference := variable.get("valueFrom", {}).get("secretKeyRef")) and not reference.get("optional")
    }
    assert required == {"attune-store", "partner"}


def test_every_exit_code_has_its_rule_and_disruption_comes_first() -> None:
    rules = build_pod_failure_policy()["rules"]
    assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    ruled = {code: rule["action"] for rule in rules[1:] for code in rule["onExitCodes"]["values"]}
    assert all(rule["onExitCodes"]["containerName"] == CONTAINER for rule in rules[1:])
    for code in ExitCode:
        expected = None if code is ExitCode.OK or code.disposition is Disposition.RETRY else code.disposition.value
        assert ruled.get(int(code)) == expected, code
    assert ruled[137] == "FailJob"


@pytest.mark.parametrize("result", [PREPARED, TRAINED, TRAINED_ON_GPUS, EVALUATED])
def test_termination_message_survives_the_way_back(result: Any) -> None:
    message = summarise(result=result).to_message()
    assert Summary.model_validate_json(message).result == result


@pytest.mark.parametrize("kind", ["Dataset", "FineTune", "Evaluation"])
def test_pod_that_is_told_to_stop_is_gone_within_a_minute_and_not_killed_before_it_has_ended_itself(kind: str) -> None:
    grace = build_job(wanted(kind), SETTINGS)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert STOP_SECONDS < grace <= 60


@pytest.mark.parametrize("kind", ["Dataset", "FineTune", "Evaluation"])
def test_queue_and_priorities_are_all_that_differs_in_a_job_that_waits_for_its_turn(kind: str) -> None:
    plain = build_job(wanted(kind), SETTINGS)
    turn = {"queueName": "speech", "workloadPriorityClassName": "high", "priorityClassName": "gpu"}
    queued = build_job(wanted(kind, **turn), SETTINGS)
    labels = queued["metadata"]["labels"]
    assert labels.pop("kueue.x-k8s.io/queue-name") == "speech"
    assert labels.pop("kueue.x-k8s.io/priority-class") == "high"
    assert queued["spec"].pop("suspend") is True
    assert plain["spec"].pop("suspend") is False
    pod = queued["spec"]["template"]["spec"]
    assert pod.pop("priorityClassName") == "gpu"
    names = [one["metadata"].pop("name") for one in (plain, queued)]
    assert json.loads(json.dumps(queued).replace(names[1], names[0])) == plain


def test_pods_fit_the_restricted_standard() -> None:
    for kind in ("Dataset", "FineTune", "Evaluation"):
        pod = build_job(wanted(kind), SETTINGS)["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {next(iter(set(one) - {"name"})) for one in pod["volumes"]} == {"configMap", "emptyDir"}


def test_owners_labels_are_not_copied() -> None:
    world = observe("Dataset")
    tracked = {"argocd.argoproj.io/instance": "x", "app.kubernetes.io/managed-by": "Helm"}
    metadata = world.resource.metadata.model_copy(update={"labels": tracked, "annotations": tracked})
    tracked_world = replace(world, resource=world.resource.model_copy(update={"metadata": metadata}))  # type: ignore[arg-type]
    (action,) = [one for one in decide(tracked_world).actions if isinstance(one, EnsureJob)]
    text = json.dumps([build_job(action, SETTINGS), build_config_map(action)])
    assert "argocd" not in text
    assert "Helm" not in text


@pytest.mark.parametrize(("limit", "threads"), [("2", "2"), ("1500m", "1"), ("250m", "1"), ("4.5", "4")])
def test_threads_follow_the_cpu_limit(limit: str, threads: str) -> None:
    assert build_thread_environment(PodResources(limits={"cpu": limit})) == {"OMP_NUM_THREADS": threads}
    assert build_thread_environment(None) == {}


@pytest.mark.parametrize("limit", ["2Gi", "1k", "3M"])
def test_cpu_limit_that_is_none_is_left_to_the_api_server_to_judge(limit: str) -> None:
    assert build_thread_environment(PodResources(limits={"cpu": limit})) == {}


def test_the_key_of_an_endpoint_reaches_the_trainer_by_reference_alone() -> None:
    action = wanted("Evaluation", **ENDPOINT)
    (container,) = build_job(action, SETTINGS)["spec"]["template"]["spec"]["containers"]
    recipe = action.spec.recipe
    assert isinstance(recipe, EvaluateRecipe)
    base, vendor = recipe.candidates
    assert base.endpoint is None
    assert vendor.endpoint is not None
    assert vendor.endpoint.key_index == 1
    (variable,) = (one for one in container["env"] if one["name"] == endpoint_variable(1))
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "vendor-key", "key": "apiKey"}}
    assert "vendor-key" not in build_config_map(action)["data"]["job.json"]
    other = copy.deepcopy(ENDPOINT)
    other["candidates"][1]["endpoint"]["keySecretRef"] = {"name": "new-key"}  # type: ignore[index, call-overload]
    assert is_same_run(wanted("Evaluation", **other).name, action.name)  # another key makes no other figures
    assert wanted("Evaluation", **other).name != action.name  # but a pod that waits for a missing Secret gets it
