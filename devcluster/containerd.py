"""Images into the node's containerd, moving only what it does not have."""

from __future__ import annotations

import subprocess

from devcluster.errors import ClusterError
from devcluster.node import Node
from devcluster.oci import Blob, Image

# Smaller ones travel with the archive.
LARGE = 64 << 20
# Content that no image refers to yet is swept away by containerd's next collection, unless it has this label.
ROOT_LABEL = "containerd.io/gc.root"
ADOPTIONS = 5


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
    held = [blob for blob in image.blobs if blob.size >= LARGE and _hold(node, blob)]
    try:
        return _import(node, image, {blob.digest for blob in held})
    finally:
        for blob in held:
            _label(node, blob, "")


def _import(node: Node, image: Image, held: set[str]) -> int:
    """Import an image whose blobs `held` containerd has; the number of bytes that had to be moved."""
    moved = 0
    broken: BrokenPipeError | None = None
    with subprocess.Popen(
        node.ctr("images", "import", "--local", "-"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdin is not None  # noqa: S101 - PIPE
        assert process.stdout is not None  # noqa: S101 - PIPE
        try:
            with process.stdin:
                moved = image.write_archive(process.stdin, without=held)
        except BrokenPipeError as error:
            # What ctr says about it is the better message.
            broken = error
        said = process.stdout.read().decode(errors="replace").strip()
    if process.returncode or broken:
        raise ClusterError(f"containerd did not take the image {image.name}: {said}")
    return moved


def _hold(node: Node, blob: Blob) -> bool:
    """Give containerd a blob that stays until the label is taken away; False where it has to travel with the image."""
    for _ in range(ADOPTIONS):
        if blob.digest not in _known(node) and not _adopt(node, blob):
            return False
        # A collection may run between the two: then there is nothing to label.
        if _label(node, blob, "attune"):
            return True
    return False


def _label(node: Node, blob: Blob, value: str) -> bool:
    """Set the label that keeps a blob, or remove it by an empty value; False if containerd has no such blob."""
    command = node.ctr("content", "label", blob.digest, f"{ROOT_LABEL}={value}")
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _known(node: Node) -> set[str]:
    """The digests of the content that containerd has."""
    listed = subprocess.run(node.ctr("content", "list", "--quiet"), capture_output=True, text=True, check=False)
    return set(listed.stdout.split())


def _adopt(node: Node, blob: Blob) -> bool:
    """Give containerd a file of the cache by a second name instead of a copy; False where that cannot be done.

    containerd shares content between its namespaces: what lies in its store under the right digest, it takes for its
    own without reading it again.
    """
    if blob.file is None:
        return False
    kind, _, digest = blob.digest.partition(":")
    place = node.folder / "containerd" / "io.containerd.content.v1.content" / "blobs" / kind / digest
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.hardlink_to(blob.file)
    except FileExistsError:
        pass
    except OSError:
        # The cache lies on another file system.
        return False
    expected = ("--expected-digest", blob.digest, "--expected-size", str(blob.size))
    # It takes the whole content for written already and goes to the end of its input, which must be as long.
    with blob.file.open("rb") as content:
        ingested = subprocess.run(
            node.ctr("content", "ingest", *expected, f"attune-{digest}"),
            stdin=content,
            capture_output=True,
            check=False,
        )
    return ingested.returncode == 0
