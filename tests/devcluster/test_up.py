"""What `up` and `down` do to the machine that they run on; no cluster is started."""

import os
import time

import pytest

from devcluster import binaries, hostsystem, images, node, up
from devcluster.errors import ClusterError
from devcluster.node import Node


@pytest.fixture
def own_state(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTUNE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("ATTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "state"


def test_another_shells_path_is_no_other_node(own_state, monkeypatch):
    before = Node.default()._daemons()
    monkeypatch.setenv("PATH", f"{own_state}:{os.environ['PATH']}")
    assert Node.default()._daemons() == before


def test_down_asks_nothing_of_the_machine_where_no_node_can_have_run(own_state, monkeypatch):
    def refuse(*_arguments, **_more):
        raise ClusterError("only root may list rules")

    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(hostsystem, "run", refuse)
    monkeypatch.setattr(hostsystem, "hierarchies", refuse)
    up.down()


@pytest.mark.parametrize("rules", [["ip kube-proxy"], ["ip nat KUBE-SERVICES", "ip nat CNI-HOSTPORT-DNAT"]], ids=str)
def test_the_rules_of_another_node_are_left_alone_and_keep_ours_from_starting(own_state, monkeypatch, rules):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(node, "missing_packages", list)
    monkeypatch.setattr(binaries, "go", lambda: "go")
    monkeypatch.setattr(hostsystem, "hierarchies", list)
    monkeypatch.setattr(hostsystem, "node_links", list)
    monkeypatch.setattr(hostsystem, "rules_left", lambda: rules)
    monkeypatch.setattr(Node, "stop", lambda _node: pytest.fail("down removed another node's rules"))
    up.down()
    assert rules[0] in node.obstacles()[0]
    monkeypatch.setattr(hostsystem, "rules_left", lambda: [*rules, hostsystem.OWN_TABLE])
    assert node.obstacles() == []


def test_a_node_without_go_is_refused_at_once_unless_everything_is_built(own_state, monkeypatch):
    def refuse():
        raise ClusterError("no go")

    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(node, "missing_packages", list)
    monkeypatch.setattr(node, "_foreign_rules", list)
    monkeypatch.setattr(binaries, "go", refuse)
    assert "Go" in node.obstacles()[0]
    binaries.find("pause").parent.mkdir(parents=True)
    binaries.find("pause").touch()
    assert node.obstacles() == []


def test_down_leaves_what_others_have_put_into_a_folder_that_we_made(tmp_path):
    host = hostsystem.HostSystem(tmp_path / "host.json")
    host._make_folder(tmp_path / "ours" / "empty")
    host._make_folder(tmp_path / "theirs")
    (tmp_path / "theirs" / "socket").write_text("")
    host.remove_folders()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["host.json", "theirs"]


def test_the_layer_of_a_program_is_written_once_for_each_state_of_the_program(own_state, tmp_path):
    program = tmp_path / "pause-1" / "pause"
    program.parent.mkdir()
    program.write_bytes(b"one")
    os.utime(program, (time.time() - 60,) * 2)

    def layer():
        return images._program_image("localhost/a:1", "/pause", program).blobs[-1]

    first = layer()
    written = first.file.stat().st_mtime_ns
    assert layer() == first
    assert first.file.stat().st_mtime_ns == written
    program.write_bytes(b"two")
    os.utime(program, (time.time() + 60,) * 2)
    assert layer().digest != first.digest
