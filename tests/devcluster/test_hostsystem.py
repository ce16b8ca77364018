"""What the end of the node takes away from the machine, and what it leaves alone; in a network namespace of its own."""

import json
import subprocess
import sys

import pytest

from devcluster import hostsystem, up
from devcluster.paths import REPOSITORY

# As the portmap plugin writes them for a pod with a published port.
PUBLISHED_PORT = """
iptables -t nat -N CNI-HOSTPORT-DNAT
iptables -t nat -N CNI-DN-0123456789abcdef01234
iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
iptables -t nat -A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
iptables -t nat -A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 8000 -j CNI-DN-0123456789abcdef01234
iptables -t nat -A CNI-DN-0123456789abcdef01234 -p tcp --dport 8000 -j DNAT --to-destination 10.244.0.9:8000
nft add table ip kube-proxy
nft add table ip6 kube-proxy
nft add table ip attune
nft add chain ip kube-proxy services
"""
SOMEBODY_ELSES = """
iptables -t nat -A POSTROUTING -s 172.30.0.0/16 -j MASQUERADE
iptables -t filter -N DOCKER-USER
iptables -t filter -A FORWARD -j DOCKER-USER
nft add table inet firewall
nft add chain inet firewall input '{ type filter hook input priority 0 ; policy drop ; }'
"""
CLEAN = """
import json, subprocess
from devcluster import hostsystem
before = hostsystem.rules_left()
hostsystem.remove_rules()
left = hostsystem.rules_left()
ruleset = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
print(json.dumps([before, left, ruleset]))
"""


@pytest.fixture(scope="module")
def tools() -> None:
    """What the node needs of Debian: nft and iptables may not be there yet."""
    up.ensure_packages()


def in_own_network(*parts: str) -> tuple[list[str], list[str], str]:
    """Run shell commands and then the cleaning; what was ours before, what was after, and the rules that are left."""
    script = "set -e\n" + "\n".join(parts) + f"\n{sys.executable} -c '{CLEAN}'"
    result = subprocess.run(
        ["unshare", "--net", "sh", "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY, timeout=60
    )
    before, left, ruleset = json.loads(result.stdout.splitlines()[-1])
    return before, left, ruleset


@pytest.mark.node
def test_every_rule_of_the_node_goes_and_the_tables_that_it_made(tools):
    before, left, ruleset = in_own_network(PUBLISHED_PORT)
    assert len(before) == 5
    assert left == []
    assert ruleset == ""


@pytest.mark.node
def test_rules_of_others_stay_as_they_were(tools):
    _before, _left, expected = in_own_network(SOMEBODY_ELSES)
    before, left, ruleset = in_own_network(SOMEBODY_ELSES, PUBLISHED_PORT)
    assert before != []
    assert left == []
    assert "172.30.0.0/16" in expected
    assert remembered(ruleset) == remembered(expected)


def remembered(ruleset: str) -> list[str]:
    """The lines of a rule set without the empty chains that iptables makes for its own use on the first call."""
    lines = [line.strip() for line in ruleset.splitlines()]
    return [line for line in lines if line and not line.startswith(("type nat hook", "chain", "}", "#"))]


@pytest.mark.node
def test_a_machine_without_rules_stays_so(tools):
    assert in_own_network("true") == ([], [], "")


def test_the_groups_of_a_hierarchy_are_removed_from_the_leaves_up(tmp_path):
    (tmp_path / "attune" / "kubepods" / "pod1").mkdir(parents=True)
    (tmp_path / "attune" / "kubepods" / "pod2").mkdir()
    hostsystem.remove_groups(tmp_path / "attune")
    hostsystem.remove_groups(tmp_path / "attune")
    assert list(tmp_path.iterdir()) == []
