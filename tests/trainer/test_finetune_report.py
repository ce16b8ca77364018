"""What a run leaves to read: its curve, its estimate, the page and the model card."""

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from attune.contract.costs import Budget, Economics
from attune.contract.job import FinetuneRecipe, ModelInput, TrainingInput
from attune.contract.result import Hardware
from attune.contract.training import EarlyStopping, Hyperparameters, Method
from attune_trainer.training.checkpoints import TrainingState
from attune_trainer.training.course import MOST_POINTS, Course
from attune_trainer.training.estimate import choose_probe, extrapolate
from attune_trainer.training.licence import read_licence
from attune_trainer.training.report import (
    CountedDataset,
    TrainingReport,
    measure,
    why_irreproducible,
    write_card,
    write_report,
)

from tests.reconcile.samples import ESTIMATE, TRAINED_ON_GPUS

HARDWARE = Hardware(device="A processor", precision="fp32", processes=1, threads=2, torch="2.15.0")


class TestCurve:
    def test_it_holds_every_step_while_there_is_room(self) -> None:
        curve = Course()
        for step in range(1, 6):
            curve = curve.with_loss(float(step))
        assert curve.losses == (1, 2, 3, 4, 5)
        assert curve.steps() == [1, 2, 3, 4, 5]

    def test_of_a_long_run_it_holds_the_whole_course_in_bounded_room(self) -> None:
        curve = Course()
        for step in range(10_000):
            curve = curve.with_loss(1 - step / 10_000)
        assert MOST_POINTS // 2 <= len(curve.losses) < MOST_POINTS
        assert curve.steps()[-1] + curve.waiting_steps == 10_000
        assert list(curve.losses) == sorted(curve.losses, reverse=True)
        assert curve.losses[0] == pytest.approx(1 - (curve.stride - 1) / 2 / 10_000)

    def test_resumed_anywhere_it_goes_on_as_if_nothing_had_been(self) -> None:
        whole = resumed = Course()
        for step in range(1500):
            whole, resumed = whole.with_loss(step % 7), resumed.with_loss(step % 7)
            if step % 100 == 0:
                resumed = Course.model_validate_json(resumed.model_dump_json())
        assert resumed == whole

    def test_it_keeps_whatever_figures_a_validation_gives(self) -> None:
        curve = Course().with_validation(1, 38, {"wer": 0.3}).with_validation(1.5, 57, {"wer": 0.2, "oldWer": 0.1})
        assert [one.metrics for one in curve.validations] == [{"wer": 0.3}, {"wer": 0.2, "oldWer": 0.1}]


class TestEstimate:
    @pytest.mark.parametrize(("steps", "probe"), [(5000, (2, 20)), (40, (2, 20)), (14, (2, 7)), (3, (2, 2))])
    def test_the_probe_is_twenty_steps_or_half_of_a_shorter_run(self, steps: int, probe: tuple[int, int]) -> None:
        assert choose_probe(steps) == probe

    def test_a_step_costs_what_its_padded_audio_does(self) -> None:
        # 18 steps of 10 s of audio took 9 s; 80 more have 20 s each: 100 s for the steps, 3 x 5 s for validations.
        work = [10.0] * 20 + [20.0] * 90
        estimate = extrapolate(work, (2, 20), 9.0, validations=3, validation_seconds=5.0, gpus=4, memory_bytes=10**9)
        assert estimate.seconds == 10 + 90 + 15
        assert estimate.gpu_hours == "0.1278"
        assert estimate.memory_bytes == 10**9


class TestLicence:
    @pytest.mark.parametrize(
        ("name", "text", "licence"),
        [
            pytest.param(
                "README.md", "---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0", id="card"
            ),
            pytest.param("README.md", '---\nlicense: "MIT"\n---\n', "mit", id="quoted"),
            pytest.param("README.md", "# A model\nlicense: mit\n", None, id="a card without front matter states none"),
            pytest.param("README.md", "---\nlicense: <b>\n---\n", None, id="what is no name is none"),
            pytest.param("LICENSE", "MIT License\n\nCopyright (c) the authors\n", "mit", id="text"),
            pytest.param("LICENSE.txt", " Apache License\n   Version 2.0, January 2004\n", "apache-2.0", id="Apache"),
            pytest.param("LICENSE", "You may do as we say.\n", "other", id="one of its own"),
            pytest.param("config.json", "{}", None, id="nothing stated"),
        ],
    )
    def test_it_is_what_the_files_state(self, tmp_path: Path, name: str, text: str, licence: str | None) -> None:
        (tmp_path / name).write_text(text)
        assert read_licence(tmp_path) == licence

    def test_the_card_counts_before_the_text(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
        (tmp_path / "LICENSE").write_text("MIT License\n")
        assert read_licence(tmp_path) == "cc-by-4.0"


class TestReproducible:
    state = TrainingState(fingerprint="f" * 64, baseline_wer=0.5, hardware=(HARDWARE,))

    def test_one_process_on_a_cpu_gives_the_same_again(self) -> None:
        assert why_irreproducible(self.state, 0) is None

    @pytest.mark.parametrize(
        ("changes", "gpus", "why"),
        [
            ({"budget_reached": True}, 0, "budget"),
            ({"hardware": (HARDWARE, HARDWARE.model_copy(update={"threads": 8}))}, 0, "different hardware"),
            ({}, 1, "GPU"),
            ({"hardware": (HARDWARE.model_copy(update={"processes": 2}),)}, 0, "several processes"),
        ],
    )
    def test_what_may_differ_is_named(self, changes: dict[str, Any], gpus: int, why: str) -> None:
        assert why in str(why_irreproducible(self.state.model_copy(update=changes), gpus))


def make_report(**changes: Any) -> TrainingReport:
    """A run of three epochs on two Datasets, by eight speakers."""
    curve = Course()
    for step in range(1, 121):
        curve = curve.with_loss(3 / step)
        if step % 40 == 0:
            curve = curve.with_validation(step / 40, step, {"wer": 0.2 - step / 2000, "oldWer": 0.1})
    state = TrainingState(
        fingerprint="f" * 64,
        step=120,
        baseline_wer=0.2,
        best_wer=0.14,
        best_epoch=2,
        course=curve,
        baseline_counts=((8, 2, 0, 0),) * 40,
        best_counts=((9, 1, 0, 0),) * 20 + ((8, 1, 1, 0),) * 20,
        hardware=(HARDWARE,),
        estimate=ESTIMATE,
    )
    counted = {"utterances": 40, "hours": "0.4", "speakers": 8, "words": 400, "digest": "0" * 64}
    recipe = FinetuneRecipe(
        base=ModelInput(uri="hf://models/whisper-small@main"),
        datasets=[
            TrainingInput(name="calls", revision="sha256:" + "a" * 64, uri="s3://attune/calls"),
            TrainingInput(name="older-calls", revision="sha256:" + "b" * 64, uri="s3://attune/older", weight="2"),
        ],
        hyperparameters=Hyperparameters(epochs=3, learning_rate="1e-3"),
        early_stopping=EarlyStopping(patience=2),
        budget=Budget(max_gpu_hours="12", cost_per_gpu_hour="2.5", currency="EUR"),
        economics=Economics(cost_per_corrected_word="0.01", hours_per_month="100"),
        model_id="ft:whisper-small:abcdef",
        output_prefix="out",
        checkpoint_prefix="checkpoints",
    )
    report = TrainingReport(
        title="team/calls<script>",
        recipe=recipe,
        result=TRAINED_ON_GPUS.model_copy(update={"budget_reached": False, "irreproducible": None}),
        state=state,
        language="en",
        licence="mit",
        datasets=[CountedDataset(name, "sha256:" + "a" * 64, {"train": counted}) for name in ("calls", "older-calls")],
        blocks=[f"calls/speaker-{number % 8}" for number in range(40)],
    )
    return replace(report, **changes)


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))


class TestReport:
    def test_it_shows_curve_figures_data_costs_and_lineage(self, tmp_path: Path) -> None:
        report = make_report()
        page = write_report(report, tmp_path)
        assert page.count("<svg") == 1
        assert "oldWer" in page  # a figure that the validation gave, whatever its name
        assert "<script" not in page
        assert "src=" not in page
        text = text_of(page)
        assert "word error rate 19.60 % -> 11.30 %" in text
        assert "on the old domain's 10.00 % -> 11.00 %" in text
        assert "early-stopping" not in text
        assert "earlyStopping.patience 2" in text
        assert "hyperparameters.learningRate 1e-3" in text
        assert "datasets.older-calls.weight 2" in text
        assert "older-calls train 40 0.4 8 400" in text
        assert "training time 1.5 min 90.0 min" in text  # estimated, in truth
        assert "peak memory 3.00 GB 2.50 GB" in text
        assert "cost 0.50 EUR 30.00 EUR" in text
        assert "the model pays back in 2 days" in text
        for digest in (TRAINED_ON_GPUS.model_digest, TRAINED_ON_GPUS.base_digest, report.recipe.config_digest()):
            assert digest in page
        assert "A processor, fp32, 1 process of 2 threads, torch 2.15.0" in text
        assert "gives weights of the same digest" in text

    def test_of_all_weights_it_names_neither_adapter_nor_its_shape(self, tmp_path: Path) -> None:
        report = make_report()
        whole = report.recipe.model_copy(update={"method": Method.FULL})
        result = report.result.model_copy(update={"adapter_uri": None, "adapter_digest": None})
        for page in (write_report(report, tmp_path), write_card(report)):
            assert str(TRAINED_ON_GPUS.adapter_digest) in page
            assert "lora.rank" in page
        full = replace(report, recipe=whole, result=result)
        for page in (write_report(full, tmp_path), write_card(full)):
            assert "dapter" not in page
            assert "lora" not in page.replace("/lora/", "")

    def test_its_intervals_are_drawn_over_speakers_where_there_are_enough(self) -> None:
        report = make_report()
        figures = measure(report.state, report.blocks)
        assert figures is not None
        assert (figures.over_utterances, figures.drawn) == (False, 8)
        assert figures.change is not None
        assert figures.change.value == pytest.approx(-0.25)
        assert figures.change.low < -0.25 < figures.change.high
        few = measure(report.state, ["one", "two"] * 20)
        assert few is not None
        assert (few.over_utterances, few.drawn) == (True, 40)

    def test_a_run_that_an_older_release_began_is_reported_without_intervals(self, tmp_path: Path) -> None:
        state = make_report().state.model_copy(update={"baseline_counts": (), "course": Course()})
        report = make_report(state=state)
        assert "Intervals are not known" in write_report(report, tmp_path)
        assert "Intervals are not known" in write_card(report)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"budget_reached": True}, "The budget ended the run after 120 of 400 steps, 3 of 3 epochs"),
            ({"stopped_early": True, "budget_reached": False}, "Early stopping ended the run after 120 of 400 steps"),
            ({"irreproducible": "of the weather", "budget_reached": False}, "another digest: of the weather"),
        ],
    )
    def test_it_says_how_the_run_ended(self, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
        assert says in text_of(write_report(make_report(result=TRAINED_ON_GPUS.model_copy(update=changes)), tmp_path))


class TestModelCard:
    def test_its_front_matter_is_what_model_hubs_read(self) -> None:
        _, front, body = write_card(make_report()).split("---\n", 2)
        told = yaml.safe_load(front)
        assert told["license"] == "mit"
        assert told["base_model"] == "models/whisper-small"
        assert told["language"] == ["en"]
        assert told["metrics"] == ["wer"]
        (entry,) = told["model-index"]
        assert entry["name"] == TRAINED_ON_GPUS.model_id
        assert entry["results"][0]["dataset"]["name"] == "calls, older-calls"
        assert entry["results"][0]["metrics"][0]["value"] == 11.3
        for heading in ("Data", "Figures", "Intended use", "Limits", "Training", "Lineage", "Licence"):
            assert f"\n## {heading}\n" in body
        assert "Licence of the base model: mit." in body
        tables = [line.count("|") for line in body.splitlines() if line.startswith("|")]
        assert set(tables) == {3, 4, 7, 8}  # no row is broken
        assert "EUR" not in body  # it goes where the model goes, prices do not
        assert "2.5" not in body.replace("2.50 GB", "")

    def test_a_base_that_states_no_licence_is_not_given_one(self) -> None:
        card = write_card(make_report(licence=None))
        assert 'license: "unknown"' in card
        assert "Licence of the base model: unknown: ask its publisher." in card
