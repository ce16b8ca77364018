"""Whatever happens in whatever order, a Canary keeps its promises; the world asserts them on every write."""

import hypothesis.strategies as st
from attune.api.canary import Outcome
from attune.contract.metrics import Track
from attune.domain.canary import decide_canary
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.unit.canary_world import World, build_canary, build_dataset

MODELS = st.sampled_from(["base", "tuned", "bad", "broken"])
STEPS = st.sampled_from(
    [
        [{"weight": 5}, {"weight": 25}, {"weight": 100}],
        [{"pause": {"seconds": 30}}, {"weight": 10}, {"weight": 60}],
        [{"weight": 40}, {"pause": {"seconds": 90}}, {"weight": 80}],
        [{"weight": 2}],
        [{"weight": 100}],
    ]
)
CRASH = st.one_of(st.none(), st.integers(0, 8))


class CanaryMachine(RuleBasedStateMachine):
    """Users, clocks, crashes and outages in any order."""

    @initialize(replicas=st.integers(1, 3), pause=st.booleans(), last=st.sampled_from([50, 100]))
    def begin(self, replicas: int, pause: bool, last: int) -> None:  # noqa: FBT001
        steps: list[object] = [{"weight": 5}, {"weight": 25}, {"weight": last}]
        if pause:
            steps.insert(2, {"pause": {"seconds": 30}})
        self.world = World(build_canary(replicas=replicas, steps=steps))
        self.world.settle()

    @rule(crash=CRASH)
    def reconcile(self, crash: int | None) -> None:
        self.world.reconcile(crash)

    @rule(times=st.integers(1, 12), crash=CRASH)
    def go_on(self, times: int, crash: int | None) -> None:
        for _ in range(times):
            self.world.run_controllers()
            self.world.advance(10)
            self.world.reconcile(crash)
            self.world.reconcile()

    @rule(seconds=st.sampled_from([1, 30, 200, 700]))
    def wait(self, seconds: int) -> None:
        self.world.advance(seconds)

    @rule()
    def run_controllers(self) -> None:
        self.world.run_controllers()

    @rule(model=MODELS)
    def change_model(self, model: str) -> None:
        self.world.set_model(model)

    @rule(replicas=st.integers(1, 3))
    def scale(self, replicas: int) -> None:
        self.world.set_spec(replicas=replicas)

    @rule(suspend=st.booleans())
    def suspend(self, suspend: bool) -> None:  # noqa: FBT001
        self.world.set_spec(suspend=suspend)

    @rule(steps=STEPS)
    def change_steps(self, steps: list[object]) -> None:
        self.world.set_spec(steps=steps)

    @rule(steps=STEPS, passes=st.integers(0, 3))
    def change_steps_while_suspended(self, steps: list[object], passes: int) -> None:
        self.world.set_spec(suspend=True)
        for _ in range(passes):
            self.world.reconcile()
            self.world.run_controllers()
            self.world.advance(10)
        self.world.set_spec(steps=steps)
        self.world.set_spec(suspend=False)
        self.world.reconcile()

    @rule()
    def restart_operator(self) -> None:
        self.world.restart_operator()

    @rule()
    def fail_scorers(self) -> None:
        self.world.fail_scorers()

    @rule(full=st.booleans())
    def fill_the_nodes(self, full: bool) -> None:  # noqa: FBT001
        self.world.no_room = full

    @rule(up=st.booleans())
    def prometheus(self, up: bool) -> None:  # noqa: FBT001
        self.world.prometheus_up = up

    @rule(there=st.booleans())
    def dataset(self, there: bool) -> None:  # noqa: FBT001
        self.world.dataset = build_dataset() if there else None

    @rule(track=st.sampled_from(list(Track)))
    def lose_pods(self, track: Track) -> None:
        if track in self.world.arms:
            self.world.arms[track].pods = [(rev, False) for rev, _ in self.world.arms[track].pods]

    @rule()
    def delete_canary_arm(self) -> None:
        self.world.arms.pop(Track.CANARY, None)

    @rule()
    def delete_scorer(self) -> None:
        self.world.scorers.clear()

    @rule(weight=st.integers(0, 100))
    def edit_route(self, weight: int) -> None:
        route = self.world.route
        # After a hand-made rise of the weight the next pass must put it right, and no promise was ours in between.
        if route is not None and weight < route.canary_weight:
            route.stable_weight, route.canary_weight = 100 - weight, weight

    @rule()
    def lose_status(self) -> None:
        """A backup was restored without statuses."""
        status = self.world.canary.status
        self.world.canary = self.world.canary.model_copy(update={"status": type(status)()})

    @invariant()
    def decide_is_total_and_repeatable(self) -> None:
        if hasattr(self, "world"):
            observed = self.world.observe()
            assert decide_canary(observed) == decide_canary(observed)

    @invariant()
    def a_pass_repeated_at_the_same_time_comes_to_rest(self) -> None:
        """The weight of one moment is not fought over."""
        if hasattr(self, "world") and self.world.route is not None:
            assert self.world.route.stable_weight + self.world.route.canary_weight == 100

    def teardown(self) -> None:
        """Whatever has happened: once the outages are over, every run ends, and then nothing is written any more."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.prometheus_up, world.dataset, world.no_room = True, build_dataset(), False
        world.set_spec(suspend=False)
        if Track.STABLE in world.arms and world.arms[Track.STABLE].model.model_id in world.broken_models:
            # It got there in place of a promotion that could not be finished: now it is a person's turn again.
            world.set_model("base")
        world.settle()
        status = world.canary.status
        stable = world.observe().stable
        assert stable is not None
        assert stable.rolled_out
        wanted = world.canary.spec.model.uri == stable.model.uri
        if status.phase == "Healthy":
            assert wanted
            assert world.ready == ("True", "Healthy")
        else:
            assert status.phase == "Degraded"
            assert not wanted
            assert status.history[0].outcome is Outcome.ROLLED_BACK
            assert world.ready == ("False", status.history[0].reason)
        assert world.route is None or world.route.canary_weight == 0
        assert Track.CANARY not in world.arms
        assert not world.scorers
        writes, events = world.writes, len(world.events)
        world.reconcile()
        world.reconcile()
        assert (world.writes, len(world.events)) == (writes, events)
        assert len(status.history) <= 10
        assert len({(one.id, one.started_time) for one in status.history}) == len(status.history)
        for entry in status.history:
            if entry.outcome is Outcome.PROMOTED:
                assert entry.weight > 0


TestCanary = CanaryMachine.TestCase
TestCanary.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
