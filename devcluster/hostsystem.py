"""What the node changes on its host, written down before each change, so that `revert` leaves nothing behind.

Mounts and processes are not among them: the node has mount and process namespaces of its own, which end with it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from devcluster.errors import ClusterError

BRIDGE = "attune0"
CGROUP = "attune"
CGROUP_ROOT = Path("/sys/fs/cgroup")
# What kube-proxy and the CNI plugins name their chains and tables.
CHAINS = re.compile(r"^(KUBE-|CNI-)")
OWN_TABLE = "ip attune"
TABLES = ("kube-proxy", "attune")
# Each kernel module that is needed, and what is there once it is loaded or where it is built in.
KERNEL_PARTS = {
    "overlay": "/sys/module/overlay",
    "br_netfilter": "/proc/sys/net/bridge/bridge-nf-call-iptables",
    "nf_conntrack": "/proc/sys/net/netfilter/nf_conntrack_max",
}
# Debian keeps administrators' programs where an ordinary PATH does not look.
ADMINISTRATORS_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    # Answers between two pods of one bridge pass netfilter too, which undoes the Service address.
    "net/bridge/bridge-nf-call-iptables": "1",
}
# What the node's programs set by themselves.
WATCHED_SYSCTLS = (
    # The plugin that publishes ports on the loopback address; on the bridge too, which goes anyway.
    "net/ipv4/conf/lo/route_localnet",
    "net/ipv4/conf/all/route_localnet",
    # kube-proxy.
    "net/netfilter/nf_conntrack_max",
    # The kubelet (setupKernelTunables).
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)


@dataclass(frozen=True)
class HostSystem:
    """The changes of one node, recorded in `record`."""

    record: Path

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            loaded: dict[str, dict[str, str]] = json.loads(self.record.read_text())
        except FileNotFoundError:
            return {"sysctls": {}, "folders": {}, "modules": {}}
        return loaded

    def _note(self, kind: str, name: str, value: str) -> None:
        noted = self._read()
        noted[kind].setdefault(name, value)
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps(noted, indent=1))

    def prepare(self, *, address: str, prefix: int, folders: Sequence[str]) -> None:
        """Load modules, set sysctls, make the bridge with its address, mount points and control groups."""
        for module, present in KERNEL_PARTS.items():
            self._load(module, present)
        for name, value in SYSCTLS.items():
            file = Path("/proc/sys") / name
            self._note("sysctls", name, file.read_text().strip())
            file.write_text(value)
        for name in WATCHED_SYSCTLS:
            file = Path("/proc/sys") / name
            if file.exists():
                self._note("sysctls", name, file.read_text().strip())
        for folder in folders:
            self._make_folder(Path(folder))
        if not Path(f"/sys/class/net/{BRIDGE}").exists():
            run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "replace", f"{address}/{prefix}", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for hierarchy in hierarchies():
            (hierarchy / CGROUP).mkdir(exist_ok=True)

    def masquerade(self, pod_range: str) -> None:
        """Let pods reach the world outside under the host's address, by a table of our own."""
        rules = f"""
            table ip attune {{}}
            delete table ip attune
            table ip attune {{
                chain postrouting {{
                    type nat hook postrouting priority srcnat; policy accept;
                    ip saddr {pod_range} ip daddr != {pod_range} oifname != "{BRIDGE}" masquerade
                }}
            }}
        """
        run("nft", "-f", "-", text=rules)

    def _load(self, module: str, present: str) -> None:
        """Load a kernel module unless what it brings is there, built in or loaded."""
        if Path(present).exists():
            return
        modprobe = shutil.which("modprobe", path=ADMINISTRATORS_PATH)
        loaded = modprobe and subprocess.run([modprobe, module], capture_output=True, check=False).returncode == 0
        if not loaded or not Path(present).exists():
            raise ClusterError(f"the kernel has no {module}: load that module, or use a kernel that has it")
        self._note("modules", module, "loaded")

    def _make_folder(self, folder: Path) -> None:
        missing = [folder, *folder.parents]
        for path in reversed([path for path in missing if not path.exists()]):
            self._note("folders", str(path), "made")
            path.mkdir()

    def revert(self) -> None:
        """Undo everything: links, rules, control groups, folders, sysctls; what is gone already is no error."""
        for link in node_links():
            subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)
        remove_rules()
        for hierarchy in hierarchies():
            remove_groups(hierarchy / CGROUP)
        noted = self._read()
        for name, value in noted["sysctls"].items():
            file = Path("/proc/sys") / name
            if file.exists() and file.read_text().strip() != value:
                file.write_text(value)
        self.remove_folders()
        for module in noted["modules"]:
            modprobe = shutil.which("modprobe", path=ADMINISTRATORS_PATH) or "modprobe"
            subprocess.run([modprobe, "-r", module], capture_output=True, check=False)
        self.record.unlink(missing_ok=True)

    def remove_folders(self) -> None:
        """Remove the folders that we made. As mount points they are empty; what others have put there since stays."""
        for folder in sorted(self._read()["folders"], key=len, reverse=True):
            with suppress(OSError):
                Path(folder).rmdir()


def run(*arguments: str, text: str | None = None) -> str:
    """Run a short command and return its output; ClusterError with what it said if it fails."""
    try:
        result = subprocess.run(arguments, input=text, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        raise ClusterError(f"the command {arguments[0]} is missing; install the package that holds it") from None
    if result.returncode:
        raise ClusterError(f"{' '.join(arguments)} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def hierarchies() -> list[Path]:
    """The roots of the control group hierarchies: one with version 2, one for each controller with version 1."""
    if (CGROUP_ROOT / "cgroup.controllers").exists():
        return [CGROUP_ROOT]
    found = [
        folder for folder in CGROUP_ROOT.iterdir() if not folder.is_symlink() and (folder / "cgroup.procs").exists()
    ]
    return sorted(found)


def remove_groups(group: Path) -> None:
    """Remove a control group and those below it; processes in them must have ended."""
    if not group.is_dir():
        return
    for child in group.iterdir():
        if child.is_dir():
            remove_groups(child)
    try:
        group.rmdir()
    except OSError as error:
        raise ClusterError(f"the control group {group} cannot be removed: {error.strerror}") from error


def groups_left() -> list[Path]:
    """Our control groups that exist."""
    return [hierarchy / CGROUP for hierarchy in hierarchies() if (hierarchy / CGROUP).exists()]


def is_used() -> bool:
    """Whether this machine shows traces that nobody but our node leaves; only root sees all of them."""
    return bool(groups_left() or node_links()) or OWN_TABLE in rules_left()


def node_links() -> list[str]:
    """The node's network links on the host: the bridge and what is plugged into it."""
    bridge = Path(f"/sys/class/net/{BRIDGE}")
    if not bridge.exists():
        return []
    return [*sorted(port.name for port in (bridge / "brif").iterdir()), BRIDGE]


def _ruleset() -> list[dict[str, dict[str, object]]]:
    if shutil.which("nft") is None:
        return []
    listed: list[dict[str, dict[str, object]]] = json.loads(run("nft", "--json", "list", "ruleset"))["nftables"]
    return listed


def rules_left() -> list[str]:
    """Tables and chains of netfilter that the node made, as "family table" and "family table chain"."""
    left = []
    for entry in _ruleset():
        if table := entry.get("table"):
            if table["name"] in TABLES:
                left.append(f"{table['family']} {table['name']}")
        elif (chain := entry.get("chain")) and CHAINS.match(str(chain["name"])):
            left.append(f"{chain['family']} {chain['table']} {chain['name']}")
    return left


def remove_rules() -> None:
    """Remove the node's tables; from tables shared with others, its chains and the rules that jump to them."""
    ruleset = _ruleset()
    tables = [entry["table"] for entry in ruleset if "table" in entry]
    commands = [f"delete table {table['family']} {table['name']}" for table in tables if table["name"] in TABLES]
    every_chain = [entry["chain"] for entry in ruleset if "chain" in entry]
    chains = [
        f"{chain['family']} {chain['table']} {chain['name']}"
        for chain in every_chain
        if CHAINS.match(str(chain["name"])) and chain["table"] not in TABLES
    ]
    jumps = []
    for entry in ruleset:
        rule = entry.get("rule")
        if rule and rule["table"] not in TABLES and not CHAINS.match(str(rule["chain"])) and _jumps(rule["expr"]):
            jumps.append(f"delete rule {rule['family']} {rule['table']} {rule['chain']} handle {rule['handle']}")
    commands += jumps
    commands += [f"flush chain {chain}" for chain in chains]
    commands += [f"delete chain {chain}" for chain in chains]
    if commands:
        run("nft", "-f", "-", text="\n".join(commands) + "\n")
    _remove_empty_tables({chain.rpartition(" ")[0] for chain in chains})


def _jumps(expression: object) -> bool:
    """Whether a rule's expression jumps or goes to one of the node's chains."""
    if isinstance(expression, list):
        return any(_jumps(part) for part in expression)
    if isinstance(expression, dict):
        targets = [
            expression[verb].get("target", "") for verb in ("jump", "goto") if isinstance(expression.get(verb), dict)
        ]
        return any(CHAINS.match(target) for target in targets) or any(_jumps(part) for part in expression.values())
    return False


def _remove_empty_tables(touched: set[str]) -> None:
    """Remove the tables that held our chains and now hold nothing but empty base chains, as iptables leaves them."""
    after = _ruleset()
    rules = {f"{entry['rule']['family']} {entry['rule']['table']}" for entry in after if "rule" in entry}
    own_chains = {
        f"{entry['chain']['family']} {entry['chain']['table']}"
        for entry in after
        if "chain" in entry and not entry["chain"].get("hook")
    }
    policies = {
        f"{entry['chain']['family']} {entry['chain']['table']}"
        for entry in after
        if "chain" in entry and entry["chain"].get("policy", "accept") != "accept"
    }
    for table in sorted(touched - rules - own_chains - policies):
        run("nft", "delete", "table", *table.split())
