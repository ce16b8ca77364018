"""Programs: from downloads that are what their release says, or from modules."""

import hashlib
import http.server
import io
import tarfile
import threading

import pytest

from devcluster import binaries
from devcluster.binaries import Release
from devcluster.errors import ClusterError

PROGRAM = b"\x7fELF and so on"


def archive() -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w:gz") as opened:
        entry = tarfile.TarInfo("tool-v1/tool")
        entry.size = len(PROGRAM)
        opened.addfile(entry, io.BytesIO(PROGRAM))
    return output.getvalue()


@pytest.fixture
def site():
    """A release site on a loopback port: a dictionary of path -> content, and its address."""
    served: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = served.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield served, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_archive_gives_the_programs_it_holds(site, tmp_path):
    served, address = site
    served["/tool.tar.gz"] = archive()
    served["/sums"] = f"{'0' * 64}  other.tar.gz\n{hashlib.sha256(archive()).hexdigest()}  tool.tar.gz\n".encode()
    binaries.fetch_release(Release(f"{address}/tool.tar.gz", f"{address}/sums", {"tool": "tool-v1/tool"}), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tool"]
    assert (tmp_path / "tool").read_bytes() == PROGRAM


@pytest.mark.parametrize("program", binaries.programs(), ids=lambda program: program.tool)
def test_go_writes_each_program_under_its_name(program, tmp_path):
    output = binaries.output_path(program, tmp_path)
    for name, package in program.packages.items():
        # Into a folder Go writes a program under its package's last name.
        written = output / package.rpartition("/")[2] if output == tmp_path else output
        assert written == tmp_path / name


def test_a_bare_program_with_a_bare_sum(site, tmp_path):
    served, address = site
    served["/kubectl"] = PROGRAM
    served["/kubectl.sha256"] = hashlib.sha256(PROGRAM).hexdigest().encode()
    binaries.fetch_release(Release(f"{address}/kubectl", f"{address}/kubectl.sha256", {"kubectl": ""}), tmp_path)
    assert (tmp_path / "kubectl").read_bytes() == PROGRAM


def test_a_download_that_is_not_what_the_release_says_is_refused(site, tmp_path):
    served, address = site
    served["/kubectl"] = PROGRAM + b"!"
    served["/kubectl.sha256"] = hashlib.sha256(PROGRAM).hexdigest().encode()
    with pytest.raises(ClusterError, match="kubectl has the sha256 sum"):
        binaries.fetch_release(Release(f"{address}/kubectl", f"{address}/kubectl.sha256", {"kubectl": ""}), tmp_path)
    assert not (tmp_path / "kubectl").exists()


def test_a_release_that_is_not_there_says_what_to_do(site, tmp_path):
    _served, address = site
    with pytest.raises(ClusterError, match="ATTUNE_BINARIES=build"):
        binaries.fetch_release(Release(f"{address}/gone", f"{address}/gone.sha256", {"gone": ""}), tmp_path)


def test_a_list_of_sums_without_the_file_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ClusterError, match="does not name a"):
        binaries.check_sum(tmp_path / "a", "a", f"{'0' * 64}  b\n{'1' * 64}  c\n")


def test_unknown_programs_are_named():
    with pytest.raises(ClusterError, match="no such programs: docker"):
        binaries.ensure(["docker"])


def test_every_program_of_a_release_is_found_in_it():
    for program in binaries.programs():
        held = {name for release in program.releases for name in release.members}
        assert held == (set(program.packages) if program.releases else set()), program.tool


def test_another_version_lives_in_another_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTUNE_CACHE", str(tmp_path))
    folders = {program.folder for program in binaries.programs()}
    monkeypatch.setattr("devcluster.versions.HELM", "3.0.0")
    changed = {program.folder for program in binaries.programs()}
    assert {folder.name.rpartition("-")[0] for folder in changed - folders} == {"helm-3.0.0"}
