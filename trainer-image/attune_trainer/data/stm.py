"""Format Stm: NIST's segment time marks, "FILE CHANNEL SPEAKER START END [<LABELS>] TEXT"."""

import posixpath
from collections.abc import Iterator, Mapping
from typing import Final

from attune_trainer.data.audio import AUDIO_SUFFIXES
from attune_trainer.data.files import SourceFile, relative_name
from attune_trainer.data.listed import (
    ListedUtterance,
    Wanted,
    clean_label,
    clean_text,
    parse_channel,
    parse_seconds,
)
from attune_trainer.data.rejections import IGNORED, RejectedLine, Rejections
from attune_trainer.failures import NotFound

_COMMENT: Final = ";;"
_FIELDS: Final = 5
_IGNORED: Final = "ignore_time_segment_in_scoring"


def list_stm(
    source: int, uri: str, files: Mapping[str, SourceFile], wanted: Wanted, rejections: Rejections
) -> Iterator[ListedUtterance]:
    """Lists the segments of all .stm files; their recordings lie beside them, with any suffix of audio.

    A speaker is one person in all files; a recording is a group. Segments that say that they are to be ignored are
    left out, and not counted as bad.

    Raises:
        RecipeFailure: SourceEmpty.
    """
    names = sorted(name for name in files if name.lower().endswith(".stm"))
    if not names:
        raise NotFound("SourceEmpty", f"there is no .stm file below {uri}")
    index = 0
    for name in names:
        for number, line in files[name].lines():
            index += 1
            place = f"{name}:{number}"
            try:
                found = _read_line(source, index, place, line, posixpath.dirname(name), files, wanted)
            except RejectedLine as rejected:
                rejections.add(rejected.reason, source, index, place)
                continue
            if found is not None:
                yield found


def _read_line(
    source: int,
    number: int,
    place: str,
    raw: bytes | None,
    folder: str,
    files: Mapping[str, SourceFile],
    wanted: Wanted,
) -> ListedUtterance | None:
    if raw is None:
        raise RejectedLine("LineTooLong")
    try:
        line = raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise RejectedLine("NotUtf8") from None
    if not line or line.startswith(_COMMENT):
        return None
    fields = line.split(None, _FIELDS)
    if len(fields) < _FIELDS:
        raise RejectedLine("MalformedLine")
    text = fields[_FIELDS] if len(fields) > _FIELDS else ""
    if text.startswith("<"):  # <o,f0,male>: conditions of the recording
        text = text.partition(">")[2]
    if text.strip().lower() == _IGNORED:
        raise RejectedLine(IGNORED)
    audio = _find_recording(posixpath.join(folder, fields[0]), files)
    return ListedUtterance(
        source,
        number,
        place,
        audio,
        wanted.span(parse_seconds(fields[3]), parse_seconds(fields[4]), parse_channel(fields[1])),
        clean_text(text),
        None,
        speaker=clean_label(fields[2]),
        group=clean_label(audio.name),
        labels=("",) * len(wanted.slices),
    )


def _find_recording(name: str, files: Mapping[str, SourceFile]) -> SourceFile:
    short = relative_name(name)
    if short is None:
        raise RejectedLine("PathLeavesSource")
    candidates = [short, *(f"{short}{suffix}" for suffix in AUDIO_SUFFIXES)]
    for candidate in candidates:
        if candidate in files:
            return files[candidate]
    raise RejectedLine("AudioNotFound")
