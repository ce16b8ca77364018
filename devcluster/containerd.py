"""Images into the node's containerd, moving only what it does not have."""

from __future__ import annotations

import subprocess

from devcluster.errors import ClusterError
from devcluster.node import Node
from devcluster.oci import Image


def has(node: Node, image: Image) -> bool:
    """Whether containerd knows this very image under its name."""
    listed = subprocess.run(
        node.ctr("images", "list", f"name=={image.name}"), capture_output=True, text=True, check=False
    ).stdout
    return image.manifest.digest in listed


def load(node: Node, image: Image) -> int:
    """Import and unpack an image unless the node has it; the number of bytes that had to be moved."""
    if has(node, image):
        return 0
    known = subprocess.run(node.ctr("content", "list", "--quiet"), capture_output=True, text=True, check=False).stdout
    process = subprocess.Popen(
        node.ctr("images", "import", "--local", "-"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin is not None  # noqa: S101 - PIPE
    assert process.stdout is not None  # noqa: S101 - PIPE
    moved, broken = 0, None
    try:
        with process.stdin:
            moved = image.write_archive(process.stdin, without=set(known.split()))
    except BrokenPipeError as error:
        # What ctr says about it is the better message.
        broken = error
    said = process.stdout.read().decode(errors="replace").strip()
    if process.wait() or broken:
        raise ClusterError(f"containerd did not take the image {image.name}: {said}")
    return moved
