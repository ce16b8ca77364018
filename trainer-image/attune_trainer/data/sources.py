"""Sources of a Dataset: which utterances they list, before any audio is read."""

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from attune.contract.environment import source_variable
from attune.contract.job import ChannelUse, PrepareSource, SourceFormat, SplitBy

from attune_trainer.data.audio import AUDIO_SUFFIXES
from attune_trainer.data.files import LINE_BYTES, SourceFile, StoreOrigin, VolumeOrigin, is_showable
from attune_trainer.data.kaldi import list_kaldi
from attune_trainer.data.listed import (
    ListedUtterance,
    Wanted,
    clean_text,
)
from attune_trainer.data.manifest import list_directory, list_manifest
from attune_trainer.data.rejections import RejectedLine, Rejections
from attune_trainer.data.shards import is_shard, list_members
from attune_trainer.data.stm import list_stm
from attune_trainer.data.subtitles import list_subtitles
from attune_trainer.failures import InvalidInput, NotFound
from attune_trainer.store import Store

__all__ = ["AUDIO_SUFFIXES", "ListedUtterance", "OpenSource", "list_utterances", "open_source", "read_text"]

# What a listing holds in memory; more belongs into several Datasets.
_FILES = 4_000_000


@dataclass(frozen=True)
class OpenSource:
    """A source and the folder it is read from."""

    index: int
    source: PrepareSource
    origin: StoreOrigin | VolumeOrigin

    @property
    def uri(self) -> str:
        """The folder as s3://bucket/prefix/ or pvc://claim/path."""
        if isinstance(self.origin, StoreOrigin):
            return self.origin.store.uri(self.origin.folder)
        return self.source.uri

    @property
    def name(self) -> str:
        """The folder's own name, for what lies at its top."""
        return posixpath.basename(self.uri.rstrip("/"))


def open_source(index: int, source: PrepareSource, store: Store) -> OpenSource:
    """Finds the store that serves a source, or its volume.

    A source's own Secret may leave out endpoint and region, which are then the namespace's store's.

    Raises:
        RecipeFailure: InvalidUri, SourceEmpty, or what Store raises about its configuration.
    """
    if source.volume is not None:
        claim = source.uri.removeprefix("pvc://").partition("/")[0]
        return OpenSource(index, source, VolumeOrigin(Path(source.volume.mount), source.volume.path, claim))
    if not source.uri.startswith("s3://"):
        raise InvalidInput("InvalidUri", f"source {source.uri} is no s3://bucket/prefix")
    bucket, prefix = store.locate(source.uri)
    folder = prefix if not prefix or prefix.endswith("/") else f"{prefix}/"
    if source.credentials_index is None:
        return OpenSource(index, source, StoreOrigin(store.for_bucket(bucket), folder))
    own = Store.from_environment(source_variable(source.credentials_index, "ATTUNE_STORE_"), bucket=bucket, like=store)
    return OpenSource(index, source, StoreOrigin(own, folder))


def list_utterances(
    opened: OpenSource, by: SplitBy, slices: tuple[str, ...], scratch: Path, rejections: Rejections
) -> Iterator[ListedUtterance]:
    """Lists a source's utterances; lines and files that cannot be used are added to the rejections.

    Args:
        opened: the source.
        by: the label that never crosses splits.
        slices: names of the labels to read.
        scratch: an empty directory, where compressed shards are unpacked and stay as long as utterances are read.
        rejections: takes what is left out.

    Raises:
        RecipeFailure: SourceEmpty, ManifestNotFound, TooManyFiles, BucketNotFound and the store's other failures.
    """
    source = opened.source
    wanted = Wanted(by, slices, per_speaker=source.channels is ChannelUse.PER_SPEAKER)
    files = _list_files(opened, scratch, rejections)
    match source.format:
        case SourceFormat.MANIFEST:
            return list_manifest(opened.index, opened.uri, source.manifest or "", files, wanted, rejections)
        case SourceFormat.DIRECTORY:
            return list_directory(opened.index, opened.uri, opened.name, files, wanted, rejections)
        case SourceFormat.KALDI:
            return list_kaldi(opened.index, opened.uri, files, wanted, rejections)
        case SourceFormat.STM:
            return list_stm(opened.index, opened.uri, files, wanted, rejections)
        case SourceFormat.WEB_VTT:
            return list_subtitles(opened.index, opened.uri, files, wanted, rejections)


def _list_files(opened: OpenSource, scratch: Path, rejections: Rejections) -> dict[str, SourceFile]:
    """Lists all files by name, those in shards below the shard's.

    Raises:
        RecipeFailure: SourceEmpty, TooManyFiles, and the store's.
    """
    files: dict[str, SourceFile] = {}
    shards = 0
    for file in opened.origin.list_files():
        if opened.source.tar_shards and is_shard(file.name):
            shards += 1
            unpacked = scratch / f"{opened.index}-{shards}"
            for member in list_members(file, unpacked, opened.index, rejections):
                _add(opened, files, member)
        elif is_showable(file.name):
            _add(opened, files, file)
        else:  # no manifest, report or status could name it
            rejections.add("NameNotPrintable", opened.index, 0, file.name)
    if not files and not rejections.count:
        raise NotFound("SourceEmpty", f"there is nothing below {opened.uri}; upload the audio or correct the address")
    return files


def _add(opened: OpenSource, files: dict[str, SourceFile], file: SourceFile) -> None:
    if len(files) >= _FILES:
        raise InvalidInput(
            "TooManyFiles", f"there are more than {_FILES} files below {opened.uri}; divide them among several Datasets"
        )
    files[file.name] = file


def read_text(listed: ListedUtterance) -> str:
    """Gives an utterance's transcript, from its sidecar where it has one.

    Raises:
        RejectedLine: NotUtf8, LacksText, TextTooLong, ControlCharacters.
    """
    if listed.sidecar is None:
        return listed.text or ""
    if listed.sidecar.size > LINE_BYTES:
        raise RejectedLine("TextTooLong")
    try:
        text = listed.sidecar.read(LINE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RejectedLine("NotUtf8") from None
    except NotFound:
        raise RejectedLine("LacksText") from None
    return clean_text(text)
