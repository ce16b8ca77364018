"""What a Job and its pods mean for the resource that they work for."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from attune.contract.exitcode import ExitCode
from attune.contract.result import Failure, Progress, Summary
from attune.domain.actions import DeleteJob, EmitEvent, EnsureJob
from attune.domain.dataset import ObservedDataset, decide_dataset
from attune.domain.evaluation import ObservedEvaluation, decide_evaluation
from attune.domain.finetune import ObservedDatasetRef, ObservedFineTune, build_model_id, decide_finetune
from attune.domain.jobs import ObservedJob, ObservedPod, describe_availability
from attune.domain.kueue import ObservedQueue
from attune.domain.names import build_job_name, fingerprint, is_same_run
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reconcile.samples import EVALUATED, TRAINED
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


def with_job(kind: str, **fields: Any) -> Observed:
    """A resource whose Job is there, in this state."""
    settled = settle(observe(kind))
    return replace(settled, jobs=(replace(settled.jobs[0], **fields),))  # type: ignore[arg-type,return-value]


def failure(code: int, reason: str = "TooSmallToSplit", **fields: Any) -> dict[str, Any]:
    message = Summary(failure=Failure(reason=reason, message="add speakers")).to_message()
    ended = pod(phase="Failed", exit_code=code, termination_message=message)
    return {"failed": True, "finished": NOW, "failed_reason": "PodFailurePolicy", "pods": (ended,), **fields}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fields", "reason", "stalled", "says"),
    [
        pytest.param({}, "Starting", False, "its pod starts", id="a Job without a pod is starting"),
        pytest.param({"suspended": True}, "Starting", False, "", id="a Job that is to go on is starting"),
        pytest.param(
            {"pods": (pod(waiting_reason="ContainerCreating"),)}, "Starting", False, "", id="a new pod is starting"
        ),
        pytest.param(
            {"pods": (pod(unschedulable="0/1 nodes are available: 1 Insufficient cpu."),)},
            "Unschedulable",
            False,
            "Insufficient cpu",
            id="a pod that fits no node passes the scheduler's words on",
        ),
        pytest.param(
            {"pods": (pod(unschedulable='0/1 nodes are available: persistentvolumeclaim "calls" not found.'),)},
            "ClaimNotFound",
            False,
            "PersistentVolumeClaim calls does not exist",
            id="a missing volume is named, and waited for",
        ),
        pytest.param(
            {"pods": (pod(waiting_reason="CreateContainerConfigError", waiting_message='secret "late" not found'),)},
            "SecretNotFound",
            False,
            "Secret late (a source's",
            id="a missing Secret is named, and waited for",
        ),
        pytest.param(
            {"pods": (pod(waiting_reason="CreateContainerConfigError", waiting_message="no such key"),)},
            "ContainerConfigError",
            False,
            "no such key",
            id="another trouble with the container passes the kubelet's words on",
        ),
        pytest.param(
            {"pods": (pod(image="r/t:1", waiting_reason="ErrImagePull", waiting_message="flips"),)},
            "ImagePullFailed",
            False,
            "r/t:1",
            id="an image that cannot be pulled is named",
        ),
        pytest.param(
            {"pods": (pod(phase="Failed", exit_code=30),)},
            "Retrying",
            False,
            "StoreUnavailable",
            id="a failed pod that is tried again says why it failed",
        ),
        pytest.param(
            {"pods": (pod(phase="Failed", exit_code=143, disrupted=True),)},
            "Retrying",
            False,
            "evicted",
            id="an evicted pod is replaced",
        ),
        pytest.param(failure(10), "TooSmallToSplit", True, "add speakers", id="a recipe's own words are passed on"),
        pytest.param(
            {"failed": True, "pods": (pod(phase="Failed", exit_code=14, termination_message="{"),)},
            "UnsupportedModel",
            True,
            "code 14",
            id="an unreadable message leaves the exit code to speak",
        ),
        pytest.param(
            {"failed": True, "pods": (pod(phase="Failed", exit_code=137, terminated_reason="OOMKilled"),)},
            "OutOfMemory",
            True,
            "spec.resources.limits.memory",
            id="a pod killed for its memory says what to raise",
        ),
        pytest.param(
            {"failed": True, "failed_reason": "BackoffLimitExceeded", "failed_message": "too often"},
            "BackoffLimitExceeded",
            True,
            "too often",
            id="a failed Job without pods leaves its own condition to speak",
        ),
        pytest.param(
            {"complete": True, "pods": (pod(phase="Succeeded", exit_code=0, termination_message="?"),)},
            "ResultUnreadable",
            True,
            "one release",
            id="a result that cannot be understood is no result",
        ),
        pytest.param(
            {"complete": True, "pods": (pod(phase="Succeeded", exit_code=0),)},
            "ResultUnreadable",
            True,
            "one release",
            id="a pod that ended well and said nothing would say nothing the next time either",
        ),
        pytest.param({"complete": True}, "ResultLost", False, "runs again", id="a result that was lost is asked for"),
        pytest.param(
            {"refusal": 'pods "x" is forbidden: exceeded quota: speech'},
            "PodNotCreated",
            False,
            "exceeded quota: speech",
            id="a Job that gets no pod passes the API server's words on",
        ),
        pytest.param(
            {"suspended": True, "suspended_by": "kueue"},
            "SuspendedByOthers",
            False,
            "suspended by kueue",
            id="a Job that somebody else has suspended is not ours to resume",
        ),
    ],
)
def test_state_of_a_job_becomes_a_reason(
    kind: str,
    fields: dict[str, Any],
    reason: str,
    stalled: bool,  # noqa: FBT001 (a column of the table)
    says: str,
) -> None:
    status = decide(with_job(kind, **fields)).status
    state, found, message = condition(status, TERMINAL[kind])
    assert found == reason
    assert says in message
    assert state == ("False" if stalled or kind == "Dataset" else "Unknown")
    assert condition(status, "Stalled")[0] == str(stalled)
    assert condition(status, "Reconciling")[0] == str(not stalled)


@pytest.mark.parametrize("kind", KINDS)
def test_a_container_that_a_crash_of_its_node_has_swallowed_is_nobodys_fault(kind: str) -> None:
    """The kubelet says 137 as for one that was killed for its memory; only the reason differs."""
    lost = pod(phase="Failed", exit_code=137, terminated_reason="ContainerStatusUnknown")
    ended: dict[str, Any] = {"failed": True, "failed_reason": "PodFailurePolicy", "finished": NOW}
    nothing: dict[str, Any] = {}
    for fields in (nothing, ended):
        plan = decide(with_job(kind, pods=(lost,), **fields))
        _, reason, message = condition(plan.status, TERMINAL[kind])
        assert reason == "Retrying"
        assert "the node of pod pod went down" in message
        assert condition(plan.status, "Stalled")[0] == "False"
        again = [one for one in plan.actions if isinstance(one, DeleteJob)]
        assert len(again) == bool(fields)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "working",
    [
        pytest.param(pod(phase="Running", ip="10.0.0.1"), id="its container runs"),
        pytest.param(pod(phase="Running", exit_code=0), id="its container has ended, the pod has not"),
        pytest.param(pod(phase="Succeeded", exit_code=0), id="the pod has ended, the Job has not"),
    ],
)
def test_running_pod_shows_as_work(kind: str, working: ObservedPod) -> None:
    status = decide(with_job(kind, pods=(working,))).status
    assert (
        condition(status, TERMINAL[kind])[1]
        == {
            "Dataset": "Preparing",
            "FineTune": "Training",
            "Evaluation": "Evaluating",
        }[kind]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_result_settles_and_outlives_its_job(kind: str) -> None:
    name = wanted_name(kind)
    settled = settle(replace(settle(observe(kind)), jobs=(finished(name, kind),)))  # type: ignore[arg-type]
    state, _, _ = condition(settled.resource.status, TERMINAL[kind])
    assert state == "True"
    assert condition(settled.resource.status, "Reconciling")[0] == "False"
    gone = replace(settled, jobs=())  # type: ignore[arg-type]
    plan = decide(gone)
    assert plan.actions == ()
    assert plan.status == settled.resource.status


@pytest.mark.parametrize("kind", KINDS)
def test_suspended_from_the_start_creates_nothing(kind: str) -> None:
    settled = settle(observe(kind, suspend=True))
    assert settled.jobs == ()
    assert condition(settled.resource.status, TERMINAL[kind])[1] == "Suspended"
    assert settled.resource.status.phase == "Suspended"


@pytest.mark.parametrize("kind", KINDS)
def test_suspend_and_resume_keep_the_job(kind: str) -> None:
    running = settle(observe(kind))
    spec = running.resource.spec.model_copy(update={"suspend": True})
    held = settle(replace(running, resource=running.resource.model_copy(update={"spec": spec})))  # type: ignore[arg-type]
    assert [one.name for one in held.jobs] == [one.name for one in running.jobs]
    assert held.jobs[0].suspended
    assert condition(held.resource.status, TERMINAL[kind])[1] == "Suspended"


@pytest.mark.parametrize("code", [ExitCode.ACCESS_DENIED, ExitCode.NOT_FOUND, ExitCode.STORE_UNAVAILABLE])
def test_what_the_store_may_answer_otherwise_is_tried_again_later(code: ExitCode) -> None:
    waiting = decide(with_job("Dataset", **failure(code, "BucketNotFound")))
    assert not [one for one in waiting.actions if isinstance(one, DeleteJob)]
    assert waiting.look_again_seconds == 300
    assert "every 5 min" in condition(waiting.status, "Ready")[2]
    late = NOW - timedelta(seconds=301)
    due = decide(with_job("Dataset", **failure(code, "BucketNotFound", finished=late)))
    assert [type(one) for one in due.actions if not isinstance(one, EmitEvent)] == [DeleteJob]


def test_findings_about_the_input_are_not_tried_again() -> None:
    plan = decide(with_job("Dataset", **failure(10, finished=NOW - timedelta(days=1))))
    assert not [one for one in plan.actions if isinstance(one, DeleteJob)]
    assert plan.look_again_seconds is None


def test_missing_job_file_is_put_back() -> None:
    plan = decide(with_job("Dataset", config_present=False))
    assert [type(one) for one in plan.actions] == [EnsureJob]


def test_spec_change_replaces_the_job_and_keeps_the_revision() -> None:
    settled = settle(replace(settle(observe("Dataset")), jobs=(finished(wanted_name("Dataset"), "Dataset"),)))  # type: ignore[arg-type]
    assert isinstance(settled, ObservedDataset)
    spec = settled.resource.spec.model_copy(update={"language": "de"})
    plan = decide_dataset(replace(settled, resource=settled.resource.model_copy(update={"spec": spec})))
    kinds = [type(one) for one in plan.actions]
    assert kinds == [DeleteJob, EnsureJob, EmitEvent]
    assert plan.status.revision == settled.resource.status.revision  # type: ignore[attr-defined]
    # And back again, before the new revision is there: the old one is what is wanted, nothing has to run.
    moved = enact(replace(settled, resource=settled.resource.model_copy(update={"spec": spec})), plan)
    back = replace(moved, resource=moved.resource.model_copy(update={"spec": settled.resource.spec}))  # type: ignore[arg-type]
    assert condition(settle(back).resource.status, "Ready")[0] == "True"
    assert settle(back).jobs == ()


def test_more_memory_is_a_new_job_of_the_same_run() -> None:
    name = wanted_name("FineTune")
    roomier = wanted_name("FineTune", resources={"limits": {"memory": "4Gi"}})
    other = wanted_name("FineTune", lora={"rank": 8})
    assert name != roomier
    assert is_same_run(name, roomier)
    assert not is_same_run(name, other)
    # A finished run is not run again because its next one would get more memory.
    done = settle(replace(settle(observe("FineTune")), jobs=(finished(name, "FineTune"),)))  # type: ignore[arg-type]
    spec = observe("FineTune", resources={"limits": {"memory": "4Gi"}}).resource.spec
    assert decide(replace(done, resource=done.resource.model_copy(update={"spec": spec}))).actions == ()  # type: ignore[arg-type]


def test_a_run_of_all_weights_has_a_model_and_no_adapter() -> None:
    result = TRAINED.model_copy(update={"adapter_uri": None, "adapter_digest": None})
    message = Summary(result=result).to_message()
    ended = replace(
        finished(wanted_name("FineTune", method="Full"), "FineTune"),
        pods=(pod(phase="Succeeded", exit_code=0, termination_message=message),),
    )
    done = settle(replace(settle(observe("FineTune", method="Full")), jobs=(ended,)))  # type: ignore[arg-type]
    assert condition(done.resource.status, "Succeeded")[0] == "True"
    status = done.resource.status.model_dump(by_alias=True, exclude_none=True)
    assert status["model"] == {
        "uri": TRAINED.model_uri,
        "digest": TRAINED.model_digest,
        "padding": TRAINED.padding,
    }


def test_revision_is_stored_before_the_run_begins() -> None:
    first = observe("FineTune")
    plan = decide(first)
    assert not [one for one in plan.actions if isinstance(one, EnsureJob)]
    assert plan.look_again_seconds == 0
    stored = enact(first, plan)
    assert isinstance(stored, ObservedFineTune)
    moved = replace(stored, datasets=(ObservedDatasetRef("calls", "NotFound"),))
    assert [type(one) for one in decide_finetune(moved).actions] == [EnsureJob, EmitEvent]


def test_evaluation_follows_its_inputs_and_keeps_a_verdict_while_they_are_away() -> None:
    done = settle(replace(settle(observe("Evaluation")), jobs=(finished(wanted_name("Evaluation"), "Evaluation"),)))  # type: ignore[arg-type]
    assert isinstance(done, ObservedEvaluation)
    away = decide_evaluation(replace(done, dataset=ObservedDatasetRef("calls", "NotReady")))
    assert away.actions == ()
    assert condition(away.status, "Succeeded")[0] == "True"
    newer = replace(done, dataset=ObservedDatasetRef("calls", "Ready", "sha256:" + "b" * 64, "s3://attune/b"))
    assert [type(one) for one in decide_evaluation(newer).actions] == [DeleteJob, EnsureJob, EmitEvent]


def test_all_that_an_evaluation_has_found_is_in_its_status() -> None:
    done = settle(replace(settle(observe("Evaluation")), jobs=(finished(wanted_name("Evaluation"), "Evaluation"),)))  # type: ignore[arg-type]
    assert isinstance(done, ObservedEvaluation)
    status = done.resource.status.model_dump()
    for name in ("leaderboard", "gaps", "failed", "verdict", "normaliser", "winner"):
        assert status[name] == EVALUATED.model_dump()[name]


def test_verdict_on_an_earlier_spec_is_none_on_one_whose_inputs_are_missing() -> None:
    done = settle(replace(settle(observe("Evaluation")), jobs=(finished(wanted_name("Evaluation"), "Evaluation"),)))  # type: ignore[arg-type]
    assert isinstance(done, ObservedEvaluation)
    metadata = done.resource.metadata.model_copy(update={"generation": 2})
    changed = replace(
        done,
        resource=done.resource.model_copy(update={"metadata": metadata}),
        dataset=ObservedDatasetRef("another", "NotFound"),
    )
    # However often it is looked at: what the first pass has written is no verdict either.
    for world in (changed, enact(changed, decide(changed)), settle(changed)):
        assert condition(decide(world).status, "Succeeded")[:2] == ("False", "DatasetNotFound")


def test_progress_is_taken_over_when_it_says_something_new_and_not_too_often() -> None:
    running = with_job("FineTune", pods=(pod(phase="Running", ip="10.0.0.1"),))
    assert isinstance(running, ObservedFineTune)
    told = Progress(stage="Training", percent=10, step=1, total_steps=10)
    first = enact(running, decide_finetune(replace(running, progress=told)))
    assert isinstance(first, ObservedFineTune)
    later = replace(first, progress=told, now=NOW + timedelta(seconds=60))
    assert decide_finetune(later).status == first.resource.status
    further = told.model_copy(update={"percent": 20})
    soon = replace(first, progress=further, now=NOW + timedelta(seconds=9))
    assert decide_finetune(soon).status == first.resource.status
    due = decide_finetune(replace(first, progress=further, now=NOW + timedelta(seconds=10))).status
    assert due.progress.percent == 20  # type: ignore[attr-defined]
    assert due.progress.last_updated_time == "2026-11-21T12:00:10Z"  # type: ignore[attr-defined]


def test_events_tell_transitions_and_nothing_else() -> None:
    first = observe("Dataset")
    plan = decide(first)
    said = [one for one in plan.actions if isinstance(one, EmitEvent)]
    assert [(one.type, one.reason) for one in said] == [("Normal", "Starting")]
    assert decide(enact(first, plan)).actions == ()


def test_what_cannot_be_used_is_named_with_what_to_do() -> None:
    assert describe_availability("Dataset", "calls", "Ready") is None
    assert describe_availability("Dataset", "calls", "NotReady")[0] == "DatasetNotReady"  # type: ignore[index]
    assert describe_availability("FineTune", "lora", "NotReady")[0] == "FineTuneNotFinished"  # type: ignore[index]
    assert "correct the reference" in describe_availability("FineTune", "lora", "NotFound")[1]  # type: ignore[index]


def test_names_are_short_enough_and_differ_by_owner() -> None:
    name = build_job_name("a" * 52, "finetune", "1a2b3c4d", "5e6f7")
    assert len(name) <= 63
    assert build_job_name("calls", "prepare", "1a2b3c4d", "5e6f7") == "calls-prepare-1a2b3c4d-5e6f7"
    assert fingerprint("one", {"a": 1}) != fingerprint("two", {"a": 1})
    assert fingerprint({"a": 1, "b": None}) == fingerprint({"a": 1})


def test_model_id_names_base_and_run() -> None:
    assert build_model_id("s3://models/whisper-tiny.en/", "3f9c2a1b") == "ft:whisper-tiny.en:3f9c2a"
    assert build_model_id("hf://openai/whisper-small@main", "3f9c2a1b") == "ft:whisper-small:3f9c2a"


pods = st.builds(
    pod,
    name=st.sampled_from(["a", "b"]),
    created=st.sampled_from(["2026-11-21T11:58:00Z", "2026-11-21T11:59:00Z"]),
    phase=st.sampled_from(["Pending", "Running", "Succeeded", "Failed", "Unknown"]),
    ip=st.sampled_from([None, "10.0.0.1"]),
    waiting_reason=st.sampled_from([None, "ContainerCreating", "CreateContainerConfigError", "ImagePullBackOff"]),
    waiting_message=st.sampled_from([None, 'secret "attune-store" not found', "odd"]),
    unschedulable=st.sampled_from([None, "0/1 nodes"]),
    exit_code=st.sampled_from([None, 0, 1, 2, *(int(code) for code in ExitCode), 137, 255]),
    terminated_reason=st.sampled_from([None, "Error", "OOMKilled"]),
    termination_message=st.sampled_from(
        [
            None,
            "",
            "no JSON",
            Summary(failure=Failure(reason="Odd", message="odd")).to_message(),
            *(finished("j", kind).pods[0].termination_message for kind in KINDS),
        ]
    ),
    disrupted=st.booleans(),
)


@settings(deadline=None)  # machines differ
@given(
    kind=st.sampled_from(KINDS),
    suspend=st.booleans(),
    fields=st.fixed_dictionaries(
        {
            "suspended": st.booleans(),
            "suspended_by": st.sampled_from([None, "kueue"]),
            "queue": st.sampled_from([None, ObservedQueue("speech"), ObservedQueue("speech", served=False)]),
            "refusal": st.sampled_from([None, "exceeded quota"]),
            "deleting": st.just(value=False),
            "complete": st.booleans(),
            "failed": st.booleans(),
            "failed_reason": st.sampled_from([None, "BackoffLimitExceeded"]),
            "finished": st.sampled_from([None, NOW, NOW - timedelta(hours=1)]),
            "config_present": st.booleans(),
            "pods": st.lists(pods, max_size=3).map(tuple),
        }
    ),
    other=st.booleans(),
)
def test_every_world_comes_to_rest_and_stays_there(
    kind: str,
    suspend: bool,  # noqa: FBT001 (drawn)
    fields: dict[str, Any],
    other: bool,  # noqa: FBT001 (drawn)
) -> None:
    jobs = [ObservedJob(wanted_name(kind), **fields)]
    if other:
        jobs.append(ObservedJob(wanted_name(kind).rpartition("-")[0] + "0-00000"))
    visited = settle(observe(kind))
    spec = visited.resource.spec.model_copy(update={"suspend": suspend})
    resource = visited.resource.model_copy(update={"spec": spec})
    rest = settle(replace(visited, jobs=tuple(jobs), resource=resource))  # type: ignore[arg-type]
    status = rest.resource.status
    kinds = [one.type for one in status.conditions]
    assert kinds == [TERMINAL[kind], "Reconciling", "Stalled"]
    states = {one.type: one.status for one in status.conditions}
    # kstatus: at most one of them, and exactly one while the work is not done.
    assert (states["Reconciling"] == "True") + (states["Stalled"] == "True") == (states[TERMINAL[kind]] != "True")
    assert len(rest.jobs) <= 1
    # Another look at the same world asks for nothing.
    again = decide(rest)
    assert again.actions == ()
    assert again.status == status


@settings(deadline=None)  # machines differ
@given(kind=st.sampled_from(KINDS), message=st.text(max_size=200))
def test_no_termination_message_upsets_a_decision(kind: str, message: str) -> None:
    ended = pod(phase="Succeeded", exit_code=0, termination_message=message)
    status = decide(with_job(kind, complete=True, pods=(ended,))).status
    assert condition(status, TERMINAL[kind])[0] != "True"
