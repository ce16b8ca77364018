"""Which index and proxies this machine uses."""

import pytest

from devcluster import network
from devcluster.network import network_settings

INDEX = "https://packages.example.com/simple"


@pytest.fixture
def home(tmp_path):
    (tmp_path / ".config" / "pip").mkdir(parents=True)
    (tmp_path / ".config" / "uv").mkdir(parents=True)
    return tmp_path


@pytest.fixture(autouse=True)
def own_machine(monkeypatch):
    """What the machine that runs the tests has configured is none of their business."""
    monkeypatch.setattr(network, "SYSTEM_CONFIGURATION", ())


def test_pips_index_serves_uv_too(home):
    (home / ".config" / "pip" / "pip.conf").write_text(f"[global]\nindex-url = {INDEX}\n")
    assert network_settings({}, home) == {"PIP_INDEX_URL": INDEX, "UV_DEFAULT_INDEX": INDEX}


def test_uvs_index_serves_pip_too(home):
    (home / ".config" / "uv" / "uv.toml").write_text(f'[[index]]\nurl = "{INDEX}"\ndefault = true\n')
    assert network_settings({}, home) == {"PIP_INDEX_URL": INDEX, "UV_DEFAULT_INDEX": INDEX}


def test_the_environment_goes_before_the_files(home):
    (home / ".config" / "pip" / "pip.conf").write_text("[global]\nindex-url = https://other.example.com\n")
    settings = network_settings({"PIP_INDEX_URL": INDEX, "HTTPS_PROXY": "http://proxy:3128", "LANG": "C"}, home)
    assert settings == {"PIP_INDEX_URL": INDEX, "UV_DEFAULT_INDEX": INDEX, "HTTPS_PROXY": "http://proxy:3128"}


def test_a_machine_without_settings_passes_none(home):
    assert network_settings({}, home) == {}
