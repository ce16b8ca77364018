"""etcd, kube-apiserver and kube-controller-manager as plain processes on free loopback ports; no root needed.

The tests' way in:

    kubeconfig = controlplane.start(state)   # provides the programs, starts what does not run yet, waits until ready
    ...
    controlplane.stop(state)                 # ends the processes and removes `state`
"""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from devcluster import binaries, paths
from devcluster.errors import ClusterError
from devcluster.pki import Authority
from devcluster.processes import Supervised, tail, wait_until
from devcluster.progress import step
from devcluster.supervisor import Daemon, Specification

PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
SERVICE_RANGE = "10.96.0.0/16"
KUBERNETES_SERVICE = "10.96.0.1"
POD_RANGE = "10.244.0.0/16"
READY_SECONDS = 120.0


@dataclass(frozen=True)
class ControlPlane:
    """Where one control plane lives: its folder and the address that its API server listens on."""

    folder: Path
    address: str = "127.0.0.1"
    log_folder: Path | None = None

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.folder / "kubeconfig"

    @property
    def authority(self) -> Authority:
        """The certificate authority of this cluster."""
        return Authority(self.folder / "pki")

    @property
    def logs(self) -> Path:
        """The folder of its daemons' logs."""
        return self.log_folder or self.folder / "logs"

    @property
    def server(self) -> str:
        """The URL of the API server."""
        return f"https://{self.address}:{self.ports()['apiserver']}"

    def ports(self) -> dict[str, int]:
        """The ports of this control plane: chosen among the free ones the first time, then the same ever after."""
        file = self.folder / "ports.json"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            names = ("etcd", "etcd-peer", "apiserver", "kube-proxy")
            file.write_text(json.dumps(dict(zip(names, free_ports(len(names)), strict=True))))
        ports: dict[str, int] = json.loads(file.read_text())
        return ports

    def daemons(self) -> tuple[Daemon, ...]:
        """The daemons, with certificates and kubeconfigs made for them."""
        authority, ports = self.authority, self.ports()
        authority.ensure()
        self.logs.mkdir(parents=True, exist_ok=True)
        names = (
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        )
        addresses = sorted({"127.0.0.1", KUBERNETES_SERVICE, self.address})
        hosts = [*(f"DNS:{name}" for name in names), *(f"IP:{address}" for address in addresses)]
        certificate, key = authority.issue("apiserver", common_name="kube-apiserver", hosts=hosts)
        kubelet_client = authority.issue(
            "apiserver-kubelet", common_name="kube-apiserver-kubelet", group="system:masters"
        )
        authority.write_kubeconfig(
            self.kubeconfig, server=self.server, common_name="kubernetes-admin", group="system:masters"
        )
        manager = authority.write_kubeconfig(
            self.folder / "controller-manager.kubeconfig",
            server=self.server,
            common_name="system:kube-controller-manager",
        )
        etcd = f"http://127.0.0.1:{ports['etcd']}"
        return (
            self.daemon(
                "etcd",
                f"--data-dir={self.folder / 'etcd'}",
                # A cluster for development may lose its last second when the machine loses power.
                "--unsafe-no-fsync",
                f"--listen-client-urls={etcd}",
                f"--advertise-client-urls={etcd}",
                f"--listen-peer-urls=http://127.0.0.1:{ports['etcd-peer']}",
                f"--initial-advertise-peer-urls=http://127.0.0.1:{ports['etcd-peer']}",
                f"--initial-cluster=default=http://127.0.0.1:{ports['etcd-peer']}",
            ),
            self.daemon(
                "kube-apiserver",
                f"--etcd-servers={etcd}",
                f"--bind-address={self.address}",
                f"--advertise-address={self.address}",
                # A loopback address cannot be an endpoint of the Service `kubernetes`; without pods nobody asks for it.
                *(("--endpoint-reconciler-type=none",) if self.address.startswith("127.") else ()),
                f"--secure-port={ports['apiserver']}",
                f"--tls-cert-file={certificate}",
                f"--tls-private-key-file={key}",
                f"--client-ca-file={authority.certificate}",
                f"--kubelet-client-certificate={kubelet_client[0]}",
                f"--kubelet-client-key={kubelet_client[1]}",
                f"--kubelet-certificate-authority={authority.certificate}",
                "--kubelet-preferred-address-types=InternalIP",
                f"--service-account-key-file={authority.service_account_key}",
                f"--service-account-signing-key-file={authority.service_account_key}",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-cluster-ip-range={SERVICE_RANGE}",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged=true",
                "--profiling=false",
            ),
            self.daemon(
                "kube-controller-manager",
                f"--kubeconfig={manager}",
                f"--authentication-kubeconfig={manager}",
                f"--authorization-kubeconfig={manager}",
                f"--service-account-private-key-file={authority.service_account_key}",
                f"--root-ca-file={authority.certificate}",
                f"--cluster-cidr={POD_RANGE}",
                "--allocate-node-cidrs=true",
                "--use-service-account-credentials=true",
                "--leader-elect=false",
                "--secure-port=0",
                "--profiling=false",
            ),
        )

    def daemon(self, name: str, *arguments: str) -> Daemon:
        """One of our programs as a daemon that logs into this cluster's folder."""
        return Daemon(name, (str(binaries.find(name)), *arguments), str(self.logs / f"{name}.log"))

    def wait_ready(self, supervised: Supervised) -> None:
        """Wait until the API server says it is ready and the controllers have made the default service account."""

        def ready() -> bool:
            if supervised.identity() is None:
                raise ClusterError(
                    f"the control plane ended; the end of its log:\n{tail(supervised.folder / 'supervisor.log')}"
                )
            return (
                self.get("/readyz") is not None
                and self.get("/api/v1/namespaces/default/serviceaccounts/default") is not None
            )

        try:
            wait_until(ready, seconds=READY_SECONDS, what="the readiness of the API server")
        except ClusterError as error:
            log = self.logs / "kube-apiserver.log"
            raise ClusterError(f"{error}; the end of {log}:\n{tail(log)}") from None

    def get(self, path: str) -> bytes | None:
        """What the API server answers the administrator at `path`; None while it does not answer with success."""
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        context.load_cert_chain(
            *self.authority.issue("kubeconfig", common_name="kubernetes-admin", group="system:masters")
        )
        # Proxies of the environment are for the world outside.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(f"{self.server}{path}", timeout=5) as answer:
                body: bytes = answer.read()
                return body
        except (urllib.error.URLError, OSError):
            return None


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


def default_state() -> Path:
    """Where `up --control-plane` keeps its cluster, apart from the node's."""
    return paths.state() / "control-plane"


def start(state: Path | None = None) -> Path:
    """Start a control plane in `state` unless it runs there already, wait until it is ready, return its kubeconfig."""
    binaries.ensure(PROGRAMS)
    plane = ControlPlane(state or default_state())
    supervised = Supervised(plane.folder)
    specification = Specification(plane.daemons())
    if not supervised.runs(specification):
        with step("starting etcd, kube-apiserver and kube-controller-manager"):
            supervised.start(specification)
            plane.wait_ready(supervised)
    else:
        plane.wait_ready(supervised)
    return plane.kubeconfig


def stop(state: Path | None = None) -> None:
    """End the control plane in `state` and remove the folder."""
    folder = state or default_state()
    Supervised(folder).stop()
    shutil.rmtree(folder, ignore_errors=True)
