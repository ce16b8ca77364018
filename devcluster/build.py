"""Attune's images from the repository's own Dockerfiles, by docker or by buildah."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from devcluster import paths, versions
from devcluster.errors import ClusterError
from devcluster.network import ca_bundle, network_settings
from devcluster.oci import Blob, Image
from devcluster.processes import run_logged, tail
from devcluster.progress import Step

# Room in memory that a build's copies of the heavy layer may take, and what must be left over besides.
SCRATCH_BYTES = 9 << 30
SPARE_BYTES = 6 << 30
DEBIAN_MIRROR = "http://deb.debian.org/debian"
# The environment's, of the version that requirements/bootstrap.txt pins.
UV = paths.REPOSITORY / ".venv" / "bin" / "uv"


@dataclass(frozen=True)
class Recipe:
    """One image: its name, its Dockerfile and target, and the sources that go into it."""

    short: str
    dockerfile: str
    target: str
    sources: tuple[str, ...]

    @property
    def name(self) -> str:
        """The image's full name."""
        return f"localhost/attune/{self.short}:dev"

    def digest(self) -> str:
        """Changes with anything that goes into the image from this repository."""
        digest = hashlib.sha256(f"{self.target} {accelerator()} {versions.DEBIAN}".encode())
        for source in sorted({self.dockerfile, *self.sources}):
            root = paths.REPOSITORY / source
            files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
            for file in files:
                if "__pycache__" not in file.parts:
                    digest.update(f"{file.relative_to(paths.REPOSITORY)} {file.stat().st_mode:o}\0".encode())
                    digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()


_INSTALL = ("requirements/bootstrap.txt", "trainer-image/install-dependencies")
_TRAINER = (
    "operator/attune/__init__.py",
    "operator/attune/contract",
    "trainer-image",
    "requirements/trainer.txt",
    *_INSTALL,
)
RECIPES = {
    recipe.short: recipe
    for recipe in (
        Recipe("operator", "operator/Dockerfile", "operator", ("operator", "requirements/operator.txt", *_INSTALL)),
        Recipe("trainer", "trainer-image/Dockerfile", "trainer", _TRAINER),
        Recipe("inference", "trainer-image/Dockerfile", "inference", _TRAINER),
    )
}


def accelerator() -> str:
    """What the images are built for: ATTUNE_ACCELERATOR, or cuda where an NVIDIA device is, else cpu."""
    chosen = os.environ.get("ATTUNE_ACCELERATOR") or ("cuda" if Path("/dev/nvidia0").exists() else "cpu")
    if chosen not in {"cuda", "cpu"}:
        raise ClusterError(f"ATTUNE_ACCELERATOR is {chosen!r}; it may be cuda or cpu")
    return chosen


@contextmanager
def secrets() -> Iterator[list[str]]:
    """Options that pass the CA bundle and the network settings to a build without leaving them in the image."""
    settings = network_settings(os.environ, Path.home())
    with tempfile.NamedTemporaryFile("w", prefix="attune-network-") as file:
        file.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
        file.flush()
        options = ["--secret", f"id=network,src={file.name}"]
        if bundle := ca_bundle():
            options += ["--secret", f"id=ca,src={bundle}"]
        yield options


def docker_build(recipe: Recipe, current: Step) -> None:
    """Build an image by the Docker engine, from the upstream base image."""
    log = paths.logs() / f"image-{recipe.short}.log"
    current.at(f"docker build; its words are in {log}")
    with secrets() as options:
        command = ["docker", "build", *options, "--network", "host", "-f", recipe.dockerfile, "--target", recipe.target]
        command += ["--build-arg", f"ACCELERATOR={accelerator()}", "-t", recipe.name, "."]
        run_logged(
            ["env", "DOCKER_BUILDKIT=1", *command], log, what=f"docker build of {recipe.name}", cwd=paths.REPOSITORY
        )


@dataclass(frozen=True)
class Buildah:
    """buildah with storage of its own in the cache, so that the heavy layer is built once."""

    folder: Path

    @classmethod
    def default(cls) -> Buildah:
        """The one in the cache."""
        return cls(paths.cache() / "buildah")

    @property
    def layout(self) -> Path:
        """The OCI layout that finished images go to; layers that it has are not written again."""
        return self.folder / "layout"

    def command(self, *arguments: str) -> list[str]:
        """A command line with our storage."""
        return ["buildah", "--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run"), *arguments]

    def environment(self) -> dict[str, str]:
        """Storage, isolation, and where the copies of a layer are made on its way into an image."""
        scratch = scratch_folder(self.folder / "scratch")
        scratch.mkdir(parents=True, exist_ok=True)
        return {
            **os.environ,
            "STORAGE_DRIVER": "overlay",
            # No runtime of its own, so that it works inside containers too.
            "BUILDAH_ISOLATION": "chroot",
            "BUILDAH_FORMAT": "oci",
            "TMPDIR": str(scratch),
        }

    def ensure_base(self, base: Path) -> str:
        """Make the base image from a root file system; its name."""
        name = f"localhost/attune/base:{Blob.of_file(base).digest.removeprefix('sha256:')[:12]}"
        known = subprocess.run(
            self.command("images", "--quiet", name), env=self.environment(), capture_output=True, check=False
        )
        if known.returncode == 0 and known.stdout.strip():
            return name
        with tempfile.TemporaryDirectory(dir=base.parent) as context:
            (Path(context) / "base.tar").hardlink_to(base)
            (Path(context) / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
            log = paths.logs() / "image-base.log"
            self._run(["bud", "--layers=false", "-t", name, context], log, what="making the base image", current=None)
        return name

    def build(self, recipe: Recipe, base: str, current: Step) -> Image:
        """Build an image into the layout and return it."""
        tag = recipe.short
        options = ["--layers", "--network", "host", "--build-arg", f"BASE_IMAGE={base}"]
        if "ACCELERATOR" in (paths.REPOSITORY / recipe.dockerfile).read_text():
            options += ["--build-arg", f"ACCELERATOR={accelerator()}"]
        options += ["--volume", f"{uv_cache()}:/run/uv-cache"]
        if UV.exists():
            options += ["--volume", f"{UV.parent}:/run/uv:ro"]
        with secrets() as passed:
            self._run(
                [
                    *("bud", *options, *passed, "-f", recipe.dockerfile, "--target", recipe.target),
                    *("-t", f"oci:{self.layout}:{tag}", "."),
                ],
                paths.logs() / f"image-{recipe.short}.log",
                what=f"building {recipe.name}",
                current=current,
            )
        return Image.of_layout(recipe.name, self.layout, tag)

    def _run(self, arguments: list[str], log: Path, *, what: str, current: Step | None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = self.environment()
        with log.open("w") as output:
            with subprocess.Popen(
                self.command(*arguments),
                cwd=paths.REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process:
                for line in process.stdout or ():
                    output.write(line)
                    output.flush()
                    if current is not None and (said := re.match(r"(?:\[\d+/\d+\] )?(STEP .*|COMMIT.*)", line)):
                        current.at(said[1][:70].strip())
            code = process.returncode
        # The mount point of a cache that a Dockerfile asks for; ours is mounted beside it.
        shutil.rmtree(Path(environment["TMPDIR"]) / "buildah-cache", ignore_errors=True)
        if code:
            raise ClusterError(f"{what} failed with exit code {code}; the end of {log}:\n{tail(log)}")


def scratch_folder(fallback: Path) -> Path:
    """Memory where there is plenty of it, for a layer is copied twice on its way and a disk is slow; else a folder."""
    memory = Path("/dev/shm")  # noqa: S108 - buildah makes folders of random names below
    try:
        free = shutil.disk_usage(memory).free
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return fallback
    said = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    available = int(said[1]) << 10 if said else 0
    return memory if free >= SCRATCH_BYTES and available >= SCRATCH_BYTES + SPARE_BYTES else fallback


def uv_cache() -> Path:
    """The cache of uv on this machine, which may hold every package already; one of ours where there is none."""
    folder = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
    if not folder.is_dir():
        folder = paths.cache() / "uv"
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def debian_mirror() -> str:
    """Where Debian's packages come from: ATTUNE_DEBIAN_MIRROR, else what this machine uses, else deb.debian.org."""
    if chosen := os.environ.get("ATTUNE_DEBIAN_MIRROR"):
        return chosen
    if shutil.which("apt-get") is None:
        return DEBIAN_MIRROR
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {versions.DEBIAN}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return listed.stdout.split()[0] if listed.returncode == 0 and listed.stdout.strip() else DEBIAN_MIRROR


def base_file() -> Path:
    """Where the root file system of the node's images is kept."""
    return paths.cache() / "images" / f"base-{versions.DEBIAN}.tar"


def make_base(current: Step) -> None:
    """Make a Debian root file system with Python, as an archive in the cache."""
    file = base_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name("new-" + file.name)
    current.at("mmdebstrap")
    excluded = [f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("doc", "man", "locale", "info")]
    run_logged(
        [
            *("mmdebstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", *excluded),
            # A build that is cut off begins anew, so nothing need reach the disk file by file.
            "--dpkgopt=force-unsafe-io",
            # The machine's own name is nobody's business.
            *("--customize-hook=rm -f $1/etc/hostname $1/etc/resolv.conf", versions.DEBIAN, str(scratch)),
            debian_mirror(),
        ],
        paths.logs() / "image-base.log",
        what="making the base image with mmdebstrap",
    )
    scratch.replace(file)
