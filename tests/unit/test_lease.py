"""Leadership: taken once, kept by renewing, lost in time, never by another's clock."""

from typing import Any

import pytest
from attune.adapters.cluster import Object, ResourceType
from attune.adapters.lease import Lease
from attune.errors import AlreadyExists, Conflict, NotLeader, Unavailable


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Shelf:
    """Holds one Lease with the API server's rule: a replace of an old version is a conflict."""

    def __init__(self) -> None:
        self.held: Object | None = None
        self.version = 0
        self.down = False

    def get(self, _kind: ResourceType, _namespace: str, _name: str) -> Object | None:
        if self.down:
            raise Unavailable("down")
        return None if self.held is None else {**self.held, "spec": dict(self.held["spec"])}

    def create(self, obj: Object) -> Object:
        if self.held is not None:
            raise AlreadyExists("there")
        return self._store(obj)

    def replace(self, obj: Object) -> Object:
        if self.held is None or obj["metadata"]["resourceVersion"] != self.held["metadata"]["resourceVersion"]:
            raise Conflict("changed")
        return self._store(obj)

    def _store(self, obj: Object) -> Object:
        self.version += 1
        self.held = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}}
        return self.held


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def make(shelf: Shelf, identity: str, clock: Clock) -> Lease:
    cluster: Any = shelf
    return Lease(cluster, "attune-system", "attune", identity, seconds=15, clock=clock)


def test_one_of_two_leads_until_it_stops_renewing(shelf: Shelf) -> None:
    clock = Clock()
    first, second = make(shelf, "one", clock), make(shelf, "two", clock)
    assert first.try_acquire()
    assert not second.try_acquire()
    for _ in range(10):
        clock.now += 5
        assert first.try_acquire()
        assert not second.try_acquire()
    assert first.is_held()
    assert not second.is_held()
    clock.now += 14.9
    assert not second.try_acquire()
    clock.now += 0.1
    assert second.try_acquire()
    # The first has stopped writing long before the second began.
    with pytest.raises(NotLeader):
        first.check()
    assert not first.try_acquire()


def test_writes_stop_before_another_may_take_over(shelf: Shelf) -> None:
    clock = Clock()
    lease = make(shelf, "one", clock)
    assert lease.try_acquire()
    shelf.down = True
    clock.now += 9.9
    assert not lease.try_acquire()
    lease.check()
    clock.now += 0.1
    with pytest.raises(NotLeader):
        lease.check()


def test_released_lease_is_free_at_once(shelf: Shelf) -> None:
    clock = Clock()
    first, second = make(shelf, "one", clock), make(shelf, "two", clock)
    assert first.try_acquire()
    first.release()
    assert not first.is_held()
    assert second.try_acquire()
    assert shelf.held is not None
    assert shelf.held["spec"]["leaseTransitions"] == 1
    # A late release by the first does not take it from the second.
    first.release()
    assert second.is_held()
    assert shelf.held["spec"]["holderIdentity"] == "two"


def test_same_pod_goes_on_at_once_after_a_crash(shelf: Shelf) -> None:
    clock = Clock()
    assert make(shelf, "one", clock).try_acquire()
    assert make(shelf, "one", clock).try_acquire()
    assert shelf.held is not None
    assert shelf.held["spec"]["leaseTransitions"] == 0


def test_another_machines_clock_does_not_matter(shelf: Shelf) -> None:
    clock = Clock()
    assert make(shelf, "one", clock).try_acquire()
    assert shelf.held is not None
    shelf.held["spec"]["renewTime"] = "1999-01-01T00:00:00.000000Z"
    second = make(shelf, "two", clock)
    assert not second.try_acquire()
    clock.now += 14
    assert not second.try_acquire()
    clock.now += 1
    assert second.try_acquire()
