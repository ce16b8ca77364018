"""Daemons that are kept running, and that end with their supervisor however it ends."""

import os
import signal
import sys
from pathlib import Path

import pytest

from devcluster.processes import Identity, Supervised, read_identity, wait_until
from devcluster.supervisor import Daemon, Specification


def daemon(folder: Path, name: str) -> Daemon:
    """A daemon that writes down its number and waits."""
    code = f"import os, signal; open({str(folder / name)!r}, 'w').write(str(os.getpid())); signal.pause()"
    return Daemon(name, (sys.executable, "-c", code), str(folder / f"{name}.log"))


def running(folder: Path, name: str) -> Identity | None:
    try:
        return Identity.of(int((folder / name).read_text()))
    except (FileNotFoundError, ValueError):
        return None


@pytest.fixture
def supervised(tmp_path):
    supervised = Supervised(tmp_path / "supervisor")
    supervised.start(Specification((daemon(tmp_path, "one"), daemon(tmp_path, "two"))))
    yield supervised
    supervised.stop()


def wait_running(folder: Path, *names: str) -> list[Identity]:
    wait_until(lambda: all(running(folder, name) for name in names), seconds=30, what=f"the start of {names}")
    return [identity for name in names if (identity := running(folder, name))]


def test_stopping_ends_every_daemon(supervised, tmp_path):
    daemons = wait_running(tmp_path, "one", "two")
    supervised.stop()
    assert [identity.alive for identity in daemons] == [False, False]
    assert supervised.identity() is None


def test_a_daemon_that_ends_is_started_again(supervised, tmp_path):
    one, two = wait_running(tmp_path, "one", "two")
    os.kill(one.pid, signal.SIGKILL)
    wait_until(lambda: running(tmp_path, "one") not in {None, one}, seconds=30, what="the second start")
    assert two.alive
    assert "one ended with -9" in (tmp_path / "one.log").read_text()


def test_no_daemon_outlives_a_supervisor_that_was_killed(supervised, tmp_path):
    daemons = wait_running(tmp_path, "one", "two")
    os.kill(supervised.identity().pid, signal.SIGKILL)
    wait_until(lambda: not any(identity.alive for identity in daemons), seconds=30, what="the end of the daemons")


def test_the_same_specification_is_not_started_twice(supervised, tmp_path):
    before = supervised.identity()
    supervised.start(Specification((daemon(tmp_path, "one"), daemon(tmp_path, "two"))))
    assert supervised.identity() == before


def test_another_specification_replaces_the_one_that_runs(supervised, tmp_path):
    one, _two = wait_running(tmp_path, "one", "two")
    changed = Specification((daemon(tmp_path, "three"),))
    assert not supervised.runs(changed)
    supervised.start(changed)
    wait_running(tmp_path, "three")
    assert not one.alive
    assert supervised.runs(changed)


def test_a_number_that_another_process_has_now_is_not_ours(tmp_path):
    own = Identity.of(os.getpid())
    file = tmp_path / "pid"
    file.write_text(f"{own.pid} {own.started}\n")
    assert read_identity(file) == own
    file.write_text(f"{own.pid} {own.started - 1}\n")
    assert read_identity(file) is None


def test_a_specification_survives_its_file(tmp_path):
    specification = Specification((Daemon("a", ("b", "c"), "log", {"PATH": "/bin"}),), (("/from", "/to"),))
    assert Specification.from_json(specification.to_json()) == specification
