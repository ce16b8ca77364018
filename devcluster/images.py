"""Every image of the development cluster: how it is made on this machine, and how it gets into the cluster."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from devcluster import artifacts, binaries, build, containerd, paths, versions
from devcluster.build import RECIPES, Buildah, Recipe
from devcluster.errors import ClusterError
from devcluster.node import PAUSE_IMAGE, SEARCH_PATH, Node
from devcluster.oci import Blob, Image, write_layer
from devcluster.progress import step

COREDNS_IMAGE = f"docker.io/coredns/coredns:{versions.COREDNS}"
# One buildah at a time: two of them would make the same base and the same heavy layer side by side.
_building = threading.Lock()


def folder() -> Path:
    """Where layers are kept that are no build's."""
    made = paths.cache() / "images"
    made.mkdir(parents=True, exist_ok=True)
    return made


def _program_image(name: str, place: str, program: Path) -> Image:
    """An image of one program and nothing else."""
    file = folder() / f"{program.parent.name}-{program.name}.tar"
    if file.exists() and file.stat().st_mtime_ns > program.stat().st_mtime_ns:
        layer = Blob.of_file(file)
    else:
        layer = write_layer(file, {place: program})
    return Image.of_layers(name, [layer], {"Entrypoint": [place], "Env": [f"PATH={SEARCH_PATH}"]})


def pause() -> Image:
    """What holds the namespaces of a pod."""
    return _program_image(PAUSE_IMAGE, "/pause", binaries.find("pause"))


def coredns() -> Image:
    """The cluster's DNS."""
    return _program_image(COREDNS_IMAGE, "/coredns", binaries.find("coredns"))


def versitygw() -> Image:
    """The platform's S3 server, under its upstream name."""
    name = f"docker.io/versity/versitygw:v{versions.VERSITYGW}"
    return _program_image(name, "/usr/local/bin/versitygw", binaries.find("versitygw"))


def traefik() -> Image:
    """The platform's Gateway API implementation, under its upstream name."""
    name = f"docker.io/library/traefik:v{versions.TRAEFIK}"
    return _program_image(name, "/usr/local/bin/traefik", artifacts.traefik())


def prometheus() -> Image:
    """The platform's Prometheus, under its upstream name."""
    name = f"docker.io/prom/prometheus:v{versions.PROMETHEUS}"
    return _program_image(name, "/bin/prometheus", binaries.find("prometheus"))


def load_built(node: Node, image: Callable[[], Image], what: str) -> None:
    """Load an image of a program unless the node has it."""
    made = image()
    if not containerd.has(node, made):
        with step(f"loading the image of {what} into the node") as current:
            current.at(f"{containerd.load(node, made) >> 20} MiB")


def base() -> Path:
    """The Debian root file system that the node's images stand on."""
    file = build.base_file()
    if not file.exists():
        with step(f"making a base image of Debian {versions.DEBIAN} with Python") as current:
            build.make_base(current)
    return file


def build_for_node(recipe: Recipe) -> Image:
    """Build an image by buildah unless its sources are as they were the last time."""
    buildah = Buildah.default()
    note = buildah.folder / f"{recipe.short}.json"
    digest = recipe.digest()
    with _building:
        try:
            noted = json.loads(note.read_text())
            if noted["sources"] == digest:
                image = Image.of_layout(recipe.name, buildah.layout, recipe.short)
                if image.manifest.digest == noted["manifest"]:
                    return image
        except (FileNotFoundError, KeyError, StopIteration, ValueError):
            pass
        root = base()
        with step(f"building {recipe.name} from {recipe.dockerfile} with buildah") as current:
            image = buildah.build(recipe, buildah.ensure_base(root), current)
        note.write_text(json.dumps({"sources": digest, "manifest": image.manifest.digest}))
    return image


def load_into_node(node: Node, image: Image) -> None:
    """Load a built image unless the node has it; say how much had to be moved."""
    if containerd.has(node, image):
        return
    with step(f"loading {image.name} into the node") as current:
        moved = containerd.load(node, image)
        current.at(f"{moved >> 20} MiB moved")


def load_into_kind(cluster: str, recipe: Recipe) -> None:
    """Build an image by the Docker engine and load it into a kind cluster."""
    with step(f"building {recipe.name} from {recipe.dockerfile} with docker") as current:
        build.docker_build(recipe, current)
    with step(f"loading {recipe.name} into kind"):
        loaded = subprocess.run(
            ["kind", "load", "docker-image", recipe.name, "--name", cluster],
            capture_output=True,
            text=True,
            check=False,
        )
    if loaded.returncode:
        raise ClusterError(f"kind load docker-image {recipe.name} failed: {loaded.stderr.strip()}")


def recipes(names: Sequence[str]) -> list[Recipe]:
    """Recipes by short name, all of them if none is named; ClusterError for a name that is none."""
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise ClusterError(f"no such image: {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    return [RECIPES[name] for name in names or RECIPES]
