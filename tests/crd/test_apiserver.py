"""Our CRDs in a real API server: what it accepts, what it refuses and with which words, what it fills in."""

import copy
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from attune.api import KINDS
from attune.api.meta import Resource

from devcluster import binaries
from tests.crd.client import GROUP_PATH, NAMESPACE, ROOT, Api, collection

pytestmark = pytest.mark.apiserver

MODELS: Mapping[str, type[Resource]] = {kind.KIND: kind for kind in KINDS}

# The smallest object of each kind that is right, and one that sets every field.
SMALL: Mapping[str, dict[str, Any]] = {
    "Dataset": {
        "sources": [{"s3": {"uri": "s3://calls/2026/"}, "format": "Directory"}],
        "language": "en",
    },
    "FineTune": {"baseModel": {"uri": "s3://models/whisper"}, "datasets": [{"name": "calls"}]},
    "Evaluation": {
        "datasetRef": {"name": "calls"},
        "candidates": [{"name": "base", "model": {"uri": "hf://openai/whisper-tiny.en"}}],
        "baseline": "base",
    },
    "Canary": {
        "model": {"uri": "s3://models/whisper"},
        "traffic": {"gatewayRef": {"name": "public"}, "hostnames": ["asr.example.com"]},
        "analysis": {
            "prometheus": {"url": "http://prometheus.monitoring:9090"},
            "golden": {"datasetRef": {"name": "calls"}},
        },
    },
}


def build(kind: str, spec: dict[str, Any] | None = None, name: str = "one") -> dict[str, Any]:
    return {
        "apiVersion": "attune.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": copy.deepcopy(SMALL[kind] if spec is None else spec),
    }


def change(obj: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Sets spec.<path> to value; steps are names and indexes, value ... deletes, and no path adds fields to spec."""
    if not path:
        obj["spec"] |= value
        return obj
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place = obj["spec"]
    for step in steps:
        place = place[step] if isinstance(step, int) else place.setdefault(step, {})
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return obj


def documents(file: Path) -> Iterator[str]:
    """The YAML texts in a file: itself, or the fenced blocks of a page."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        yield from re.findall(r"^```ya?ml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    else:
        yield text


def examples() -> Iterator[Any]:
    """Every object of ours in the examples and in the docs."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    manifests = [*(ROOT / "examples").rglob("*.yaml"), *(ROOT / "tests" / "e2e").rglob("*.yaml")]
    for file in sorted([*pages, *manifests]):
        for text in documents(file):
            for obj in yaml.safe_load_all(text):
                if isinstance(obj, dict) and str(obj.get("apiVersion", "")).startswith("attune.dev/"):
                    identity = f"{file.relative_to(ROOT)}:{obj['kind']}/{obj['metadata']['name']}"
                    yield pytest.param(obj, id=identity)


@pytest.mark.parametrize("obj", list(examples()))
def test_examples_are_accepted_by_api_server_and_model(api: Api, obj: dict[str, Any]) -> None:
    obj = {**obj, "metadata": {**obj["metadata"], "namespace": NAMESPACE}}
    answer = api.create(obj)
    assert answer.status == 201, answer.message
    assert answer.warnings == ""
    MODELS[obj["kind"]].model_validate(answer.body)


def test_there_are_examples_of_every_kind() -> None:
    assert {param.values[0]["kind"] for param in examples()} == set(MODELS)


@pytest.mark.parametrize("kind", MODELS)
def test_the_api_server_fills_in_what_the_model_does(api: Api, kind: str) -> None:
    answer = api.create(build(kind))
    assert answer.status == 201, answer.message
    by_server = answer.body["spec"]
    metadata = {"name": "one", "namespace": NAMESPACE, "uid": "u"}
    model = MODELS[kind].model_validate({"metadata": metadata, "spec": SMALL[kind]})
    by_model = model.model_dump(mode="json", by_alias=True, exclude_none=True)["spec"]
    assert _without_empty(by_model) == _without_empty(by_server)
    # And the model reads back what the server stores.
    assert MODELS[kind].model_validate({"metadata": metadata, "spec": by_server}) == model


def _without_empty(value: Any) -> Any:
    """An absent list and an empty one mean the same."""
    if isinstance(value, dict):
        return {key: _without_empty(one) for key, one in value.items() if one not in ([], {})}
    return [_without_empty(one) for one in value] if isinstance(value, list) else value


IMMUTABLE = "is immutable: create a new resource instead"
ONE_MODEL = "exactly one of model, fineTuneRef and endpoint must be given"
ONE_SOURCE = "exactly one of uri and fineTuneRef must be given"
ONE_OLD = "ewc.datasetRef must be given without replay, and only then"
OLD = {"datasetRef": {"name": "general"}}
RISING = "weights must rise from step to step"
NO_ADAPTERS = "method Full trains all weights and has no adapters: remove lora"
CANDIDATE = {"name": "base", "model": {"uri": "s3://models/a"}}

REFUSED: Mapping[str, tuple[str, str, Any, str]] = {
    # case -> (kind, path below spec, value, what the message says)
    "an unknown field": ("Dataset", "colour", "red", 'unknown field "spec.colour"'),
    "an unknown field further down": ("Canary", "analysis.wer.maxIncreas", "0.1", 'unknown field "spec.analysis.wer.'),
    "a Dataset without sources": ("Dataset", "sources", [], "should have at least 1 items"),
    "more sources than there may be": (
        "Dataset", "sources", [SMALL["Dataset"]["sources"][0]] * 17, "must have at most 16 items",
    ),
    "a queue that no LocalQueue can be called": ("Dataset", "queueName", "Speech_1", "should match"),
    "a place in no queue": ("FineTune", "workloadPriorityClassName", "high", "is Kueue's and needs spec.queueName"),
    "a source that is no S3 prefix": ("Dataset", "sources.0.s3.uri", "hf://openai/x", "must start with s3://"),
    "a source that is a URL of another kind": ("Dataset", "sources.0.s3.uri", "http://internal/x", "should match"),
    "a Manifest without its file": (
        "Dataset", "sources.0.format", "Manifest", "manifest must be given with format Manifest, and only then",
    ),
    "a Directory with a manifest": (
        "Dataset", "sources.0.manifest", "a.jsonl", "manifest must be given with format Manifest, and only then",
    ),
    "a format that does not exist": ("Dataset", "sources.0.format", "Sphere", "Unsupported value"),
    "a source in two places": (
        "Dataset", "sources.0.persistentVolumeClaim", {"claimName": "calls"},
        "exactly one of s3 and persistentVolumeClaim",
    ),
    "a source nowhere": ("Dataset", "sources.0.s3", ..., "exactly one of s3 and persistentVolumeClaim must be given"),
    "a path that leaves its volume": (
        "Dataset", "sources.0", {"persistentVolumeClaim": {"claimName": "a", "path": "../x"}, "format": "Stm"},
        "should match",
    ),
    "an absolute path on a volume": (
        "Dataset", "sources.0", {"persistentVolumeClaim": {"claimName": "a", "path": "/x"}, "format": "Stm"},
        "should match",
    ),
    "channels of subtitles, which name none": (
        "Dataset", "sources.0", {**SMALL["Dataset"]["sources"][0], "format": "WebVtt", "channels": "PerSpeaker"},
        "needs a format that names channels",
    ),
    "a loudness at the wrong step": (
        "Dataset", "pipeline", [{"step": "Filter", "loudnessLufs": "-23"}], "belong to step Normalize",
    ),
    "a filter at the wrong step": (
        "Dataset", "pipeline", [{"step": "Normalize", "similarAudio": True}], "belong to step Filter",
    ),
    "a loudness that no recording has": (
        "Dataset", "pipeline", [{"step": "Normalize", "loudnessLufs": "3"}], "must be between -50 and -10",
    ),
    "a rate of speech that nothing has": (
        "Dataset", "pipeline", [{"step": "Filter", "minCharactersPerSecond": "9", "maxCharactersPerSecond": "9"}],
        "minCharactersPerSecond must be less than maxCharactersPerSecond",
    ),
    "a label that is no label": ("Dataset", "slices", ["text"], "are no labels"),
    "a label that is given twice": ("Dataset", "slices", ["accent", "accent"], "each label may be given once"),
    "known words on a model hub": ("Dataset", "knownWords", {"uri": "hf://a/b", "format": "Text"}, "should match"),
    "a language by its name": ("Dataset", "language", "English", "Too long"),
    "a sample rate at the wrong step": (
        "Dataset", "pipeline", [{"step": "Filter", "sampleRate": 16000}], "sampleRate belongs to step Normalize",
    ),
    "a filter that lets nothing through": (
        "Dataset", "pipeline", [{"step": "Filter", "minSeconds": "5", "maxSeconds": "4.9"}],
        "must be less than maxSeconds",
    ),
    "a filter whose shortest is the default longest": (
        "Dataset", "pipeline", [{"step": "Filter", "minSeconds": "30"}], "must be less than maxSeconds (30 where",
    ),
    "a filter whose longest is below the default shortest": (
        "Dataset", "pipeline", [{"step": "Filter", "maxSeconds": "0.1"}], "minSeconds (0.1 where absent) must be less",
    ),
    "a step that is given twice": (
        "Dataset", "pipeline", [{"step": "Normalize"}, {"step": "Normalize"}], "each step may be given once",
    ),
    "a share of more than a half": ("Dataset", "splits.validation", "0.51", "must be between 0.01 and 0.5"),
    "splits that leave nothing to train on": (
        "Dataset", "splits", {"validation": "0.5", "holdout": "0.5"}, "must leave a share to train on",
    ),
    "a decimal as a number": ("Dataset", "splits.validation", 0.1, "must be of type string"),
    "a decimal with an exponent": ("Dataset", "splits.validation", "1e-1", "should match"),
    "a negative share": ("Dataset", "maxRejectedShare", "-0.1", "must be between 0 and 1"),
    "a quantity that is none": ("Dataset", "resources.limits", {"memory": "2 GB"}, "should match"),
    "a resource's name that is too long": (
        "Dataset", "resources.limits", {"x" * 64: "1"}, "keys must have 1 to 63 characters",
    ),
    "no base model": ("FineTune", "baseModel", ..., "spec.baseModel: Required value"),
    "a base model from nowhere": ("FineTune", "baseModel", {}, ONE_SOURCE),
    "a base model from two places": ("FineTune", "baseModel.fineTuneRef", {"name": "x"}, ONE_SOURCE),
    "a FineTune that begins with itself": (
        "FineTune", "baseModel", {"fineTuneRef": {"name": "one"}}, "baseModel.fineTuneRef must name another FineTune",
    ),
    "a Dataset of no weight": ("FineTune", "datasets.0.weight", "0", "must be between 0.001 and 1000"),
    "a temperature that sharpens": ("FineTune", "datasetTemperature", "0.5", "must be between 1 and 100"),
    "a temperature of one Dataset": ("FineTune", "datasetTemperature", "2", "needs at least two datasets"),
    "a retention that does nothing": ("FineTune", "retention", {}, "replay, ewc or both must be given"),
    "a replay of nothing but the old": (
        "FineTune", "retention", {"replay": {**OLD, "ratio": "1"}}, "must be between 0.01 and 0.9",
    ),
    "a replay of what is trained on": (
        "FineTune", "retention", {"replay": {"datasetRef": {"name": "calls"}}}, "take it out of one of them",
    ),
    "weights held for what is trained on": (
        "FineTune", "retention", {"ewc": {"lambda": "1", "datasetRef": {"name": "calls"}}}, "take it out of one of",
    ),
    "weights held that no process has whole": (
        "FineTune", "",
        {"retention": {"ewc": {**OLD, "lambda": "1"}}, "distributed": {"deepspeed": {"zeroStage": 3}}},
        "zeroStage must be 2 or less",
    ),
    "weights held that Dora moves": (
        "FineTune", "",
        {"retention": {"ewc": {**OLD, "lambda": "1"}}, "lora": {"variant": "Dora"}},
        "choose another lora.variant, or replay alone",
    ),
    "weights held for nobody": ("FineTune", "retention", {"ewc": {"lambda": "1"}}, ONE_OLD),
    "weights held for another than is replayed": (
        "FineTune", "retention", {"replay": OLD, "ewc": {**OLD, "lambda": "1"}}, ONE_OLD,
    ),
    "the same Dataset twice": ("FineTune", "datasets", [{"name": "a"}, {"name": "a"}], "Duplicate value"),
    "a Dataset whose name cannot be one": ("FineTune", "datasets", [{"name": "A"}], "should match"),
    "an optimiser moved that is not shared out": (
        "FineTune", "distributed", {"deepspeed": {"zeroStage": 1, "offload": "Optimizer"}}, "zeroStage 2 and 3",
    ),
    "no pod at all": ("FineTune", "distributed", {"nodes": 0}, "greater than or equal to 1"),
    "more pods than there are names for": ("FineTune", "distributed", {"nodes": 65}, "less than or equal to 64"),
    "a rank of 0": ("FineTune", "lora.rank", 0, "greater than or equal to 1"),
    "a dropout of 1": ("FineTune", "lora.dropout", "1", "must be between 0 and 0.9"),
    "a learning rate of 0": ("FineTune", "hyperparameters.learningRate", "0", "must be between 1e-9 and 1"),
    "a learning rate above 1": ("FineTune", "hyperparameters.learningRate", "1e1", "must be between 1e-9 and 1"),
    "a method that does not exist": ("FineTune", "method", "PrefixTuning", "Unsupported value"),
    "all weights with adapters": ("FineTune", "", {"method": "Full", "lora": {"rank": 8}}, NO_ADAPTERS),
    "all weights with adapters of a kind": (
        "FineTune", "", {"method": "Full", "lora": {"variant": "Dora"}}, NO_ADAPTERS,
    ),
    "4-bit weights that processes share out": (
        "FineTune", "", {"method": "QLora", "distributed": {"deepspeed": {"zeroStage": 3}}},
        "method QLora keeps its 4-bit weights whole in every process: zeroStage must be 2 or less",
    ),
    "Fp16 with an optimiser that is shared out": (
        "FineTune", "",
        {"hyperparameters": {"precision": "Fp16"}, "distributed": {"deepspeed": {"zeroStage": 1}}},
        "precision Fp16 works with zeroStage 0 only: choose Bf16, or leave zeroStage out",
    ),
    "a variant that does not exist": ("FineTune", "lora.variant", "AdaLora", "Unsupported value"),
    "a layer twice": ("FineTune", "lora.targetModules", ["fc1", "fc1"], "Duplicate value"),
    "a layer by its path": ("FineTune", "lora.targetModules", ["encoder.fc1"], "should match"),
    "no layers": ("FineTune", "lora.targetModules", [], "should have at least 1 items"),
    "no gradients to a step": (
        "FineTune", "hyperparameters.gradientAccumulation", 0, "greater than or equal to 1",
    ),
    "a warm-up longer than the run": ("FineTune", "hyperparameters.warmupRatio", "1.1", "must be between 0 and 1"),
    "a dropout of the network of 1": ("FineTune", "hyperparameters.dropout", "1", "must be between 0 and 0.9"),
    "an augmentation of nothing": ("FineTune", "augmentation", {}, "augmentation needs at least one of speed"),
    "a slowest speed above the fastest": (
        "FineTune", "augmentation", {"speed": {"min": "1.2"}}, "speed.min must be at most speed.max",
    ),
    "a loudest noise softer than the softest": (
        "FineTune", "augmentation", {"noise": {"snrDbMin": 30}}, "noise.snrDbMin must be at most noise.snrDbMax",
    ),
    "noise of no kind": ("FineTune", "augmentation", {"noise": {"kinds": []}}, "noise needs kinds, or a uri"),
    "noise from a model hub": ("FineTune", "augmentation", {"noise": {"uri": "hf://noise/fans"}}, "should match"),
    "the same noise twice": (
        "FineTune", "augmentation", {"noise": {"kinds": ["Pink", "Pink"]}}, "Duplicate value",
    ),
    "a driest room above the default wettest": (
        "FineTune", "augmentation", {"roomImpulseResponse": {"rt60MinSeconds": "0.7"}}, "must be at most rt60MaxSecond",
    ),
    "rooms that are simulated and recorded": (
        "FineTune", "augmentation", {"roomImpulseResponse": {"uri": "s3://rooms/a", "rt60MinSeconds": "0.2"}},
        "takes a uri, or bounds of simulated rooms, not both",
    ),
    "no codec to pass": ("FineTune", "augmentation", {"codec": {"kinds": []}}, "should have at least 1 items"),
    "an effect that never comes": (
        "FineTune", "augmentation", {"codec": {"probability": "0"}}, "must be between 0.01 and 1",
    ),
    "masks of no kind": (
        "FineTune", "augmentation", {"specAugment": {"timeMasks": 0, "frequencyMasks": 0}},
        "specAugment needs timeMasks or frequencyMasks",
    ),
    "a budget that bounds and prices nothing": (
        "FineTune", "budget", {}, "at least one of maxGpuHours, maxHours and costPerGpuHour must be given",
    ),
    "a budget of no time": ("FineTune", "budget", {"maxHours": "0"}, "must be between 0.000001 and 100000"),
    "a currency without a price": (
        "FineTune", "budget", {"maxHours": "1", "currency": "EUR"}, "currency goes with costPerGpuHour",
    ),
    "a worth without a cost": (
        "FineTune", "economics", {"costPerCorrectedWord": "0.01", "hoursPerMonth": "100"},
        "economics needs budget.costPerGpuHour",
    ),
    "no candidates": ("Evaluation", "candidates", [], "should have at least 1 items"),
    "nine candidates": (
        "Evaluation", "candidates", [{**CANDIDATE, "name": f"c{i}"} for i in range(9)], "must have at most 8 items",
    ),
    "two candidates of one name": ("Evaluation", "candidates", [CANDIDATE, CANDIDATE], "Duplicate value"),
    "a candidate with two models": ("Evaluation", "candidates.0.fineTuneRef", {"name": "x"}, ONE_MODEL),
    "a candidate without a model": ("Evaluation", "candidates.0.model", ..., ONE_MODEL),
    "a baseline that nobody knows": (
        "Evaluation", "baseline", "nobody", "baseline must be the name of a candidate",
    ),
    "a metric twice": ("Evaluation", "metrics", ["Wer", "Wer"], "Duplicate value"),
    "a metric that does not exist": ("Evaluation", "metrics", ["Bleu"], "Unsupported value"),
    "a gate with two bounds": (
        "Evaluation", "gates", [{"metric": "Wer", "max": "0.1", "maxChangeFromBaseline": "0"}],
        "exactly one of max, min and maxChangeFromBaseline must be given",
    ),
    "a gate without a bound": (
        "Evaluation", "gates", [{"metric": "Wer"}], "exactly one of max, min and maxChangeFromBaseline must be given",
    ),
    "a gate below -100 %": (
        "Evaluation", "gates", [{"metric": "Wer", "maxChangeFromBaseline": "-1.5"}], "must be between -1 and 1000",
    ),
    "a gate on an accuracy from above": (
        "Evaluation", "gates", [{"metric": "SentenceAccuracy", "max": "0.9"}], "are better when larger and take min",
    ),
    "a gate on an error rate from below": (
        "Evaluation", "gates", [{"metric": "Wer", "min": "0.9"}], "are better when larger and take min",
    ),
    "a gate on a slice that is not asked for": (
        "Evaluation", "", {"slices": ["channel"], "gates": [{"metric": "Wer", "max": "0.1", "slice": "accent"}]},
        "the slice of a gate must be one of spec.slices",
    ),
    "a gate on the speed of a slice": (
        "Evaluation", "", {"slices": ["accent"], "gates": [{"metric": "Latency", "max": "1", "slice": "accent"}]},
        "RealTimeFactor and Latency are not counted by utterance",
    ),
    "a slice twice": ("Evaluation", "slices", ["accent", "accent"], "Duplicate value"),
    "a slice that is no label": ("Evaluation", "slices", ["a b"], "should match"),
    "entity accuracy of nothing": (
        "Evaluation", "metrics", ["EntityAccuracy"], "EntityAccuracy needs spec.entities",
    ),
    "a gate on the accuracy of no entities": (
        "Evaluation", "gates", [{"metric": "EntityAccuracy", "min": "0.9"}], "EntityAccuracy needs spec.entities",
    ),
    "entities that nobody counts": (
        "Evaluation", "entities", {"numbers": True}, "spec.entities is for the metric EntityAccuracy",
    ),
    "entities that are none": (
        "Evaluation", "", {"metrics": ["EntityAccuracy"], "entities": {"numbers": False}},
        "give terms, termsUri or numbers: true",
    ),
    "an endpoint with a key in its address": (
        "Evaluation", "candidates.0", {"name": "base", "endpoint": {"url": "https://user:key@asr.example.com/v1"}},
        "should match",
    ),
    "an endpoint that is no URL": (
        "Evaluation", "candidates.0", {"name": "base", "endpoint": {"url": "asr.example.com/v1"}}, "should match",
    ),
    "an endpoint asked for ever": (
        "Evaluation", "candidates.0",
        {"name": "base", "endpoint": {"url": "https://asr.example.com/v1", "maxAttempts": 1000}},
        "should be less than or equal to 10",
    ),
    "certainty": ("Evaluation", "confidence", "1", "must be between 0.5 and 0.999"),
    "a Canary with two models": ("Canary", "model.fineTuneRef", {"name": "x"}, ONE_SOURCE),
    "a Canary without a model": ("Canary", "model", {}, ONE_SOURCE),
    "falling weights": ("Canary", "steps", [{"weight": 25}, {"weight": 5}, {"weight": 100}], RISING),
    "equal weights": ("Canary", "steps", [{"weight": 25}, {"weight": 25}], RISING),
    "weights that fall across a pause": (
        "Canary", "steps", [{"weight": 25}, {"pause": {"seconds": 5}}, {"weight": 20}], RISING,
    ),
    "a weight of 0": ("Canary", "steps", [{"weight": 0}], "greater than or equal to 1"),
    "a weight of 101": ("Canary", "steps", [{"weight": 101}], "less than or equal to 100"),
    "a step that is both": (
        "Canary", "steps", [{"weight": 5, "pause": {"seconds": 5}}], "exactly one of weight and pause must be given",
    ),
    "a step that is neither": ("Canary", "steps", [{"weight": 5}, {}], "exactly one of weight and pause"),
    "nothing but pauses": ("Canary", "steps", [{"pause": {"seconds": 5}}], "at least one step must have a weight"),
    "no steps": ("Canary", "steps", [], "should have at least 1 items"),
    "a container of another name": (
        "Canary", "template", {"spec": {"containers": [{"name": "sidecar"}]}}, "Unsupported value",
    ),
    "two containers": (
        "Canary", "template", {"spec": {"containers": [{"name": "server"}, {"name": "server"}]}}, "must have at most 1",
    ),
    "a variable that is the operator's": (
        "Canary", "template", {"spec": {"containers": [{"name": "server", "env": [{"name": "ATTUNE_MODEL_URI"}]}]}},
        "names that start with ATTUNE_ are the operator's",
    ),
    "a toleration that contradicts itself": (
        "Canary", "template", {"spec": {"tolerations": [{"key": "gpu", "operator": "Exists", "value": "yes"}]}},
        "operator Exists goes without a value",
    ),
    "a label that no pod may have": (
        "Canary", "template", {"metadata": {"labels": {"team": "speech recognition"}}}, "should match",
    ),
    "a label that is the operator's": (
        "Canary", "template", {"metadata": {"labels": {"attune.dev/track": "stable"}}},
        "labels of attune.dev/ and app.kubernetes.io/managed-by are the operator's",
    ),
    "a hostname with an empty part": ("Canary", "traffic.hostnames", ["asr..example.com"], "should match"),
    "a hostname with a path": ("Canary", "traffic.hostnames", ["asr.example.com/v1"], "should match"),
    "a Prometheus address with a query": (
        "Canary", "analysis.prometheus.url", "http://p:9090/?x=1", "should match",
    ),
    "a promotion without data": ("Canary", "analysis.onNoData", "Promote", "Unsupported value"),
    "a confidence of a coin": ("Canary", "analysis.wer.confidence", "0.5", "must be between 0.8 and 0.999"),
    "a port that is none": ("Canary", "service.port", 70000, "less than or equal to 65535"),
    "no replicas": ("Canary", "replicas", 0, "greater than or equal to 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(api: Api, case: str) -> None:
    kind, path, value, says = REFUSED[case]
    answer = api.create(change(build(kind), path, value))
    assert answer.status in {400, 422}, answer.body
    assert says in answer.message


@pytest.mark.parametrize(("kind", "longest"), [("Dataset", 52), ("FineTune", 52), ("Evaluation", 52), ("Canary", 40)])
def test_names_leave_room_for_what_children_append(api: Api, kind: str, longest: int) -> None:
    assert api.create(build(kind, name="n" * longest)).status == 201
    answer = api.create(build(kind, name="n" * (longest + 1)))
    assert answer.status == 422
    assert f"the name must have at most {longest} characters" in answer.message


@pytest.mark.parametrize("kind", MODELS)
def test_names_can_be_referred_to(api: Api, kind: str) -> None:
    assert api.create(build(kind, name="calls-2026q2")).status == 201
    answer = api.create(build(kind, name="calls.2026q2"))
    assert answer.status == 422
    assert "only lower case letters, digits and hyphens" in answer.message


def test_a_canary_may_not_begin_with_a_digit_since_services_may_not(api: Api) -> None:
    assert "the name must begin with a letter" in api.create(build("Canary", name="1st")).message


UNCHANGEABLE = [
    ("FineTune", {"baseModel": {"uri": "s3://models/other"}}),
    ("FineTune", {"datasets": [{"name": "other"}]}),
    ("FineTune", {"lora": {"rank": 8}}),
    ("FineTune", {"lora": {"variant": "RsLora"}}),
    ("FineTune", {"method": "QLora"}),
    ("FineTune", {"hyperparameters": {"epochs": 9}}),
    ("FineTune", {"padding": "Window"}),
    ("FineTune", {"distributed": {"processesPerNode": 2}}),
    ("FineTune", {"distributed": {"nodes": 2}}),
    ("FineTune", {"earlyStopping": {"patience": 5}}),
    ("FineTune", {"augmentation": {"speed": {}}}),
    ("FineTune", {"datasetTemperature": "2"}),
    ("FineTune", {"retention": {"replay": OLD}}),
    ("FineTune", {"budget": {"maxHours": "2"}}),
]


@pytest.mark.parametrize(("kind", "patch"), UNCHANGEABLE)
def test_what_a_result_was_made_from_never_changes(api: Api, kind: str, patch: dict[str, Any]) -> None:
    obj = build(kind, name=f"fixed-{UNCHANGEABLE.index((kind, patch))}")
    assert api.create(obj, dry_run=False).status == 201
    answer = api.merge(kind, obj["metadata"]["name"], {"spec": patch})
    assert answer.status == 422
    assert IMMUTABLE in answer.message
    # The rest may change.
    assert api.merge(kind, obj["metadata"]["name"], {"spec": {"suspend": True}}).status == 200


CONDITION = {
    "type": "Ready",
    "status": "True",
    "reason": "Prepared",
    "message": "537 utterances",
    "lastTransitionTime": "2026-11-21T12:00:00Z",
    "observedGeneration": 1,
}
STATUS = {
    "observedGeneration": 1,
    "phase": "Ready",
    "conditions": [CONDITION],
    "stats": {"hours": "0.4", "utterances": 537, "speakers": 1, "words": 3000, "vocabulary": 800, "oovRate": "0.03"},
}


def test_status_is_written_through_its_subresource_only(api: Api) -> None:
    obj = build("Dataset", name="status-split")
    created = api.create({**obj, "status": STATUS}, dry_run=False)
    assert created.status == 201
    assert "status" not in created.body
    written = api.merge(
        "Dataset", "status-split", {"status": STATUS, "spec": {"language": "de"}}, subresource="/status"
    )
    assert written.status == 200, written.message
    assert written.body["status"] == STATUS
    assert written.body["spec"]["language"] == "en"
    assert written.body["metadata"]["generation"] == created.body["metadata"]["generation"]
    cleared = api.merge("Dataset", "status-split", {"status": None})
    assert cleared.body["status"] == STATUS


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        ({"conditions": [{**CONDITION, "status": "Maybe"}]}, "Unsupported value"),
        ({"conditions": [CONDITION, CONDITION]}, "Duplicate value"),
        ({"conditions": [{**CONDITION, "lastTransitionTime": "yesterday"}]}, "must be of type date-time"),
        ({"conditions": [{**CONDITION, "message": "x" * 2049}]}, "Too long"),
        ({"conditions": [{**CONDITION, "reason": "no words"}]}, "should match"),
        ({"phase": "x" * 33}, "Too long"),
    ],
)
def test_a_status_is_checked_too(api: Api, patch: dict[str, Any], says: str) -> None:
    name = "status-checked"
    assert api.create(build("Dataset", name=name), dry_run=False).status in {201, 409}
    answer = api.merge("Dataset", name, {"status": {**STATUS, **patch}}, subresource="/status")
    assert answer.status == 422, answer.body
    assert says in answer.message


def test_columns_show_the_status(api: Api) -> None:
    assert api.create(build("Dataset", name="columns"), dry_run=False).status == 201
    assert api.merge("Dataset", "columns", {"status": STATUS}, subresource="/status").status == 200
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io"
    table = api.request("GET", f"{collection('Dataset')}/columns", accept=accept).body
    headings = [column["name"] for column in table["columnDefinitions"]]
    assert headings == ["Name", *(column[0] for column in MODELS["Dataset"].COLUMNS)]
    row = dict(zip(headings, table["rows"][0]["cells"], strict=True))
    assert row["Phase"] == "Ready"
    assert row["Hours"] == "0.4"
    assert row["Utterances"] == 537
    assert row["Reason"] == "Prepared"


def test_short_names_are_nobody_elses(api: Api) -> None:
    owners: dict[str, set[str]] = {}
    for path in _group_paths(api):
        for one in api.request("GET", path).body.get("resources", []):
            for name in [one["name"], one.get("singularName", ""), *one.get("shortNames", [])]:
                owners.setdefault(name, set()).add(path)
    for kind in KINDS:
        for name in (kind.SHORT_NAME, kind.PLURAL, kind.KIND.lower()):
            assert owners[name] == {GROUP_PATH}, name


def _group_paths(api: Api) -> list[str]:
    groups = api.request("GET", "/apis").body["groups"]
    return ["/api/v1", *(f"/apis/{version['groupVersion']}" for group in groups for version in group["versions"])]


def test_kubectl_lists_the_category_and_explains_every_field(api: Api) -> None:
    def kubectl(*arguments: str) -> str:
        command = [str(binaries.find("kubectl")), "--kubeconfig", str(api.kubeconfig), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert api.create(build("Canary", name="category"), dry_run=False).status == 201
    assert "canary.attune.dev/category" in kubectl("get", "attune", "-n", NAMESPACE, "-o", "name")
    text = kubectl("explain", "canary.spec.analysis.wer")
    assert "Tolerated relative increase over stable" in text
    assert "confidence" in text
    for kind in KINDS:
        assert "<no description>" not in kubectl("explain", f"{kind.SHORT_NAME}.spec")
        assert "<no description>" not in kubectl("explain", f"{kind.SHORT_NAME}.status")


def test_definitions_have_no_complaints(api: Api) -> None:
    listed = api.request("GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions").body["items"]
    assert {one["spec"]["names"]["kind"] for one in listed} == set(MODELS)
    for one in listed:
        conditions = {condition["type"]: condition["status"] for condition in one["status"]["conditions"]}
        assert conditions == {"NamesAccepted": "True", "Established": "True"}
