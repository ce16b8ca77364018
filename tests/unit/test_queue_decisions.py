"""A Job in one of Kueue's queues: what is said of it, and that its turn is never taken."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from attune.domain.actions import DeleteJob, EmitEvent, EnsureJob, Plan
from attune.domain.jobs import ObservedJob
from attune.domain.kueue import ObservedQueue, ObservedWorkload
from attune.domain.names import is_same_run
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.worlds import (
    KINDS,
    NOW,
    TERMINAL,
    Observed,
    condition,
    decide,
    enact,
    finished,
    observe,
    pod,
    settle,
    wanted_name,
)

PENDING = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu, 1 more needed"
PREEMPTED = "Preempted to accommodate a workload (UID: 1) due to prioritization in the ClusterQueue"


def queued(kind: str, **fields: Any) -> Observed:
    """A resource in queue speech whose Job is there, in this state."""
    settled = settle(observe(kind, queueName="speech"))
    return replace(settled, jobs=(replace(settled.jobs[0], **fields),))  # type: ignore[arg-type,return-value]


def waiting(kind: str, **workload: Any) -> Observed:
    return queued(kind, queue=ObservedQueue("speech", workload=ObservedWorkload(name="job-1", **workload)))


def with_spec(observed: Observed, **fields: Any) -> Observed:
    spec = observed.resource.spec.model_copy(update=fields)
    return replace(observed, resource=observed.resource.model_copy(update={"spec": spec}))  # type: ignore[arg-type,return-value]


def changes(plan: Plan) -> list[EnsureJob | DeleteJob]:
    return [one for one in plan.actions if isinstance(one, EnsureJob | DeleteJob)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("queue", "reason", "warns", "says"),
    [
        pytest.param(ObservedQueue("speech"), "Queued", False, "not taken it up", id="a new Job waits for Kueue"),
        pytest.param(
            ObservedQueue("speech", served=False),
            "QueueNotServed",
            True,
            "Kueue is not installed in this cluster",
            id="without Kueue the reason is that there is none",
        ),
        pytest.param(
            ObservedQueue("speech", exists=False),
            "QueueNotFound",
            True,
            "no LocalQueue speech in this namespace",
            id="a queue that is not there is named",
        ),
        pytest.param(
            ObservedQueue("speech", readable=False),
            "Queued",
            False,
            "kubectl get workloads",
            id="what may not be read is left to who may",
        ),
        pytest.param(
            ObservedQueue("speech", workload=ObservedWorkload("job-1", waiting=PENDING)),
            "Queued",
            False,
            "1 more needed",
            id="Kueue's own words say what is missing",
        ),
        pytest.param(
            ObservedQueue(
                "speech",
                workload=ObservedWorkload(
                    "job-1", waiting=PENDING, evicted_reason="Preempted", evicted_message=PREEMPTED
                ),
            ),
            "Preempted",
            False,
            "waits in queue speech again: couldn't",
            id="who was preempted waits again",
        ),
        pytest.param(
            ObservedQueue(
                "speech",
                workload=ObservedWorkload("job-1", evicted_reason="ClusterQueueStopped", evicted_message="stopped"),
            ),
            "Evicted",
            False,
            "stopped; Job",
            id="an eviction for another reason is one",
        ),
        pytest.param(
            ObservedQueue(
                "speech",
                workload=ObservedWorkload(
                    "job-1", active=False, evicted_reason="Deactivated", evicted_message="by an administrator"
                ),
            ),
            "Deactivated",
            True,
            "until spec.active of Workload job-1 is true",
            id="what an administrator holds back says who can let it go",
        ),
    ],
)
def test_a_job_that_waits_says_what_for(
    kind: str,
    queue: ObservedQueue,
    reason: str,
    warns: bool,  # noqa: FBT001 (a column of the table)
    says: str,
) -> None:
    plan = decide(queued(kind, queue=queue))
    state, found, message = condition(plan.status, TERMINAL[kind])
    assert found == reason
    assert says in message
    assert state == ("False" if kind == "Dataset" else "Unknown")
    assert plan.status.phase == "Queued"
    assert condition(plan.status, "Reconciling")[0] == "True"
    assert changes(plan) == []
    # Kueue's reasons change without the Job's; nobody tells of it.
    assert plan.look_again_seconds is not None
    assert {one.type for one in plan.actions if isinstance(one, EmitEvent)} <= {"Warning" if warns else "Normal"}


@pytest.mark.parametrize("kind", KINDS)
def test_admission_preemption_and_the_next_admission_are_each_announced_once(kind: str) -> None:
    running = pod(phase="Running")
    story: list[dict[str, Any]] = [
        {"queue": ObservedQueue("speech", workload=ObservedWorkload("job-1", waiting=PENDING))},
        {"suspended": False},
        {"suspended": False, "pods": (running,)},
        {"queue": ObservedQueue("speech", workload=ObservedWorkload("job-1", evicted_reason="Preempted"))},
        {"suspended": False},
        {"suspended": False, "pods": (running,)},
    ]
    world = observe(kind, queueName="speech")
    said = []
    for _ in range(3):  # the Datasets' revisions first, then the Job
        plan = decide(world)
        said += [one.reason for one in plan.actions if isinstance(one, EmitEvent)]
        world = enact(world, plan)
    waiting = world.jobs[0]
    assert waiting.suspended
    for fields in story:
        world = replace(world, jobs=(replace(waiting, **fields),))  # type: ignore[arg-type]
        plan = decide(world)
        assert changes(plan) == []
        said += [one.reason for one in plan.actions if isinstance(one, EmitEvent)]
        world = enact(world, plan)
        assert decide(world).actions == ()
    works = {"Dataset": "Preparing", "FineTune": "Training", "Evaluation": "Evaluating"}[kind]
    assert [one for one in said if one != "DatasetsFixed"] == [
        "Queued", "Admitted", works, "Preempted", "Admitted", works,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_suspending_takes_the_job_out_of_its_queue_and_resuming_queues_it_anew(kind: str) -> None:
    running = queued(kind, suspended=False, pods=(pod(phase="Running"),))
    name = running.jobs[0].name
    plan = decide(with_spec(running, suspend=True))
    # A later pod is not to train beside one that still saves its checkpoint.
    assert changes(plan) == [DeleteJob(name, pods_first=True)]
    assert condition(plan.status, TERMINAL[kind])[1] == "Suspended"
    leaving = with_spec(queued(kind, deleting=True), suspend=False)
    assert changes(decide(leaving)) == []
    assert decide(leaving).look_again_seconds is not None
    (again,) = changes(decide(replace(leaving, jobs=())))  # type: ignore[arg-type]
    assert isinstance(again, EnsureJob)
    assert again.name == name
    assert again.queue == "speech"


@pytest.mark.parametrize("kind", KINDS)
def test_suspending_what_has_ended_takes_its_result(kind: str) -> None:
    ended = queued(kind)
    done = finished(ended.jobs[0].name, kind)
    ended = replace(ended, jobs=(replace(done, queue=ObservedQueue("speech")),))  # type: ignore[arg-type]
    assert condition(decide(with_spec(ended, suspend=True)).status, TERMINAL[kind])[0] == "True"


@pytest.mark.parametrize("kind", KINDS)
def test_another_queue_or_priority_is_a_new_job_of_the_same_run(kind: str) -> None:
    names = [
        wanted_name(kind),
        wanted_name(kind, queueName="speech"),
        wanted_name(kind, queueName="batch"),
        wanted_name(kind, queueName="speech", workloadPriorityClassName="high"),
        wanted_name(kind, priorityClassName="speech"),
    ]
    assert len(set(names)) == len(names)
    assert all(is_same_run(names[0], other) for other in names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_that_is_placed_anew_waits_for_the_pod_of_the_old_one(kind: str) -> None:
    old = queued(kind, suspended=False, pods=(pod(phase="Running"),))
    moved = with_spec(old, queue_name="batch")
    assert changes(decide(moved)) == [DeleteJob(old.jobs[0].name, pods_first=True)]
    leaving = replace(moved, jobs=(replace(old.jobs[0], deleting=True),))  # type: ignore[arg-type]
    assert changes(decide(leaving)) == []
    assert decide(leaving).look_again_seconds is not None
    (new,) = changes(decide(replace(moved, jobs=())))  # type: ignore[arg-type]
    assert isinstance(new, EnsureJob)
    assert new.queue == "batch"
    # One that has failed holds nothing up.
    failed = replace(old.jobs[0], failed=True, pods=(pod(phase="Failed", exit_code=13),))
    kinds = [type(one) for one in changes(decide(replace(moved, jobs=(failed,))))]  # type: ignore[arg-type]
    assert kinds == [DeleteJob, EnsureJob]


@settings(deadline=None)  # machines differ
@given(
    kind=st.sampled_from(KINDS),
    suspended=st.booleans(),
    config_present=st.booleans(),
    named_by_us=st.booleans(),
    workload=st.sampled_from([None, ObservedWorkload("w"), ObservedWorkload("w", active=False)]),
    pods=st.sampled_from([(), (pod(phase="Running"),), (pod(),)]),
)
def test_a_job_that_runs_or_waits_is_never_told_to_do_the_other(
    kind: str,
    suspended: bool,  # noqa: FBT001 (drawn)
    config_present: bool,  # noqa: FBT001 (drawn)
    named_by_us: bool,  # noqa: FBT001 (drawn)
    workload: ObservedWorkload | None,
    pods: tuple[Any, ...],
) -> None:
    world = settle(observe(kind, **({"queueName": "speech"} if named_by_us else {})))
    queue = ObservedQueue("speech", workload=workload)
    job = replace(world.jobs[0], suspended=suspended, config_present=config_present, queue=queue, pods=pods)
    plan = decide(replace(world, jobs=(job,)))  # type: ignore[arg-type]
    # EnsureJob puts job.json back; reconcile.ensure leaves spec.suspend of such a Job alone.
    assert [type(one) for one in changes(plan)] == ([] if config_present else [EnsureJob])


def test_job_of_a_finished_run_goes_when_its_time_is_up_and_its_model_stays() -> None:
    done = settle(replace(settle(observe("FineTune")), jobs=(finished(wanted_name("FineTune"), "FineTune"),)))  # type: ignore[arg-type]
    timed = with_spec(done, ttl_seconds_after_finished=60)
    early = decide(replace(timed, now=NOW + timedelta(seconds=20)))  # type: ignore[arg-type]
    assert early.actions == ()
    assert early.look_again_seconds == 40
    late = replace(timed, now=NOW + timedelta(seconds=60))  # type: ignore[arg-type]
    assert decide(late).actions == (DeleteJob(done.jobs[0].name),)
    gone = enact(late, decide(late))  # type: ignore[arg-type]
    assert decide(gone).actions == ()
    assert gone.resource.status == done.resource.status
    assert decide(done).look_again_seconds is None


def test_result_that_nobody_has_read_yet_and_failure_outlive_their_time() -> None:
    world = settle(observe("FineTune", ttlSecondsAfterFinished=0))
    unread = replace(world, jobs=(finished(world.jobs[0].name, "FineTune"),))  # type: ignore[arg-type]
    assert changes(decide(unread)) == []
    failed = ObservedJob(
        world.jobs[0].name, failed=True, finished=NOW - timedelta(days=1), pods=(pod(phase="Failed", exit_code=10),)
    )
    assert changes(decide(replace(world, jobs=(failed,)))) == []  # type: ignore[arg-type]
