"""Sources of a Dataset: which utterances they list, before any audio is read."""

import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from attune.contract.environment import source_variable
from attune.contract.job import PrepareSource, SourceFormat, SplitBy

from attune_trainer.data.rejections import RejectedLine, Rejections
from attune_trainer.failures import InvalidInput, NotFound
from attune_trainer.store import Store, StoredObject

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".w64", ".caf")
_LINE_BYTES = 64 * 1024
_TEXT_CHARACTERS = 4000
_LABEL_CHARACTERS = 256


@dataclass(frozen=True)
class ListedUtterance:
    """An utterance as its source lists it.

    Attributes:
        source: index of the source.
        number: of its line or file in the source, from 1.
        place: what a person looks for when it is wrong.
        audio: the audio object.
        text: the transcript; None where it lies in `sidecar`.
        sidecar: the object that holds the transcript.
        speaker: who speaks.
        group: what it was recorded with.
    """

    source: int
    number: int
    place: str
    audio: StoredObject
    text: str | None
    sidecar: StoredObject | None
    speaker: str
    group: str


@dataclass(frozen=True)
class OpenSource:
    """A source with the store it is read from and its folder, which ends in a slash (or is empty: the bucket)."""

    index: int
    source: PrepareSource
    store: Store
    folder: str  # key

    @property
    def uri(self) -> str:
        """The folder as s3://bucket/prefix/."""
        return self.store.uri(self.folder)


def open_source(index: int, source: PrepareSource, store: Store) -> OpenSource:
    """Finds the store that serves a source.

    A source's own Secret may leave out endpoint and region, which are then the namespace's store's.

    Raises:
        RecipeFailure: InvalidUri, or what Store raises about its configuration.
    """
    if not source.uri.startswith("s3://"):
        raise InvalidInput("InvalidUri", f"source {source.uri} is no s3://bucket/prefix")
    bucket, prefix = store.locate(source.uri)
    folder = prefix if not prefix or prefix.endswith("/") else f"{prefix}/"
    if source.credentials_index is None:
        return OpenSource(index, source, store.for_bucket(bucket), folder)
    own = Store.from_environment(source_variable(source.credentials_index, "ATTUNE_STORE_"), bucket=bucket, like=store)
    return OpenSource(index, source, own, folder)


def list_utterances(opened: OpenSource, by: SplitBy, rejections: Rejections) -> Iterator[ListedUtterance]:
    """Lists a source's utterances; lines and files that cannot be used are added to the rejections.

    Raises:
        RecipeFailure: SourceEmpty, ManifestNotFound, BucketNotFound and the store's other failures.
    """
    objects = {entry.key.removeprefix(opened.folder): entry for entry in opened.store.list_objects(opened.folder)}
    if not objects:
        raise NotFound("SourceEmpty", f"there is nothing below {opened.uri}; upload the audio or correct the address")
    if opened.source.format is SourceFormat.MANIFEST:
        return _list_manifest(opened, objects, by, rejections)
    return _list_directory(opened, objects, rejections)


def _list_manifest(
    opened: OpenSource, objects: dict[str, StoredObject], by: SplitBy, rejections: Rejections
) -> Iterator[ListedUtterance]:
    name = opened.source.manifest
    if not name:
        raise InvalidInput("ManifestNotFound", f"source {opened.uri} of format Manifest names no manifest")
    entry = objects.get(_relative_name(name) or "")
    if entry is None:
        raise NotFound("ManifestNotFound", f"there is no {name} below {opened.uri}; upload it or correct its name")
    raw = opened.store.read_bytes(entry.uri)
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not any(line.strip() for line in lines):
        raise NotFound("SourceEmpty", f"{name} below {opened.uri} lists nothing")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            yield _read_line(opened.index, number, place, line, objects, by)
        except RejectedLine as rejected:
            rejections.add(rejected.reason, opened.index, number, place)


def _read_line(
    index: int, number: int, place: str, line: bytes, objects: dict[str, StoredObject], by: SplitBy
) -> ListedUtterance:
    if len(line) > _LINE_BYTES:
        raise RejectedLine("LineTooLong")
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise RejectedLine("NotJson") from None
    if not isinstance(fields, dict):
        raise RejectedLine("NotJson")
    audio_name = _text_field(fields, "audio", "LacksAudio")
    text = _text_field(fields, "text", "LacksText")
    if len(text) > _TEXT_CHARACTERS:
        raise RejectedLine("TextTooLong")
    group = _label_field(fields, "group")
    speaker = _label_field(fields, "speaker")
    if by is SplitBy.SPEAKER and not speaker:
        raise RejectedLine("LacksSpeaker")
    if not speaker and not group:
        raise RejectedLine("LacksGroup")
    name = _relative_name(audio_name)
    if name is None:
        raise RejectedLine("PathLeavesSource")
    audio = objects.get(name)
    if audio is None:
        raise RejectedLine("AudioNotFound")
    return ListedUtterance(index, number, place, audio, text, None, speaker=speaker or group, group=group or speaker)


def _text_field(fields: dict[str, Any], name: str, reason: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RejectedLine(reason)
    _check_writable(value)
    return " ".join(value.split()) if name == "text" else value


def _label_field(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # speaker numbers are often written as numbers
    if not isinstance(value, str) or len(value) > _LABEL_CHARACTERS:
        raise RejectedLine("LabelNotText")
    _check_writable(value)
    return value.strip()


def _check_writable(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, escaped in JSON: no file can hold it
        raise RejectedLine("NotUtf8") from None


def _relative_name(name: str) -> str | None:
    """Gives a path below the source in its shortest form; None where it leads out of it."""
    if "\\" in name or "\0" in name or "://" in name or name.startswith("/"):
        return None
    short = posixpath.normpath(name)
    return None if short in {"", "."} or short == ".." or short.startswith("../") else short


def _list_directory(
    opened: OpenSource, objects: dict[str, StoredObject], rejections: Rejections
) -> Iterator[ListedUtterance]:
    names = sorted(name for name in objects if name.lower().endswith(AUDIO_SUFFIXES))
    if not names:
        raise NotFound("SourceEmpty", f"there is no audio file below {opened.uri} ({' '.join(AUDIO_SUFFIXES)})")
    # Files at the top belong to the source's own folder.
    top = posixpath.basename(opened.folder.rstrip("/")) or opened.store.bucket
    for number, name in enumerate(names, start=1):
        sidecar = objects.get(f"{posixpath.splitext(name)[0]}.txt")
        if sidecar is None:
            rejections.add("LacksText", opened.index, number, name)
            continue
        if sidecar.size > _LINE_BYTES:
            rejections.add("TextTooLong", opened.index, number, name)
            continue
        folder = posixpath.dirname(name) or top
        yield ListedUtterance(opened.index, number, name, objects[name], None, sidecar, speaker=folder, group=folder)


def read_text(opened: OpenSource, listed: ListedUtterance) -> str:
    """Gives an utterance's transcript, from its sidecar where it has one.

    Raises:
        RejectedLine: NotUtf8, LacksText, TextTooLong.
    """
    if listed.sidecar is None:
        return listed.text or ""
    try:
        text = opened.store.read_bytes(listed.sidecar.uri).decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise RejectedLine("NotUtf8") from None
    except NotFound:
        raise RejectedLine("LacksText") from None
    if not text:
        raise RejectedLine("LacksText")
    if len(text) > _TEXT_CHARACTERS:
        raise RejectedLine("TextTooLong")
    return " ".join(text.split())
