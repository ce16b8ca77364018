"""A run of two pods: two Jobs' containers with a disk each, that share nothing but the store and the network."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from attune.contract.exitcode import Disposition, ExitCode
from attune.contract.job import DatasetInput, JobSpec, Owner
from attune.contract.result import FinetuneResult, Summary
from attune_trainer.store import Store
from attune_trainer.training import checkpoints
from attune_trainer.training.checkpoints import TrainingState
from safetensors.numpy import load_file

from tests.trainer.conftest import S3Server, free_port, read_summary
from tests.trainer.test_finetune import SAME_COURSE, make_dataset
from tests.trainer.tiny_whisper import build_tiny_whisper

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def inputs(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[DatasetInput, str]:
    """A prepared Dataset and a tiny base model, both in the store."""
    store = s3_server.store()
    base = store.upload_directory(build_tiny_whisper(tmp_path_factory.mktemp("base")), "pods-inputs/base")
    return make_dataset(store, tmp_path_factory.mktemp("calls"), "pods"), base


@dataclass
class Pod:
    """A container of the run, and the disk that it has to itself."""

    process: subprocess.Popen[bytes]
    folder: Path
    environment: dict[str, str]

    def wait(self, seconds: float = 300) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        """Ends the container and all of its processes at once, as the loss of its node does."""
        parent = psutil.Process(self.process.pid)
        for process in (*parent.children(recursive=True), parent):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def summary(self) -> Summary:
        return Summary.model_validate(read_summary(self.environment))

    @property
    def result(self) -> FinetuneResult:
        result = self.summary.result
        assert isinstance(result, FinetuneResult), self.log[-4000:]
        return result


class Run:
    """A FineTune's Job, attempt after attempt."""

    def __init__(self, recipe: dict[str, Any], server: S3Server, folder: Path, prefix: str, nodes: int) -> None:
        self.store, self.prefix, self.nodes = server.store(), prefix, nodes
        self._folder, self._server, self._attempts = folder, server, 0
        self.pods: list[Pod] = []
        self._spec = JobSpec(
            owner=Owner(kind="FineTune", namespace="speech", name="tune", uid="0"),
            result_key=f"{prefix}/result.json",
            recipe=recipe,  # type: ignore[arg-type] # the discriminator picks the model
        )

    def start(self) -> list[Pod]:
        """Starts all pods anew, with empty disks."""
        self._attempts += 1
        ports = {"ATTUNE_GANG_PORT": str(free_port()), "ATTUNE_TRAINING_PORT": str(free_port())}
        self.pods = [self._start_pod(index, ports) for index in range(self.nodes)]
        return self.pods

    def _start_pod(self, index: int, ports: dict[str, str]) -> Pod:
        folder = self._folder / f"attempt-{self._attempts}-pod-{index}"
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(self._spec.model_dump_json(by_alias=True))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ATTUNE_")},
            **self._server.environment(),
            "ATTUNE_JOB_FILE": str(folder / "job.json"),
            "ATTUNE_TERMINATION_MESSAGE_FILE": str(folder / "termination-log"),
            "ATTUNE_WORK_DIRECTORY": str(folder / "work"),
            "ATTUNE_PROGRESS_PORT": "0",
            "ATTUNE_PROGRESS_HOST": "127.0.0.1",
            "ATTUNE_ATTEMPT_UID": f"attempt-{self._attempts}-pod-{index}",
            # Of all processes the same, as one arithmetic wants.
            "OMP_NUM_THREADS": "1",
        }
        if self.nodes > 1:
            environment |= {"JOB_COMPLETION_INDEX": str(index), "ATTUNE_LEADER_HOST": "127.0.0.1", **ports}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "attune_trainer"], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        return Pod(process, folder, environment)

    def finish(self) -> list[FinetuneResult]:
        """Lets an attempt come to its end; gives what each pod has said."""
        pods = self.start()
        assert [pod.wait() for pod in pods] == [0] * len(pods), "\n".join(pod.log[-3000:] for pod in pods)
        return [pod.result for pod in pods]

    def sealed(self) -> list[str]:
        """The folders of the checkpoints that can be gone on from, the oldest first."""
        keys = self.store.list(f"{self.prefix}/checkpoints/")
        return sorted(key.split("/")[-2] for key in keys if key.endswith("/seal.json"))

    def wait_sealed(self) -> None:
        """Waits for a first checkpoint, and fails if the run ends before it."""
        deadline = time.monotonic() + 240
        while not self.sealed():
            assert time.monotonic() < deadline
            for pod in self.pods:
                assert pod.process.poll() is None, pod.log[-4000:]
            time.sleep(0.05)  # between two looks

    def state(self) -> TrainingState:
        """Where the first pod ended."""
        text = (self.pods[0].folder / "work" / "output" / checkpoints.STATE_FILE).read_text()
        return TrainingState.model_validate_json(text)

    def stop(self) -> None:
        for pod in self.pods:
            if pod.process.poll() is None:
                pod.kill()


MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def make_run(
    s3_server: S3Server, inputs: tuple[DatasetInput, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeRun]:
    """Makes runs; their pods that are left in the end are killed."""
    dataset, base = inputs
    made: list[Run] = []

    def make(nodes: int, stage: int = 0, **changes: Any) -> Run:
        prefix = f"pods-{len(made)}"
        hyperparameters = {"epochs": 2, "batchSize": 4, "maxBatchSeconds": 24, "learningRate": "2e-3"}
        recipe = {
            "recipe": "finetune",
            "base": {"uri": base},
            "datasets": [dataset.model_dump(by_alias=True)],
            "lora": {"rank": 4, "alpha": 8, "dropout": "0.1"},
            "checkpoint": {"everySteps": 3, "keep": 2},
            "distributed": {"nodes": nodes, "deepspeed": {"zeroStage": stage}},
            "modelId": "ft:tiny:abcdef",
            "outputPrefix": f"{prefix}/models",
            "checkpointPrefix": f"{prefix}/checkpoints",
            **changes,
            "hyperparameters": hyperparameters | changes.get("hyperparameters", {}),
        }
        made.append(Run(recipe, s3_server, tmp_path_factory.mktemp(prefix), prefix, nodes))
        return made[-1]

    yield make
    for run in made:
        run.stop()


def read_adapter(store: Store, result: FinetuneResult, folder: Path) -> dict[str, np.ndarray]:
    assert result.adapter_uri is not None
    store.download_prefix(result.adapter_uri, folder)
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(
    make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[float, ...], dict[str, np.ndarray]]:
    """One pod that takes two batches for each step: the loss at each step, and its adapter."""
    changes = {**SAME_COURSE, "hyperparameters": {**SAME_COURSE["hyperparameters"], "gradientAccumulation": 2}}
    run = make_run(1, **changes)
    (result,) = run.finish()
    return run.state().course.losses, read_adapter(run.store, result, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_pods_learn_step_by_step_what_one_with_both_their_batches_learns(
    alone: tuple[tuple[float, ...], dict[str, np.ndarray]], make_run: MakeRun, stage: int, tmp_path: Path
) -> None:
    losses, whole = alone
    run = make_run(2, stage, **SAME_COURSE)
    results = run.finish()
    assert run.state().course.losses == pytest.approx(losses, rel=1e-4)
    # What the first has published is what every pod says, so that it matters to nobody which is asked.
    assert results[0] == results[1]
    shared = read_adapter(run.store, results[0], tmp_path / "adapter")
    assert {name: value.shape for name, value in shared.items()} == {name: value.shape for name, value in whole.items()}
    for name, value in shared.items():
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(value, whole[name], atol=2e-4)
    models = {key.split("/")[2] for key in run.store.list(f"{run.prefix}/models/")}
    assert models == {"attempt-1-pod-0"}
    assert run.sealed() == []
    assert "hold the line" not in "".join(pod.log for pod in run.pods)


# Dropout, which each process draws for itself, so that what goes on needs the random states of all.
LONGER = {"hyperparameters": {"epochs": 6, "precision": "Fp32"}}


@pytest.fixture(scope="module")
def undisturbed(make_run: MakeRun) -> FinetuneResult:
    """Two pods that share out the optimiser's state, from start to end."""
    return make_run(2, 2, **LONGER).finish()[0]


def test_a_pod_that_dies_takes_the_other_one_down_and_both_go_on_to_the_very_same_weights(
    undisturbed: FinetuneResult, make_run: MakeRun
) -> None:
    run = make_run(2, 2, **LONGER)
    first, second = run.start()
    run.wait_sealed()
    second.kill()
    assert first.wait(60) == int(ExitCode.PEER_LOST), first.log[-4000:]
    # The end of the one that died costs the retry, that of the other one none.
    assert ExitCode.PEER_LOST.disposition is Disposition.FREE
    failure = first.summary.failure
    assert failure is not None
    assert failure.reason == "PeerLost"
    losses = json.loads(run.store.read_bytes(f"{run.prefix}/checkpoints/{checkpoints.LOSSES_FILE}"))
    assert (losses["checkpoint"], losses["count"]) == (run.sealed()[-1], 1)
    engine = checkpoints.ENGINE_FOLDER
    seal = json.loads(run.store.read_bytes(f"{run.prefix}/checkpoints/{run.sealed()[-1]}/seal.json"))
    shards = [name for name in seal if name.startswith(f"{engine}/state/") and "optim_states" in name]
    assert len(shards) == 2, seal

    result, same = run.finish()
    assert "goes on from a checkpoint" in run.pods[0].log
    assert "goes on from a checkpoint" in run.pods[1].log
    assert result == same
    assert (result.model_digest, result.wer, result.steps) == (
        undisturbed.model_digest,
        undisturbed.wer,
        undisturbed.steps,
    )
    assert not run.store.list(f"{run.prefix}/checkpoints/")


def test_a_first_pod_that_dies_takes_the_other_one_down(make_run: MakeRun) -> None:
    run = make_run(2, 1, hyperparameters={"epochs": 1000})
    first, second = run.start()
    run.wait_sealed()
    first.kill()
    assert second.wait(60) == int(ExitCode.PEER_LOST), second.log[-4000:]
    assert not [one for one in psutil.process_iter(["environ"]) if is_of(one, second)]


def test_a_pod_that_falls_silent_is_not_waited_for(make_run: MakeRun) -> None:
    run = make_run(2, 0, hyperparameters={"epochs": 1000})
    first, second = run.start()
    run.wait_sealed()
    # Its connections stay open, as those of a node that has vanished do.
    silent = psutil.Process(second.process.pid)
    for process in (silent, *silent.children(recursive=True)):
        process.suspend()
    assert first.wait(120) == int(ExitCode.PEER_LOST), first.log[-4000:]
    assert "pod 1 of this run is gone" in first.log
    assert not [one for one in psutil.process_iter(["environ"]) if is_of(one, first)]


def is_of(process: psutil.Process, pod: Pod) -> bool:
    environment = process.info["environ"] or {}
    return environment.get("ATTUNE_WORK_DIRECTORY") == pod.environment["ATTUNE_WORK_DIRECTORY"]


def test_one_pod_that_is_told_to_stop_stops_both_at_one_checkpoint_and_both_go_on_to_the_very_same_weights(
    undisturbed: FinetuneResult, make_run: MakeRun
) -> None:
    run = make_run(2, 2, **LONGER)
    pods = run.start()
    run.wait_sealed()
    pods[1].process.send_signal(signal.SIGTERM)
    assert [pod.wait(60) for pod in pods] == [int(ExitCode.TERMINATED)] * 2, "\n".join(pod.log[-3000:] for pod in pods)
    newest = run.sealed()[-1]
    seal = json.loads(run.store.read_bytes(f"{run.prefix}/checkpoints/{newest}/seal.json"))
    stored = {key.partition(f"{newest}/")[2] for key in run.store.list(f"{run.prefix}/checkpoints/{newest}/")}
    assert stored == {*seal, "seal.json"}
    result, _ = run.finish()
    assert (result.model_digest, result.steps) == (undisturbed.model_digest, undisturbed.steps)
