"""versions.py and the tool modules say the same."""

import re

import pytest

from devcluster import binaries, paths, versions

MODULES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kubernetes": "k8s.io/kubernetes",
    "containerd": "github.com/containerd/containerd/v2",
    "coredns": "github.com/coredns/coredns",
    "versitygw": "github.com/versity/versitygw",
    "helm": "helm.sh/helm/v4",
}


def required(tool: str) -> dict[str, str]:
    text = (paths.TOOLS / tool / "go.mod").read_text()
    return dict(re.findall(r"^\s*(?:require )?(\S+\.\S+/\S+) v(\S+)(?: // indirect)?$", text, re.MULTILINE))


@pytest.mark.parametrize("program", binaries.programs(), ids=lambda program: program.tool)
def test_a_program_is_the_version_that_its_module_pins(program):
    if program.tool == "prometheus":
        major, minor, patch = (int(part) for part in program.version.split("."))
        # The module's versions are the releases', squeezed below v1: v3.13.5 is v0.313.5.
        assert required(program.tool)["github.com/prometheus/prometheus"] == f"0.{major * 100 + minor}.{patch}"
    elif program.tool in MODULES:
        assert required(program.tool)[MODULES[program.tool]] == program.version
        assert (paths.TOOLS / program.tool / "go.sum").stat().st_size > 0
    else:
        assert program.tool == "pause", "a program without a pinned module"


def test_the_gateway_api_is_the_version_that_its_module_pins():
    assert required("gateway-api") == {"sigs.k8s.io/gateway-api": versions.GATEWAY_API}


def test_every_staging_module_of_kubernetes_is_its_own_version():
    text = (paths.TOOLS / "kubernetes" / "go.mod").read_text()
    replaced = re.findall(r"^\s*(k8s\.io/\S+) => (\S+) v(\S+)$", text, re.MULTILINE)
    _major, minor, patch = versions.KUBERNETES.split(".")
    assert len(replaced) > 30
    assert {(new, version) for _old, new, version in replaced} == {
        (old, f"0.{minor}.{patch}") for old, _new, _version in replaced
    }


def test_the_platform_names_the_versions_that_its_images_are_made_of():
    manifests = "".join(file.read_text() for file in paths.PLATFORM_MANIFESTS.glob("*.yaml"))
    named = set(re.findall(r"image: (\S+)", manifests))
    assert named == {
        f"docker.io/versity/versitygw:v{versions.VERSITYGW}",
        f"docker.io/prom/prometheus:v{versions.PROMETHEUS}",
        f"docker.io/library/traefik:v{versions.TRAEFIK}",
    }
