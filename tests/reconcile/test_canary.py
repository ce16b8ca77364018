"""A Canary against a real API server, its Deployment controller and a real Prometheus; the test plays the kubelet."""

import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attune.adapters.cluster import CONFIG_MAP, CUSTOM, GATEWAY, HTTP_ROUTE, JOB, POD, SERVICE, Cluster, Object
from attune.api import Canary
from attune.api.canary import ArmModel
from attune.contract.job import JobSpec
from attune.contract.metrics import Track
from attune.domain.actions import EnsureArm, EnsureRoute, RolloutRecord
from attune.domain.canary.identity import fill_image
from attune.reconcile import act_canary
from attune.reconcile.observe import parse_resource
from attune.render.inference import LABEL_TRACK
from attune.settings import Settings

from tests.reconcile.canary_stage import Exposition, Killed, Stage, run_prometheus, serve
from tests.reconcile.conftest import kubectl
from tests.reconcile.kubelet import Namespace, find_condition, wait_for

pytestmark = [
    pytest.mark.apiserver,
    pytest.mark.timeout(500),
]

PULLING = {"reason": "ContainerCreating", "message": ""}


@pytest.fixture(scope="module")
def gateway_api(kubeconfig: Path, cluster: Cluster) -> None:
    """The Gateway API's CRDs."""
    from devcluster import artifacts  # noqa: PLC0415 (downloads what is missing: only where it is needed)

    subprocess.run(
        [str(kubectl()), "--kubeconfig", str(kubeconfig), "apply", "--server-side", "-f", str(artifacts.gateway_api())],
        check=True,
        capture_output=True,
        timeout=300,
    )
    wait_for(lambda: cluster.is_served(GATEWAY) and cluster.is_served(HTTP_ROUTE), "the Gateway API")


@pytest.fixture(scope="module")
def exposition() -> Iterator[tuple[Exposition, int]]:
    scorers = Exposition()
    server, port = serve(lambda _: (200, "text/plain; version=0.0.4", scorers.render()))
    yield scorers, port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def scorers(exposition: tuple[Exposition, int]) -> Exposition:
    return exposition[0]


@pytest.fixture(scope="module")
def prometheus(exposition: tuple[Exposition, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from run_prometheus(tmp_path_factory.mktemp("prometheus"), exposition[1])


@pytest.fixture
def stage(cluster: Cluster, namespace: Namespace, settings: Settings, prometheus: str, gateway_api: None) -> Stage:
    """Everything that a Canary refers to."""
    ready = Stage(cluster, namespace, settings, prometheus)
    ready.put_gateway()
    ready.put_dataset()
    return ready


@pytest.fixture
def serving(stage: Stage) -> Stage:
    """A Canary that serves its first model."""
    stage.apply("base")
    stage.drive_phase("Healthy")
    return stage


def score(stage: Stage, scorers: Exposition, stable: int, canary: int) -> None:
    """Lets the scorer of the present rollout find so many errors in an utterance, once it has been started."""
    rollout = stage.status.get("rollout")
    if rollout and stage.cluster.get(JOB, stage.namespace.name, f"voice-score-{rollout['id']}"):
        scorers.put(stage.namespace.name, rollout["id"], (stable, canary))


def test_the_first_model_goes_straight_to_stable(stage: Stage) -> None:
    stage.apply("base")
    stage.step()
    assert {one["type"] for one in stage.status["conditions"]} == {"Ready", "Reconciling", "Stalled"}
    assert stage.route is None, "nothing is routed to pods that are not ready"
    stage.drive_phase("Healthy")
    assert stage.split == (100, 0)
    assert stage.arm("canary") is None
    assert stage.status["stable"]["modelId"] == "base"
    assert stage.status["stable"]["weight"] == 100
    services = {one["metadata"]["name"] for one in stage.cluster.list(SERVICE, stage.namespace.name)}
    assert services == {"voice-stable", "voice-canary"}, "the route resolves while there is no canary"
    assert stage.ready["status"] == "True"


def test_nothing_is_written_at_rest(serving: Stage) -> None:
    serving.step()
    before = serving.versions()
    outcomes = [serving.step() for _ in range(5)]
    assert {one.result for one in outcomes} == {"unchanged"}
    assert serving.versions() == before


def test_a_better_model_is_promoted_step_by_step(serving: Stage, scorers: Exposition) -> None:
    serving.apply("tuned")
    serving.drive(
        lambda: (
            (serving.status.get("stable") or {}).get("modelId") == "tuned"
            and serving.status["phase"] == "Healthy"
            and serving.arm("canary") is None
        ),
        "the promotion",
        each=lambda: score(serving, scorers, 2, 1),
    )
    assert serving.weights == [0, 5, 50, 100, 0]
    entry = serving.status["history"][0]
    assert (entry["outcome"], entry["modelId"], entry["weight"]) == ("Promoted", "tuned", 100)
    assert (entry["stableWer"], entry["canaryWer"]) == ("0.3600", "0.1800")
    serving.drive(lambda: not serving.namespace.jobs("voice"), "the scorer's end")
    events = serving.events
    for reason in ("RolloutStarted", "WeightChanged", "Promoting", "Promoted"):
        assert reason in events
    arm = serving.arm("stable")
    assert arm is not None
    environment = {one["name"]: one.get("value") for one in arm["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment["ATTUNE_MODEL_URI"] == "s3://attune/models/tuned"
    assert environment["ATTUNE_TRACK"] == "stable"
    serving.step()
    before = serving.versions()
    assert {serving.step().result for _ in range(3)} == {"unchanged"}
    assert serving.versions() == before


def test_a_worse_model_is_rolled_back_and_stays_so(serving: Stage, scorers: Exposition) -> None:
    serving.apply("bad")
    serving.drive(
        lambda: serving.status["phase"] == "Degraded" and serving.arm("canary") is None,
        "the rollback",
        each=lambda: score(serving, scorers, 1, 3),
    )
    assert serving.split == (100, 0)
    assert serving.ready["status"] == "False"
    assert serving.ready["reason"] == "WordErrorRateTooHigh"
    assert "canary heard 54 % of words wrong, stable 18 %" in serving.ready["message"]
    assert serving.status["stable"]["modelId"] == "base"
    assert serving.status["history"][0]["outcome"] == "RolledBack"
    assert serving.route is not None
    assert serving.route["metadata"]["annotations"]["attune.dev/failed-rollout"] == serving.status["history"][0]["id"]
    assert "RolledBack" in serving.events
    reached = list(serving.weights)
    # A backup without statuses is restored: the weight still never rises.
    serving.cluster.apply_status(
        {
            "apiVersion": CUSTOM["Canary"].api_version,
            "kind": "Canary",
            "metadata": {"name": "voice", "namespace": serving.namespace.name},
            "status": {"observedGeneration": 0},
        }
    )
    for _ in range(5):
        serving.step()
        serving.play_kubelet()
    assert serving.weights == reached
    assert serving.status["phase"] == "Degraded"
    assert serving.ready["reason"] == "WordErrorRateTooHigh"
    # Back to the model that serves: a quiet end.
    serving.apply("base")
    serving.drive_phase("Healthy")
    assert serving.ready["status"] == "True"


@pytest.mark.parametrize(("canary", "phase", "outcome"), [(1, "Healthy", "Promoted"), (4, "Degraded", "RolledBack")])
def test_an_operator_killed_between_any_two_writes_comes_to_the_same_end(
    serving: Stage, scorers: Exposition, kubeconfig: Path, canary: int, phase: str, outcome: str
) -> None:
    # One write in the first pass, two in the second, and so on up to five: every place between two writes is hit.
    # (An Event that is there already is an attempt as well, so that one a pass would never come to the status.)
    passes = allowed = 0

    def fence() -> None:
        nonlocal allowed
        if allowed == 0:
            raise Killed
        allowed -= 1

    mortal = Cluster.connect(kubeconfig=str(kubeconfig), fence=fence)

    def step() -> None:
        nonlocal passes, allowed
        passes, allowed = passes + 1, 1 + passes % 5
        try:
            serving.step(mortal)
        except Killed:
            return

    serving.apply("tuned")
    serving.drive(
        lambda: (
            bool(serving.status.get("history")) and serving.status["phase"] == phase and serving.arm("canary") is None
        ),
        "the end",
        each=lambda: score(serving, scorers, 2, canary),
        step=step,
        seconds=300,
    )
    assert serving.status["history"][0]["outcome"] == outcome
    assert len(serving.status["history"]) == 1
    assert serving.split == (100, 0)
    serving.drive(lambda: not serving.namespace.jobs("voice"), "the scorer's end", step=step)
    mortal.close()


def test_prometheus_down_holds_the_weight(stage: Stage, scorers: Exposition, prometheus: str) -> None:
    stage.prometheus = "http://127.0.0.1:9"
    stage.apply("base")
    stage.drive_phase("Healthy")
    stage.apply("tuned")
    stage.drive(lambda: stage.weights[-1] == 5, "the first weight")
    stage.drive(
        lambda: stage.status["analysis"]["message"].startswith("Prometheus at http://127.0.0.1:9 did not answer"),
        "what is wrong",
    )
    for _ in range(30):
        stage.step()
    assert stage.weights[-1] == 5
    assert stage.status["analysis"]["verdict"] == "Unknown"
    assert stage.ready["status"] == "Unknown"
    rollout = stage.status["rollout"]["id"]
    # The address is mended in the middle of the rollout, which goes on.
    stage.prometheus = prometheus
    stage.apply("tuned")
    stage.drive(lambda: stage.weights[-1] == 50, "the next weight", each=lambda: score(stage, scorers, 2, 1))
    assert stage.status["rollout"]["id"] == rollout


def test_an_image_that_cannot_be_pulled_is_found_without_waiting_for_words(serving: Stage) -> None:
    serving.waiting["tuned"] = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    serving.apply("tuned")
    serving.drive_phase("Degraded")
    assert serving.ready["reason"] == "ImagePullFailed"
    assert "registry.test/inference:1" in serving.ready["message"]
    assert serving.weights == [0], "no request ever reached it"


def test_a_new_model_in_the_middle_supersedes_the_rollout(serving: Stage, scorers: Exposition) -> None:
    serving.apply("tuned")
    serving.drive(lambda: serving.weights[-1] == 5, "the first weight")
    serving.apply("tuned-more")
    serving.drive(
        lambda: (serving.status.get("canary") or {}).get("modelId") == "tuned-more" and serving.weights[-1] == 5,
        "the next rollout",
    )
    assert serving.weights == [0, 5, 0, 5]
    assert serving.status["history"][0]["outcome"] == "Superseded"
    jobs = {one["metadata"]["name"] for one in serving.namespace.jobs("voice")}
    assert jobs == {f"voice-score-{serving.status['rollout']['id']}"}


def test_the_scorer_is_told_what_to_compare(serving: Stage) -> None:
    serving.apply("tuned")
    serving.drive(lambda: bool(serving.namespace.jobs("voice")), "the scorer")
    (job,) = serving.namespace.jobs("voice")
    config = serving.cluster.get(CONFIG_MAP, serving.namespace.name, job["metadata"]["name"])
    assert config is not None
    recipe = JobSpec.model_validate_json(config["data"]["job.json"]).recipe
    assert recipe.recipe == "score"
    assert recipe.stable_url == f"http://voice-stable.{serving.namespace.name}.svc:8000"
    assert recipe.canary_url == f"http://voice-canary.{serving.namespace.name}.svc:8000"
    assert (recipe.stable_model_id, recipe.canary_model_id) == ("base", "tuned")
    assert recipe.rollout == serving.status["rollout"]["id"]


def test_a_route_edited_by_hand_is_put_right(serving: Stage) -> None:
    assert serving.route is not None
    rule = serving.route["spec"]["rules"][0]
    edited = {**rule, "backendRefs": [{**one, "weight": 50} for one in rule["backendRefs"]]}
    serving.cluster.patch(HTTP_ROUTE, serving.namespace.name, "voice", {"spec": {"rules": [edited]}})
    assert serving.split == (50, 50)
    serving.step()
    assert serving.split == (100, 0)


def test_a_deleted_route_comes_back_as_it_was(serving: Stage, scorers: Exposition) -> None:
    serving.cluster.delete(HTTP_ROUTE, serving.namespace.name, "voice")
    serving.drive(lambda: serving.route is not None, "the route")
    assert serving.split == (100, 0)
    assert serving.status["stable"]["modelId"] == "base"


def test_what_is_no_longer_wanted_is_dropped(stage: Stage) -> None:
    """Also where it was there from the beginning: a digest of the first model would refuse the second one's files."""
    stage.apply("base")
    canary = parse_resource(Canary, stage.canary)
    template = fill_image(canary.spec.template, "registry.test/inference:1")
    first = ArmModel(revision="1" * 10, model_id="one", uri="s3://attune/models/one", digest="sha256:" + "c" * 64)
    second = ArmModel(revision="2" * 10, model_id="two", uri="s3://attune/models/two")
    for model in (first, second):
        action = EnsureArm(Track.STABLE, model, template, 1)
        assert act_canary.ensure_arm(stage.cluster, stage.settings, canary, action)
    arm = stage.arm("stable")
    assert arm is not None
    assert "attune.dev/model-digest" not in arm["metadata"]["annotations"]
    (container,) = arm["spec"]["template"]["spec"]["containers"]
    assert "ATTUNE_MODEL_DIGEST" not in {one["name"] for one in container["env"]}
    record = RolloutRecord("abcdef0123", 1, "2026-11-21T12:00:00Z", "2026-11-21T12:05:00Z", promoting=True)
    for kept in (record, None):
        route = EnsureRoute(100, 0, kept, "test")
        assert act_canary.ensure_route(stage.cluster, stage.settings, canary, route)
    assert stage.route is not None
    assert "attune.dev/rollout" not in stage.route["metadata"]["annotations"]


def test_scaling_reaches_stable_at_once_and_needs_no_rollout(serving: Stage) -> None:
    serving.apply("base", replicas=3)
    serving.drive(
        lambda: serving.status["stable"]["readyReplicas"] == 3 and serving.status["phase"] == "Healthy", "three pods"
    )
    assert serving.status.get("rollout") is None


def test_a_missing_gateway_waits_and_goes_on(
    cluster: Cluster, namespace: Namespace, settings: Settings, gateway_api: None
) -> None:
    stage = Stage(cluster, namespace, settings, "http://127.0.0.1:9")
    stage.apply("base")
    stage.step()
    assert stage.ready["reason"] == "GatewayNotFound"
    assert "create it or correct spec.traffic.gatewayRef" in stage.ready["message"]
    stage.put_gateway()
    stage.drive_phase("Healthy")


def test_a_model_that_does_not_exist_leaves_stable_alone(serving: Stage) -> None:
    serving.apply(model={"fineTuneRef": {"name": "nobody"}})
    serving.step()
    assert serving.ready["reason"] == "FineTuneNotFound"
    assert serving.split == (100, 0)
    assert serving.status["stable"]["modelId"] == "base"
    serving.apply("base")
    serving.drive_phase("Healthy")


def test_a_golden_set_that_can_never_suffice_is_said_before_the_rollout(serving: Stage) -> None:
    serving.put_dataset(words=150)
    serving.apply("tuned")
    serving.step()
    assert serving.ready["reason"] == "GoldenSetTooSmall"
    assert "holds 400 utterances with 150 words" in serving.ready["message"]
    assert serving.arm("canary") is None


def test_somebody_elses_object_is_never_overwritten(stage: Stage) -> None:
    other = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "voice-stable", "namespace": stage.namespace.name},
        "spec": {"ports": [{"port": 80}]},
    }
    stage.cluster.create(other)
    stage.apply("base")
    stage.step()
    assert stage.ready["reason"] == "NotOurs"
    assert "Service voice-stable exists" in stage.ready["message"]
    stage.cluster.delete(SERVICE, stage.namespace.name, "voice-stable")
    stage.drive_phase("Healthy")


def initializing(stage: Stage, scorers: Exposition) -> None:
    stage.waiting["base"] = PULLING
    stage.apply("base")
    stage.drive(lambda: bool(pods_of(stage, "stable")), "a pod of stable")


def starting(stage: Stage, scorers: Exposition) -> None:
    stage.waiting["tuned"] = PULLING
    stage.apply("base")
    stage.drive_phase("Healthy")
    stage.apply("tuned")
    stage.drive(lambda: bool(pods_of(stage, "canary")), "a pod of the canary")


def weighted(stage: Stage, scorers: Exposition) -> None:
    stage.apply("base")
    stage.drive_phase("Healthy")
    stage.apply("tuned")
    stage.drive(lambda: stage.weights[-1] == 5 and bool(stage.namespace.jobs("voice")), "the first weight")


def pausing(stage: Stage, scorers: Exposition) -> None:
    stage.apply("base")
    stage.drive_phase("Healthy")
    stage.apply("tuned", steps=[{"pause": {"seconds": 600}}, {"weight": 100}])
    stage.drive_phase("Paused")


def promoting(stage: Stage, scorers: Exposition) -> None:
    stage.waiting["stable/tuned"] = PULLING
    stage.apply("base", steps=[{"weight": 100}])
    stage.drive_phase("Healthy")
    stage.apply("tuned", steps=[{"weight": 100}])
    stage.drive_phase("Promoting", each=lambda: score(stage, scorers, 2, 1))


def rolled_back(stage: Stage, scorers: Exposition) -> None:
    stage.waiting["tuned"] = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    stage.apply("base")
    stage.drive_phase("Healthy")
    stage.apply("tuned")
    stage.drive_phase("Degraded")


def pods_of(stage: Stage, track: str) -> list[Object]:
    return stage.cluster.list(POD, stage.namespace.name, {LABEL_TRACK: track})


@pytest.mark.parametrize(
    ("bring", "propagation"),
    [
        (initializing, "Background"),
        (starting, "Background"),
        (weighted, "Background"),
        (weighted, "Foreground"),
        (pausing, "Background"),
        (promoting, "Background"),
        (rolled_back, "Background"),
    ],
)
def test_deletion_leaves_nothing(
    stage: Stage,
    scorers: Exposition,
    caplog: pytest.LogCaptureFixture,
    bring: Callable[[Stage, Exposition], None],
    propagation: str,
) -> None:
    bring(stage, scorers)
    uid = stage.canary["metadata"]["uid"]
    assert stage.namespace.children(uid)
    caplog.clear()
    stage.namespace.delete("Canary", "voice", propagation)
    assert stage.step().result == "gone"
    assert stage.namespace.children(uid) == [], "nothing comes back"
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_deletion_in_the_middle_of_a_pass_leaves_nothing(
    stage: Stage, kubeconfig: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the pass makes after that has no owner from the beginning."""
    stage.apply("base")
    uid = stage.canary["metadata"]["uid"]

    def fence() -> None:
        stage.cluster.delete(CUSTOM["Canary"], stage.namespace.name, "voice")

    late = Cluster.connect(kubeconfig=str(kubeconfig), fence=fence)
    assert stage.step(late).error == "Conflict"
    late.close()
    assert stage.step().result == "gone"
    stage.namespace.wait_gone("Canary", "voice", uid)
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_a_promotion_whose_pods_never_start_is_left_for_another_model(serving: Stage, scorers: Exposition) -> None:
    serving.waiting["stable/tuned"] = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    served: list[bool] = []

    def look() -> None:
        score(serving, scorers, 2, 1)
        arms = [serving.arm(track) for track, weight in zip(Track, serving.split, strict=True) if weight]
        served.append(all(arm is not None and arm["status"].get("availableReplicas", 0) > 0 for arm in arms))

    serving.apply("tuned")
    serving.drive(lambda: serving.ready["reason"] == "ImagePullFailed", "the promotion to be stuck", each=look)
    assert serving.status["phase"] == "Promoting"
    assert find_condition(serving.canary, "Stalled")["status"] == "True"
    assert "change spec.model, and stable first goes back to model base" in serving.ready["message"]
    assert serving.split == (0, 100)
    assert "ImagePullFailed" in serving.events
    serving.step()
    assert serving.step().result == "unchanged"
    serving.apply("best")
    serving.drive(
        lambda: (
            (serving.status.get("stable") or {}).get("modelId") == "best"
            and serving.status["phase"] == "Healthy"
            and serving.arm("canary") is None
        ),
        "the promotion of the other model",
        each=look,
    )
    assert serving.weights == [0, 5, 50, 100, 0, 5, 50, 100, 0]
    told = [(one["modelId"], one["outcome"], one["reason"]) for one in serving.status["history"]]
    assert told == [("best", "Promoted", "Promoted"), ("tuned", "RolledBack", "ImagePullFailed")]
    assert all(served)
    arm = serving.arm("stable")
    assert arm is not None
    assert "attune.dev/former" not in arm["metadata"]["annotations"]


def test_a_scorer_that_is_started_anew_reads_what_is_wanted_now(serving: Stage) -> None:
    """Somebody has mended the golden set and deleted the Job that had failed on it."""
    serving.apply("tuned")
    serving.drive(lambda: bool(serving.namespace.jobs("voice")), "the scorer")
    (job,) = serving.namespace.jobs("voice")
    name = job["metadata"]["name"]
    serving.put_dataset(revision="2")
    serving.cluster.delete(JOB, serving.namespace.name, name)

    def again() -> bool:
        return any(one["metadata"]["uid"] != job["metadata"]["uid"] for one in serving.namespace.jobs("voice"))

    serving.drive(again, "another scorer")
    config = serving.cluster.get(CONFIG_MAP, serving.namespace.name, name)
    assert config is not None
    recipe = JobSpec.model_validate_json(config["data"]["job.json"]).recipe
    assert recipe.recipe == "score"
    assert recipe.dataset.uri == "s3://attune/datasets/calls/2"
