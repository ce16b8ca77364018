"""The whole recipe: real processes under DeepSpeed's launcher, a real store, a tiny Whisper."""

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from attune.contract.exitcode import ExitCode
from attune.contract.job import DatasetInput, FinetuneRecipe, JobSpec, Owner
from attune.contract.result import FinetuneResult, Summary
from attune.contract.training import Checkpointing, Distributed, Hyperparameters, Lora, Method, Padding
from attune_trainer.failures import OutOfMemory, RecipeFailure, StoreUnavailable, Terminated
from attune_trainer.job import RecipeContext
from attune_trainer.modeling import load_recognizer
from attune_trainer.progress import ProgressReporter
from attune_trainer.recipes import finetune, prepare
from attune_trainer.store import Store, digest_directory
from attune_trainer.training import checkpoints
from attune_trainer.training.launch import TrainingProcesses
from attune_trainer.training.settings import TrainingSettings, TrainingUtterance
from prometheus_client import generate_latest
from safetensors.numpy import load_file, save_file

from tests.trainer.conftest import S3Server
from tests.trainer.tiny_whisper import build_tiny_whisper

pytestmark = pytest.mark.slow

MakeContext = Callable[..., RecipeContext]
WORDS = ("yes", "no", "stop", "go on", "press one", "call me", "hold the line", "good bye")


def speak(text: str, seed: int) -> np.ndarray:
    """Gives every letter a tone of its own, 80 ms long."""
    draw = np.random.default_rng(seed)
    at = np.arange(int(0.08 * 16000)) / 16000
    tones = [np.sin(2 * np.pi * (200 + 100 * (ord(letter) - 96)) * at) * (letter != " ") for letter in text]
    sound = np.concatenate(tones) * 0.3
    return (sound + draw.standard_normal(len(sound)) * 0.01).astype(np.float32)


def make_dataset(store: Store, folder: Path, name: str, words: tuple[str, ...] = WORDS) -> DatasetInput:
    """Prepares a Dataset of 40 utterances."""
    lines = []
    for index in range(40):
        text = f"{words[index % 8]} {'abcdefgh'[index // 8]}"
        soundfile.write(folder / f"{index}.wav", speak(text, index), 16000, subtype="PCM_16")
        lines.append(json.dumps({"audio": f"{index}.wav", "text": text, "speaker": f"s{index % 10}"}))
    (folder / "calls.jsonl").write_text("\n".join(lines))
    uri = store.upload_directory(folder, f"finetune-inputs/{name}")
    recipe = {
        "recipe": "prepare",
        "sources": [{"uri": uri, "format": "Manifest", "manifest": "calls.jsonl"}],
        "language": "en",
        "splits": {"by": "Speaker", "validation": "0.2", "holdout": "0.1", "seed": 7},
        "maxRejectedShare": "0",
        "outputPrefix": f"finetune-inputs/dataset-{name}",
    }
    spec = JobSpec(owner=Owner(kind="Test", namespace="speech", name=name, uid="0"), result_key="unused", recipe=recipe)
    prepared = prepare.run(
        spec.recipe,
        RecipeContext(spec, store, ProgressReporter(), folder / "work", "attempt-1", threading.Event()),
    )
    return DatasetInput(name=name, revision=prepared.revision, uri=prepared.uri)


@pytest.fixture(scope="module")
def inputs(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[DatasetInput, str]:
    """A prepared Dataset and a tiny base model, both in the store."""
    store = s3_server.store()
    base = store.upload_directory(build_tiny_whisper(tmp_path_factory.mktemp("base")), "finetune-inputs/base")
    return make_dataset(store, tmp_path_factory.mktemp("calls"), "calls"), base


@pytest.fixture(scope="module")
def recipe_for(inputs: tuple[DatasetInput, str]) -> Callable[..., dict[str, Any]]:
    dataset, base = inputs

    def make(prefix: str, **changes: Any) -> dict[str, Any]:
        hyperparameters = {"epochs": 2, "batchSize": 4, "maxBatchSeconds": 24, "learningRate": "2e-3"}
        hyperparameters |= changes.pop("hyperparameters", {})
        recipe = {
            "recipe": "finetune",
            "base": {"uri": base},
            "datasets": [dataset.model_dump(by_alias=True)],
            # Dropout, so that a resumed run needs the random state as well.
            "lora": {"rank": 4, "alpha": 8, "dropout": "0.1"},
            "hyperparameters": hyperparameters,
            "checkpoint": {"everySteps": 3, "keep": 2},
            "modelId": "ft:tiny:abcdef",
            "outputPrefix": f"{prefix}/models",
            "checkpointPrefix": f"{prefix}/checkpoints",
        }
        return recipe | changes

    return make


def run(context: RecipeContext) -> FinetuneResult:
    recipe = context.spec.recipe
    assert isinstance(recipe, FinetuneRecipe)
    result = finetune.run(recipe, context)
    for clean_up in context.once_published:  # as the Job does once it has published the Result
        clean_up()
    return result


class Watcher(ProgressReporter):
    """A reporter that acts once, when a training step is reported."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.losses: dict[int, float] = {}
        self._at, self._act, self._done = step, act, False

    def update(self, **changes: Any) -> None:
        super().update(**changes)
        if changes.get("step") is not None and changes.get("epoch") is not None:
            self.seen.append(changes["step"])
            self.losses[changes["step"]] = changes["metrics"]["loss"]
            if changes["step"] >= self._at and not self._done:
                self._done = True
                self._act()


def go_on(make_context: MakeContext, recipe: dict[str, Any], work_directory: Path) -> tuple[Watcher, FinetuneResult]:
    """Runs a second attempt, in another pod, to its end; gives the steps that it trained, and its result."""
    watcher = Watcher(10**9, lambda: None)
    return watcher, run(make_context(recipe, reporter=watcher, work_directory=work_directory, attempt_uid="two"))


@pytest.fixture(scope="module")
def uninterrupted(
    s3_server: S3Server, recipe_for: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[FinetuneResult, Path, Store, ProgressReporter]:
    """A run from start to end: its result, its published files, the store, and its reporter."""
    store, reporter = s3_server.store(), ProgressReporter()
    spec = JobSpec(
        owner=Owner(kind="Test", namespace="speech", name="tune", uid="0"),
        result_key="unused",
        recipe=recipe_for("finetune-uninterrupted"),
    )
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(work))  # the image has no compiler; here it would be found and used
        patch.setenv("HOME", str(work))
        result = run(RecipeContext(spec, store, reporter, work, "attempt-1", threading.Event()))
    published = tmp_path_factory.mktemp("published")
    store.download_prefix(result.model_uri, published / "merged")
    store.download_prefix(result.adapter_uri, published / "adapter")
    return result, published, store, reporter


def test_a_run_publishes_adapter_and_merged_model_with_their_digests(
    uninterrupted: tuple[FinetuneResult, Path, Store, ProgressReporter], tmp_path: Path
) -> None:
    result, published, store, reporter = uninterrupted
    assert result.model_uri == f"s3://{store.bucket}/finetune-uninterrupted/models/attempt-1/merged"
    assert result.model_digest == digest_directory(published / "merged")
    assert result.adapter_digest == digest_directory(published / "adapter")
    assert {file.name for file in (published / "merged").iterdir()} >= {
        "attune.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    }
    recognizer = load_recognizer(published / "merged", "cpu")
    assert recognizer.padding is result.padding is Padding.BUCKETS
    assert recognizer.model_id == result.model_id == "ft:tiny:abcdef"
    adapter = load_file(published / "adapter" / "adapter_model.safetensors")
    assert all(np.abs(value).max() > 0 for value in adapter.values())
    assert result.gpu_seconds == 0
    assert float(result.epochs) == 2
    assert float(result.audio_seconds_per_second) > 0
    assert store.list("finetune-uninterrupted/checkpoints/") == []
    progress = reporter.snapshot()
    assert progress.stage == "Publishing"
    named = {"wer", "baselineWer", "loss", "audioSecondsPerSecond", "gpuSeconds"}
    assert {metric.name for metric in progress.metrics} >= named
    exported = generate_latest(reporter.registry).decode()
    assert all(f'attune_job_figure{{name="{name}"}}' in exported for name in named)


def test_a_run_publishes_a_report_and_a_model_card_beside_the_model_and_no_transcript(
    uninterrupted: tuple[FinetuneResult, Path, Store, ProgressReporter],
) -> None:
    result, _, store, reporter = uninterrupted
    folder = f"s3://{store.bucket}/finetune-uninterrupted/models/attempt-1"
    assert result.report_uri == f"{folder}/report.html"
    assert all(
        key.startswith("finetune-uninterrupted/models/attempt-1/") for key in store.list("finetune-uninterrupted/")
    )
    page = store.read_bytes(result.report_uri).decode()
    card = store.read_bytes(f"{folder}/README.md").decode()
    for text in (page, card):
        assert result.model_digest in text
        assert f"{100 * float(result.wer):.2f} %" in text
        assert not [word for word in WORDS if len(word) > 4 and word in text]
    assert "<svg" in page
    assert result.estimate is not None
    assert result.estimate == reporter.snapshot().estimate
    assert result.estimate.seconds >= 0
    assert result.peak_memory_bytes is not None
    assert result.peak_memory_bytes >= result.estimate.memory_bytes > 0
    assert (result.budget_reached, result.irreproducible) == (False, None)


def test_a_run_that_was_asked_to_end_goes_on_to_the_very_same_weights(
    uninterrupted: tuple[FinetuneResult, Path, Store, ProgressReporter],
    recipe_for: Callable[..., dict[str, Any]],
    make_context: MakeContext,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    stop = threading.Event()
    first = Watcher(4, stop.set)
    with pytest.raises(Terminated) as raised:
        run(make_context(recipe_for(key_prefix), stop=stop, reporter=first, work_directory=tmp_path / "first"))
    assert raised.value.code is ExitCode.TERMINATED
    second, result = go_on(make_context, recipe_for(key_prefix), tmp_path / "second")
    whole = uninterrupted[0]
    assert second.seen[0] == first.seen[-1] + 1
    assert result.steps == whole.steps == second.seen[-1]
    assert (result.baseline_wer, result.wer) == (whole.baseline_wer, whole.wer)
    assert result.model_digest == whole.model_digest
    assert result.adapter_digest == whole.adapter_digest
    assert (result.hardware, result.irreproducible) == (whole.hardware, None)


def test_a_run_that_hears_other_audio_in_each_epoch_goes_on_to_the_very_same_weights(
    uninterrupted: tuple[FinetuneResult, Path, Store, ProgressReporter],
    recipe_for: Callable[..., dict[str, Any]],
    make_context: MakeContext,
    s3_store: Store,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).uniform(-0.1, 0.1, 8000) * np.geomspace(1, 0.01, 8000)
        soundfile.write(sounds / f"{number}.wav", noise, 16000)
    uri = s3_store.upload_directory(sounds, f"{key_prefix}/sounds")
    changes = {
        "hyperparameters": {"dropout": "0.1"},
        "augmentation": {
            "speed": {"min": "0.8", "max": "1.2"},
            "roomImpulseResponse": {"uri": uri},
            "noise": {"kinds": ["White", "Pink", "Brown", "Babble"], "uri": uri, "probability": "0.9"},
            "codec": {"probability": "0.9"},
            "specAugment": {},
        },
    }
    whole = run(make_context(recipe_for(f"{key_prefix}/whole", **changes), work_directory=tmp_path / "whole"))
    assert whole.model_digest != uninterrupted[0].model_digest
    assert whole.baseline_wer == uninterrupted[0].baseline_wer  # validation hears what was recorded
    stop = threading.Event()
    first = Watcher(whole.steps // 2 + 1, stop.set)  # in the second epoch
    recipe = recipe_for(f"{key_prefix}/parts", **changes)
    with pytest.raises(Terminated):
        run(make_context(recipe, stop=stop, reporter=first, work_directory=tmp_path / "first"))
    second, result = go_on(make_context, recipe, tmp_path / "second")
    assert second.seen[0] == first.seen[-1] + 1
    assert (result.model_digest, result.adapter_digest) == (whole.model_digest, whole.adapter_digest)


def test_a_run_whose_process_was_killed_goes_on_from_an_unharmed_checkpoint_to_the_very_same_weights(
    uninterrupted: tuple[FinetuneResult, Path, Store, ProgressReporter],
    recipe_for: Callable[..., dict[str, Any]],
    make_context: MakeContext,
    s3_store: Store,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    def kill_worker() -> None:
        for child in psutil.Process().children(recursive=True):
            if "attune_trainer.training.worker" in child.cmdline() and "launch" not in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)

    first = Watcher(7, kill_worker)
    with pytest.raises(OutOfMemory, match="maxBatchSeconds"):
        run(make_context(recipe_for(key_prefix), reporter=first, work_directory=tmp_path / "first"))
    sealed = sorted(key for key in s3_store.list(f"{key_prefix}/checkpoints/") if key.endswith("seal.json"))
    assert sealed
    assert len(sealed) <= 2
    # The newest is damaged on top of it: an older one, or none, has to serve.
    s3_store.write_bytes(sealed[-1].replace("seal.json", "state.json"), b"{}")
    second, result = go_on(make_context, recipe_for(key_prefix), tmp_path / "second")
    newest = int(sealed[-1].split("/")[-2].split("-")[1])
    assert second.seen[0] <= newest
    assert result.model_digest == uninterrupted[0].model_digest


def test_a_run_that_was_cut_off_while_it_published_trains_no_step_again(
    uninterrupted: tuple[FinetuneResult, Path, Store, ProgressReporter],
    recipe_for: Callable[..., dict[str, Any]],
    make_context: MakeContext,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    def lose(*_: object) -> None:
        raise StoreUnavailable("StoreUnavailable", "the store did not answer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "_publish", lose)
        with pytest.raises(StoreUnavailable):
            run(make_context(recipe_for(key_prefix), work_directory=tmp_path / "first"))
    # Under another name, as a copy of the FineTune would be: the model is another, its weights are not.
    second, result = go_on(make_context, recipe_for(key_prefix, modelId="ft:tiny:123456"), tmp_path / "second")
    whole = uninterrupted[0]
    assert second.seen == []
    assert (result.steps, result.epochs, result.stopped_early) == (whole.steps, whole.epochs, whole.stopped_early)
    assert (result.baseline_wer, result.wer) == (whole.baseline_wer, whole.wer)
    assert result.weights_digest == whole.weights_digest
    assert result.model_digest != whole.model_digest


def test_a_second_generation_keeps_an_old_domain_tells_of_both_and_goes_on_to_the_very_same_weights(
    uninterrupted: tuple[FinetuneResult, Path, Store, ProgressReporter],
    recipe_for: Callable[..., dict[str, Any]],
    make_context: MakeContext,
    s3_store: Store,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    first, folder = uninterrupted[0], tmp_path / "old"
    folder.mkdir()
    words = ("red", "green", "blue", "white", "black", "brown", "pink", "grey")
    old = make_dataset(s3_store, folder, "colours", words)
    changes = {
        "base": {"uri": first.model_uri, "digest": first.model_digest},
        "modelId": "ft:tiny:123456",
        "retention": {
            "dataset": old.model_dump(by_alias=True),
            "replay": {"ratio": "0.3"},
            "ewc": {"lambda": "10", "samples": 8},
        },
    }
    reporter = ProgressReporter()
    alone = run(make_context(recipe_for(f"{key_prefix}/alone", **changes), reporter=reporter))
    assert alone.old_wer is not None
    assert alone.old_baseline_wer is not None
    assert {metric.name for metric in reporter.snapshot().metrics} >= {"wer", "oldWer", "baselineWer", "oldBaselineWer"}
    assert alone.curve_uri is not None
    curve = json.loads(s3_store.read_bytes(alone.curve_uri))
    assert [one["epoch"] for one in curve] == [0, 1, 2]
    assert all(one.keys() == {"epoch", "wer", "oldWer"} for one in curve)
    assert float(alone.old_baseline_wer) == pytest.approx(curve[0]["oldWer"], abs=1e-6)
    assert float(alone.wer) == pytest.approx(min(one["wer"] for one in curve[1:]), abs=1e-6)
    told = json.loads(s3_store.read_bytes(f"{alone.model_uri}/attune.json"))
    assert [one["modelId"] for one in told["history"]] == ["ft:tiny:123456", "ft:tiny:abcdef"]
    assert [one["name"] for one in told["history"][0]["datasets"]] == ["calls", "colours"]
    assert told["history"][0]["baseDigest"] == first.model_digest

    stop = threading.Event()
    recipe = recipe_for(key_prefix, **changes)
    with pytest.raises(Terminated):
        run(make_context(recipe, stop=stop, reporter=Watcher(4, stop.set), work_directory=tmp_path / "first"))
    watcher, result = go_on(make_context, recipe, tmp_path / "second")
    assert watcher.seen[0] > 4
    assert (result.wer, result.old_wer, result.steps) == (alone.wer, alone.old_wer, alone.steps)
    assert result.adapter_digest == alone.adapter_digest


def train_in_two_processes(
    folder: Path,
    validation: int,
    on_event: Callable[[dict[str, Any]], None],
    stop_wanted: Callable[[], bool] = lambda: False,
) -> None:
    """Follows two training processes to their end; before they train, they validate on so many utterances."""
    spoken = []
    for index, text in enumerate(WORDS):
        file, samples = folder / f"{index}.wav", speak(text, index)
        soundfile.write(file, samples, 16000, subtype="PCM_16")
        spoken.append(TrainingUtterance(audio=file, text=text, seconds=len(samples) / 16000))
    with TrainingProcesses(folder / "processes", 2) as processes:
        processes.begin(
            TrainingSettings(
                base=build_tiny_whisper(folder / "base"),
                base_uri="s3://attune/base",
                model_id="ft:tiny:abcdef",
                language="en",
                train=tuple(spoken),
                validation=tuple(spoken[index % len(spoken)] for index in range(validation)),
                method=Method.LORA,
                lora=Lora(rank=4, alpha=8),
                hyperparameters=Hyperparameters(epochs=50, batch_size=2),
                padding=Padding.BUCKETS,
                early_stopping=None,
                checkpoint=Checkpointing(),
                distributed=Distributed(processes_per_node=2),
                fingerprint="f" * 64,
                checkpoints=folder / "checkpoints",
                resume=None,
                output=folder / "output",
                stop_file=processes.stop_file,
            )
        )
        processes.follow(on_event, stop_wanted)


def test_of_two_processes_the_one_that_was_killed_gives_the_reason_and_not_the_other_one_that_lost_it(
    tmp_path: Path,
) -> None:
    def kill_second(event: dict[str, Any]) -> None:
        if event.get("step", 0) > 0:
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.environ().get("RANK") == "1":
                        child.kill()

    with pytest.raises(OutOfMemory, match="maxBatchSeconds"):
        train_in_two_processes(tmp_path, 33, kill_second)  # 17 and 16: the first has a chunk more


def test_two_processes_end_in_the_middle_of_a_validation_when_they_are_asked_to(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    with pytest.raises(Terminated):
        train_in_two_processes(tmp_path, 960, told.append, lambda: any(one.get("percent", 0) > 10 for one in told))
    assert {event["kind"] for event in told} == {"progress"}  # no baseline: that would have been heard to its end


# Without dropout, which each process draws for itself, and in one arithmetic, all of these learn the same.
SAME_COURSE = {
    "lora": {"rank": 4, "alpha": 8},
    "padding": "Window",
    "hyperparameters": {"precision": "Fp32", "epochs": 1},
}


@pytest.fixture(scope="module")
def alone(
    s3_server: S3Server, recipe_for: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[FinetuneResult, dict[int, float]]:
    """One process that takes two batches for each step: its result, and the loss at each step."""
    changes = copy.deepcopy(SAME_COURSE)
    changes["hyperparameters"]["gradientAccumulation"] = 2
    watcher = Watcher(10**9, lambda: None)
    spec = JobSpec(
        owner=Owner(kind="Test", namespace="speech", name="tune", uid="0"),
        result_key="unused",
        recipe=recipe_for("finetune-alone", **changes),
    )
    work = tmp_path_factory.mktemp("alone")
    context = RecipeContext(spec, s3_server.store(), watcher, work, "attempt-1", threading.Event())
    return run(context), watcher.losses


@pytest.mark.parametrize(("stage", "offload"), [(2, None), (3, None), (2, "Optimizer"), (3, "Optimizer")])
def test_two_processes_that_share_a_run_out_learn_what_one_with_both_their_batches_learns(
    alone: tuple[FinetuneResult, dict[int, float]],
    recipe_for: Callable[..., dict[str, Any]],
    make_context: MakeContext,
    s3_store: Store,
    key_prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    offload: str | None,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # the image has no compiler; here it would be found and used
    deepspeed = {"zeroStage": stage, "offload": offload}
    changes = SAME_COURSE | {"distributed": {"processesPerNode": 2, "deepspeed": deepspeed}}
    stop = threading.Event()
    first = Watcher(2, stop.set)
    with pytest.raises(Terminated):
        run(make_context(recipe_for(key_prefix, **changes), stop=stop, reporter=first))
    second, result = go_on(make_context, recipe_for(key_prefix, **changes), tmp_path / "second")
    assert second.seen[0] == first.seen[-1] + 1
    assert result.padding is Padding.WINDOW
    expected, losses = alone
    assert first.losses | second.losses == pytest.approx(losses, rel=1e-4)
    assert result.steps == expected.steps == second.seen[-1]
    assert result.adapter_uri is not None
    assert expected.adapter_uri is not None
    s3_store.download_prefix(result.adapter_uri, tmp_path / "shared")
    s3_store.download_prefix(expected.adapter_uri, tmp_path / "alone")
    shared, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("shared", "alone"))
    assert {name: value.shape for name, value in shared.items()} == {name: value.shape for name, value in whole.items()}
    assert all(np.abs(value).max() > 0 for value in shared.values())
    for name, value in shared.items():
        np.testing.assert_allclose(value, whole[name], atol=2e-4)


def test_a_run_whose_budget_is_spent_ends_at_once_with_a_model_that_was_validated(
    recipe_for: Callable[..., dict[str, Any]], make_context: MakeContext, key_prefix: str
) -> None:
    budget = {"maxHours": "0.000001"}  # less than any step takes: the second one is the last
    context = make_context(recipe_for(key_prefix, budget=budget, hyperparameters={"epochs": 1000}))
    result = run(context)
    assert result.budget_reached
    assert (result.steps, result.stopped_early) == (2, False)
    assert result.total_steps is not None
    assert result.total_steps > 1000
    assert 0 < float(result.epochs) < 1
    assert "budget" in str(result.irreproducible)
    assert load_recognizer(context.work_directory / "output" / "merged", "cpu").model_id == result.model_id


def test_a_run_of_all_weights_goes_on_from_a_checkpoint_to_the_very_same_weights(
    recipe_for: Callable[..., dict[str, Any]],
    make_context: MakeContext,
    s3_store: Store,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    recipe = recipe_for(
        key_prefix,
        method="Full",
        lora={},
        hyperparameters={"learningRate": "5e-4", "epochs": 1},
        checkpoint={"everySteps": 2, "keep": 20},
    )
    context = make_context(recipe, work_directory=tmp_path / "first")
    assert isinstance(context.spec.recipe, FinetuneRecipe)
    whole = finetune.run(context.spec.recipe, context)
    assert (whole.adapter_uri, whole.adapter_digest) == (None, None)
    # As if it had been lost after its first checkpoint.
    prefix = f"{key_prefix}/checkpoints/"
    for key in s3_store.list(prefix):
        if not key.startswith(f"{prefix}{checkpoints.folder_name(2, 0)}/"):
            s3_store.delete(key)
    second, result = go_on(make_context, recipe, tmp_path / "second")
    assert second.seen[0] == 3
    assert (result.model_digest, result.wer) == (whole.model_digest, whole.wer)


def test_a_run_beside_weights_of_4_bits_publishes_a_model_of_full_precision_and_its_adapter(
    recipe_for: Callable[..., dict[str, Any]],
    make_context: MakeContext,
    s3_store: Store,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    watcher = Watcher(10**9, lambda: None)
    result = run(make_context(recipe_for(key_prefix, method="QLora"), reporter=watcher))
    assert np.mean([watcher.losses[step] for step in watcher.seen[-3:]]) < watcher.losses[1]
    assert result.adapter_uri is not None
    s3_store.download_prefix(result.model_uri, tmp_path / "merged")
    s3_store.download_prefix(result.adapter_uri, tmp_path / "adapter")
    assert result.model_digest == digest_directory(tmp_path / "merged")
    assert result.adapter_digest == digest_directory(tmp_path / "adapter")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {str(value.dtype) for value in merged.values()} == {"float32"}
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(np.abs(value).max() > 0 for value in adapter.values())


def test_a_loss_that_is_no_number_ends_the_run_names_the_step_and_leaves_the_last_good_checkpoint(
    recipe_for: Callable[..., dict[str, Any]],
    make_context: MakeContext,
    s3_store: Store,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    # Only the longest transcripts reach this position of the decoder, and they train together.
    folder = build_tiny_whisper(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights["model.decoder.embed_positions.weight"][16] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = s3_store.upload_directory(folder, f"{key_prefix}/base")
    watcher = Watcher(10**9, lambda: None)
    changes = {"base": {"uri": base}, "checkpoint": {"everySteps": 1, "keep": 1}}
    with pytest.raises(RecipeFailure, match=r"lower spec\.hyperparameters\.learningRate") as raised:
        run(make_context(recipe_for(key_prefix, **changes), reporter=watcher))
    assert raised.value.code is ExitCode.DIVERGED
    last = watcher.seen[-1]
    assert f"at step {last + 1} of " in raised.value.message
    (sealed,) = (key for key in s3_store.list(f"{key_prefix}/checkpoints/") if key.endswith("seal.json"))
    assert checkpoints.folder_name(last, 0) in sealed


def test_a_job_that_gets_sigterm_saves_a_checkpoint_and_exits_with_143(
    recipe_for: Callable[..., dict[str, Any]],
    job_environment: dict[str, str],
    s3_store: Store,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    spec = JobSpec(
        owner=Owner(kind="FineTune", namespace="speech", name="tune", uid="0"),
        result_key=f"{key_prefix}/result.json",
        recipe=recipe_for(key_prefix, hyperparameters={"epochs": 1000}, checkpoint={"everySteps": 1000000}),
    )
    (tmp_path / "job.json").write_text(spec.model_dump_json(by_alias=True))
    log = []
    command = [sys.executable, "-m", "attune_trainer"]
    with subprocess.Popen(command, env=job_environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        for line in job.stdout:
            log.append(line)
            if '"stage": "Training"' in line:
                job.send_signal(signal.SIGTERM)
    assert job.returncode == int(ExitCode.TERMINATED), "".join(log[-20:])
    assert any(key.endswith("seal.json") for key in s3_store.list(f"{key_prefix}/checkpoints/"))
    summary = Summary.model_validate_json((tmp_path / "termination-log").read_text())
    assert summary.failure is not None
    assert summary.failure.reason == "Terminated"
    assert not any(word in "".join(log) for word in ("hold the line", "good bye"))
