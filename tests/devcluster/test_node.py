"""A real node starts, runs a pod, and leaves nothing behind."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from devcluster import binaries, hostsystem, images, node, paths, up
from devcluster.hostsystem import rules_left
from devcluster.node import Node, manifest
from devcluster.processes import wait_until

pytestmark = pytest.mark.node

POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "held"},
    "spec": {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 0,
        "containers": [
            {
                "name": "held",
                "image": images.PAUSE_IMAGE,
                # A published port, so that the plugin that writes rules for it has something to clean up.
                "ports": [{"containerPort": 80, "hostPort": 18080, "hostIP": "127.0.0.1"}],
            }
        ],
        "volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}],
    },
}


def output(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def commands_of_processes() -> set[str]:
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                found.add((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def traces() -> dict[str, object]:
    """Everything of this machine that a node touches."""
    sysctls = [*hostsystem.SYSCTLS, *hostsystem.WATCHED_SYSCTLS]
    return {
        "mounts": sorted(line for line in Path("/proc/mounts").read_text().splitlines()),
        "links": sorted(line.split()[0].partition("@")[0] for line in output("ip", "-brief", "link")),
        "addresses": sorted(" ".join(line.split()[:3:2]) for line in output("ip", "-brief", "-4", "address")),
        "routes": output("ip", "route"),
        "rules": output("nft", "list", "ruleset"),
        "hosts": Path("/etc/hosts").read_text(),
        "groups": sorted(str(group) for root in hostsystem.hierarchies() for group in root.iterdir() if group.is_dir()),
        "folders": {target: Path(target).exists() for _source, target in Node.default().binds()},
        "sysctls": {name: Path("/proc/sys", name).read_text() for name in sysctls if Path("/proc/sys", name).exists()},
    }


@pytest.fixture
def own_node(monkeypatch, tmp_path):
    """A node in a state of its own; there can be only one on a machine, for it has one bridge and one address range."""
    if hostsystem.node_links() or Path("/run/containerd").exists():
        pytest.skip("a node (or another containerd) runs on this machine; make down removes it")
    monkeypatch.setenv("ATTUNE_STATE", str(tmp_path / "state"))
    up.ensure_packages()
    binaries.ensure([*node.PROGRAMS, "pause", "coredns"])
    current = Node.default()
    yield current
    current.stop()


def test_down_removes_every_trace_of_a_node_that_ran_pods(own_node):
    before = traces()
    own_node.start()
    images.load_built(own_node, images.pause, "pause")
    images.load_built(own_node, images.coredns, "CoreDNS")
    own_node.wait_ready()
    own_node.kubectl("apply", "-f", "-", text=manifest("coredns.yaml", image=images.COREDNS_IMAGE))
    own_node.kubectl("apply", "-f", "-", text=json.dumps(POD))
    own_node.kubectl("wait", "--for=condition=Ready", "--timeout=60s", "pod/held")
    own_node.kubectl("rollout", "status", "deployment/coredns", "-n", "kube-system", "--timeout=60s")
    assert "CoreDNS" in own_node.kubectl("logs", "-n", "kube-system", "deployment/coredns")
    assert own_node.kubectl("get", "nodes", "-o", "jsonpath={.items[*].metadata.name}") == node.NAME

    during = traces()
    assert during["links"] != before["links"]
    assert any("kube-proxy" in rule for rule in rules_left())
    assert any("CNI-" in rule for rule in rules_left()), "the pod's published port made no rules"
    assert during["groups"] != before["groups"]
    # Mounts of containers are the node's own affair from the start.
    assert during["mounts"] == before["mounts"]

    started = own_node.supervised.identity()
    own_node.start()
    assert own_node.supervised.identity() == started, "a second start must find the first"

    up.down()
    # The kernel takes the links of a network namespace apart on its own time.
    wait_until(lambda: traces() == before, seconds=30, what="the disappearance of every trace")
    assert not paths.state().exists()
    left = [command for command in commands_of_processes() if os.fspath(paths.state()) in command]
    assert left == []


def test_a_node_that_was_killed_leaves_nothing_after_down_either(own_node):
    before = traces()
    own_node.start()
    images.load_built(own_node, images.pause, "pause")
    own_node.wait_ready()
    own_node.kubectl("apply", "-f", "-", text=json.dumps(POD))
    own_node.kubectl("wait", "--for=condition=Ready", "--timeout=60s", "pod/held")
    supervisor = own_node.supervised.identity()
    os.kill(supervisor.pid, 9)
    wait_until(lambda: not supervisor.alive, seconds=30, what="the end of the supervisor")
    up.down()
    wait_until(lambda: traces() == before, seconds=30, what="the disappearance of every trace")
    assert [command for command in commands_of_processes() if os.fspath(paths.state()) in command] == []
