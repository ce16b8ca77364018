"""How this machine reaches package registries: certificates, indexes and proxies, for builds and downloads alike."""

from __future__ import annotations

import configparser
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
NETWORK = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL")
SYSTEM_CONFIGURATION = (Path("/etc/pip.conf"), Path("/etc/uv/uv.toml"))
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


def ca_bundle() -> Path | None:
    """The certificates that this machine trusts: what its environment names, else the system's bundle."""
    named = [os.environ.get(name, "") for name in ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")]
    return next((Path(file) for file in (*named, *CA_BUNDLES) if file and Path(file).is_file()), None)


def network_settings(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """The package index and proxies that this machine uses, from its environment and pip's and uv's configuration."""
    settings = {name: environment[name] for name in (*NETWORK, *PROXIES) if environment.get(name)}
    parser = configparser.ConfigParser(interpolation=None)
    own = (
        home / ".pip" / "pip.conf",
        home / ".config" / "pip" / "pip.conf",
        Path(environment.get("PIP_CONFIG_FILE", "")),
    )
    parser.read(file for file in (*SYSTEM_CONFIGURATION, *own) if file.suffix == ".conf")
    for option, name in (("index-url", "PIP_INDEX_URL"), ("extra-index-url", "PIP_EXTRA_INDEX_URL")):
        if parser.has_option("global", option):
            settings.setdefault(name, " ".join(parser.get("global", option).split()))
    for file in (*SYSTEM_CONFIGURATION, home / ".config" / "uv" / "uv.toml"):
        if file.suffix == ".toml" and file.is_file():
            loaded = tomllib.loads(file.read_text())
            default = next((index["url"] for index in loaded.get("index", []) if index.get("default")), None)
            if url := default or loaded.get("index-url"):
                settings.setdefault("UV_DEFAULT_INDEX", url)
    uv_index = settings.get("UV_DEFAULT_INDEX") or settings.get("UV_INDEX_URL")
    if pip_index := settings.get("PIP_INDEX_URL"):
        if uv_index is None:
            settings["UV_DEFAULT_INDEX"] = pip_index
    elif uv_index is not None:
        settings["PIP_INDEX_URL"] = uv_index
    return settings
