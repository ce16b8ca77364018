"""A whole score Job: two real inference servers, a prepared Dataset, a scorer process, and its counters over HTTP."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from attune.contract import metrics
from attune.contract.exitcode import ExitCode
from attune.contract.job import (
    DatasetInput,
    JobSpec,
    Owner,
    PrepareRecipe,
    PrepareSource,
    ScoreRecipe,
    SourceFormat,
    Split,
    SplitBy,
    SplitRule,
)
from attune_trainer.data.dataset import load_split, read_audio
from attune_trainer.job import RecipeContext
from attune_trainer.modeling import load_recognizer
from attune_trainer.recipes import prepare
from attune_trainer.scoring import count_errors, normalise
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load_file, save_file

from tests.assets.mini_model import ensure_mini_corpus, ensure_mini_model
from tests.trainer.conftest import S3Server, free_port, read_summary
from tests.trainer.server_process import ServerProcess, start_server, wait_until

pytestmark = pytest.mark.slow  # the Mini model is trained on first use

SEED = 11
CAP = 3  # low, so that some utterance of the worse model meets it
ROLLOUT = "rollout-1"


@pytest.fixture(scope="module")
def models(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The Mini model and a worse one, by name; both are in the store below score-tests/."""
    base = ensure_mini_model()
    worse = tmp_path_factory.mktemp("worse")
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (worse / file.name).write_bytes(file.read_bytes())
            continue
        noise = np.random.default_rng(5)
        weights = {
            name: (value + noise.normal(0, 0.12 * value.std(), value.shape)).astype(value.dtype)
            for name, value in load_file(file).items()
        }
        save_file(weights, worse / file.name, metadata={"format": "pt"})
    folders = {"base": base, "worse": worse}
    for name, folder in folders.items():
        s3_server.store().upload_directory(folder, f"score-tests/{name}")
    return folders


@dataclass(frozen=True)
class Sums:
    """The paired sums after some utterances, computed without servers."""

    utterances: int
    words: int
    stable: int
    canary: int
    product: int


@dataclass(frozen=True)
class Prepared:
    """A Dataset and what a scorer must count on its holdout, after each utterance."""

    dataset: DatasetInput
    prefixes: list[Sums]
    transcripts: list[str]


@pytest.fixture
def prepared(
    s3_server: S3Server, models: dict[str, Path], make_context: Callable[..., RecipeContext], tmp_path: Path
) -> Prepared:
    store = s3_server.store()
    source = store.upload_directory(ensure_mini_corpus("old"), "score-tests/corpus")
    recipe = PrepareRecipe(
        sources=[PrepareSource(uri=source, format=SourceFormat.MANIFEST, manifest="transcripts.jsonl")],
        language="en",
        splits=SplitRule(by=SplitBy.SPEAKER, validation="0.1", holdout="0.3", seed=7),
        max_rejected_share="0.05",
        output_prefix="score-tests/dataset",
    )
    result = prepare.run(recipe, make_context(recipe.model_dump(by_alias=True)))
    dataset = DatasetInput(name="corpus", revision=result.revision, uri=result.uri)
    utterances = {one.id: one for one in load_split(store, dataset, Split.HOLDOUT)}
    order = sorted(utterances)
    random.Random(SEED).shuffle(order)
    audio = [read_audio(store, utterances[key], tmp_path / "audio") for key in order]
    heard = {name: load_recognizer(folder, "cpu").transcribe(audio) for name, folder in models.items()}
    prefixes = [Sums(0, 0, 0, 0, 0)]
    for position, key in enumerate(order):
        reference = normalise(utterances[key].text, "en")
        stable, canary = (
            min(CAP, count_errors(reference, normalise(heard[name][position], "en")).errors)
            for name in ("base", "worse")
        )
        last = prefixes[-1]
        prefixes.append(
            Sums(
                last.utterances + 1,
                last.words + len(reference.split()),
                last.stable + stable,
                last.canary + canary,
                last.product + stable * canary,
            )
        )
    return Prepared(dataset, prefixes, [one.text for one in utterances.values()])


@dataclass(eq=False)
class Scorer:
    """A running score Job."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path

    def scrape(self) -> dict[tuple[str, str | None], float] | None:
        """Gives the rollout's samples by name and track; None while nothing listens or nothing is loaded yet."""
        try:
            text = httpx.get(f"{self.url}/metrics", trust_env=False).text
        except httpx.HTTPError:
            return None
        samples = {
            (sample.name, sample.labels.get("track")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("attune_rollout") == ROLLOUT
        }
        return samples or None

    def sums(self) -> Sums | None:
        samples = self.scrape()
        if samples is None:
            return None
        names = (
            metrics.PAIRED_UTTERANCES,
            metrics.PAIRED_WORDS,
            metrics.PAIRED_STABLE_ERRORS,
            metrics.PAIRED_CANARY_ERRORS,
            metrics.PAIRED_PRODUCT,
        )
        return Sums(*(int(samples[name, None]) for name in names))


@contextmanager
def start_scorer(
    environment: dict[str, str], folder: Path, prepared: Prepared, stable_url: str, canary_url: str
) -> Iterator[Scorer]:
    recipe = ScoreRecipe(
        dataset=prepared.dataset,
        split=Split.HOLDOUT,
        stable_url=stable_url,
        canary_url=canary_url,
        stable_model_id="mini",
        canary_model_id="worse",
        requests_per_minute=600,
        canary="prod-voice",
        namespace="speech",
        rollout=ROLLOUT,
        max_errors_per_utterance=CAP,
        seed=SEED,
    )
    spec = JobSpec(
        owner=Owner(kind="Canary", namespace="speech", name="prod-voice", uid="0"),
        result_key="score-tests/result.json",
        recipe=recipe,
    )
    Path(environment["ATTUNE_JOB_FILE"]).write_text(spec.model_dump_json(by_alias=True))
    port = free_port()
    log = folder / "scorer.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "attune_trainer"],
            env=environment | {"ATTUNE_PROGRESS_PORT": str(port)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Scorer(process, f"http://127.0.0.1:{port}", log)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)


@contextmanager
def arms(s3_server: S3Server, folder: Path) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Both arms, started at the same time; the canary's is not waited for."""
    with (
        start_server(
            s3_server, folder / "canary", "s3://attune/score-tests/worse", wait=False,
            ATTUNE_TRACK="canary", ATTUNE_MODEL_ID="worse",
        ) as canary,
        start_server(s3_server, folder / "stable", "s3://attune/score-tests/base", ATTUNE_MODEL_ID="mini") as stable,
    ):  # fmt: skip
        yield stable, canary


def read_progress(scorer: Scorer) -> tuple[str, int]:
    told = httpx.get(f"{scorer.url}/progress", trust_env=False).json()
    return told["stage"], told["percent"]


def test_the_counters_are_what_the_models_say_at_every_scrape_and_after_a_restart(
    s3_server: S3Server, prepared: Prepared, job_environment: dict[str, str], tmp_path: Path
) -> None:
    total = prepared.prefixes[-1]
    assert total.canary > total.stable  # else the test could not tell the arms apart
    with arms(s3_server, tmp_path) as (stable, canary):
        seen: set[int] = set()

        def reached(scorer: Scorer, utterances: int) -> bool:
            assert scorer.process.poll() is None, scorer.log.read_text()
            sums = scorer.sums()
            if sums is None:
                return False
            assert sums == prepared.prefixes[sums.utterances]  # a scrape is the set's beginning, whole
            seen.add(sums.utterances)
            return sums.utterances >= utterances

        with start_scorer(job_environment, tmp_path, prepared, stable.url, canary.url) as scorer:
            wait_until(lambda: reached(scorer, 5), 300, "five pairs")
            scorer.process.send_signal(signal.SIGTERM)
            assert scorer.process.wait(timeout=60) == ExitCode.TERMINATED
        # The first scorer hung up on what was under way; the second is to be answered without a fault.
        hung_up = stable.sample("attune_serve_errors_total", track="stable")
        with start_scorer(job_environment, tmp_path, prepared, stable.url, canary.url) as scorer:
            wait_until(lambda: reached(scorer, total.utterances), 300, "all pairs")
            wait_until(lambda: (scorer.scrape() or {}).get((metrics.GOLDEN_EXHAUSTED, None)) == 1, what="exhaustion")
            samples = scorer.scrape()
            assert samples is not None
            # Counters are read when they are asked for; progress is told in turns.
            wait_until(lambda: read_progress(scorer) == ("Exhausted", 100), what="progress of a replay that is over")
            scorer.process.send_signal(signal.SIGTERM)
            assert scorer.process.wait(timeout=60) == ExitCode.TERMINATED
        assert stable.sample("attune_serve_errors_total", track="stable") == hung_up
        for arm in (stable, canary):
            assert arm.sample("attune_serve_requests_total", status="200") >= total.utterances + 5
    assert len(seen) > 3
    assert samples[metrics.GOLDEN_UTTERANCES, None] == total.utterances
    assert samples[metrics.GOLDEN_WORDS, None] == total.words
    for track, errors in (("stable", total.stable), ("canary", total.canary)):
        assert samples[metrics.UTTERANCES, track] == total.utterances
        assert samples[metrics.WORD_ERRORS, track] == errors
        assert samples[metrics.REFERENCE_WORDS, track] == total.words
        assert samples[metrics.FAILED_REQUESTS, track] == 0
    summary = read_summary(job_environment)
    assert summary is not None
    assert summary["failure"]["reason"] == "Terminated"
    logged = scorer.log.read_text()
    assert not [text for text in prepared.transcripts if " " in text and text in logged]


def test_a_split_that_is_not_there_is_said(
    s3_server: S3Server, job_environment: dict[str, str], tmp_path: Path
) -> None:
    nowhere = DatasetInput(name="gone", revision=f"sha256:{'0' * 64}", uri="s3://attune/score-tests/gone")
    prepared = Prepared(nowhere, [], [])
    with start_scorer(job_environment, tmp_path, prepared, "http://127.0.0.1:9", "http://127.0.0.1:9") as scorer:
        assert scorer.process.wait(timeout=120) == ExitCode.NOT_FOUND
    assert json.dumps(read_summary(job_environment)).count("RevisionNotFound") == 1
