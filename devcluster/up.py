"""`up`, `down` and `status`: which cluster it is to be, and everything that makes it one."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from devcluster import artifacts, binaries, controlplane, images, node, paths
from devcluster.errors import ClusterError
from devcluster.node import Kubectl, Node, manifest
from devcluster.processes import run_logged
from devcluster.progress import say, seconds, step

KIND_CLUSTER = "attune"
TOOLS = ("kubectl", "helm")
ROLLOUT_SECONDS = 300
# A node starts with the first; the others are provided while it does.
FIRST_PROGRAMS = (*node.PROGRAMS, "pause", "coredns")
OTHER_PROGRAMS = ("versitygw", "prometheus", "helm")


@dataclass(frozen=True)
class Choice:
    """Which cluster it is to be ("current", "kind" or "node"), and why."""

    kind: str
    reason: str


def choose() -> Choice:
    """Decide by ATTUNE_CLUSTER, else by what this machine has; ClusterError names what is missing for each way."""
    wanted = os.environ.get("ATTUNE_CLUSTER", "")
    if wanted not in {"", "current", "kind", "node"}:
        raise ClusterError(f"ATTUNE_CLUSTER is {wanted!r}; it may be current, kind or node")
    if wanted == "current":
        return Choice("current", "ATTUNE_CLUSTER says so")
    kind_missing, node_missing = kind_obstacles(), node.obstacles()
    if wanted == "kind" or (not wanted and not kind_missing):
        if kind_missing:
            raise ClusterError(f"ATTUNE_CLUSTER asks for kind, but {'; '.join(kind_missing)}")
        return Choice("kind", "ATTUNE_CLUSTER says so" if wanted else "a Docker engine answers")
    if not node_missing:
        return Choice(
            "node", "ATTUNE_CLUSTER says so" if wanted else f"{'; '.join(kind_missing)}; this is Linux, as root"
        )
    if wanted:
        raise ClusterError(f"ATTUNE_CLUSTER asks for a node, but: {'; '.join(node_missing)}")
    raise ClusterError(
        "no cluster can be made here. Any of these is enough:\n"
        "  - ATTUNE_CLUSTER=current, to use the cluster that kubectl talks to now\n"
        f"  - kind, but: {'; '.join(kind_missing)}\n"
        f"  - one node from Kubernetes' own programs, but: {'; '.join(node_missing)}"
    )


def kind_obstacles() -> list[str]:
    """What keeps kind from running here; empty if nothing does."""
    missing = []
    if shutil.which("docker") is None:
        missing.append("docker is not installed")
    elif subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=30).returncode:
        missing.append("no Docker engine answers")
    if shutil.which("kind") is None:
        missing.append("kind is not installed")
    return missing


def up() -> None:
    """Make sure that the cluster runs, with the platform and Attune's images in it."""
    began = time.monotonic()
    choice = choose()
    say(f"cluster: {choice.kind} ({choice.reason})")
    {"current": _up_current, "kind": _up_kind, "node": _up_node}[choice.kind]()
    _note_choice(choice.kind)
    say(f'up after {seconds(time.monotonic() - began)}; to use it: eval "$(python3 -m devcluster env)"')


def _up_current() -> None:
    binaries.ensure(TOOLS)
    kubectl = Kubectl(None)
    context = kubectl("config", "current-context").strip()
    say(f"  using the context {context}")
    if context.startswith("kind-") and not kind_obstacles():
        for recipe in images.recipes(()):
            images.load_into_kind(context.removeprefix("kind-"), recipe)
    else:
        names = ", ".join(recipe.name for recipe in images.recipes(()))
        say(f"  images: build and push {names} to a registry of this cluster's, and name them in the chart's values")
    apply_platform(kubectl)


def _up_kind() -> None:
    binaries.ensure(TOOLS)
    existing = subprocess.run(["kind", "get", "clusters"], capture_output=True, text=True, check=False).stdout.split()
    kubeconfig = paths.state() / "kind" / "kubeconfig"
    kubeconfig.parent.mkdir(parents=True, exist_ok=True)
    if KIND_CLUSTER not in existing:
        with step("creating a kind cluster"):
            run_logged(
                [
                    *("kind", "create", "cluster", "--config", str(paths.REPOSITORY / "kind-config.yaml")),
                    *("--name", KIND_CLUSTER, "--kubeconfig", str(kubeconfig), "--wait", "120s"),
                ],
                paths.logs() / "kind.log",
                what="kind create cluster",
            )
    run_logged(
        ["kind", "export", "kubeconfig", "--name", KIND_CLUSTER, "--kubeconfig", str(kubeconfig)],
        paths.logs() / "kind.log",
        what="kind export kubeconfig",
    )
    for recipe in images.recipes(()):
        images.load_into_kind(KIND_CLUSTER, recipe)
    apply_platform(Kubectl(kubeconfig))


def _up_node() -> None:
    ensure_packages()
    current = Node.default()
    # Compiling keeps the processors busy, images the network and the disk: side by side they take little longer.
    with ThreadPoolExecutor() as pool:
        programs = pool.submit(binaries.ensure, FIRST_PROGRAMS)
        built = pool.submit(lambda: [images.build_for_node(recipe) for recipe in images.recipes(())])
        downloads = pool.submit(lambda: (artifacts.traefik(), artifacts.gateway_api()))
        programs.result()
        # Side by side: each has a large package or two that one processor compiles while the other would wait.
        rest = [pool.submit(binaries.ensure, [name]) for name in OTHER_PROGRAMS]
        current.start()
        images.load_built(current, images.pause, "pause")
        images.load_built(current, images.coredns, "CoreDNS")
        current.wait_ready()
        current.kubectl("apply", "-f", "-", text=manifest("coredns.yaml", image=images.COREDNS_IMAGE))
        for image in built.result():
            images.load_into_node(current, image)
        downloads.result()
        images.load_built(current, images.traefik, "Traefik")
        for other in rest:
            other.result()
        images.load_built(current, images.versitygw, "versitygw")
        images.load_built(current, images.prometheus, "Prometheus")
    apply_platform(current.kubectl)
    _wait_rollouts(current.kubectl, {"kube-system": "coredns"})


def prefetch(*, with_images: bool) -> None:
    """Provide the programs that a node will need, and its images, where it is to be a node."""
    if choose().kind != "node":
        return
    binaries.ensure([*FIRST_PROGRAMS, *OTHER_PROGRAMS])
    if with_images:
        ensure_packages()
        for recipe in images.recipes(()):
            images.build_for_node(recipe)


def ensure_packages() -> None:
    """Install the Debian packages that the node and its images need and this machine lacks."""
    missing = node.missing_packages()
    if not missing:
        return
    with step(f"installing Debian's {', '.join(missing)}") as current:
        log = paths.logs() / "packages.log"
        current.at("apt-get update")
        run_logged(["apt-get", "update"], log, what="apt-get update")
        current.at("apt-get install")
        run_logged(
            [
                *("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--yes", "--no-install-recommends"),
                *missing,
            ],
            log,
            what=f"installing {', '.join(missing)}",
        )


def apply_platform(kubectl: Kubectl) -> None:
    """Apply the Gateway API's CRDs and examples/platform, and wait until its parts answer."""
    with step("applying examples/platform"):
        kubectl("apply", "--server-side", "--force-conflicts", "-f", str(artifacts.gateway_api()))
        kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd/httproutes.gateway.networking.k8s.io")
        kubectl("apply", "--server-side", "--force-conflicts", "-k", str(paths.PLATFORM_MANIFESTS))
    _wait_rollouts(kubectl, {"storage": "s3", "monitoring": "prometheus", "gateway": "traefik"})


def _wait_rollouts(kubectl: Kubectl, deployments: dict[str, str]) -> None:
    with step(f"waiting for {', '.join(deployments.values())}") as current:
        for namespace, name in deployments.items():
            current.at(name)
            kubectl(
                "wait",
                "--for=condition=Available",
                f"deployment/{name}",
                "-n",
                namespace,
                f"--timeout={ROLLOUT_SECONDS}s",
            )


def load_images(names: list[str]) -> None:
    """Build Attune's images anew where their sources changed, and load them into the cluster that runs."""
    kind = _noted_choice()
    for recipe in images.recipes(names):
        if kind == "node":
            images.load_into_node(Node.default(), images.build_for_node(recipe))
        elif kind == "kind":
            images.load_into_kind(KIND_CLUSTER, recipe)
        else:
            raise ClusterError(
                "images are loaded into the node and into kind only; push them to your cluster's registry"
            )


def down() -> None:
    """Remove the cluster and every trace of it; the cache, with what can be used again, stays."""
    # Rules alone may be another node's, which is none of our business.
    if node.has_been_here():
        with step("removing the node: processes, mounts, links, rules, control groups, files"):
            Node.default().stop()
    if (paths.state() / "kind").exists():
        with step("deleting the kind cluster"):
            run_logged(
                ["kind", "delete", "cluster", "--name", KIND_CLUSTER],
                paths.logs() / "kind.log",
                what="kind delete cluster",
            )
        shutil.rmtree(paths.state() / "kind", ignore_errors=True)
    if _noted_choice() == "current":
        say("the cluster is not ours and stays; to remove what was put into it:")
        say("  helm uninstall attune -n attune-system; kubectl delete -k examples/platform")
    _choice_file().unlink(missing_ok=True)
    if controlplane.default_state().exists():
        return
    shutil.rmtree(paths.logs(), ignore_errors=True)
    try:
        paths.state().rmdir()
    except OSError:
        # Somebody else's files, or never made.
        return


def status() -> int:
    """Say what runs; 0 if the cluster answers, else 1."""
    kind = _noted_choice()
    if kind == "":
        say("no cluster: make up starts one")
        return 1
    say(f"cluster: {kind}")
    if chosen := kubeconfig():
        say(f"KUBECONFIG={chosen}")
    say(f"logs: {paths.logs()}")
    if kind == "node":
        identity = Node.default().supervised.identity()
        say(f"node: {'runs, process ' + str(identity.pid) if identity else 'does not run; make up starts it again'}")
        if identity is None:
            return 1
    try:
        kubectl = Kubectl(kubeconfig())
        say(kubectl("get", "nodes", "-o", "wide").rstrip())
        say(kubectl("get", "pods", "-A").rstrip())
    except ClusterError as error:
        say(str(error))
        return 1
    return 0


def kubeconfig() -> Path | None:
    """The kubeconfig of the cluster that is up; None for the environment's own."""
    kind = _noted_choice()
    if kind == "kind":
        return paths.state() / "kind" / "kubeconfig"
    return Node.default().plane.kubeconfig if kind == "node" else None


def environment() -> str:
    """Shell commands that make kubectl and helm find the cluster."""
    lines = []
    if chosen := kubeconfig():
        lines.append(f'export KUBECONFIG="{chosen}"')
        lines += [f'export {name}="{value}"' for name, value in node.without_proxy().items()]
    lines.append(f'export PATH="{paths.cache() / "bin"}:$PATH"')
    return "\n".join(lines)


def _choice_file() -> Path:
    return paths.state() / "cluster"


def _note_choice(kind: str) -> None:
    _choice_file().parent.mkdir(parents=True, exist_ok=True)
    _choice_file().write_text(kind)


def _noted_choice() -> str:
    """Which cluster is up: "node", "kind", "current" or "" for none."""
    try:
        return _choice_file().read_text()
    except FileNotFoundError:
        return "node" if Node.default().supervised.identity() else ""
