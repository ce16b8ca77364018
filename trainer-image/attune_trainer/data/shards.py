"""Tar shards: their members as files of the source, whatever the archive tries.

The headers of a shard are read once, its members later from where they lie. A compressed shard is unpacked to the
scratch volume first, as one file and within bounds. Links, devices, absolute paths and paths that lead out are rejected
by name; nothing is ever written under a name of the archive's choosing.
"""

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from attune_trainer.data.files import ScratchOrigin, ShardOrigin, SourceFile, is_showable, relative_name
from attune_trainer.data.rejections import RejectedLine, Rejections

COMPRESSED: Final = (".tar.gz", ".tgz")
SUFFIXES: Final = (".tar", *COMPRESSED)
_READ_BYTES: Final = 256 * 1024
_MEMBERS: Final = 1_000_000
_UNPACKED_BYTES: Final = 64 * 1024**3
# Speech compresses to a third, zeros to a thousandth; whatever is packed tighter than this is no speech.
_RATIO: Final = 100
_RATIO_FROM: Final = 16 * 1024**2  # bytes; small archives of texts may be packed tight
# The longest name, or set of extended attributes, of a member.
_HEADER_BYTES: Final = 64 * 1024
_SIZE_DIGITS: Final = 18
_PAX_TYPES: Final = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_PASSED_OVER: Final = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)
_LINKS: Final = (tarfile.SYMTYPE, tarfile.LNKTYPE)


def is_shard(name: str) -> bool:
    """Tells whether a file is a tar shard, by its name."""
    return name.lower().endswith(SUFFIXES)


def list_members(shard: SourceFile, scratch: Path, source: int, rejections: Rejections) -> Iterator[SourceFile]:
    """Lists the members of a shard as files below its name.

    What cannot be used is added to the rejections: a member by its name, the rest of a damaged archive by the shard's.

    Args:
        shard: a .tar, .tar.gz or .tgz.
        scratch: where a compressed shard is unpacked; nothing may be there yet.
        source: index of the source.
        rejections: takes what is left out.
    """
    damage = None
    if shard.name.lower().endswith(COMPRESSED):
        try:
            size, damage = _unpack(shard, scratch)
        except RejectedLine as rejected:
            scratch.unlink(missing_ok=True)
            rejections.add(rejected.reason, source, 0, shard.name)
            return
        shard = SourceFile(shard.name, size, ScratchOrigin(scratch))
    try:
        yield from _list(shard, source, rejections)
    except RejectedLine as rejected:
        damage = rejected.reason
    if damage is not None:
        rejections.add(damage, source, 0, shard.name)


def _unpack(shard: SourceFile, path: Path) -> tuple[int, str | None]:
    """Unpacks to a file; gives its size, and a reason where the archive is damaged after that.

    Raises:
        RejectedLine: ArchiveTooLarge, of an archive that is packed tighter than any speech too.
    """
    packed = unpacked = 0
    inflater, whole = zlib.decompressobj(wbits=31), False
    with path.open("wb") as sink:
        for piece in shard.pieces():
            packed += len(piece)
            data = piece
            while data:
                try:
                    part = inflater.decompress(data, _READ_BYTES)
                except zlib.error:
                    return unpacked, "ArchiveDamaged"
                unpacked += len(part)
                if unpacked > _UNPACKED_BYTES or (unpacked > _RATIO_FROM and unpacked > _RATIO * packed):
                    raise RejectedLine("ArchiveTooLarge")
                sink.write(part)
                data, whole = inflater.unconsumed_tail, inflater.eof
                if whole:
                    data = inflater.unused_data.lstrip(b"\0")  # another member of the gzip file, or padding
                    inflater = zlib.decompressobj(wbits=31)
    return unpacked, None if whole else "ArchiveDamaged"


class _Headers:
    """Reads headers out of a shard, a stretch at a time."""

    def __init__(self, shard: SourceFile) -> None:
        self._shard = shard
        self._begin = 0
        self._stretch = b""

    def read(self, offset: int, length: int) -> bytes:
        """Reads so many bytes at an offset.

        Raises:
            RejectedLine: ArchiveDamaged, where it ends earlier.
        """
        inside = offset - self._begin
        if not 0 <= inside <= len(self._stretch) - length:
            wanted = min(max(length, _READ_BYTES), self._shard.size - offset)
            if wanted < length:
                raise RejectedLine("ArchiveDamaged")
            self._stretch = self._shard.origin.read_range(self._shard, offset, wanted)
            self._begin, inside = offset, 0
            if len(self._stretch) < length:
                raise RejectedLine("ArchiveDamaged")
        return self._stretch[inside : inside + length]


def _list(shard: SourceFile, source: int, rejections: Rejections) -> Iterator[SourceFile]:
    """Lists members that can be used.

    Raises:
        RejectedLine: ArchiveDamaged, ArchiveTooLarge.
    """
    origin, names = ShardOrigin(shard), set[str]()
    for count, (member, written, size, offset) in enumerate(_walk(shard), start=1):
        if count > _MEMBERS:
            raise RejectedLine("ArchiveTooLarge")
        name = relative_name(written)
        reason = _refuse(member, name, names)
        if name is None or reason is not None:
            rejections.add(reason or "PathLeavesSource", source, count, f"{shard.name}/{written}")
            continue
        names.add(name)
        yield SourceFile(f"{shard.name}/{name}", size, origin, offset)


def _walk(shard: SourceFile) -> Iterator[tuple[tarfile.TarInfo, str, int, int]]:
    """Goes from header to header; yields (header, name, size, offset) of each member that is no folder.

    Raises:
        RejectedLine: ArchiveDamaged.
    """
    headers, position = _Headers(shard), 0
    told: dict[str, str] = {}  # what an extended header says of the next member
    while position < shard.size:
        block = headers.read(position, tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError):
            raise RejectedLine("ArchiveDamaged") from None
        size, offset = _own_size(member, told), position + tarfile.BLOCKSIZE
        position = offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if size < 0 or offset + size > shard.size:
            raise RejectedLine("ArchiveDamaged")
        if member.type == tarfile.GNUTYPE_LONGNAME or member.type in _PAX_TYPES:
            told |= _read_extension(member, headers, offset)
        elif member.type == tarfile.DIRTYPE:
            told = {}
        elif member.type not in _PASSED_OVER:
            yield member, told.get("path", member.name), size, offset
            told = {}
    if not shard.size:
        raise RejectedLine("ArchiveDamaged")


def _own_size(member: tarfile.TarInfo, told: dict[str, str]) -> int:
    if member.type in _LINKS:
        return 0  # a hard link may name its target's size, and has no contents
    text = told.get("size", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _SIZE_DIGITS else member.size


def _refuse(member: tarfile.TarInfo, name: str | None, names: set[str]) -> str | None:
    if member.type in _LINKS:
        return "LinkInArchive"
    if member.type not in tarfile.REGULAR_TYPES or member.type == tarfile.GNUTYPE_SPARSE:
        return "SpecialFileInArchive"
    if name is None:
        return "PathLeavesSource"
    if not is_showable(name):
        return "NameNotPrintable"
    return "RepeatedInArchive" if name in names else None


def _read_extension(member: tarfile.TarInfo, headers: _Headers, offset: int) -> dict[str, str]:
    """Reads the name, or the name and size, that an extended header gives to the next member.

    Raises:
        RejectedLine: ArchiveDamaged.
    """
    if member.size > _HEADER_BYTES:
        raise RejectedLine("ArchiveDamaged")
    raw = headers.read(offset, member.size) if member.size else b""
    if member.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    told = {}
    while raw.strip(b"\0"):
        # A record is "LENGTH KEY=VALUE\n", the length being that of the whole record.
        digits, _, _ = raw.partition(b" ")
        if not digits.isdigit() or len(digits) > 6 or not len(digits) + 3 <= int(digits) <= len(raw):  # noqa: PLR2004
            raise RejectedLine("ArchiveDamaged")
        key, _, value = raw[len(digits) + 1 : int(digits) - 1].partition(b"=")
        if key in {b"path", b"size"}:
            told[key.decode()] = value.decode("utf-8", "surrogateescape")
        raw = raw[int(digits) :]
    return told
