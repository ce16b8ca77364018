"""Decisions on a Canary, one situation after the other."""

from dataclasses import replace
from datetime import timedelta

import pytest
from attune.api import FineTune
from attune.api.canary import HistoryEntry, Outcome, PodTemplate, Step
from attune.contract.exitcode import ExitCode
from attune.contract.metrics import Track
from attune.contract.result import Failure
from attune.domain.actions import DeleteArm, DeleteJob, EnsureArm, EnsureRoute, EnsureScorer
from attune.domain.arms import ObservedGateway, PodProblem, ServingPod, find_problem
from attune.domain.canary import decide_canary
from attune.domain.canary.analysis import LOSSES_IN_A_STEP
from attune.domain.canary.identity import (
    compute_revision,
    fill_image,
    is_same_pair,
    name_model,
    name_pair,
    name_rollout,
)
from attune.domain.canary.preflight import refuse_prometheus
from attune.domain.canary.record import compute_weight
from attune.domain.canary.scorer import SCORER_ATTEMPTS

from tests.unit.canary_world import BEGINNING, World, build_canary, build_dataset


@pytest.fixture
def world() -> World:
    """A Canary that serves base, at rest."""
    ready = World(build_canary())
    ready.settle()
    ready.events.clear()
    ready.weights.clear()
    return ready


# --- Arithmetic and names ---


@pytest.mark.parametrize(("index", "weight"), [(None, 0), (0, 5), (1, 25), (2, 25), (3, 50), (9, 50)])
def test_the_weight_of_a_step_is_that_of_the_last_weight_up_to_it(index: int | None, weight: int) -> None:
    steps = [Step(weight=5), Step(weight=25), Step.model_validate({"pause": {"seconds": 9}}), Step(weight=50)]
    assert compute_weight(steps, index) == weight


def test_a_pause_before_the_first_weight_has_none() -> None:
    assert compute_weight([Step.model_validate({"pause": {"seconds": 9}}), Step(weight=5)], 0) == 0


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://attune/models/whisper-tiny.en", "whisper-tiny.en"),
        ("s3://b/3f9c2a/merged", "3f9c2a/merged"),
        ("hf://openai/whisper-small@main", "whisper-small@main"),
        ("s3://bucket", "bucket"),
        ("s3://b/models/", "models"),
    ],
)
def test_a_model_is_named_by_the_end_of_its_uri(uri: str, name: str) -> None:
    assert name_model(uri) == name


def test_a_revision_changes_with_model_digest_and_template_and_with_nothing_else() -> None:
    plain = PodTemplate()
    labelled = PodTemplate.model_validate({"metadata": {"labels": {"team": "voice"}}})
    one = compute_revision("s3://b/m", None, plain)
    assert one == compute_revision("s3://b/m", None, PodTemplate.model_validate({"spec": {"containers": []}}))
    others = {
        compute_revision("s3://b/n", None, plain),
        compute_revision("s3://b/m", "sha256:" + "0" * 64, plain),
        compute_revision("s3://b/m", None, labelled),
    }
    assert len(others | {one}) == 4


def test_a_rollout_is_named_by_what_is_compared_and_by_the_try() -> None:
    pair = name_pair("u", "a", "b")
    assert len({pair, name_pair("u", "b", "a"), name_pair("v", "a", "b")}) == 3
    names = [name_rollout(pair, BEGINNING + timedelta(seconds=passed)) for passed in range(60)]
    assert len({*names, name_rollout("f" * len(pair), BEGINNING)}) == 61
    assert all(is_same_pair(one, pair) for one in [*names, pair])
    assert not is_same_pair(names[0], name_pair("u", "b", "a"))


def test_an_image_is_filled_in_only_where_none_is_given() -> None:
    assert fill_image(PodTemplate(), "i:1").spec.containers[0].image == "i:1"
    given = PodTemplate.model_validate({"spec": {"containers": [{"name": "server", "image": "mine:2"}]}})
    assert fill_image(given, "i:1").spec.containers[0].image == "mine:2"


# --- The first model ---


def test_the_first_model_needs_no_trial() -> None:
    world = World(build_canary())
    plan = world.reconcile()
    assert [type(action) for action in plan.actions[:1]] == [EnsureArm]
    assert not any(isinstance(action, EnsureRoute) for action in plan.actions)
    assert world.ready == ("False", "Initializing")
    world.settle()
    assert world.ready == ("True", "Healthy")
    assert set(world.weights) == {0}
    assert Track.CANARY not in world.arms
    assert world.canary.status.history == []


def test_a_first_model_that_never_starts_may_be_replaced_by_another() -> None:
    world = World(build_canary("broken"))
    for _ in range(12):
        world.reconcile()
        world.run_controllers()
        world.advance(10)
    assert world.ready == ("False", "StableNotReady")
    world.set_model("base")
    world.settle()
    assert world.ready == ("True", "Healthy")


@pytest.mark.parametrize(
    ("gateway", "reason"),
    [
        (ObservedGateway("NotFound"), "GatewayNotFound"),
        (ObservedGateway("NotServed"), "GatewayNotFound"),
        (ObservedGateway("NotProgrammed", "no listener"), "GatewayNotReady"),
    ],
)
def test_without_a_gateway_nothing_begins(gateway: ObservedGateway, reason: str) -> None:
    world = World(build_canary())
    world.gateway = gateway
    plan = world.reconcile()
    assert world.ready == ("False", reason)
    assert not world.arms
    assert plan.look_again_seconds is not None
    world.gateway = ObservedGateway("Unreadable")
    world.settle()
    assert world.ready == ("True", "Healthy")


# --- Promotion ---


def test_a_better_model_goes_up_step_by_step_and_is_promoted(world: World) -> None:
    world.set_model("tuned")
    world.settle()
    assert world.weights == [0, 5, 25, 50, 100, 100, 0]
    assert world.ready == ("True", "Healthy")
    assert world.arms[Track.STABLE].model.model_id == "tuned"
    (entry,) = world.canary.status.history
    assert (entry.outcome, entry.reason, entry.weight) == (Outcome.PROMOTED, "Promoted", 100)
    assert (entry.stable_wer, entry.canary_wer) == ("0.2000", "0.1000")
    assert world.reasons == ["RolloutStarted", *["WeightChanged"] * 4, "Promoting", "Promoted"]


def test_the_canary_keeps_the_last_steps_weight_while_stable_gets_the_model() -> None:
    world = World(build_canary(steps=[{"weight": 5}, {"weight": 40}]))
    world.settle()
    world.set_model("tuned")
    world.until("Promoting")
    assert world.route is not None
    assert world.route.canary_weight == 40
    world.settle()
    assert world.arms[Track.STABLE].model.model_id == "tuned"
    assert max(world.weights) == 40


def test_a_rollout_is_reconciling_and_not_yet_ready(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 25)
    ready, reconciling, stalled = world.canary.status.conditions
    assert (ready.status, ready.reason) == ("Unknown", "RolloutProgressing")
    assert (reconciling.status, reconciling.reason) == ("True", "RolloutProgressing")
    assert stalled.status == "False"
    assert "model tuned gets 25 % of requests (step 2 of 4)" in ready.message


def test_a_step_lasts_an_interval_at_least(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 5)
    world.advance(200)  # enough evidence for a Pass by now
    world.reconcile()
    assert world.route is not None
    assert world.route.canary_weight == 25
    for _ in range(5):
        world.advance(1)
        world.reconcile()
        assert world.route.canary_weight == 25
    world.advance(5)
    world.reconcile()
    assert world.route.canary_weight == 50


def test_a_pause_waits_whatever_the_analysis_says() -> None:
    world = World(build_canary(steps=[{"weight": 5}, {"pause": {"seconds": 300}}, {"weight": 100}]))
    world.settle()
    world.set_model("tuned")
    world.until("Paused", 5)
    for _ in range(29):
        world.advance(10)
        world.reconcile()
        assert world.route is not None
        assert world.route.canary_weight == 5
    world.advance(20)
    world.reconcile()
    assert world.route is not None
    assert world.route.canary_weight == 100


def test_stable_keeps_its_template_while_another_is_on_trial(world: World) -> None:
    before = world.arms[Track.STABLE].template
    world.set_spec(template={"metadata": {"labels": {"team": "voice"}}}, model={"uri": "s3://attune/models/tuned"})
    world.until("Progressing", 25)
    assert world.arms[Track.STABLE].template == before
    assert world.arms[Track.CANARY].template.metadata.labels == {"team": "voice"}


def test_an_operator_with_another_default_image_changes_no_arm(world: World) -> None:
    plan = decide_canary(replace(world.observe(), inference_image="registry/inference:2"))
    (arm,) = [action for action in plan.actions if isinstance(action, EnsureArm)]
    assert arm.template.spec.containers[0].image == "registry/inference:1"


def test_replicas_reach_both_arms_in_the_middle_of_a_rollout(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 5)
    world.set_spec(replicas=3)
    plan = world.reconcile()
    assert {a.track: a.replicas for a in plan.actions if isinstance(a, EnsureArm)} == {Track.STABLE: 3, Track.CANARY: 3}


def test_more_replicas_are_there_before_the_weight_moves(world: World) -> None:
    _prepare(world)
    world.set_spec(replicas=3)
    world.reconcile()
    assert world.weights[-1] == 0
    world.until("Progressing", 5)
    assert len(world.arms[Track.CANARY].pods) == 3


def test_nothing_goes_up_while_stable_is_not_ready(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 25)
    world.arms[Track.STABLE].pods = [(revision, False) for revision, _ in world.arms[Track.STABLE].pods]
    for _ in range(20):
        world.advance(10)
        world.reconcile()
    assert world.route is not None
    assert world.route.canary_weight == 25


# --- Rollback ---


def test_a_worse_model_is_rolled_back_and_is_not_tried_again(world: World) -> None:
    world.set_model("bad")
    world.settle()
    assert world.canary.status.phase == "Degraded"
    assert world.ready == ("False", "WordErrorRateTooHigh")
    (entry,) = world.canary.status.history
    assert (entry.outcome, entry.weight) == (Outcome.ROLLED_BACK, 5)
    assert "canary heard 60 % of words wrong, stable 20 %" in entry.message
    assert world.reasons == ["RolloutStarted", "WeightChanged", "RolledBack"]
    stalled = next(one for one in world.canary.status.conditions if one.type == "Stalled")
    assert stalled.status == "True"
    writes = world.writes
    world.advance(100_000)
    world.reconcile()
    assert world.writes == writes


def test_the_failure_is_written_in_the_same_request_as_the_weight(world: World) -> None:
    world.set_model("bad")
    world.until("Progressing", 5)
    world.advance(100)
    plan = world.reconcile(crash_after=0)
    first = plan.actions[0]
    assert isinstance(first, EnsureRoute)
    assert (first.stable_weight, first.canary_weight) == (100, 0)
    assert first.rollout is not None
    assert first.rollout.failed_reason == "WordErrorRateTooHigh"
    assert not any(isinstance(action, DeleteArm | DeleteJob) for action in plan.actions)


def test_a_fail_in_the_middle_of_a_pause_ends_it() -> None:
    world = World(build_canary(steps=[{"pause": {"seconds": 3000}}, {"weight": 5}]))
    world.settle()
    world.set_model("bad")
    world.settle()
    assert world.ready == ("False", "WordErrorRateTooHigh")


def test_a_canary_whose_pods_never_start_gets_no_request(world: World) -> None:
    world.set_model("broken")
    world.settle()
    assert world.ready == ("False", "CanaryNotReady")
    assert set(world.weights) == {0}


def test_a_canary_that_loses_its_pods_loses_its_weight_until_they_are_back(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 25)
    arm = world.arms[Track.CANARY]
    arm.pods = [(revision, False) for revision, _ in arm.pods]
    world.reconcile()
    assert world.route is not None
    assert world.route.canary_weight == 0
    assert world.ready == ("Unknown", "CanaryNotReady")
    world.run_controllers()
    world.reconcile()
    assert world.route.canary_weight == 25


def test_a_canary_whose_pods_come_and_go_is_rolled_back() -> None:
    world = _undecided()
    for _ in range(LOSSES_IN_A_STEP):
        world.advance(20)
        _lose_and_regain(world)
        assert world.weights[-1] == 5
    world.arms[Track.CANARY].pods = []
    world.reconcile()
    assert world.ready == ("False", "CanaryNotReady")


def test_weight_that_was_lost_comes_back_when_something_is_known_and_never_as_more(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 5)
    world.prometheus_up = False
    _lose_and_regain(world)
    assert world.weights[-1] == 0
    world.set_spec(steps=[{"weight": 60}, {"weight": 100}])
    world.reconcile()
    assert world.weights[-1] == 0
    world.prometheus_up = True
    assert world.verdict() == "Inconclusive"
    world.reconcile()
    assert world.weights[-1] == 5
    world.settle()
    assert world.arms[Track.STABLE].model.model_id == "tuned"


def _lose_and_regain(world: World) -> None:
    arm = world.arms[Track.CANARY]
    arm.pods = [(revision, False) for revision, _ in arm.pods]
    world.reconcile()
    assert world.weights[-1] == 0
    world.run_controllers()
    world.advance(1)
    world.reconcile()


def test_a_canary_that_stays_without_pods_is_rolled_back(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 25)
    world.arms[Track.CANARY].pods = []
    world.reconcile()
    world.advance(61)
    world.reconcile()
    assert world.ready == ("False", "CanaryNotReady")


def test_unknown_holds_and_is_rolled_back_only_after_its_timeout(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 25)
    world.prometheus_up = False
    for _ in range(30):
        world.advance(10)
        world.reconcile()
        assert world.route is not None
        assert world.route.canary_weight == 25
    assert world.canary.status.analysis is not None
    assert world.canary.status.analysis.verdict == "Unknown"
    assert world.ready == ("Unknown", "PrometheusUnavailable")
    assert "connection refused" in world.canary.status.conditions[0].message
    assert [one.type for one in world.events if one.reason == "PrometheusUnavailable"] == ["Warning"]
    world.advance(20)
    world.reconcile()
    assert world.ready == ("False", "NoData")


def test_a_scorer_that_has_failed_for_good_is_replaced_with_growing_pauses_and_not_for_ever() -> None:
    world = _undecided(noDataTimeoutSeconds=10_000, maxStepSeconds=10_000)
    began = set(world.scorers)
    for attempt, pause in enumerate((60, 120, 240, 480), start=2):
        world.fail_scorers()
        world.reconcile()
        assert world.ready == ("Unknown", "BackoffLimitExceeded")
        assert f"another is started {pause} s after it" in world.canary.status.conditions[0].message
        world.advance(pause - 1)
        world.reconcile()
        assert len(world.scorers) == attempt - 1
        world.advance(1)
        world.reconcile()
        assert len(world.scorers) == attempt
        world.reconcile()
        assert world.ready == ("Unknown", "RolloutProgressing")
    assert began < set(world.scorers)
    world.fail_scorers()
    world.advance(5000)
    world.reconcile()
    assert len(world.scorers) == SCORER_ATTEMPTS
    assert "it was the last of 5; for another: kubectl delete job" in world.canary.status.conditions[0].message
    world.set_model("base")
    world.set_spec(template={})
    world.settle()
    assert not world.scorers


def test_a_scorer_that_has_failed_is_mentioned_beside_what_is_known() -> None:
    world = _undecided()
    world.advance(30)
    world.reconcile()
    assert world.verdict() == "Inconclusive"
    assert world.ready == ("Unknown", "RolloutProgressing")
    world.fail_scorers()
    world.reconcile()
    assert world.ready == ("Unknown", "BackoffLimitExceeded")
    message = world.canary.status.conditions[0].message
    assert "canary heard 20 % of words wrong" in message
    assert "failed: too often" in message


def _undecided(**analysis: object) -> World:
    """A rollout at its first weight that golden utterances come in for, and that they don't decide."""
    world = World(build_canary(analysis={**_analysis(), "wer": {"minWords": 1900, "maxIncrease": "0.3"}, **analysis}))
    world.settle()
    world.set_spec(template={"metadata": {"labels": {"team": "voice"}}})
    world.until("Progressing", 5)
    return world


def test_time_runs_out_only_while_the_operator_looks(world: World) -> None:
    """The node has crashed; the operator is back before Prometheus is."""
    world.set_model("tuned")
    world.until("Progressing", 25)
    world.prometheus_up = False
    world.advance(100_000)
    world.restart_operator()
    for _ in range(30):
        world.reconcile()
        assert world.weights[-1] == 25
        world.advance(10)
    world.advance(10)
    world.reconcile()
    assert world.ready == ("False", "NoData")


def test_pods_that_never_became_ready_get_their_time_after_an_absence(world: World) -> None:
    world.set_model("tuned")
    world.reconcile()
    world.advance(100_000)
    world.restart_operator()
    world.reconcile()
    world.settle()
    assert world.arms[Track.STABLE].model.model_id == "tuned"


def test_an_undecided_step_ends_after_its_time_with_the_number_needed() -> None:
    # The same model under another template: 80 utterances of base's 20 % are never enough for minWords.
    world = World(build_canary(analysis={**_analysis(), "wer": {"minWords": 1900, "maxIncrease": "0.001"}}))
    world.settle()
    world.set_spec(template={"metadata": {"labels": {"team": "voice"}}})
    world.until("Progressing", 5)
    world.advance(500)
    world.reconcile()
    assert world.ready == ("Unknown", "GoldenSetTooSmall")
    assert "all 400 golden utterances have been heard" in world.canary.status.conditions[0].message
    world.advance(200)
    world.reconcile()
    assert world.ready == ("False", "AnalysisTimedOut")


def _analysis() -> dict[str, object]:
    plain = build_canary().spec.analysis.model_dump(mode="json", by_alias=True, exclude_none=True)
    return dict(plain)


def test_a_lost_status_changes_nothing_after_a_fail(world: World) -> None:
    world.set_model("bad")
    world.settle()
    world.canary = world.canary.model_copy(update={"status": type(world.canary.status)()})
    world.settle()
    assert world.ready == ("False", "WordErrorRateTooHigh")
    assert [one.outcome for one in world.canary.status.history] == [Outcome.ROLLED_BACK]
    assert set(world.weights) == {0, 5}


def test_a_route_that_is_deleted_after_a_fail_does_not_start_it_again(world: World) -> None:
    world.set_model("bad")
    world.settle()
    world.route = None
    world.settle()
    assert world.ready == ("False", "WordErrorRateTooHigh")


# --- Changes of mind ---


def test_another_model_in_the_middle_supersedes(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 25)
    world.set_model("bad")
    plan = world.reconcile()
    assert world.route is not None
    assert world.route.canary_weight == 0
    assert not any(isinstance(a, EnsureArm) and a.track is Track.CANARY for a in plan.actions)
    assert world.canary.status.history[0].outcome is Outcome.SUPERSEDED
    world.settle()
    assert [one.outcome for one in world.canary.status.history] == [Outcome.ROLLED_BACK, Outcome.SUPERSEDED]


def test_other_steps_raise_no_weight_without_a_pass_and_lower_it_at_once(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 25)
    world.prometheus_up = False
    world.set_spec(steps=[{"weight": 50}, {"weight": 100}])
    world.reconcile()
    assert world.weights[-1] == 25
    assert "gets 25 % of requests (step 2 of 2)" in world.canary.status.conditions[0].message
    world.set_spec(steps=[{"weight": 2}, {"weight": 10}, {"weight": 100}])
    world.reconcile()
    assert world.weights[-1] == 10
    world.prometheus_up = True
    world.settle()
    assert world.arms[Track.STABLE].model.model_id == "tuned"


def test_a_model_that_is_tried_again_at_once_is_judged_by_what_it_hears_now(world: World) -> None:
    """Prometheus still knows what the scorer of the try before has counted."""
    rollouts = []
    for _ in range(2):
        world.set_model("tuned")
        world.until("Progressing", 5)
        assert world.canary.status.rollout is not None
        rollouts.append(world.canary.status.rollout.id)
        assert set(world.scorers) == {f"voice-score-{rollouts[-1]}"}
        world.set_model("base")
        world.reconcile()
    assert len(set(rollouts)) == 2


def test_going_back_to_stables_model_ends_quietly(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 25)
    world.set_model("base")
    world.settle()
    assert world.ready == ("True", "Healthy")
    assert world.canary.status.history[0].outcome is Outcome.WITHDRAWN
    assert "RolledBack" not in world.reasons


def test_after_a_fail_going_back_is_healthy_again_and_another_model_is_tried(world: World) -> None:
    world.set_model("bad")
    world.settle()
    world.set_model("base")
    world.settle()
    assert world.ready == ("True", "Healthy")
    world.set_model("tuned")
    world.settle()
    assert world.arms[Track.STABLE].model.model_id == "tuned"


def test_a_change_during_promotion_waits_until_it_is_finished(world: World) -> None:
    world.set_model("tuned")
    world.until("Promoting")
    world.set_model("bad")
    world.settle()
    outcomes = [(one.model_id, one.outcome) for one in world.canary.status.history]
    assert outcomes == [("bad", Outcome.ROLLED_BACK), ("tuned", Outcome.PROMOTED)]


# --- A promotion that does not end ---


def _get_stuck(replicas: int = 1, last_weight: int = 100) -> World:
    """A promotion from base to tuned whose pods find no room, for longer than they are given."""
    world = World(build_canary(replicas=replicas, steps=[{"weight": 5}, {"weight": last_weight}]))
    world.settle()
    world.set_model("tuned")
    world.until("Promoting")
    world.no_room = True
    _pass_time(world)
    return world


def _pass_time(world: World, passes: int = 8) -> None:
    for _ in range(passes):
        world.run_controllers()
        world.advance(10)
        world.reconcile()


def _tell(world: World) -> list[tuple[str, str]]:
    """Model and outcome of each rollout, newest first."""
    return [(one.model_id, str(one.outcome)) for one in world.canary.status.history]


def test_a_promotion_that_finds_no_room_says_so_and_goes_on_when_there_is_some() -> None:
    world = _get_stuck()
    assert world.ready == ("False", "StableNotReady")
    ready, _, stalled = world.canary.status.conditions
    assert stalled.status == "True"
    assert "make room for one more pod; or change spec.model, and stable first goes back to model base" in ready.message
    assert [one.type for one in world.events if one.reason == "StableNotReady"] == ["Warning"]
    _pass_time(world, 30)
    assert (world.weights[-1], world.canary.status.phase) == (100, "Promoting")
    assert world.arms[Track.CANARY].pods == [(world.arms[Track.CANARY].model.revision, True)]
    world.no_room = False
    world.settle()
    assert _tell(world) == [("tuned", "Promoted")]
    assert world.arms[Track.STABLE].former is None, "what is over is forgotten"


@pytest.mark.parametrize(
    ("other", "serves", "told"),
    [
        pytest.param("base", "base", [("tuned", "RolledBack")], id="the former one"),
        pytest.param("best", "best", [("best", "Promoted"), ("tuned", "RolledBack")], id="a third one that is better"),
        pytest.param("bad", "base", [("bad", "RolledBack"), ("tuned", "RolledBack")], id="a third one that is worse"),
        pytest.param("broken", "base", [("broken", "RolledBack"), ("tuned", "RolledBack")], id="one that never starts"),
    ],
)
@pytest.mark.parametrize("crash_after", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("replicas", [1, 3])
def test_another_model_takes_a_stuck_promotion_back_and_begins_at_the_beginning(
    other: str, serves: str, told: list[tuple[str, str]], crash_after: int | None, replicas: int
) -> None:
    """Also with an operator that is killed in every pass, after so many writes."""
    world = _get_stuck(replicas)
    world.set_model(other)
    world.weights.clear()
    for _ in range(200):
        if crash_after is not None:
            world.reconcile(crash_after)
        world.reconcile()
        assert world.arms[Track.STABLE].model.model_id in {"base", serves}, "never the next one untried"
        if world.canary.status.rollout is None and Track.CANARY not in world.arms:
            break
        # There is room for one more pod where the canary arm has gone.
        world.no_room = Track.CANARY in world.arms and not _tell(world)
        world.run_controllers()
        world.advance(10)
    world.no_room = False
    world.settle()
    assert world.arms[Track.STABLE].model.model_id == serves
    assert _tell(world) == told
    assert next(one for one in world.weights if one != 100) == 0, "stable has everything before the next one begins"
    tuned = world.canary.status.history[-1]
    assert (tuned.reason, tuned.weight) == ("StableNotReady", 100)
    assert "stable's pods were not ready with it when another was asked for" in tuned.message


def test_a_promotion_that_is_taken_back_is_told() -> None:
    world = _get_stuck()
    world.events.clear()
    world.set_model("base")
    world.reconcile()
    assert world.canary.status.phase == "RollingBack"
    assert world.ready == ("Unknown", "PromotionGivenUp")
    message = world.canary.status.conditions[0].message
    assert (
        "Stable goes back to model base; the canary has 100 % of requests until stable has its pods (1) again"
        in message
    )
    world.settle()
    assert world.ready == ("True", "Healthy")
    assert [(one.type, one.reason) for one in world.events] == [
        ("Warning", "PromotionGivenUp"),
        ("Warning", "RolledBack"),
        ("Normal", "Healthy"),
    ]


def test_a_promotion_that_gets_on_is_finished_before_another_model_is_tried(world: World) -> None:
    world.set_model("tuned")
    world.until("Promoting")
    world.set_model("base")
    for _ in range(3):
        world.reconcile()
        assert world.arms[Track.STABLE].model.model_id == "tuned"
    world.settle()
    assert _tell(world)[-1] == ("tuned", "Promoted")


def test_a_promotion_that_is_written_down_and_not_begun_is_taken_back_at_once(world: World) -> None:
    """The operator was killed in between, or is refused the change of stable."""
    world.set_model("tuned")
    world.until("Progressing", 100)
    while not (world.route and world.route.record and world.route.record.promoting):
        world.advance(10)
        world.reconcile(crash_after=1)
    assert world.arms[Track.STABLE].model.model_id == "base"
    world.set_model("best")
    world.settle()
    assert _tell(world) == [("best", "Promoted"), ("tuned", "RolledBack")]


def test_the_canary_serves_until_stable_has_as_many_pods_of_its_former_model_as_are_wanted() -> None:
    world = _get_stuck(replicas=3)
    arm, former = world.arms[Track.STABLE], world.arms[Track.STABLE].former
    assert former is not None
    # A node has gone, and with it all but one of the former model's pods.
    arm.pods = [(former.model.revision, True), (arm.model.revision, False)]
    world.set_model("base")
    _pass_time(world, 20)
    assert world.ready == ("False", "PromotionGivenUp")
    assert "or go back to the model that was promoted" in world.canary.status.conditions[0].message
    assert world.weights[-1] == 100
    assert len(world.arms[Track.CANARY].pods) == 3
    world.no_room = False
    world.settle()
    assert world.ready == ("True", "Healthy")
    assert _tell(world) == [("tuned", "RolledBack")]


def test_pods_that_serve_the_promoted_model_count_on_the_way_back() -> None:
    """The canary arm may hold the very room that the last pod of the former model needs."""
    world = _get_stuck(replicas=2)
    arm, former = world.arms[Track.STABLE], world.arms[Track.STABLE].former
    assert former is not None
    arm.pods = [(former.model.revision, True), (arm.model.revision, True), (arm.model.revision, False)]
    world.set_model("base")
    _pass_time(world, 4)
    assert Track.CANARY not in world.arms
    assert world.weights[-1] == 0
    world.no_room = False
    _pass_time(world)
    assert world.ready == ("True", "Healthy")


def test_a_promotion_on_its_way_back_is_taken_up_again_with_its_model() -> None:
    """Also where the former model cannot be had any more."""
    world = _get_stuck()
    world.arms[Track.STABLE].pods = []
    world.broken_models.add("base")
    world.set_model("base")
    _pass_time(world, 20)
    assert world.arms[Track.STABLE].model.model_id == "base"
    assert world.weights[-1] == 100
    world.set_model("tuned")
    world.no_room = False
    world.settle()
    assert _tell(world) == [("tuned", "Promoted")]


@pytest.mark.parametrize("other", [None, "base"])
def test_the_canary_serves_everybody_when_stable_loses_its_pods_in_a_promotion(other: str | None) -> None:
    world = _get_stuck(last_weight=40)
    assert world.weights[-1] == 40
    world.arms[Track.STABLE].pods = []
    world.prometheus_up = False
    if other is not None:
        world.set_model(other)
    world.reconcile()
    assert world.weights[-1] == 100
    world.no_room, world.prometheus_up = False, True
    world.settle()
    assert world.ready == ("True", "Healthy")
    assert world.arms[Track.STABLE].model.model_id == (other or "tuned")


def test_where_the_former_model_is_not_known_a_stuck_promotion_waits() -> None:
    """An operator of an earlier release has begun it."""
    world = _get_stuck()
    world.arms[Track.STABLE].former = None
    world.set_model("bad")
    _pass_time(world)
    assert world.arms[Track.STABLE].model.model_id == "tuned"
    assert world.canary.status.conditions[0].message.endswith("make room for one more pod")
    world.no_room = False
    world.settle()
    assert _tell(world) == [("bad", "RolledBack"), ("tuned", "Promoted")]


def test_a_model_that_cannot_be_told_takes_nothing_back() -> None:
    world = _get_stuck()
    world.set_spec(model={"fineTuneRef": {"name": "nobody"}})
    world.reconcile()
    assert world.canary.status.phase == "Promoting"
    assert "there is no FineTune nobody" in world.canary.status.conditions[0].message
    world.set_model("base")
    world.reconcile()
    world.set_spec(model={"fineTuneRef": {"name": "nobody"}})
    world.reconcile()
    assert world.arms[Track.STABLE].model.model_id == "base"
    world.settle()
    assert world.ready == ("False", "FineTuneNotFound")
    assert _tell(world) == [("tuned", "RolledBack")]


@pytest.mark.parametrize("lost", ["status", "route", "canary arm"])
def test_whatever_is_lost_on_the_way_back_stable_gets_its_former_model(lost: str) -> None:
    world = _get_stuck()
    world.set_model("base")
    world.reconcile()
    if lost == "status":
        world.canary = world.canary.model_copy(update={"status": type(world.canary.status)()})
    elif lost == "route":
        world.route = None
    else:
        del world.arms[Track.CANARY]
    world.settle()
    assert world.ready == ("True", "Healthy")
    assert world.arms[Track.STABLE].model.model_id == "base"
    assert ("tuned", "Promoted") not in _tell(world)


def test_pods_that_a_quota_forbids_are_given_up_without_the_deployments_word() -> None:
    world = _get_stuck()
    world.set_model("base")

    def choose() -> str:
        seen = world.observe()
        assert seen.stable is not None
        late = replace(seen, stable=replace(seen.stable, deadline_exceeded=False))
        return decide_canary(late).status.phase or ""

    assert choose() == "Promoting"
    world.advance(60)
    assert choose() == "RollingBack"


def test_suspend_holds_everything_and_the_clock_starts_anew_afterwards(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 25)
    world.set_spec(suspend=True)
    plan = world.reconcile()
    assert all(not isinstance(a, EnsureRoute | EnsureArm | EnsureScorer) for a in plan.actions)
    assert world.ready == ("Unknown", "Suspended")
    world.advance(100_000)
    world.reconcile()
    world.set_spec(suspend=False)
    world.reconcile()
    assert world.route is not None
    assert world.route.canary_weight in {25, 50}
    assert world.canary.status.rollout is not None


def _prepare(world: World) -> None:
    """A rollout whose pods have become ready, unseen as yet."""
    world.set_model("tuned")
    world.reconcile()
    for _ in range(3):
        world.run_controllers()
        world.reconcile(crash_after=0)


def test_pods_that_became_ready_while_the_operator_was_away_are_in_time(world: World) -> None:
    _prepare(world)
    world.advance(100_000)
    world.reconcile()
    assert world.weights[-1] == 5
    assert world.canary.status.history == []


def test_the_time_to_start_begins_anew_after_a_suspension(world: World) -> None:
    world.set_model("tuned")
    world.reconcile()
    world.set_spec(suspend=True)
    world.reconcile()
    world.advance(100_000)
    world.set_spec(suspend=False)
    world.settle()
    assert [one.outcome for one in world.canary.status.history] == [Outcome.PROMOTED]


def test_a_pass_that_is_seen_late_counts(world: World) -> None:
    """The operator was away for longer than a step may last; the evidence came in all the same."""
    world.set_model("tuned")
    world.until("Progressing", 25)
    world.advance(100_000)
    world.reconcile()
    assert world.weights[-1] == 50


def test_an_arm_that_the_gateway_may_still_send_requests_to_keeps_its_model(world: World) -> None:
    world.set_model("tuned")
    world.until("Progressing", 25)
    world.set_model("bad")
    world.reconcile()
    seen = world.observe()
    assert seen.route is not None
    assert seen.route.canary_weight == 0
    late = replace(seen, route=replace(seen.route, settled=False))
    for observed, arms in ((late, {Track.STABLE}), (seen, {Track.STABLE, Track.CANARY})):
        plan = decide_canary(observed)
        assert {one.track for one in plan.actions if isinstance(one, EnsureArm)} == arms
        assert plan.look_again_seconds is not None


# --- What is referred to ---


def test_a_fine_tune_that_has_finished_brings_its_name_and_digest(world: World) -> None:
    world.set_spec(model={"fineTuneRef": {"name": "lora"}})
    world.reconcile()
    assert world.ready == ("False", "FineTuneNotFound")
    world.fine_tune_state = "NotReady"
    world.reconcile()
    assert world.ready == ("Unknown", "FineTuneNotFinished")
    world.fine_tune_state = "Failed"
    world.reconcile()
    assert world.ready == ("False", "FineTuneFailed")
    world.fine_tune_state, world.fine_tune = "Ready", _fine_tune()
    world.until("Progressing")
    model = world.arms[Track.CANARY].model
    assert (model.model_id, model.digest) == ("ft:tiny:3f9c2a", "sha256:" + "c" * 64)


def _fine_tune() -> FineTune:
    return FineTune.model_validate(
        {
            "metadata": {"name": "lora", "namespace": "speech", "uid": "f-1"},
            "spec": {"baseModel": {"uri": "s3://m/base"}, "datasets": [{"name": "calls"}]},
            "status": {
                "modelId": "ft:tiny:3f9c2a",
                "model": {
                    "uri": "s3://attune/models/tuned",
                    "digest": "sha256:" + "c" * 64,
                    "adapterUri": "s3://attune/models/adapter",
                    "adapterDigest": "sha256:" + "d" * 64,
                    "padding": "Buckets",
                },
            },
        }
    )


def test_a_golden_set_that_is_missing_or_too_small_stops_the_rollout_before_it_begins(world: World) -> None:
    world.set_model("tuned")
    world.dataset = None
    world.reconcile()
    assert world.ready == ("False", "DatasetNotFound")
    world.dataset = build_dataset(words=150, utterances=30)
    world.reconcile()
    assert world.ready == ("False", "GoldenSetTooSmall")
    assert "use about 40 utterances" in world.canary.status.conditions[0].message
    assert Track.CANARY not in world.arms
    world.dataset = build_dataset()
    world.settle()
    assert world.arms[Track.STABLE].model.model_id == "tuned"


@pytest.mark.parametrize(
    ("url", "hosts", "allowed"),
    [
        ("http://anything:1", (), True),
        ("http://prometheus.monitoring:9090", ("prometheus.monitoring",), True),
        ("https://Prometheus.monitoring/path", ("prometheus.monitoring",), True),
        ("http://prometheus.monitoring:9090", ("other", "prometheus.monitoring:9090"), True),
        ("http://prometheus.monitoring:6443", ("prometheus.monitoring:9090",), False),
        ("http://prometheus.monitoring.evil:9090", ("prometheus.monitoring",), False),
        ("http://monitoring:9090", ("prometheus.monitoring",), False),
        ("http://169.254.169.254/latest", ("prometheus.monitoring",), False),
        ("http://other:99999", ("prometheus.monitoring",), False),
    ],
)
def test_only_a_prometheus_that_the_installation_allows_is_asked(
    url: str, hosts: tuple[str, ...], *, allowed: bool
) -> None:
    assert (refuse_prometheus(url, hosts) is None) == allowed


def test_a_prometheus_that_is_not_allowed_stops_the_rollout_before_it_begins(world: World) -> None:
    world.prometheus_hosts = ("prometheus.monitoring",)
    world.set_model("tuned")
    world.reconcile()
    assert world.ready == ("False", "PrometheusNotAllowed")
    message = world.canary.status.conditions[0].message
    assert "names prometheus:9090" in message
    assert "name prometheus.monitoring, or have it added to the chart's settings.prometheusHosts" in message
    assert Track.CANARY not in world.arms
    world.prometheus_hosts = ("prometheus",)
    world.settle()
    assert world.arms[Track.STABLE].model.model_id == "tuned"


def test_a_model_that_cannot_be_told_holds_a_rollout_and_a_fail_still_counts(world: World) -> None:
    world.set_model("bad")
    world.until("Progressing", 5)
    world.set_spec(model={"fineTuneRef": {"name": "nobody"}})
    world.reconcile()
    assert world.ready == ("Unknown", "FineTuneNotFound")
    world.advance(100)
    world.reconcile()
    assert world.route is not None
    assert world.route.canary_weight == 0
    assert world.canary.status.history[0].outcome is Outcome.ROLLED_BACK


def test_a_model_that_can_no_longer_be_told_gets_no_first_request(world: World) -> None:
    _prepare(world)
    world.set_spec(model={"fineTuneRef": {"name": "nobody"}})
    world.reconcile()
    assert world.ready == ("Unknown", "FineTuneNotFound")
    assert "correct the reference" in world.canary.status.conditions[0].message
    assert set(world.weights) == {0}


def test_a_broken_stable_is_replaced_without_a_trial(world: World) -> None:
    world.broken_models.add("base")
    world.arms[Track.STABLE].pods = [(revision, False) for revision, _ in world.arms[Track.STABLE].pods]
    world.advance(100)
    world.set_model("tuned")
    world.settle()
    assert world.ready == ("True", "Healthy")
    assert world.arms[Track.STABLE].model.model_id == "tuned"


def test_deletion_is_left_to_the_garbage_collector(world: World) -> None:
    metadata = world.canary.metadata.model_copy(update={"deletion_timestamp": "2026-11-21T12:00:00Z"})
    world.canary = world.canary.model_copy(update={"metadata": metadata})
    plan = decide_canary(world.observe())
    assert plan.actions == ()
    assert plan.status == world.canary.status


def test_history_keeps_the_last_ten(world: World) -> None:
    for _ in range(6):
        for model in ("tuned", "bad"):
            world.set_model(model)
            world.until("Progressing", 5)
    world.settle()
    history: list[HistoryEntry] = world.canary.status.history
    assert len(history) == 10
    assert history == sorted(history, key=lambda one: one.finished_time, reverse=True)


# --- Pods ---

POD = ServingPod("p", "r", image="i:1")


@pytest.mark.parametrize(
    ("pod", "reason", "fatal"),
    [
        pytest.param(replace(POD, unschedulable="0/1 nodes"), "Unschedulable", False, id="no node fits"),
        pytest.param(replace(POD, waiting_reason="ErrImagePull"), "ImagePullFailed", False, id="one failed pull"),
        pytest.param(replace(POD, waiting_reason="ImagePullBackOff"), "ImagePullFailed", True, id="pulls fail"),
        pytest.param(
            replace(POD, waiting_reason="CreateContainerConfigError", waiting_message='secret "store" not found'),
            "SecretNotFound",
            False,
            id="a Secret is missing",
        ),
        pytest.param(
            replace(
                POD,
                waiting_reason="CreateContainerConfigError",
                waiting_message="couldn't find key bucket in Secret speech/store",
            ),
            "SecretKeyMissing",
            False,
            id="a key is missing",
        ),
        pytest.param(replace(POD, ended_reason="OOMKilled", restarts=1), "OutOfMemory", False, id="out of memory once"),
        pytest.param(replace(POD, ended_reason="OOMKilled", restarts=2), "OutOfMemory", True, id="out of memory again"),
        pytest.param(
            replace(POD, waiting_reason="CrashLoopBackOff", restarts=2, ended_code=1),
            "CrashLoopBackOff",
            True,
            id="loop",
        ),
        pytest.param(
            replace(
                POD,
                ended_code=int(ExitCode.NOT_FOUND),
                failure=Failure(reason="ModelNotFound", message="there is no model at s3://m/x"),
            ),
            "ModelNotFound",
            True,
            id="the server says that it comes again",
        ),
        pytest.param(
            replace(
                POD,
                ended_code=int(ExitCode.STORE_UNAVAILABLE),
                failure=Failure(reason="StoreUnavailable", message="the store does not answer"),
            ),
            "StoreUnavailable",
            False,
            id="the server says that it may be over soon",
        ),
    ],
)
def test_what_ails_a_pod_is_named(pod: ServingPod, reason: str, fatal: bool) -> None:  # noqa: FBT001
    problem = find_problem([pod])
    assert isinstance(problem, PodProblem)
    assert (problem.reason, problem.fatal) == (reason, fatal)


def test_a_pod_that_is_ready_or_on_its_way_has_no_problem() -> None:
    assert find_problem([POD, replace(POD, ready=True, restarts=5, ended_reason="OOMKilled")]) is None


def test_the_fatal_problem_comes_first() -> None:
    pods = [replace(POD, unschedulable="0/1 nodes"), replace(POD, waiting_reason="ImagePullBackOff")]
    problem = find_problem(pods)
    assert problem is not None
    assert problem.reason == "ImagePullFailed"


def test_times_are_counted_from_the_route(world: World) -> None:
    """A clock that jumps back rolls nothing back."""
    world.set_model("tuned")
    world.until("Progressing", 25)
    world.now -= timedelta(hours=1)
    world.reconcile()
    assert world.route is not None
    assert world.route.canary_weight == 25
