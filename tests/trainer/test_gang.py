"""How pods that train together meet, and how each notices that another is gone; over real connections."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from attune.contract.exitcode import Disposition, ExitCode
from attune_trainer.failures import InvalidInput, PeerLost, RecipeFailure, Terminated
from attune_trainer.training.gang import Alone, Leader, Member, Place, Report, Stage, Timing, open_gang

# Quick, and so patient that a busy machine is no loss.
TIMING = Timing(beat=0.02, lost=60, gather=60)
IMPATIENT = replace(TIMING, lost=2)


def no_check() -> None:
    """Nobody asks a pod to end."""


def nothing(name: str | None) -> Path | None:
    """There is no checkpoint."""
    assert name is None
    return None


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setenv("ATTUNE_PROGRESS_HOST", "127.0.0.1")
    with ExitStack() as entered:
        yield entered


def lead(stack: ExitStack, nodes: int = 2, timing: Timing = TIMING, uid: str = "uid-0") -> tuple[Leader, Place]:
    """Opens a leader on a free port; gives the place of its first member as well."""
    leader = stack.enter_context(Leader(Place(0, nodes, "127.0.0.1", gang_port=0), uid, timing))
    return leader, Place(1, nodes, "127.0.0.1", gang_port=leader.port)


def wait_until(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not look():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)  # between two looks


def is_lost(pod: Leader | Member) -> bool:
    try:
        pod.raise_if_lost()
    except PeerLost:
        return True
    return False


def meet(stack: ExitStack, leader: Leader, *members: Member) -> None:
    """Lets all begin together, without a checkpoint."""
    with ThreadPoolExecutor(len(members) + 1) as pool:
        waiting = [pool.submit(one.agree, nothing, no_check) for one in (leader, *members)]
        assert [one.result() for one in waiting] == [None] * len(waiting)


def test_all_begin_from_the_checkpoint_that_the_first_one_has_chosen(stack: ExitStack) -> None:
    leader, place = lead(stack, nodes=3)
    members = [stack.enter_context(Member(replace(place, index=index), f"uid-{index}", TIMING)) for index in (1, 2)]
    asked: list[str | None] = []

    def download(name: str | None) -> Path:
        asked.append(name)
        return Path("/scratch/resume/step-00000008-0000")

    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(one.agree, download, no_check) for one in (*members, leader)]
        found = {one.result() for one in waiting}
    assert found == {Path("/scratch/resume/step-00000008-0000")}
    assert sorted(asked, key=str) == [None, "step-00000008-0000", "step-00000008-0000"]
    assert len({one.mark for one in (leader, *members)}) == 1
    assert [one.leads for one in (leader, *members)] == [True, False, False]
    assert not any(is_lost(one) for one in (leader, *members))


def test_a_pod_that_is_alone_waits_for_nobody(stack: ExitStack) -> None:
    with open_gang(None, "uid-0") as gang:
        assert isinstance(gang, Alone)
        assert gang.agree(nothing, no_check) is None
        assert (gang.leads, gang.mark) == (True, "")
        gang.raise_if_lost()


def test_the_first_pod_says_which_others_never_came_and_that_costs_a_retry(stack: ExitStack) -> None:
    leader, place = lead(stack, nodes=4, timing=replace(TIMING, gather=0.1))
    leader.hear(2, Report(uid="uid-2", ready=""))
    with pytest.raises(RecipeFailure, match="pods 1, 3 of 4 did not report") as raised:
        leader.agree(nothing, no_check)
    assert raised.value.code is ExitCode.GANG_INCOMPLETE
    assert raised.value.code.disposition is Disposition.RETRY
    assert place.leader_host in raised.value.message


def test_another_pod_that_finds_no_first_one_gives_up_without_a_cost(stack: ExitStack) -> None:
    leader, place = lead(stack)
    leader.__exit__(None, None, None)
    member = Member(place, "uid-1", replace(TIMING, gather=0.1))
    with pytest.raises(PeerLost) as raised:
        member.agree(nothing, no_check)
    assert raised.value.code.disposition is Disposition.FREE


def test_a_pod_that_waits_ends_when_it_is_asked_to(stack: ExitStack) -> None:
    _, place = lead(stack)

    def stop() -> None:
        raise Terminated

    with pytest.raises(Terminated):
        Member(place, "uid-1", TIMING).agree(nothing, stop)


def test_a_silent_pod_is_lost_unless_it_has_trained_to_the_end(stack: ExitStack) -> None:
    leader, place = lead(stack, nodes=3, timing=IMPATIENT)
    first, second = (Member(replace(place, index=index), f"uid-{index}", TIMING) for index in (1, 2))
    with second:
        with first:
            meet(stack, leader, first, second)
            first.finish_training()
            wait_until(lambda: bool(leader._heard[1].report.done))
        wait_until(lambda: time.monotonic() - leader._heard[1].at > IMPATIENT.lost)
        assert not is_lost(leader)
    wait_until(lambda: is_lost(leader))
    with pytest.raises(PeerLost, match="pod 2 of this run is gone"):
        leader.raise_if_lost()
    # It publishes without them.
    leader.finish_training()
    assert not is_lost(leader)


def test_a_first_pod_that_is_silent_is_lost(stack: ExitStack) -> None:
    leader, place = lead(stack)
    member = stack.enter_context(Member(place, "uid-1", IMPATIENT))
    meet(stack, leader, member)
    leader._server.shutdown()
    leader._server.server_close()
    wait_until(lambda: is_lost(member))


def test_a_pod_that_has_been_replaced_is_lost_and_its_successor_does_not_join(stack: ExitStack) -> None:
    leader, place = lead(stack)
    member = stack.enter_context(Member(place, "uid-1", TIMING))
    meet(stack, leader, member)
    successor = leader.hear(1, Report(uid="uid-1-again", ready=""))
    assert (successor.stage, successor.member) == (Stage.TRAINING, "uid-1")
    assert is_lost(leader)


def test_a_first_pod_of_another_attempt_is_not_the_one_that_it_began_with(stack: ExitStack) -> None:
    leader, place = lead(stack)
    member = stack.enter_context(Member(place, "uid-1", TIMING))
    meet(stack, leader, member)
    leader._uid = "uid-0-again"  # what its successor answers under the same host name
    wait_until(lambda: is_lost(member))


def test_a_first_pod_that_is_replaced_before_training_is_waited_for_anew(stack: ExitStack) -> None:
    leader, place = lead(stack)
    member = stack.enter_context(Member(place, "uid-1", TIMING))
    asked: list[str | None] = []

    def newer(name: str | None) -> Path:
        asked.append(name)
        if name == "step-1":
            # Meanwhile the first pod has been replaced, and its successor has found a newer checkpoint.
            leader._uid, leader._checkpoint = "uid-0-again", "step-2"
        return Path(name or "step-1")

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(one.agree, newer, no_check) for one in (leader, member)]
        assert waiting[1].result() == Path("step-2")
        waiting[0].result()
    assert asked == [None, "step-1", "step-2"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/members/0", b'{"uid": "x"}', id="the leader itself"),
        pytest.param("/members/2", b'{"uid": "x"}', id="a pod that the run does not have"),
        pytest.param("/members/one", b'{"uid": "x"}', id="no index"),
        pytest.param("/members/1", b'{"uid": 1}', id="no uid"),
        pytest.param("/members/1", b"x" * 5000, id="too much"),
    ],
)
def test_what_is_no_report_is_refused(stack: ExitStack, path: str, body: bytes) -> None:
    from http.client import HTTPConnection  # noqa: PLC0415

    leader, _ = lead(stack)
    connection = HTTPConnection("127.0.0.1", leader.port, timeout=10)
    connection.request("POST", path, body=body)
    assert connection.getresponse().status == 400
    connection.close()
    assert leader._heard == {}


@pytest.mark.parametrize(
    "environment",
    [
        {"ATTUNE_LEADER_HOST": "pod-0"},
        {"JOB_COMPLETION_INDEX": "1"},
        {"JOB_COMPLETION_INDEX": "2", "ATTUNE_LEADER_HOST": "pod-0"},
    ],
)
def test_a_pod_that_does_not_know_its_place_says_so(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JOB_COMPLETION_INDEX", "ATTUNE_LEADER_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput, match="images of one release"):
        Place.from_environment(2)
