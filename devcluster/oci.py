"""Container images as files: layers as plain tar archives, and archives that containerd imports."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from devcluster.binaries import architecture

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
# Not compressed: packing and unpacking would take longer than copying, and nothing leaves the machine.
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
COPY = 1 << 20
TAG_ANNOTATION = "org.opencontainers.image.ref.name"
NAME_ANNOTATION = "io.containerd.image.name"


@dataclass(frozen=True)
class Blob:
    """Content known by its sha256 digest; in a file, or short and in memory."""

    digest: str
    size: int
    file: Path | None = None
    content: bytes = b""

    @classmethod
    def of_bytes(cls, content: bytes) -> Blob:
        """A blob in memory."""
        return cls(f"sha256:{hashlib.sha256(content).hexdigest()}", len(content), content=content)

    @classmethod
    def of_file(cls, file: Path) -> Blob:
        """A blob in a file; the digest is kept beside it and computed only once for each state of the file."""
        note = file.with_name(file.name + ".sha256")
        status = file.stat()
        state = f"{status.st_size} {status.st_mtime_ns}"
        if note.exists():
            digest, _, known = note.read_text().partition(" ")
            if known == state:
                return cls(digest, status.st_size, file)
        with file.open("rb") as opened:
            digest = f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"
        note.write_text(f"{digest} {state}")
        return cls(digest, status.st_size, file)

    def descriptor(self, media_type: str, **more: Any) -> dict[str, Any]:
        """The blob as manifests refer to it."""
        return {"mediaType": media_type, "digest": self.digest, "size": self.size, **more}


@dataclass(frozen=True)
class Image:
    """A named image: a manifest and the blobs that it refers to."""

    name: str
    manifest: Blob
    blobs: tuple[Blob, ...]

    @classmethod
    def of_layers(cls, name: str, layers: Sequence[Blob], settings: Mapping[str, Any]) -> Image:
        """An image of uncompressed layers; `settings` are the config's Entrypoint, Cmd, Env, User and so on."""
        config = Blob.of_bytes(
            _json(
                {
                    "architecture": architecture(),
                    "os": "linux",
                    "config": dict(settings),
                    "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
                }
            )
        )
        manifest = Blob.of_bytes(
            _json(
                {
                    "schemaVersion": 2,
                    "mediaType": MANIFEST_TYPE,
                    "config": config.descriptor(CONFIG_TYPE),
                    "layers": [layer.descriptor(LAYER_TYPE) for layer in layers],
                }
            )
        )
        return cls(name, manifest, (config, *layers))

    @classmethod
    def of_layout(cls, name: str, layout: Path, tag: str) -> Image:
        """The image of a tag in an OCI layout folder, under a name of our choice."""
        index = json.loads((layout / "index.json").read_text())
        described = next(
            entry for entry in index["manifests"] if entry.get("annotations", {}).get(TAG_ANNOTATION) == tag
        )

        def blob(descriptor: Mapping[str, Any]) -> Blob:
            file = layout / "blobs" / descriptor["digest"].replace(":", "/")
            return Blob(descriptor["digest"], descriptor["size"], file)

        manifest = blob(described)
        content = (layout / "blobs" / manifest.digest.replace(":", "/")).read_bytes()
        loaded = json.loads(content)
        return cls(name, Blob.of_bytes(content), tuple(blob(part) for part in (loaded["config"], *loaded["layers"])))

    def write_archive(self, output: IO[bytes], *, without: Collection[str] = ()) -> int:
        """Write an OCI archive as a stream, leaving out blobs that the reader has; the bytes of the blobs in it."""
        index = {
            "schemaVersion": 2,
            "mediaType": INDEX_TYPE,
            "manifests": [self.manifest.descriptor(MANIFEST_TYPE, annotations={NAME_ANNOTATION: self.name})],
        }
        written = 0
        with tarfile.open(fileobj=output, mode="w|", format=tarfile.GNU_FORMAT, bufsize=COPY) as archive:
            archive.copybufsize = COPY  # type: ignore[attr-defined]
            _add(archive, "oci-layout", Blob.of_bytes(_json({"imageLayoutVersion": "1.0.0"})))
            for blob in {blob.digest: blob for blob in (*self.blobs, self.manifest)}.values():
                if blob.digest not in without:
                    _add(archive, f"blobs/{blob.digest.replace(':', '/')}", blob)
                    written += blob.size
            _add(archive, "index.json", Blob.of_bytes(_json(index)))
        return written


def write_layer(file: Path, contents: Mapping[str, Path]) -> Blob:
    """Write a layer that holds programs, path in the image -> file; the same contents make the same layer."""
    scratch = file.with_name(file.name + ".new")
    with tarfile.open(scratch, mode="w", format=tarfile.GNU_FORMAT) as archive:
        folders: set[str] = set()
        for path, source in sorted(contents.items()):
            parts = path.strip("/").split("/")
            for depth in range(1, len(parts)):
                folder = "/".join(parts[:depth])
                if folder not in folders:
                    folders.add(folder)
                    entry = tarfile.TarInfo(folder)
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(entry)
            entry = tarfile.TarInfo("/".join(parts))
            entry.size, entry.mode = source.stat().st_size, 0o755
            with source.open("rb") as opened:
                archive.addfile(entry, opened)
    scratch.replace(file)
    return Blob.of_file(file)


def _add(archive: tarfile.TarFile, name: str, blob: Blob) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = blob.size, 0o644
    if blob.file is None:
        archive.addfile(entry, io.BytesIO(blob.content))
        return
    with blob.file.open("rb") as opened:
        archive.addfile(entry, opened)


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
