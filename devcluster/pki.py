"""A certificate authority, certificates and kubeconfigs for one cluster, made with openssl."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from devcluster.errors import ClusterError

DAYS = "3650"


def _openssl(*arguments: str, text: str | None = None) -> None:
    try:
        result = subprocess.run(["openssl", *arguments], input=text, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise ClusterError("openssl is not installed; install it (Debian: apt-get install openssl)") from None
    if result.returncode:
        raise ClusterError(f"openssl {arguments[0]} failed: {result.stderr.strip()}")


def _key(file: Path) -> None:
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(file))
    file.chmod(0o600)


@dataclass(frozen=True)
class Authority:
    """The certificate authority whose files live in `folder`; what exists is used again."""

    folder: Path

    @property
    def certificate(self) -> Path:
        """The authority's own certificate, which every client and server of the cluster trusts."""
        return self.folder / "ca.crt"

    @property
    def service_account_key(self) -> Path:
        """The key that signs service account tokens."""
        return self.folder / "service-accounts.key"

    def ensure(self) -> None:
        """Make the authority and the service accounts' key if they are not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        if not self.service_account_key.exists():
            _key(self.service_account_key)
        if not self.certificate.exists():
            _key(self.folder / "ca.key")
            _openssl(
                *(
                    "req",
                    "-x509",
                    "-new",
                    "-key",
                    str(self.folder / "ca.key"),
                    "-days",
                    DAYS,
                    "-subj",
                    "/CN=devcluster",
                ),
                *("-addext", "keyUsage=critical,keyCertSign,digitalSignature", "-out", str(self.certificate)),
            )

    def issue(self, name: str, *, common_name: str, group: str = "", hosts: Sequence[str] = ()) -> tuple[Path, Path]:
        """Return (certificate, key) files for a subject; `hosts` are "DNS:..." and "IP:..." names of a server.

        A certificate that exists is used again only if it was issued for the same subject and hosts.
        """
        certificate, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        subject = (f"/O={group}" if group else "") + f"/CN={common_name}"
        extensions = "extendedKeyUsage=clientAuth,serverAuth\n"
        if hosts:
            extensions += f"subjectAltName={','.join(hosts)}\n"
        issued_for = self.folder / f"{name}.subject"
        wanted = f"{subject}\n{extensions}"
        if certificate.exists() and issued_for.exists() and issued_for.read_text() == wanted:
            return certificate, key
        request, extension_file = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extension_file.write_text(extensions)
        _key(key)
        _openssl("req", "-new", "-key", str(key), "-subj", subject, "-out", str(request))
        _openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.certificate), "-CAkey", str(self.folder / "ca.key")),
            *("-CAcreateserial", "-days", DAYS, "-extfile", str(extension_file), "-out", str(certificate)),
        )
        issued_for.write_text(wanted)
        return certificate, key

    def write_kubeconfig(self, file: Path, *, server: str, common_name: str, group: str = "") -> Path:
        """Write a kubeconfig, credentials inside, for one subject of this cluster."""
        certificate, key = self.issue(file.name, common_name=common_name, group=group)
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "attune",
                    "cluster": {"server": server, "certificate-authority-data": _encoded(self.certificate)},
                }
            ],
            "users": [
                {
                    "name": common_name,
                    "user": {"client-certificate-data": _encoded(certificate), "client-key-data": _encoded(key)},
                }
            ],
            "contexts": [{"name": "attune", "context": {"cluster": "attune", "user": common_name}}],
            "current-context": "attune",
        }
        # JSON is YAML; a kubeconfig may be either.
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as output:
            json.dump(content, output, indent=1)
        return file


def _encoded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()
