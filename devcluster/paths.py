"""Where the development cluster keeps what it may keep (cache) and what belongs to one running cluster (state)."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TOOLS = REPOSITORY / "devcluster" / "tools"
MANIFESTS = REPOSITORY / "devcluster" / "manifests"
PLATFORM_MANIFESTS = REPOSITORY / "examples" / "platform"


def cache() -> Path:
    """The folder of everything that can be made again: binaries, downloads, image layers."""
    return Path(os.environ.get("ATTUNE_CACHE") or Path.home() / ".cache" / "attune")


def state() -> Path:
    """The folder of the running cluster: keys, etcd, containerd, logs, kubeconfig."""
    return Path(os.environ.get("ATTUNE_STATE") or Path.home() / ".local" / "state" / "attune")


def logs() -> Path:
    """The folder of every log: one file for each daemon, build and package installation."""
    return state() / "logs"


def node() -> Path:
    """The folder of the one-node cluster."""
    return state() / "node"
