"""What a FineTune says of its run: lineage, estimate, budget, and when it has paid for itself."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

from attune.contract.job import FinetuneRecipe
from attune.contract.result import FinetuneResult, Progress, Summary
from attune.domain.actions import EmitEvent
from attune.domain.finetune import ObservedFineTune, build_finetune_job, decide_finetune
from attune.domain.jobs import ObservedJob

from tests.reconcile.samples import ESTIMATE, TRAINED, TRAINED_ON_GPUS
from tests.unit.worlds import NOW, make_fine_tune, observe, pod, settle, wanted_name

IMAGE = "sha256:" + "f" * 64
BUDGET = {"maxGpuHours": "12", "costPerGpuHour": "2.5", "currency": "EUR"}
ECONOMICS = {"costPerCorrectedWord": "0.01", "hoursPerMonth": "100"}


def world(**spec: Any) -> ObservedFineTune:
    """A FineTune whose Job has been made."""
    made = settle(observe("FineTune", **spec))
    assert isinstance(made, ObservedFineTune)
    return made


def running(**spec: Any) -> ObservedFineTune:
    made = world(**spec)
    at_work = pod(phase="Running", ip="10.0.0.1", image_id=f"registry.test/trainer@{IMAGE}")
    return replace(made, jobs=(replace(made.jobs[0], pods=(at_work,)),))


def ended(result: FinetuneResult, **spec: Any) -> ObservedFineTune:
    """A FineTune whose Job has left this result, and has gone since."""
    made = world(**spec)
    message = Summary(result=result).to_message()
    last = pod(phase="Succeeded", exit_code=0, termination_message=message, image_id=f"trainer@{IMAGE}")
    done = settle(replace(made, jobs=(ObservedJob(made.jobs[0].name, complete=True, finished=NOW, pods=(last,)),)))
    assert isinstance(done, ObservedFineTune)
    return replace(done, jobs=())


def wanted_recipe(**spec: Any) -> FinetuneRecipe:
    """What a FineTune's Job is told."""
    tune = world(**spec).resource
    assert tune.status.lineage is not None
    recipe = build_finetune_job(tune, tune.status.lineage).spec.recipe
    assert isinstance(recipe, FinetuneRecipe)
    return recipe


def succeeded(observed: ObservedFineTune) -> tuple[str, str, str]:
    found = decide_finetune(observed).status.conditions[0]
    return found.status, found.reason, found.message


def test_lineage_names_configuration_image_code_and_hardware() -> None:
    lineage = ended(TRAINED_ON_GPUS).resource.status.lineage
    assert lineage is not None
    assert lineage.image_digest == IMAGE
    assert lineage.code_version == "0.1.0"
    assert lineage.hardware is not None
    assert lineage.hardware.device == "A GPU"
    assert lineage.irreproducible == TRAINED_ON_GPUS.irreproducible
    assert lineage.base_digest == TRAINED.base_digest
    assert lineage.config_digest == wanted_recipe().config_digest()


def test_the_image_is_written_down_while_it_works_and_only_by_its_digest() -> None:
    status = decide_finetune(running()).status
    assert status.lineage.image_digest == IMAGE  # type: ignore[attr-defined]
    unnamed = replace(running().jobs[0], pods=(pod(phase="Running", image_id="trainer:latest"),))
    assert decide_finetune(replace(running(), jobs=(unnamed,))).status.lineage.image_digest is None  # type: ignore[attr-defined]


def test_what_decides_the_model_changes_the_digest_of_its_configuration_and_nothing_else_does() -> None:
    plain = wanted_recipe().config_digest()
    assert wanted_recipe(checkpoint={"everySteps": 7}).config_digest() == plain
    assert wanted_recipe(lora={"rank": 8}).config_digest() != plain
    bounded = wanted_recipe(budget={"maxGpuHours": "12"}).config_digest()
    assert bounded != plain
    assert wanted_recipe(budget=BUDGET, economics=ECONOMICS).config_digest() == bounded
    assert wanted_recipe(budget={"costPerGpuHour": "2.5"}).config_digest() == plain


def test_an_estimate_is_taken_over_once_and_compared_with_the_truth() -> None:
    told = Progress(stage="Training", percent=30, step=20, total_steps=400, estimate=ESTIMATE)
    at_work = replace(running(), progress=told)
    status = decide_finetune(at_work).status
    assert status.estimate.seconds == 90  # type: ignore[attr-defined]
    again = replace(
        at_work,
        resource=at_work.resource.model_copy(update={"status": status}),
        progress=told.model_copy(update={"percent": 40, "estimate": ESTIMATE.model_copy(update={"seconds": 7})}),
        now=NOW + timedelta(minutes=1),
    )
    later = decide_finetune(again).status
    assert (later.progress.percent, later.estimate.seconds) == (40, 90)  # type: ignore[attr-defined]
    # A run so short that nobody asked it in time says it at its end.
    done = ended(TRAINED_ON_GPUS).resource.status
    assert done.estimate is not None
    assert done.usage is not None
    assert (done.estimate.memory_bytes, done.usage.peak_memory_bytes) == (3_000_000_000, 2_500_000_000)
    assert done.report == TRAINED_ON_GPUS.report_uri


def test_a_run_that_its_budget_has_ended_succeeds_and_says_where() -> None:
    state, reason, message = succeeded(ended(TRAINED_ON_GPUS, budget=BUDGET))
    assert (state, reason) == ("True", "BudgetReached")
    assert "after 1.50 h (12.00 GPU hours), at step 120 of 400" in message
    within = TRAINED_ON_GPUS.model_copy(update={"budget_reached": False})
    assert succeeded(ended(within, budget=BUDGET))[1] == "Trained"


def test_a_result_of_a_trainer_that_told_less_is_read_as_before() -> None:
    state, reason, message = succeeded(ended(TRAINED, budget=BUDGET))
    assert (state, reason) == ("True", "Trained")
    assert message == "ft:whisper-tiny.en:3f9c2a: word error rate 0.113 on the validation split, 0.196 before"


def test_prices_may_change_and_only_the_sentence_follows_them() -> None:
    done = ended(TRAINED_ON_GPUS, budget=BUDGET, economics=ECONOMICS)
    assert "; pays back in 2 days: it saves 747.00 EUR a month, and the run cost 30.00 EUR" in succeeded(done)[2]
    assert wanted_name("FineTune", budget=BUDGET, economics=ECONOMICS) == wanted_name("FineTune", budget=BUDGET)
    poorer = {**ECONOMICS, "hoursPerMonth": "0.1"}
    changed = make_fine_tune(budget=BUDGET, economics=poorer).model_copy(update={"status": done.resource.status})
    plan = decide_finetune(replace(done, resource=changed))
    assert "pays back in 41 months" in plan.status.conditions[0].message
    assert not [one for one in plan.actions if not isinstance(one, EmitEvent)]
