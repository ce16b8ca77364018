"""The development cluster from the command line: python3 -m devcluster --help says what there is."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from devcluster import controlplane, up
from devcluster.errors import ClusterError
from devcluster.hostsystem import ADMINISTRATORS_PATH
from devcluster.progress import say


def main() -> int:
    """Run one command; its exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m devcluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up", help="start the cluster, or make sure that it runs")
    start.add_argument("--control-plane", action="store_true", help="only etcd, the API server and the controllers")
    stop = commands.add_parser("down", help="stop the cluster and remove every trace of it")
    stop.add_argument("--control-plane", action="store_true", help="the one that `up --control-plane` started")
    commands.add_parser("status", help="what runs")
    load = commands.add_parser("images", help="build Attune's images and load them into the cluster")
    load.add_argument("names", nargs="*", help="operator, trainer, inference; all of them if none is named")
    commands.add_parser("kubeconfig", help="print the path of the kubeconfig")
    commands.add_parser("env", help="print shell commands that make kubectl and helm find the cluster")
    ahead = commands.add_parser("prefetch", help="build the node's programs ahead of `up`; it may be ended at any time")
    ahead.add_argument("--images", action="store_true", help="and the images")
    arguments = parser.parse_args()
    # A shell of `su` finds neither nft nor modprobe, and the daemons inherit what it finds.
    os.environ["PATH"] = ADMINISTRATORS_PATH
    try:
        return _run(arguments)
    except ClusterError as error:
        sys.stderr.write(f"devcluster: {error}\n")
        return 1


def _run(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "up" if arguments.control_plane:
            say(f"KUBECONFIG={controlplane.start()}")
        case "up":
            up.up()
        case "down" if arguments.control_plane:
            controlplane.stop()
        case "down":
            up.down()
        case "status":
            return up.status()
        case "prefetch":
            # So that the compiler's output folder is removed; what was compiled is kept, and `up` goes on from there.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
            up.prefetch(with_images=arguments.images)
        case "images":
            up.load_images(arguments.names)
        case "kubeconfig":
            say(str(up.kubeconfig() or ""))
        case "env":
            say(up.environment())
    return 0


if __name__ == "__main__":
    sys.exit(main())
