"""What a FineTune begins with: another FineTune's model, weighted Datasets, and an old domain that is kept."""

from dataclasses import replace
from typing import Any

import pytest
from attune.contract.job import FinetuneRecipe, ModelInput
from attune.contract.result import Summary
from attune.domain.actions import EnsureJob
from attune.domain.conditions import find_condition
from attune.domain.finetune import (
    ObservedDatasetRef,
    ObservedFineTune,
    ObservedFineTuneRef,
    build_model_id,
    decide_finetune,
)
from attune.domain.jobs import Availability
from attune.reconcile.queue import Key
from attune.reconcile.references import find_references

from tests.reconcile.samples import TRAINED
from tests.unit.worlds import NOW, REVISION, SURROUNDINGS, enact, finished, make_fine_tune, settle

PARENT = ObservedFineTuneRef(
    "first",
    "Ready",
    ModelInput(uri=TRAINED.model_uri, digest=TRAINED.model_digest, model_id=TRAINED.model_id),
    ModelInput(uri=TRAINED.adapter_uri, digest=TRAINED.adapter_digest),
)
OLD = ObservedDatasetRef("general", "Ready", "sha256:" + "9" * 64, "s3://attune/datasets/team/dataset/general/1/9999")
CHILD: dict[str, Any] = {"baseModel": {"fineTuneRef": {"name": "first"}}}
REPLAY: dict[str, Any] = {"retention": {"replay": {"datasetRef": {"name": "general"}, "ratio": "0.3"}}}
EWC: dict[str, Any] = {"retention": {"ewc": {"datasetRef": {"name": "general"}, "lambda": "50"}}}


def observe(
    parent: ObservedFineTuneRef | None = None, retained: ObservedDatasetRef | None = None, **spec: Any
) -> ObservedFineTune:
    return ObservedFineTune(
        make_fine_tune(**spec), (REVISION,), (), NOW, SURROUNDINGS, parent=parent, retained=retained
    )


def settled(observed: ObservedFineTune) -> ObservedFineTune:
    rest = settle(observed)
    assert isinstance(rest, ObservedFineTune)
    return rest


def recipe_of(observed: ObservedFineTune) -> FinetuneRecipe:
    """The recipe of the Job that is asked for once the inputs are fixed."""
    for _ in range(3):
        plan = decide_finetune(observed)
        for action in plan.actions:
            if isinstance(action, EnsureJob):
                assert isinstance(action.spec.recipe, FinetuneRecipe)
                return action.spec.recipe
        moved = enact(observed, plan)
        assert isinstance(moved, ObservedFineTune)
        observed = moved
    raise AssertionError("no Job is asked for")


@pytest.mark.parametrize(
    ("availability", "reason", "state", "says"),
    [
        pytest.param("NotFound", "FineTuneNotFound", "False", "no FineTune first", id="a parent that is not there"),
        pytest.param("NotReady", "FineTuneNotFinished", "Unknown", "waiting for it", id="a parent that still trains"),
        pytest.param("Failed", "FineTuneFailed", "False", "mend it", id="a parent that has failed"),
    ],
)
def test_a_child_waits_for_its_parent_and_says_why(
    availability: Availability, reason: str, state: str, says: str
) -> None:
    rest = settled(observe(ObservedFineTuneRef("first", availability), **CHILD))
    found = find_condition(rest.resource.status.conditions, "Succeeded")
    assert found is not None
    assert (found.status, found.reason) == (state, reason)
    assert says in found.message
    assert rest.jobs == ()
    assert rest.resource.status.lineage is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("availability", "reason"),
    [("NotFound", "DatasetNotFound"), ("NotReady", "DatasetNotReady"), ("Failed", "DatasetFailed")],
)
@pytest.mark.parametrize("spec", [REPLAY, EWC])
def test_the_old_domain_is_waited_for_like_the_new_one(
    availability: Availability, reason: str, spec: dict[str, Any]
) -> None:
    rest = settled(observe(retained=ObservedDatasetRef("general", availability), **spec))
    found = find_condition(rest.resource.status.conditions, "Succeeded")
    assert found is not None
    assert found.reason == reason
    assert "general" in found.message
    assert rest.jobs == ()


def test_a_parents_model_is_written_down_before_the_run_begins_and_stays_whatever_becomes_of_it() -> None:
    first = observe(PARENT, **CHILD)
    plan = decide_finetune(first)
    assert not [one for one in plan.actions if isinstance(one, EnsureJob)]
    assert plan.look_again_seconds == 0
    lineage = plan.status.lineage  # type: ignore[attr-defined]
    assert (lineage.base_uri, lineage.base_digest) == (TRAINED.model_uri, TRAINED.model_digest)
    assert lineage.parent.model_dump(by_alias=True) == {
        "name": "first",
        "modelId": TRAINED.model_id,
        "digest": TRAINED.model_digest,
        "adapterUri": TRAINED.adapter_uri,
        "adapterDigest": TRAINED.adapter_digest,
    }
    stored = enact(first, plan)
    assert isinstance(stored, ObservedFineTune)
    again = ObservedFineTuneRef("first", "Ready", ModelInput(uri="s3://attune/another", digest="sha256:" + "0" * 64))
    wanted = recipe_of(stored)
    assert wanted.base == ModelInput(uri=TRAINED.model_uri, digest=TRAINED.model_digest, model_id=TRAINED.model_id)
    for parent in (again, ObservedFineTuneRef("first", "NotFound"), ObservedFineTuneRef("first", "Failed")):
        assert recipe_of(replace(stored, parent=parent)) == wanted


def test_a_finished_child_keeps_parent_and_result() -> None:
    running = settled(observe(PARENT, **CHILD))
    done = settled(replace(running, jobs=(finished(running.jobs[0].name, "FineTune"),)))
    status = done.resource.status
    assert status.lineage.parent.name == "first"  # type: ignore[attr-defined]
    gone = replace(done, parent=ObservedFineTuneRef("first", "NotFound"), jobs=())
    plan = decide_finetune(gone)
    assert plan.actions == ()
    assert plan.status == status


def test_another_parent_is_another_run() -> None:
    other = replace(PARENT, model=ModelInput(uri=TRAINED.model_uri, digest="sha256:" + "0" * 64))
    names = {settled(observe(parent, **CHILD)).jobs[0].name for parent in (PARENT, other)}
    assert len(names) == 2


def test_generations_share_the_name_of_the_model_that_the_first_began_with() -> None:
    assert build_model_id("s3://attune/models/team/x/merged", "77d0e1b2", "ft:whisper-tiny.en:3f9c2a") == (
        "ft:whisper-tiny.en:77d0e1"
    )
    assert build_model_id("s3://attune/whisper/", "77d0e1b2", "mine") == "ft:whisper:77d0e1"
    assert recipe_of(observe(PARENT, **CHILD)).model_id.startswith("ft:whisper-tiny.en:")


def test_weights_and_temperature_reach_the_run() -> None:
    recipe = recipe_of(observe(datasets=[{"name": "calls", "weight": "2.5"}], datasetTemperature="4"))
    assert [one.weight for one in recipe.datasets] == ["2.5"]
    assert recipe.dataset_temperature == "4"


def test_an_old_domain_is_fixed_at_its_revision_and_reaches_the_run() -> None:
    recipe = recipe_of(observe(retained=OLD, **REPLAY))
    assert recipe.retention is not None
    assert recipe.retention.dataset.revision == OLD.revision
    assert recipe.retention.replay is not None
    assert recipe.retention.replay.ratio == "0.3"
    assert recipe.retention.ewc is None
    held = recipe_of(observe(retained=OLD, **EWC)).retention
    assert held is not None
    assert held.replay is None
    assert held.ewc is not None
    assert (held.ewc.strength, held.ewc.samples) == ("50", 200)
    assert held.model_dump(by_alias=True)["ewc"]["lambda"] == "50"


def test_who_asks_for_none_of_this_has_the_job_that_he_had_before() -> None:
    """A new release must not take finished runs for outdated ones."""
    recipe = recipe_of(observe()).model_dump(by_alias=True, exclude_none=True)
    assert not {"datasetTemperature", "retention"} & recipe.keys()
    assert recipe["base"].keys() == {"uri"}
    assert recipe["datasets"][0].keys() == {"name", "revision", "uri"}


@pytest.mark.parametrize(
    ("result", "says"),
    [
        pytest.param({}, "0.196 before", id="without an old domain"),
        pytest.param(
            {"old_baseline_wer": "0.05", "old_wer": "0.06"}, "0.06 on the old domain's, 0.05 before", id="with one"
        ),
    ],
)
def test_the_message_tells_what_became_of_both_domains(result: dict[str, str], says: str) -> None:
    running = settled(observe(retained=OLD, **REPLAY))
    job = finished(running.jobs[0].name, "FineTune")
    message = job.pods[0].termination_message
    assert message is not None
    summary = Summary.model_validate_json(message)
    told = Summary(result=summary.result.model_copy(update=result)).to_message()  # type: ignore[union-attr]
    done = settled(replace(running, jobs=(replace(job, pods=(replace(job.pods[0], termination_message=told),)),)))
    found = find_condition(done.resource.status.conditions, "Succeeded")
    assert found is not None
    assert found.message.endswith(says)
    assert done.resource.status.metrics.old_wer == result.get("old_wer")  # type: ignore[attr-defined]


def test_a_finetune_is_woken_by_all_that_it_names() -> None:
    tune = make_fine_tune(**CHILD, **REPLAY)
    assert find_references(tune) == {
        Key("Dataset", "team", "calls"),
        Key("Dataset", "team", "general"),
        Key("FineTune", "team", "first"),
    }
    assert find_references(make_fine_tune(**EWC)) == {
        Key("Dataset", "team", "calls"),
        Key("Dataset", "team", "general"),
    }
