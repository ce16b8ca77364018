"""A small world for decisions on a Canary: Deployments that become ready, a route, a scorer, clocks and crashes."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, assert_never

from attune.api import Canary, Dataset, FineTune
from attune.api.canary import AnalysisVerdict, ArmModel, PodTemplate
from attune.contract.metrics import Track
from attune.domain.actions import (
    CanaryAction,
    DeleteArm,
    DeleteJob,
    EmitEvent,
    EnsureArm,
    EnsureJob,
    EnsureRoute,
    EnsureScorer,
    FormerArm,
    Plan,
    RolloutRecord,
)
from attune.domain.arms import ObservedArm, ObservedGateway, ObservedRoute, ServingPod
from attune.domain.canary import ObservedCanary, decide_canary
from attune.domain.canary.record import compute_weight
from attune.domain.jobs import ObservedJob
from attune.domain.times import format_time, parse_time
from attune.domain.verdict import NoEvidence, PairedSums, judge

BEGINNING = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
GOLDEN_UTTERANCES, WORDS_EACH = 400, 5
# Word errors in ten utterances, by model. Any pairing of two of them is judged within the golden set.
ERRORS = {"base": 10, "tuned": 5, "best": 1, "bad": 30, "broken": 10}


def build_canary(model: str = "base", **spec: Any) -> Canary:
    return Canary.model_validate(
        {
            "metadata": {"name": "voice", "namespace": "speech", "uid": "u-1", "generation": 1},
            "spec": {
                "model": {"uri": f"s3://attune/models/{model}"},
                "traffic": {"gatewayRef": {"name": "public"}, "hostnames": ["asr.example.com"]},
                "analysis": {
                    "intervalSeconds": 10,
                    "prometheus": {"url": "http://prometheus:9090"},
                    "golden": {"datasetRef": {"name": "calls"}},
                    "wer": {"minWords": 200},
                    "noDataTimeoutSeconds": 300,
                    "maxStepSeconds": 600,
                },
                "progressDeadlineSeconds": 60,
                **spec,
            },
        }
    )


def build_dataset(words: int = GOLDEN_UTTERANCES * WORDS_EACH, utterances: int = GOLDEN_UTTERANCES) -> Dataset:
    split = {"utterances": utterances, "hours": "0.1", "speakers": 1, "words": words}
    return Dataset.model_validate(
        {
            "metadata": {"name": "calls", "namespace": "speech", "uid": "d-1"},
            "spec": {
                "language": "en",
                "sources": [{"s3": {"uri": "s3://internal/calls"}, "format": "Directory"}],
            },
            "status": {
                "revision": "sha256:" + "1" * 64,
                "uri": "s3://attune/datasets/calls/1",
                "splits": {"train": split, "validation": split, "holdout": split},
            },
        }
    )


@dataclass
class Arm:
    """A Deployment. pods: (revision, ready) of each."""

    model: ArmModel
    template: PodTemplate
    replicas: int
    asked: datetime
    former: FormerArm | None = None
    pods: list[tuple[str, bool]] = field(default_factory=list)


@dataclass
class Route:
    stable_weight: int
    canary_weight: int
    record: RolloutRecord | None


class World:
    """Carries plans out, keeps the promises' books, and lets time pass. Asserts on every write of the route."""

    def __init__(self, canary: Canary) -> None:
        self.canary = canary
        self.now = BEGINNING
        self.looking_since = BEGINNING
        self.arms: dict[Track, Arm] = {}
        self.route: Route | None = None
        self.scorers: dict[str, datetime] = {}
        self.failed_scorers: dict[str, datetime] = {}
        self.prometheus_up = True
        self.prometheus_hosts: tuple[str, ...] = ()
        self.scorer_works = True
        self.gateway = ObservedGateway("Programmed")
        self.dataset: Dataset | None = build_dataset()
        self.fine_tune: FineTune | None = None
        self.fine_tune_state: Any = "NotFound"
        self.broken_models = {"broken"}
        self.no_room = False  # new pods of stable never start, whatever their model
        self.events: list[EmitEvent] = []
        self.weights: list[int] = []
        self.failed: set[tuple[str, str]] = set()
        self.writes = 0
        self.passed: set[str] = set()
        self.reached: dict[tuple[str, str] | None, int] = {}  # weight that a rollout was last given
        self.seen_weight = 0  # of the canary, on the route as the present pass found it

    # --- reading ---

    def observe(self) -> ObservedCanary:
        record = self.route.record if self.route else None
        self.seen_weight = self.route.canary_weight if self.route else 0
        return ObservedCanary(
            canary=self.canary,
            now=self.now,
            looking_since=self.looking_since,
            inference_image="registry/inference:1",
            fine_tune=self.fine_tune,
            fine_tune_state=self.fine_tune_state,
            dataset=self.dataset,
            dataset_state="Ready" if self.dataset else "NotFound",
            gateway=self.gateway,
            stable=self._observe_arm(Track.STABLE),
            trial=self._observe_arm(Track.CANARY),
            route=ObservedRoute(self.route.stable_weight, self.route.canary_weight, record) if self.route else None,
            scorers=tuple(self._observe_scorer(name) for name in self.scorers),
            evidence=self.evidence(),
            prometheus_hosts=self.prometheus_hosts,
        )

    def _observe_scorer(self, name: str) -> ObservedJob:
        failed = self.failed_scorers.get(name)
        if failed is None:
            return ObservedJob(name)
        reason, message = "BackoffLimitExceeded", "too often"
        return ObservedJob(name, failed=True, failed_reason=reason, failed_message=message, finished=failed)

    def _observe_arm(self, track: Track) -> ObservedArm | None:
        arm = self.arms.get(track)
        if arm is None:
            return None
        current = [ready for revision, ready in arm.pods if revision == arm.model.revision]
        rolled_out = len(current) == len(arm.pods) == arm.replicas and all(current)
        late = (self.now - arm.asked).total_seconds() > self.canary.spec.progress_deadline_seconds
        return ObservedArm(
            model=arm.model,
            template=arm.template,
            replicas=arm.replicas,
            ready=sum(ready for _, ready in arm.pods),
            rolled_out=rolled_out,
            deadline_exceeded=late and not self._can_start(track, arm) and not rolled_out,
            pods=tuple(
                ServingPod(f"{track}-{i}", revision, ready=ready) for i, (revision, ready) in enumerate(arm.pods)
            ),
            former=arm.former,
        )

    def _can_start(self, track: Track, arm: Arm) -> bool:
        return arm.model.model_id not in self.broken_models and not (self.no_room and track is Track.STABLE)

    def evidence(self) -> PairedSums | NoEvidence:
        record = self.route.record if self.route else None
        if not self.prometheus_up:
            return NoEvidence("PrometheusUnavailable", "connection refused")
        if record is None or record.step is None or record.failed_reason:
            return NoEvidence("NoData", "nothing has been compared yet")
        # Each scorer replays from the start; the one that has come furthest counts.
        ran = [
            int((self.failed_scorers.get(name, self.now) - began).total_seconds())
            for name, began in self.scorers.items()
            if f"-{record.id}" in name
        ]
        if not ran or not self.scorer_works:
            return NoEvidence("NoData", "no series yet")
        trial = self.arms.get(Track.CANARY)
        stable = self.arms.get(Track.STABLE)
        if trial is None or stable is None:
            return NoEvidence("NoData", "no series yet")
        return self.pair(stable.model.model_id, trial.model.model_id, max(ran))

    @staticmethod
    def pair(stable: str, trial: str, utterances: int) -> PairedSums:
        n = min(utterances, GOLDEN_UTTERANCES)
        sums = [0] * 5
        for index in range(n):
            # Errors spread evenly over utterances; an utterance takes at most three more than the next.
            s, c = (ERRORS[model] * (index + 1) // 10 - ERRORS[model] * index // 10 for model in (stable, trial))
            for place, value in enumerate((s, c, s * s, c * c, s * c)):
                sums[place] += value
        return PairedSums(
            n, n * WORDS_EACH, *sums, GOLDEN_UTTERANCES, GOLDEN_UTTERANCES * WORDS_EACH, n == GOLDEN_UTTERANCES
        )

    def verdict(self) -> AnalysisVerdict:
        return judge(self.evidence(), self.canary.spec.analysis.wer).verdict

    # --- writing ---

    def reconcile(self, crash_after: int | None = None) -> Plan:
        """One pass. crash_after: so many actions are carried out, and no status is written."""
        seen = self.observe()
        plan = decide_canary(seen)
        for index, action in enumerate(plan.actions):
            if crash_after is not None and index >= crash_after:
                return plan
            self._carry_out(action)  # type: ignore[arg-type]
        if crash_after is None and plan.status != self.canary.status:
            self.writes += 1
            self.canary = self.canary.model_copy(update={"status": plan.status})
        if crash_after is None and not self.canary.spec.suspend and self.route:
            self._assert_served(seen, self.route)
        return plan

    def _assert_served(self, seen: ObservedCanary, route: Route) -> None:
        """Asserts that no arm without pods gets requests while the other has some, as far as a pass could see."""
        stable, trial = (arm is not None and arm.ready > 0 for arm in (seen.stable, seen.trial))
        if route.canary_weight:
            assert trial or not stable, "weight only where pods are"
        if route.record is not None and route.record.promoting and route.stable_weight:
            assert stable or not trial, "the canary has passed: it serves while stable does not"

    def _carry_out(self, action: CanaryAction) -> None:  # noqa: C901 (one case for each action)
        match action:
            case EnsureArm():
                self._ensure_arm(action)
            case DeleteArm():
                assert self.route is not None
                assert self.route.canary_weight == 0, "the canary arm may go only when nothing reaches it"
                assert self.seen_weight == 0, "and only in a pass that has found the route so"
                if action.track in self.arms:
                    self.writes += 1
                    del self.arms[action.track]
            case EnsureRoute():
                self._ensure_route(action)
            case EnsureScorer():
                assert len(action.name) <= 63
                if action.name not in self.scorers:
                    self.writes += 1
                    self.scorers[action.name] = self.now
            case DeleteJob():
                self.failed_scorers.pop(action.name, None)
                if self.scorers.pop(action.name, None) is not None:
                    self.writes += 1
            case EmitEvent():
                assert len(action.message) <= 2048
                self.events.append(action)
            case EnsureJob():
                raise AssertionError(action)
            case _:
                assert_never(action)

    def _ensure_arm(self, action: EnsureArm) -> None:
        arm = self.arms.get(action.track)
        wanted = (action.model, action.template, action.replicas, action.former)
        if arm is not None and (arm.model, arm.template, arm.replicas, arm.former) == wanted:
            return
        self.writes += 1
        assert action.template.spec.containers[0].image, "the image is filled in"
        if arm is None:
            self.arms[action.track] = Arm(*wanted[:3], asked=self.now, former=action.former)
            return
        if action.track is Track.STABLE and arm.model.revision != action.model.revision and self.route is not None:
            observed = self._observe_arm(Track.STABLE)
            assert observed is not None
            back = arm.former == (action.model, action.template)
            assert observed.broken or back or action.model.revision in self.passed, "stable changes only after a Pass"
            if action.former is not None:
                assert action.former == (arm.model, arm.template), "what is taken away is written down"
        if action.track is Track.CANARY and arm.model.revision != action.model.revision:
            assert self.route is not None
            assert self.route.canary_weight == 0, "the model of an arm that gets requests never changes"
        if (arm.model, arm.template, arm.replicas) != wanted[:3]:
            arm.asked = self.now
        arm.model, arm.template, arm.replicas, arm.former = wanted

    def _ensure_route(self, action: EnsureRoute) -> None:
        assert action.stable_weight + action.canary_weight == 100
        before = self.route
        after = Route(action.stable_weight, action.canary_weight, action.rollout)
        if before == after:
            return
        self.writes += 1
        old = before.canary_weight if before else 0
        record = action.rollout
        key = (record.id, record.started) if record else None
        # A promotion that is taken back has its mark before stable has its former model again.
        if record is not None and record.failed_reason is not None and not record.promoting:
            self.failed.add((record.id, record.started))
        if key in self.failed:
            assert after.canary_weight == 0, "the weight never rises after a Fail"
            assert record is not None
            assert record.failed_reason is not None, "a Fail is not forgotten"
        stable, trial = self._observe_arm(Track.STABLE), self._observe_arm(Track.CANARY)
        # A model that has passed may serve everybody where nobody else does.
        alone = before and before.record and before.record.promoting and (stable is None or stable.ready == 0)
        if after.canary_weight > old and not alone:
            assert trial is not None
            assert trial.rolled_out, "capacity is there before the weight moves"
            assert self.verdict() is not AnalysisVerdict.FAIL
            known = self.verdict() is not AnalysisVerdict.UNKNOWN
            regained = old == 0 and known and after.canary_weight <= self.reached.get(key, 0)
            passed = self.verdict() is AnalysisVerdict.PASS
            assert passed or regained or self._is_first(before, after), "weight rises after a Pass alone"
        if record is not None and record.promoting and not (before and before.record and before.record.promoting):
            assert self.verdict() is AnalysisVerdict.PASS, "Unknown never promotes"
            self.passed.add(self.arms[Track.CANARY].model.revision)
        if before and before.record and before.record.promoting and (record is None or not record.promoting):
            assert stable is not None
            if record is None:
                assert stable.rolled_out, "a promoted model is on stable before the canary arm goes"
            else:
                assert record.failed_reason is not None, "a promotion ends well, or as a failure"
                assert stable.ready >= self.canary.spec.replicas, "stable serves before the canary arm goes"
                assert trial is None or stable.model != trial.model, "with its former model"
        if after.canary_weight:
            self.reached[key] = after.canary_weight
        self.weights.append(after.canary_weight)
        self.route = after

    def _is_first(self, before: Route | None, after: Route) -> bool:
        """Whether this is a rollout's first weight, which nothing can be known before."""
        steps = self.canary.spec.steps
        step = before.record.step if before is not None and before.record is not None else None
        first = next(one.weight for one in steps if one.weight is not None)
        return compute_weight(steps, step) == 0 and after.canary_weight == first

    # --- the rest of the cluster ---

    def advance(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    def fail_scorers(self) -> None:
        for name in self.scorers:
            self.failed_scorers.setdefault(name, self.now)

    def restart_operator(self) -> None:
        self.looking_since = self.now

    def run_controllers(self) -> None:
        """One step of the Deployment controller: surge by one, replace one, drop what is too much."""
        for track, arm in self.arms.items():
            wanted = arm.model.revision
            good = self._can_start(track, arm)
            arm.pods = [(rev, ready or (rev == wanted and good)) for rev, ready in arm.pods]
            current = [pod for pod in arm.pods if pod[0] == wanted]
            old = [pod for pod in arm.pods if pod[0] != wanted]
            if len(current) < arm.replicas and len(arm.pods) <= arm.replicas:
                current.append((wanted, False))
            elif any(not ready for _, ready in old):
                old.remove(next(pod for pod in old if not pod[1]))
            elif old and sum(ready for _, ready in current + old) > arm.replicas:
                old.pop()
            elif len(current) > arm.replicas:
                current.pop()
            elif old and all(ready for _, ready in current) and len(current) == arm.replicas:
                old.pop()
            arm.pods = old + current

    def set_spec(self, **spec: Any) -> None:
        plain = self.canary.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        metadata = self.canary.metadata.model_copy(update={"generation": self.canary.metadata.generation + 1})
        self.canary = self.canary.model_copy(
            update={"spec": type(self.canary.spec).model_validate({**plain, **spec}), "metadata": metadata}
        )

    def set_model(self, name: str) -> None:
        self.set_spec(model={"uri": f"s3://attune/models/{name}"})

    # --- waiting ---

    def settle(self, passes: int = 400, seconds: int = 10) -> None:
        """Runs everything until nothing changes any more.

        Raises:
            AssertionError: when that does not come to pass.
        """
        for _ in range(passes):
            before = self.writes
            self.reconcile()
            self.run_controllers()
            pods = [list(arm.pods) for arm in self.arms.values()]
            self.run_controllers()
            quiet = before == self.writes and pods == [list(arm.pods) for arm in self.arms.values()]
            self.advance(seconds)
            if quiet and self.canary.status.rollout is None and self.canary.status.canary is None:
                return
        status = self.canary.status
        raise AssertionError(f"not settled: {status.phase} {status.conditions[0].message}")

    def until(self, phase: str, weight: int | None = None, passes: int = 200) -> None:
        """Runs until the status shows this phase (and canary weight)."""
        for _ in range(passes):
            self.reconcile()
            status = self.canary.status
            seen = status.canary.weight if status.canary else 0
            if status.phase == phase and (weight is None or seen == weight):
                return
            self.run_controllers()
            self.advance(10)
        raise AssertionError(f"never {phase} {weight}: {status.phase} {status.conditions[0].message}")

    @property
    def reasons(self) -> list[str]:
        return [event.reason for event in self.events]

    @property
    def ready(self) -> tuple[str, str]:
        """Status and reason of the condition Ready."""
        condition = self.canary.status.conditions[0]
        assert condition.type == "Ready"
        return condition.status, condition.reason


def elapsed(world: World) -> float:
    record = world.route.record if world.route else None
    assert record is not None
    return (world.now - parse_time(record.started)).total_seconds()


__all__ = ["BEGINNING", "World", "build_canary", "build_dataset", "elapsed", "format_time", "replace"]
