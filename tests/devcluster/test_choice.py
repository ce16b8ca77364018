"""Which cluster `up` takes, and what it says where none will do."""

import pytest

from devcluster import node, up
from devcluster.errors import ClusterError
from devcluster.up import Choice

DOCKER = "no Docker engine answers"
ROOT = "not run as root"

CASES = {
    "the current cluster when told to": ("current", [DOCKER], [ROOT], Choice("current", "ATTUNE_CLUSTER says so")),
    "kind where Docker answers": ("", [], [], Choice("kind", "a Docker engine answers")),
    "kind when told to": ("kind", [], [], Choice("kind", "ATTUNE_CLUSTER says so")),
    "a node where there is no Docker": ("", [DOCKER], [], Choice("node", f"{DOCKER}; this is Linux, as root")),
    "a node beside Docker when told to": ("node", [], [], Choice("node", "ATTUNE_CLUSTER says so")),
}

ERRORS = {
    "nothing will do": ("", [DOCKER], [ROOT], f"ATTUNE_CLUSTER=current.*\n.*{DOCKER}\n.*{ROOT}"),
    "kind is asked for and cannot be": ("kind", [DOCKER], [], f"asks for kind, but {DOCKER}"),
    "a node is asked for and cannot be": ("node", [], [ROOT], f"asks for a node, but: {ROOT}"),
    "a word that means nothing": ("minikube", [], [], "'minikube'; it may be current, kind or node"),
}


def arrange(monkeypatch, wanted, kind_missing, node_missing):
    monkeypatch.setenv("ATTUNE_CLUSTER", wanted)
    monkeypatch.setattr(up, "kind_obstacles", lambda: kind_missing)
    monkeypatch.setattr(node, "obstacles", lambda: node_missing)


@pytest.mark.parametrize(("wanted", "kind_missing", "node_missing", "choice"), CASES.values(), ids=CASES.keys())
def test_choice(monkeypatch, wanted, kind_missing, node_missing, choice):
    arrange(monkeypatch, wanted, kind_missing, node_missing)
    assert up.choose() == choice


@pytest.mark.parametrize(("wanted", "kind_missing", "node_missing", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_no_choice(monkeypatch, wanted, kind_missing, node_missing, message):
    arrange(monkeypatch, wanted, kind_missing, node_missing)
    with pytest.raises(ClusterError, match=message):
        up.choose()


def test_a_user_who_is_not_root_is_told_so(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert ROOT in node.obstacles()


def test_a_proxy_is_not_asked_for_the_node(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert node.without_proxy() == {}
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.com:3128")
    monkeypatch.setenv("NO_PROXY", "internal.example.com")
    expected = f"{node.ADDRESS},127.0.0.1,localhost,internal.example.com"
    assert node.without_proxy() == {"NO_PROXY": expected, "no_proxy": expected}
