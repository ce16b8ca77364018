"""Formats Manifest (JSONL) and Directory (audio with a transcript beside it)."""

import posixpath
from collections.abc import Iterator, Mapping
from typing import Any, Final

from attune.contract.job import SplitBy

from attune_trainer.data.files import SourceFile, audio_names, relative_name
from attune_trainer.data.listed import (
    ListedUtterance,
    Wanted,
    clean_text,
    parse_object,
    read_label,
    read_labels,
    read_span,
)
from attune_trainer.data.rejections import RejectedLine, Rejections
from attune_trainer.failures import NotFound

# A sidecar may list the utterances of a long recording.
_SIDECAR_BYTES: Final = 4 * 1024 * 1024
_SIDECAR_UTTERANCES: Final = 20_000


def list_manifest(
    source: int, uri: str, name: str, files: Mapping[str, SourceFile], wanted: Wanted, rejections: Rejections
) -> Iterator[ListedUtterance]:
    """Lists what a JSONL file lists: {"audio", "text", "speaker", "group", "start", "end", "channel", labels}.

    Raises:
        RecipeFailure: ManifestNotFound, SourceEmpty.
    """
    file = files.get(relative_name(name) or "")
    if file is None:
        raise NotFound("ManifestNotFound", f"there is no {name} below {uri}; upload it or correct its name")
    empty = True
    for number, line in file.lines():
        if line is not None and not line.strip():
            continue
        empty = False
        place = f"{name}:{number}"
        try:
            yield _read_line(source, number, place, line, files, wanted)
        except RejectedLine as rejected:
            rejections.add(rejected.reason, source, number, place)
    if empty:
        raise NotFound("SourceEmpty", f"{name} below {uri} lists nothing")


def _read_line(
    source: int, number: int, place: str, line: bytes | None, files: Mapping[str, SourceFile], wanted: Wanted
) -> ListedUtterance:
    if line is None:
        raise RejectedLine("LineTooLong")
    fields = parse_object(line)
    if not isinstance(fields, dict):
        raise RejectedLine("NotJson")
    audio = fields.get("audio")
    if not isinstance(audio, str) or not audio.strip():
        raise RejectedLine("LacksAudio")
    text = _read_text(fields)
    speaker, group = read_label(fields, "speaker"), read_label(fields, "group")
    if wanted.by is SplitBy.SPEAKER and not speaker:
        raise RejectedLine("LacksSpeaker")
    if not speaker and not group:
        raise RejectedLine("LacksGroup")
    span, labels = read_span(fields, wanted), read_labels(fields, wanted.slices)
    file = find_audio(audio, files)
    return ListedUtterance(
        source, number, place, file, span, text, None, speaker=speaker or group, group=group or speaker, labels=labels
    )


def _read_text(fields: Mapping[str, Any]) -> str:
    text = fields.get("text")
    if not isinstance(text, str):
        raise RejectedLine("LacksText")
    return clean_text(text)


def find_audio(name: str, files: Mapping[str, SourceFile]) -> SourceFile:
    """Finds an audio file by its path below the source.

    Raises:
        RejectedLine: PathLeavesSource, AudioNotFound.
    """
    short = relative_name(name)
    if short is None:
        raise RejectedLine("PathLeavesSource")
    file = files.get(short)
    if file is None:
        raise RejectedLine("AudioNotFound")
    return file


def list_directory(
    source: int, uri: str, top: str, files: Mapping[str, SourceFile], wanted: Wanted, rejections: Rejections
) -> Iterator[ListedUtterance]:
    """Lists the audio files that have a transcript beside them, of the same name.

    A .txt is the text; a .json is an object with a manifest line's fields, without audio, or a list of such objects for
    a recording of several utterances or channels. With both the .txt is the text. Where nothing says who speaks, the
    folder does.

    Raises:
        RecipeFailure: SourceEmpty.
    """
    number = 0
    for name in audio_names(uri, files):
        stem = posixpath.splitext(name)[0]
        folder = posixpath.dirname(name) or top
        described, text = files.get(f"{stem}.json"), files.get(f"{stem}.txt")
        number += 1
        try:
            fields = _read_sidecar(described) if described is not None else [{}]
        except RejectedLine as rejected:
            rejections.add(rejected.reason, source, number, name)
            continue
        for index, entry in enumerate(fields):
            number += index > 0
            place = name if len(fields) == 1 else f"{name}[{index}]"
            sidecar = text if len(fields) == 1 else None
            try:
                yield _read_entry(source, number, place, files[name], entry, sidecar, folder, wanted)
            except RejectedLine as rejected:
                rejections.add(rejected.reason, source, number, place)


def _read_sidecar(file: SourceFile) -> list[Any]:
    if file.size > _SIDECAR_BYTES:
        raise RejectedLine("SidecarTooLarge")
    try:
        found = parse_object(file.read(_SIDECAR_BYTES).removeprefix(b"\xef\xbb\xbf"))
    except NotFound:
        raise RejectedLine("LacksText") from None
    fields = found if isinstance(found, list) else [found]
    if not fields:
        raise RejectedLine("LacksText")
    if len(fields) > _SIDECAR_UTTERANCES:
        raise RejectedLine("SidecarTooLarge")
    return fields


def _read_entry(
    source: int,
    number: int,
    place: str,
    audio: SourceFile,
    entry: Any,
    sidecar: SourceFile | None,
    folder: str,
    wanted: Wanted,
) -> ListedUtterance:
    if not isinstance(entry, dict):
        raise RejectedLine("NotJson")
    text = _read_text(entry) if sidecar is None else None
    span = read_span(entry, wanted)
    group = read_label(entry, "group")
    speaker = read_label(entry, "speaker")
    if not speaker:
        # Two channels are two people, whose recording is one.
        speaker = folder if span.channel is None else f"{audio.name}#{span.channel}"
        group = group or (folder if span.channel is None else audio.name)
    return ListedUtterance(
        source,
        number,
        place,
        audio,
        span,
        text,
        sidecar,
        speaker=speaker,
        group=group or folder,
        labels=read_labels(entry, wanted.slices),
    )
