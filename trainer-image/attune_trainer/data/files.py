"""The files of a source, wherever they lie: below a prefix of a bucket, on a volume, in a tar shard of either."""

import errno
import os
import posixpath
import stat
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from attune_trainer.data.audio import AUDIO_SUFFIXES
from attune_trainer.data.rejections import RejectedLine
from attune_trainer.failures import AccessDenied, NotFound
from attune_trainer.store import Store

PIECE_BYTES: Final = 8 * 1024 * 1024
LINE_BYTES: Final = 64 * 1024


class Origin(Protocol):
    """Reads the files of one place."""

    def read_range(self, file: "SourceFile", offset: int, length: int) -> bytes:
        """Reads a part of a file, less where it ends earlier.

        Raises:
            RecipeFailure: NotFound where it is gone, and the place's other failures.
        """

    def download(self, file: "SourceFile", path: Path) -> None:
        """Copies a file's contents to a path."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source.

    Attributes:
        name: its path below the source; what is in shards/1.tar is below "shards/1.tar/".
        size: bytes.
        origin: reads it.
        offset: where it begins in the shard that holds it.
    """

    name: str
    size: int
    origin: Origin
    offset: int = 0

    def read(self, limit: int) -> bytes:
        """Reads the whole of a small file.

        Raises:
            RejectedLine: FileTooLarge.
        """
        if self.size > limit:
            raise RejectedLine("FileTooLarge")
        return self.origin.read_range(self, 0, self.size) if self.size else b""

    def download(self, path: Path) -> None:
        """Copies it to a path."""
        self.origin.download(self, path)

    def pieces(self) -> Iterator[bytes]:
        """Yields its contents in order, in pieces of at most PIECE_BYTES."""
        for offset in range(0, self.size, PIECE_BYTES):
            piece = self.origin.read_range(self, offset, min(PIECE_BYTES, self.size - offset))
            yield piece

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Yields its lines from 1 on, without their ends and a byte order mark; None for one beyond LINE_BYTES.

        However long file and lines are, only a piece of it is in memory.
        """
        number, rest, too_long = 1, b"", False
        for index, piece in enumerate(self.pieces()):
            *whole, rest = (rest + (piece.removeprefix(b"\xef\xbb\xbf") if index == 0 else piece)).split(b"\n")
            for line in whole:
                yield number, None if too_long or len(line) > LINE_BYTES else line.removesuffix(b"\r")
                number, too_long = number + 1, False
            if len(rest) > LINE_BYTES:
                rest, too_long = b"", True
        if rest or too_long:
            yield number, None if too_long else rest.removesuffix(b"\r")


@dataclass(frozen=True)
class StoreOrigin:
    """A prefix in a bucket; folder ends in a slash or is empty."""

    store: Store
    folder: str

    def list_files(self) -> Iterator[SourceFile]:
        """Lists all objects below the folder."""
        for entry in self.store.list_objects(self._key("")):
            yield SourceFile(entry.key.removeprefix(self.folder), entry.size, self)

    def read_range(self, file: SourceFile, offset: int, length: int) -> bytes:
        """Reads a part of an object."""
        return self.store.read_range(self._key(file.name), offset, length)

    def download(self, file: SourceFile, path: Path) -> None:
        """Copies an object to a path."""
        self.store.download_file(self._key(file.name), path)

    def _key(self, name: str) -> str:
        # As an address: a key may itself look like one.
        return self.store.uri(f"{self.folder}{name}")


class VolumeOrigin:
    """A folder of a mounted volume, which nothing in it leads out of: links are not followed."""

    def __init__(self, mount: Path, path: str, claim: str) -> None:
        """Opens the folder.

        Raises:
            RecipeFailure: SourceEmpty where it is not there, AccessDenied where it may not be read.
        """
        self._claim = claim
        self._folder = mount / path
        try:
            inside = self._folder.resolve(strict=True).is_relative_to(mount.resolve(strict=True))
        except OSError as error:
            raise self._failure(error) from error
        if not inside or not self._folder.is_dir():
            raise NotFound(
                "SourceEmpty", f"there is no folder {path or '/'} on claim {claim}; correct the source's path"
            )

    def list_files(self) -> Iterator[SourceFile]:
        """Lists all regular files below the folder, in the order of their names."""
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(self._folder / folder) as entries:
                    found = sorted(entries, key=lambda entry: entry.name, reverse=True)
            except OSError as error:
                raise self._failure(error) from error
            for entry in found:
                name = posixpath.join(folder, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.is_file(follow_symlinks=False):
                    yield SourceFile(name, entry.stat(follow_symlinks=False).st_size, self)

    def read_range(self, file: SourceFile, offset: int, length: int) -> bytes:
        """Reads a part of a file."""
        with self._open(file) as opened:
            opened.seek(offset)
            return opened.read(length)

    def download(self, file: SourceFile, path: Path) -> None:
        """Copies a file to a path."""
        with self._open(file) as opened, path.open("wb") as target:
            while piece := opened.read(PIECE_BYTES):
                target.write(piece)

    def _open(self, file: SourceFile) -> BinaryIO:
        try:
            descriptor = os.open(self._folder / file.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise self._failure(error) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise NotFound("ObjectNotFound", f"a file of claim {self._claim} is no regular file any more")
        return os.fdopen(descriptor, "rb")

    def _failure(self, error: OSError) -> AccessDenied | NotFound:
        if error.errno in {errno.EACCES, errno.EPERM}:
            return AccessDenied(
                "VolumeNotReadable",
                f"files of claim {self._claim} may not be read by user 65532, as which Jobs run; change their mode",
            )
        what = "SourceEmpty" if error.errno == errno.ENOENT else "VolumeNotReadable"
        return NotFound(what, f"claim {self._claim} cannot be read ({error.strerror}); correct the source's path")


@dataclass(frozen=True)
class ShardOrigin:
    """The members of an uncompressed tar shard, read from where it lies."""

    shard: SourceFile

    def read_range(self, file: SourceFile, offset: int, length: int) -> bytes:
        """Reads a part of a member."""
        wanted = min(length, file.size - offset)
        return self.shard.origin.read_range(self.shard, file.offset + offset, wanted)

    def download(self, file: SourceFile, path: Path) -> None:
        """Copies a member to a path."""
        with path.open("wb") as target:
            for piece in file.pieces():
                target.write(piece)


@dataclass(frozen=True)
class ScratchOrigin:
    """What was unpacked of a compressed shard: one file on the scratch volume, members one after another."""

    path: Path

    def read_range(self, file: SourceFile, offset: int, length: int) -> bytes:
        """Reads a part of a member."""
        with self.path.open("rb") as opened:
            opened.seek(file.offset + offset)
            return opened.read(min(length, file.size - offset))

    def download(self, file: SourceFile, path: Path) -> None:
        """Copies a member to a path."""
        with path.open("wb") as target:
            for piece in file.pieces():
                target.write(piece)


def is_showable(name: str) -> bool:
    """Tells whether a file's name can be shown: it has no control characters, and is UTF-8."""
    return all(unicodedata.category(character) not in {"Cc", "Cs"} for character in name)


def audio_names(uri: str, names: Collection[str]) -> list[str]:
    """Lists what is audio by its name, in order.

    Raises:
        RecipeFailure: SourceEmpty.
    """
    found = sorted(name for name in names if name.lower().endswith(AUDIO_SUFFIXES))
    if not found:
        raise NotFound("SourceEmpty", f"there is no audio file below {uri} ({' '.join(AUDIO_SUFFIXES)})")
    return found


def relative_name(name: str) -> str | None:
    """Gives a path below a source in its shortest form; None where it leads out of it."""
    if "\\" in name or "\0" in name or "://" in name or name.startswith("/"):
        return None
    short = posixpath.normpath(name)
    return None if short in {"", "."} or short == ".." or short.startswith("../") else short
