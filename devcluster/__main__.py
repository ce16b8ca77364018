"""The development cluster from the command line: python3 -m devcluster <up|down|status|images|kubeconfig|env>."""

from __future__ import annotations

import argparse
import sys

from devcluster import controlplane
from devcluster.errors import ClusterError
from devcluster.progress import say


def main() -> int:
    """Run one command; its exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m devcluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start the cluster, or make sure that it runs")
    up.add_argument("--control-plane", action="store_true", help="only etcd, kube-apiserver and kube-controller-manager")
    down = commands.add_parser("down", help="stop the cluster and remove every trace of it")
    down.add_argument("--control-plane", action="store_true", help="the one that `up --control-plane` started")
    arguments = parser.parse_args()
    try:
        if arguments.command == "up" and arguments.control_plane:
            say(f"KUBECONFIG={controlplane.start()}")
        elif arguments.command == "down" and arguments.control_plane:
            controlplane.stop()
    except ClusterError as error:
        sys.stderr.write(f"devcluster: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
