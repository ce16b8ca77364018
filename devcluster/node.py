"""One real node: containerd, kubelet, kube-proxy, control plane, in mount and process namespaces of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

from devcluster import binaries, controlplane, hostsystem, paths, versions
from devcluster.controlplane import ControlPlane
from devcluster.errors import ClusterError
from devcluster.hostsystem import ADMINISTRATORS_PATH, BRIDGE, CGROUP, HostSystem
from devcluster.processes import Supervised, tail, wait_until
from devcluster.progress import step
from devcluster.supervisor import Daemon, Specification

NAME = "attune"
# The node's address is the pods' gateway: only this machine reaches it, and it stays when the machine moves.
ADDRESS = "10.244.0.1"
PODS = "10.244.0.0/24"
PREFIX = 24
CLUSTER_DNS = "10.96.0.10"
PAUSE_IMAGE = "localhost/attune/pause:1"
PROGRAMS = (
    *controlplane.PROGRAMS,
    *("kube-scheduler", "kubelet", "kube-proxy", "containerd", "containerd-shim-runc-v2", "ctr"),
)
# Debian's packages of what the node runs, and of what its images are made with.
PACKAGES = {
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "nft": "nftables",
    "iptables": "iptables",
    "ip": "iproute2",
    "mount": "mount",
    "unshare": "util-linux",
    "openssl": "openssl",
    "conntrack": "conntrack",
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
}
CNI_FOLDERS = ("/usr/lib/cni", "/opt/cni/bin")
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READY_SECONDS = 180.0


@dataclass(frozen=True)
class Node:
    """The node whose files live in `folder`."""

    folder: Path

    @classmethod
    def default(cls) -> Node:
        """The node of `make up`."""
        return cls(paths.node())

    @property
    def plane(self) -> ControlPlane:
        """The node's control plane."""
        return ControlPlane(self.folder, ADDRESS, paths.logs())

    @property
    def host(self) -> HostSystem:
        """What the node changed on this machine."""
        return HostSystem(self.folder / "host.json")

    @property
    def supervised(self) -> Supervised:
        """The node's processes."""
        return Supervised(self.folder, own_namespaces=True)

    @property
    def socket(self) -> Path:
        """Containerd's socket."""
        return self.folder / "run" / "containerd.sock"

    @property
    def kubectl(self) -> Kubectl:
        """Kubectl as the administrator of this node."""
        return Kubectl(self.plane.kubeconfig)

    def ctr(self, *arguments: str) -> list[str]:
        """A command line of containerd's own client, in the kubelet's image namespace."""
        return [str(binaries.find("ctr")), "--address", str(self.socket), "--namespace", "k8s.io", *arguments]

    def binds(self) -> tuple[tuple[str, str], ...]:
        """The folders that programs insist on, each backed by one of ours inside the node's mount namespace."""
        targets = (
            "/run/containerd",
            "/run/netns",
            "/var/log/pods",
            "/var/log/containers",
            "/var/lib/cni",
            "/var/lib/kubelet",
        )
        return tuple((str(self.folder / "host" / target.strip("/").replace("/", "-")), target) for target in targets)

    def start(self) -> None:
        """Start what does not run yet; return when the API server is ready and containerd answers."""
        specification = Specification(self._daemons(), self.binds())
        if self.supervised.runs(specification):
            self.plane.wait_ready(self.supervised)
            return
        with step("starting the node: etcd, Kubernetes, containerd"):
            self.supervised.stop()
            for source, _target in self.binds():
                Path(source).mkdir(parents=True, exist_ok=True)
            # Sockets and mounts of shims that ended with the node's last run.
            for stale in ("containerd-state", "host/run-containerd", "host/run-netns"):
                shutil.rmtree(self.folder / stale, ignore_errors=True)
                (self.folder / stale).mkdir(parents=True)
            self.host.prepare(address=ADDRESS, prefix=PREFIX, folders=[target for _source, target in self.binds()])
            self.host.masquerade(PODS)
            self.supervised.start(specification)
            self.plane.wait_ready(self.supervised)
            wait_until(self._containerd_answers, seconds=60, what="containerd's first answer")

    def wait_ready(self) -> None:
        """Wait until the node says it is Ready; ClusterError with the kubelet's last words if it never does."""
        try:
            wait_until(self._is_ready, seconds=READY_SECONDS, what="the readiness of the node")
        except ClusterError as error:
            log = self.plane.logs / "kubelet.log"
            raise ClusterError(f"{error}; the end of {log}:\n{tail(log)}") from None

    def stop(self) -> None:
        """Stop everything and remove every trace, the node's folder included."""
        self.supervised.stop()
        self.host.revert()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_ready(self) -> bool:
        answer = self.plane.get(f"/api/v1/nodes/{NAME}")
        if answer is None:
            return False
        conditions = json.loads(answer)["status"].get("conditions", [])
        return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)

    def _containerd_answers(self) -> bool:
        return subprocess.run(self.ctr("version"), capture_output=True, check=False).returncode == 0

    def _daemons(self) -> tuple[Daemon, ...]:
        plane, authority = self.plane, self.plane.authority
        control = plane.daemons()
        scheduler, proxy, kubelet = (
            authority.write_kubeconfig(
                self.folder / f"{name}.kubeconfig", server=plane.server, common_name=common_name, group=group
            )
            for name, common_name, group in (
                ("scheduler", "system:kube-scheduler", ""),
                ("proxy", "system:kube-proxy", "system:node-proxier"),
                ("kubelet", f"system:node:{NAME}", "system:nodes"),
            )
        )
        serving = authority.issue("kubelet-serving", common_name=NAME, hosts=[f"DNS:{NAME}", f"IP:{ADDRESS}"])
        containerd = plane.daemon("containerd", "--config", str(self._write_containerd()))
        # Not the caller's PATH: another shell's would look like another node, and stop this one.
        search = f"{binaries.find('containerd-shim-runc-v2').parent}:{SEARCH_PATH}"
        return (
            *control,
            plane.daemon(
                "kube-scheduler",
                f"--kubeconfig={scheduler}",
                f"--authentication-kubeconfig={scheduler}",
                f"--authorization-kubeconfig={scheduler}",
                "--leader-elect=false",
                "--secure-port=0",
                "--profiling=false",
            ),
            replace(containerd, environment={"PATH": search}),
            plane.daemon(
                "kubelet",
                f"--config={self._write_kubelet(serving)}",
                f"--kubeconfig={kubelet}",
                f"--hostname-override={NAME}",
                f"--node-ip={ADDRESS}",
                f"--root-dir={self.folder / 'kubelet'}",
            ),
            plane.daemon(
                "kube-proxy",
                f"--kubeconfig={proxy}",
                f"--hostname-override={NAME}",
                "--proxy-mode=nftables",
                f"--cluster-cidr={PODS}",
                f"--metrics-bind-address=127.0.0.1:{plane.ports()['kube-proxy']}",
                "--healthz-bind-address=",
                # The host's own limit stays as it is.
                "--conntrack-max-per-core=0",
                "--conntrack-min=0",
                "--conntrack-tcp-timeout-established=0",
                "--conntrack-tcp-timeout-close-wait=0",
            ),
        )

    def _write_containerd(self) -> Path:
        cni = self.folder / "cni"
        cni.mkdir(parents=True, exist_ok=True)
        plugins = [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": True,
                # The node's own table masquerades; this plugin's chains would stay behind.
                "ipMasq": False,
                "hairpinMode": True,
                "ipam": {"type": "host-local", "ranges": [[{"subnet": PODS}]], "routes": [{"dst": "0.0.0.0/0"}]},
            },
            {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
        ]
        (cni / "10-attune.conflist").write_text(
            json.dumps({"cniVersion": "1.0.0", "name": "attune", "plugins": plugins}, indent=1)
        )
        cni_programs = next((folder for folder in CNI_FOLDERS if Path(folder, "bridge").exists()), CNI_FOLDERS[0])
        file = self.folder / "containerd.toml"
        file.write_text(
            f"""version = 3
root = "{self.folder / "containerd"}"
state = "{self.folder / "containerd-state"}"
[grpc]
  address = "{self.socket}"
[ttrpc]
  address = "{self.socket}.ttrpc"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{PAUSE_IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
  # Without CAP_SYS_RESOURCE nobody may lower an oom score below his own.
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        BinaryName = "{_which("runc")}"
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{cni_programs}"]
    conf_dir = "{cni}"
"""
        )
        return file

    def _write_kubelet(self, serving: tuple[Path, Path]) -> Path:
        file = self.folder / "kubelet.json"
        configuration = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": ADDRESS,
            "authentication": {
                "anonymous": {"enabled": False},
                "x509": {"clientCAFile": str(self.plane.authority.certificate)},
                "webhook": {"enabled": True},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(serving[0]),
            "tlsPrivateKeyFile": str(serving[1]),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{CGROUP}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "clusterDNS": [CLUSTER_DNS],
            "clusterDomain": "cluster.local",
            "resolvConf": str(resolver_file()),
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            # A development machine's disk is fuller than a server's, and images were imported, not pulled: keep them.
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "healthzPort": 0,
            "makeIPTablesUtilChains": False,
            "volumePluginDir": str(self.folder / "volume-plugins"),
            "maxPods": 110,
        }
        file.write_text(json.dumps(configuration, indent=1))
        return file


@dataclass(frozen=True)
class Kubectl:
    """kubectl on one cluster; `kubeconfig` None means the environment's own."""

    kubeconfig: Path | None

    def command(self, *arguments: str) -> list[str]:
        """The whole command line."""
        chosen = ["--kubeconfig", str(self.kubeconfig)] if self.kubeconfig else []
        return [str(binaries.find("kubectl")), *chosen, *arguments]

    def __call__(self, *arguments: str, text: str | None = None) -> str:
        """Run kubectl and return its output; ClusterError with what it said if it fails."""
        result = subprocess.run(
            self.command(*arguments),
            input=text,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **without_proxy()},
        )
        if result.returncode:
            raise ClusterError(f"kubectl {' '.join(arguments)} failed: {result.stderr.strip()}")
        return result.stdout


def without_proxy() -> dict[str, str]:
    """Settings that keep clients from asking a proxy for the node's address; none where no proxy is set."""
    if not any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return {}
    known = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    excepted = ",".join(part for part in (ADDRESS, "127.0.0.1", "localhost", known) if part)
    return {"NO_PROXY": excepted, "no_proxy": excepted}


def resolver_file() -> Path:
    """The list of name servers for pods: systemd's own where it is, for the other names its stub on loopback."""
    behind_stub = Path("/run/systemd/resolve/resolv.conf")
    return behind_stub if behind_stub.exists() else Path("/etc/resolv.conf")


def manifest(name: str, **values: str) -> str:
    """One of the node's own manifests, with ${...} filled in."""
    return Template((paths.MANIFESTS / name).read_text()).substitute(values)


def missing_packages() -> list[str]:
    """The Debian packages whose programs the node needs and this machine lacks."""
    missing = []
    for program, package in PACKAGES.items():
        present = Path(program).exists() if program.startswith("/") else _which(program) is not None
        if not present and package == "containernetworking-plugins":
            present = any(Path(folder, "bridge").exists() for folder in CNI_FOLDERS)
        if not present:
            missing.append(package)
    return missing


def _which(program: str) -> str | None:
    return shutil.which(program, path=ADMINISTRATORS_PATH)


def has_been_here() -> bool:
    """Whether a node of ours runs on this machine, or has left a folder or traces that nobody else leaves."""
    may_have_run = os.uname().sysname == "Linux" and os.geteuid() == 0
    return Node.default().folder.exists() or (may_have_run and hostsystem.is_used())


def obstacles() -> list[str]:
    """What keeps a node from running on this machine; empty if nothing does."""
    found = []
    if os.uname().sysname != "Linux":
        found.append(f"the system is {os.uname().sysname}, not Linux")
    if os.geteuid() != 0:
        found.append("not run as root")
    missing = missing_packages()
    if missing and shutil.which("apt-get") is None:
        found.append(f"missing programs of the packages {', '.join(missing)}, and no apt-get to install them")
    return found or [*_missing_compiler(), *_foreign_rules()]


def _missing_compiler() -> list[str]:
    """What keeps `pause` from being built, which has no release to be downloaded."""
    try:
        if binaries.find("pause").exists():
            return []
    except ClusterError as error:
        # Nothing is known of this machine's architecture.
        return [str(error)]
    try:
        binaries.go()
    except ClusterError:
        return [f"Go {versions.GO} is not installed (https://go.dev/dl)"]
    return []


def _foreign_rules() -> list[str]:
    """What says that another node runs here. Two kube-proxies remove each other's rules, and `down` removes both's."""
    try:
        rules = [] if has_been_here() else hostsystem.rules_left()
    except ClusterError as error:
        return [str(error)]
    return [f"another node or CNI has netfilter rules on this machine: {', '.join(rules[:3])}"] if rules else []
