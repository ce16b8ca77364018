"""Images as files: what is written is what a reader finds."""

import hashlib
import io
import json
import os
import tarfile

import pytest

from devcluster.oci import Blob, Image, write_layer


@pytest.fixture
def layer(tmp_path):
    (tmp_path / "program").write_bytes(b"#!/bin/true\n")
    return write_layer(tmp_path / "layer.tar", {"/usr/bin/program": tmp_path / "program"})


def read_archive(image: Image, without=()):
    output = io.BytesIO()
    written = image.write_archive(output, without=without)
    output.seek(0)
    with tarfile.open(fileobj=output) as archive:
        files = {entry.name: archive.extractfile(entry).read() for entry in archive if entry.isfile()}
    return written, files


def test_a_layer_holds_the_program_where_it_was_asked_for(layer):
    with tarfile.open(layer.file) as archive:
        assert [(entry.name, oct(entry.mode), entry.uid) for entry in archive] == [
            ("usr", "0o755", 0),
            ("usr/bin", "0o755", 0),
            ("usr/bin/program", "0o755", 0),
        ]


def test_the_same_contents_make_the_same_layer(layer, tmp_path):
    os.utime(tmp_path / "program", (1, 1))
    assert write_layer(tmp_path / "again.tar", {"usr/bin/program": tmp_path / "program"}).digest == layer.digest


def test_every_blob_of_an_archive_has_the_digest_that_it_is_named_by(layer):
    image = Image.of_layers("localhost/a:1", [layer], {"Entrypoint": ["/usr/bin/program"]})
    written, files = read_archive(image)
    index = json.loads(files["index.json"])["manifests"][0]
    assert index["annotations"] == {"io.containerd.image.name": "localhost/a:1"}
    blobs = {
        name.removeprefix("blobs/sha256/"): content for name, content in files.items() if name.startswith("blobs/")
    }
    assert {digest: hashlib.sha256(content).hexdigest() for digest, content in blobs.items()} == {d: d for d in blobs}
    manifest = json.loads(blobs[index["digest"].removeprefix("sha256:")])
    config = json.loads(blobs[manifest["config"]["digest"].removeprefix("sha256:")])
    assert config["rootfs"]["diff_ids"] == [layer.digest] == [entry["digest"] for entry in manifest["layers"]]
    assert config["config"] == {"Entrypoint": ["/usr/bin/program"]}
    assert written == sum(map(len, blobs.values()))


def test_what_the_reader_has_does_not_travel(layer):
    image = Image.of_layers("localhost/a:1", [layer], {})
    everything, _files = read_archive(image)
    written, files = read_archive(image, without={layer.digest})
    assert written == everything - layer.size
    assert f"blobs/{layer.digest.replace(':', '/')}" not in files


def test_a_file_that_changed_gets_another_digest(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    first = Blob.of_file(file)
    assert Blob.of_file(file) == first
    file.write_bytes(b"other")
    assert Blob.of_file(file).digest == f"sha256:{hashlib.sha256(b'other').hexdigest()}"


def test_a_layout_gives_the_image_of_the_tag(layer, tmp_path):
    layout = tmp_path / "layout"
    (layout / "blobs" / "sha256").mkdir(parents=True)
    entries = []
    for tag in ("trainer", "inference"):
        image = Image.of_layers(tag, [layer], {"Cmd": [tag]})
        for blob in (*image.blobs, image.manifest):
            content = blob.file.read_bytes() if blob.file else blob.content
            (layout / "blobs" / blob.digest.replace(":", "/")).write_bytes(content)
        note = {"org.opencontainers.image.ref.name": tag}
        entries.append({"digest": image.manifest.digest, "size": image.manifest.size, "annotations": note})
    (layout / "index.json").write_text(json.dumps({"manifests": entries}))
    found = Image.of_layout("localhost/b:1", layout, "trainer")
    assert found.name == "localhost/b:1"
    assert found.manifest == Image.of_layers("trainer", [layer], {"Cmd": ["trainer"]}).manifest
    assert [blob.digest for blob in found.blobs[1:]] == [layer.digest]
