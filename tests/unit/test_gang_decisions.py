"""What the pods of one Job mean that train together: they are one piece of work, whichever of them has trouble."""

from dataclasses import replace
from typing import Any

import pytest
from attune.contract.exitcode import Disposition, ExitCode
from attune.contract.result import Failure, Summary
from attune.domain.actions import DeleteJob, EnsureJob
from attune.domain.finetune import ObservedFineTune, decide_finetune
from attune.domain.jobs import ObservedJob, ObservedPod
from attune.domain.kueue import ObservedQueue

from tests.reconcile.samples import TRAINED
from tests.unit.worlds import NOW, condition, observe, pod, settle

PODS = {"nodes": 2, "deepspeed": {"zeroStage": 2}}
EARLIER, LATER = "2026-11-21T11:58:00Z", "2026-11-21T11:59:00Z"


def world(*pods: ObservedPod, **fields: Any) -> ObservedFineTune:
    """A FineTune of two pods whose Job is there, in this state."""
    made = settle(observe("FineTune", distributed=PODS))
    assert isinstance(made, ObservedFineTune)
    return replace(made, jobs=(replace(made.jobs[0], pods=pods, **fields),))


def member(index: int, **fields: Any) -> ObservedPod:
    return pod(name=f"lora-{index}", index=index, **fields)


def ended(index: int, code: ExitCode | int, reason: str, **fields: Any) -> ObservedPod:
    message = Summary(failure=Failure(reason=reason, message=f"pod {index} says {reason}")).to_message()
    return member(index, phase="Failed", exit_code=int(code), termination_message=message, **fields)


RUNS = {"phase": "Running", "ip": "10.0.0.1"}


@pytest.mark.parametrize(
    ("pods", "reason", "says"),
    [
        pytest.param((), "Starting", "its 2 pods start", id="no pod yet"),
        pytest.param((member(0, **RUNS),), "Starting", "wait for each other", id="one pod is not all"),
        pytest.param((member(0, **RUNS), member(1)), "Starting", "", id="the other one is on its way"),
        pytest.param((member(0, **RUNS), member(1, **RUNS)), "Training", "", id="all run"),
        pytest.param(
            (member(0, **RUNS), member(1, phase="Succeeded", exit_code=0)), "Training", "", id="one is done already"
        ),
        pytest.param(
            (member(0, **RUNS), member(1, unschedulable="0/2 nodes: 2 Insufficient nvidia.com/gpu")),
            "Unschedulable",
            "Insufficient nvidia.com/gpu",
            id="what holds one back holds all back",
        ),
        pytest.param(
            (
                ended(0, ExitCode.PEER_LOST, "PeerLost", created=LATER),
                ended(1, ExitCode.STORE_UNAVAILABLE, "StoreUnavailable", created=EARLIER),
            ),
            "Retrying",
            "pod 1 says StoreUnavailable; all 2 pods go back to the last checkpoint",
            id="the one that ended first gives the reason, and not the one that lost it",
        ),
        pytest.param(
            (member(0, **RUNS), ended(1, ExitCode.INTERNAL_ERROR, "InternalError")),
            "Retrying",
            "pod 1 says InternalError",
            id="the other one has not noticed yet",
        ),
        pytest.param(
            (
                ended(0, ExitCode.PEER_LOST, "PeerLost"),
                member(1, phase="Failed", exit_code=137, disrupted=True),
            ),
            "Retrying",
            "its pod was evicted; all 2 pods",
            id="one was evicted and had no time",
        ),
        pytest.param(
            (
                ended(0, ExitCode.TERMINATED, "Terminated"),
                ended(1, ExitCode.TERMINATED, "Terminated", disrupted=True),
            ),
            "Retrying",
            "its pod was evicted; all 2 pods",
            id="one was evicted and both have saved a checkpoint",
        ),
        pytest.param(
            (
                ended(0, ExitCode.PEER_LOST, "PeerLost", created=EARLIER),
                ended(1, ExitCode.INTERNAL_ERROR, "InternalError", created=EARLIER),
                member(0, **RUNS, created=LATER),
                member(1, **RUNS, created=LATER),
            ),
            "Training",
            "",
            id="what earlier pods ended with is over",
        ),
        pytest.param(
            (
                ended(0, ExitCode.INTERNAL_ERROR, "InternalError", created=EARLIER),
                ended(1, ExitCode.PEER_LOST, "PeerLost", created=EARLIER),
                ended(0, ExitCode.PEER_LOST, "PeerLost", created=LATER),
                ended(1, ExitCode.STORE_UNAVAILABLE, "StoreUnavailable", created=LATER),
            ),
            "Retrying",
            "pod 1 says StoreUnavailable",
            id="and so is their reason",
        ),
    ],
)
def test_state_of_the_pods_becomes_a_reason(pods: tuple[ObservedPod, ...], reason: str, says: str) -> None:
    status = decide_finetune(world(*pods)).status
    _, found, message = condition(status, "Succeeded")
    assert found == reason
    assert says in message
    assert condition(status, "Stalled")[0] == "False"


def test_a_job_that_gets_only_some_of_its_pods_says_why_though_the_others_run() -> None:
    plan = decide_finetune(world(member(0, **RUNS), refusal="exceeded quota: speech"))
    assert condition(plan.status, "Succeeded")[1] == "PodNotCreated"
    assert "gets not all of its 2 pods: exceeded quota" in condition(plan.status, "Succeeded")[2]
    # Nothing of the Job's own changes when the next one is refused.
    assert decide_finetune(world(member(0, **RUNS))).look_again_seconds == 5


def test_a_failed_job_gives_the_reason_of_the_pod_that_ended_it() -> None:
    pods = (
        ended(0, ExitCode.PEER_LOST, "PeerLost", created=LATER),
        ended(1, ExitCode.OUT_OF_MEMORY, "OutOfMemory", created=EARLIER),
    )
    plan = decide_finetune(world(*pods, failed=True, failed_reason="PodFailurePolicy", finished=NOW))
    assert condition(plan.status, "Succeeded") == ("False", "OutOfMemory", "pod 1 says OutOfMemory")
    assert condition(plan.status, "Stalled")[0] == "True"
    assert not [one for one in plan.actions if isinstance(one, DeleteJob)]


def test_a_node_that_went_down_under_one_pod_costs_nobody_a_retry() -> None:
    lost = member(1, phase="Failed", exit_code=137, terminated_reason="ContainerStatusUnknown")
    plan = decide_finetune(world(member(0, **RUNS), lost, failed=True, finished=NOW))
    assert condition(plan.status, "Succeeded")[1] == "Retrying"
    assert [one for one in plan.actions if isinstance(one, DeleteJob)]


def test_pods_that_never_all_came_are_tried_again_later() -> None:
    waited = ended(0, ExitCode.GANG_INCOMPLETE, "GangIncomplete")
    plan = decide_finetune(world(waited, failed=True, failed_reason="BackoffLimitExceeded", finished=NOW))
    assert condition(plan.status, "Succeeded")[1] == "GangIncomplete"
    assert "tried again every 5 min" in condition(plan.status, "Succeeded")[2]
    assert plan.look_again_seconds == 300


def test_the_first_pod_is_the_one_that_says_how_far_all_are() -> None:
    first, second = member(0, **RUNS), member(1, phase="Running", ip="10.0.0.2")
    assert ObservedJob("lora", pods=(second, first)).running_pod == first
    assert ObservedJob("lora", pods=(second,)).running_pod is None


def test_result_of_any_pod_is_the_result() -> None:
    message = Summary(result=TRAINED).to_message()
    done = tuple(member(index, phase="Succeeded", exit_code=0, termination_message=message) for index in (1, 0))
    settled = settle(world(*done, complete=True, finished=NOW))
    assert condition(settled.resource.status, "Succeeded")[1] == "Trained"


def test_a_queue_gets_one_job_of_all_pods() -> None:
    made = settle(observe("FineTune", distributed=PODS, queueName="speech"))
    assert [(one.queue, one.suspended) for one in made.jobs] == [(ObservedQueue("speech"), True)]
    admitted = replace(made, jobs=(replace(made.jobs[0], suspended=False),))  # type: ignore[arg-type]
    assert isinstance(admitted, ObservedFineTune)
    _, reason, message = condition(decide_finetune(admitted).status, "Succeeded")
    assert reason == "Admitted"
    assert message.endswith("its 2 pods start, and wait for each other")


def test_suspension_of_a_queued_run_frees_all_its_pods_at_once() -> None:
    made = settle(observe("FineTune", distributed=PODS, queueName="speech"))
    assert isinstance(made, ObservedFineTune)
    spec = made.resource.spec.model_copy(update={"suspend": True})
    held = replace(made, resource=made.resource.model_copy(update={"spec": spec}))
    (deletion,) = [one for one in decide_finetune(held).actions if isinstance(one, DeleteJob)]
    assert deletion.pods_first


def test_a_lost_service_is_put_back() -> None:
    plan = decide_finetune(world(member(0, **RUNS), member(1, **RUNS), config_present=False))
    (again,) = [one for one in plan.actions if isinstance(one, EnsureJob)]
    assert again.nodes == 2


def test_of_all_pods_that_end_together_one_costs_a_retry() -> None:
    assert {code for code in ExitCode if code.disposition is Disposition.FREE} == {
        ExitCode.PEER_LOST,
        ExitCode.TERMINATED,
    }
    assert ExitCode.GANG_INCOMPLETE.disposition is Disposition.RETRY
