"""Format Kaldi: a data directory with wav.scp, text and utt2spk, and segments for long recordings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from attune_trainer.data.audio import Span
from attune_trainer.data.files import SourceFile
from attune_trainer.data.listed import (
    ListedUtterance,
    Wanted,
    clean_label,
    clean_text,
    parse_channel,
    parse_seconds,
)
from attune_trainer.data.manifest import find_audio
from attune_trainer.data.rejections import RejectedLine, Rejections
from attune_trainer.failures import NotFound

_NEEDED: Final = ("wav.scp", "text", "utt2spk")
_SEGMENT_FIELDS: Final = 3


def list_kaldi(
    source: int, uri: str, files: Mapping[str, SourceFile], wanted: Wanted, rejections: Rejections
) -> Iterator[ListedUtterance]:
    """Lists the utterances of `text`.

    Recordings of wav.scp are paths below the source; commands are never run. Channels are those of
    reco2file_and_channel; a slice NAME is read from utt2NAME, or by speaker from spk2NAME.

    Raises:
        RecipeFailure: ManifestNotFound, where one of the three files is missing.
    """
    missing = [name for name in _NEEDED if name not in files]
    if missing:
        raise NotFound(
            "ManifestNotFound",
            f"there is no {' and no '.join(missing)} below {uri}; format Kaldi needs {', '.join(_NEEDED)} there",
        )
    tables = _Tables.read(source, files, wanted, rejections)
    seen: set[str] = set()
    for number, key, value in _read_lines(source, files["text"], rejections):
        place = f"text:{number}"
        try:
            yield _find_utterance(source, number, key, value, tables, files, wanted, seen)
        except RejectedLine as rejected:
            rejections.add(rejected.reason, source, number, place)


@dataclass(frozen=True)
class _Tables:
    """The files of a data directory, by their keys; segments are None where recordings are utterances."""

    recordings: Mapping[str, str]
    speakers: Mapping[str, str]
    segments: Mapping[str, str] | None
    channels: Mapping[str, str]
    labels: Sequence[Mapping[str, str]]

    @classmethod
    def read(cls, source: int, files: Mapping[str, SourceFile], wanted: Wanted, rejections: Rejections) -> Self:
        """Reads those that are there."""

        def table(*names: str) -> dict[str, str] | None:
            name = next((one for one in names if one in files), None)
            return _read_table(source, files[name], rejections) if name is not None else None

        return cls(
            recordings=table("wav.scp") or {},
            speakers=table("utt2spk") or {},
            segments=table("segments"),
            channels=(table("reco2file_and_channel") if wanted.per_speaker else None) or {},
            labels=[table(f"utt2{name}", f"spk2{name}") or {} for name in wanted.slices],
        )


def _find_utterance(
    source: int,
    number: int,
    key: str,
    value: str,
    tables: _Tables,
    files: Mapping[str, SourceFile],
    wanted: Wanted,
    seen: set[str],
) -> ListedUtterance:
    if key in seen:
        raise RejectedLine("RepeatedId")
    seen.add(key)
    text, speaker = clean_text(value), clean_label(tables.speakers.get(key, ""))
    if not speaker:
        raise RejectedLine("LacksSpeaker")
    recording, span = _find_span(key, tables.segments, tables.channels, wanted)
    path = tables.recordings.get(recording, "").strip()
    if not path:
        raise RejectedLine("AudioNotFound")
    if path.startswith("|") or path.endswith("|"):
        raise RejectedLine("CommandNotRun")
    return ListedUtterance(
        source,
        number,
        f"text:{number}",
        find_audio(path, files),
        span,
        text,
        None,
        speaker=speaker,
        group=clean_label(recording) if tables.segments is not None else speaker,
        labels=tuple(clean_label(table.get(key) or table.get(speaker, "")) for table in tables.labels),
    )


def _find_span(
    key: str, segments: Mapping[str, str] | None, channels: Mapping[str, str], wanted: Wanted
) -> tuple[str, Span]:
    """Gives the recording of an utterance and where in it it is."""
    recording, start, end = key, None, None
    if segments is not None:
        if key not in segments:
            raise RejectedLine("LacksSegment")
        fields = segments[key].split()
        if len(fields) < _SEGMENT_FIELDS:
            raise RejectedLine("MalformedLine")
        # An end of -1 is the recording's.
        recording, start, end = fields[0], parse_seconds(fields[1]), None
        if fields[2] not in {"-1", "-1.0"}:
            end = parse_seconds(fields[2])
    side = channels.get(recording, "").split()
    return recording, wanted.span(start, end, parse_channel(side[-1]) if side else None)


def _read_table(source: int, file: SourceFile, rejections: Rejections) -> dict[str, str]:
    table: dict[str, str] = {}
    for number, key, value in _read_lines(source, file, rejections):
        if key in table:
            rejections.add("RepeatedId", source, number, f"{file.name}:{number}")
        else:
            table[key] = value
    return table


def _read_lines(source: int, file: SourceFile, rejections: Rejections) -> Iterator[tuple[int, str, str]]:
    """Yields (line number, key, the rest of the line)."""
    for number, line in file.lines():
        place = f"{file.name}:{number}"
        if line is None:
            rejections.add("LineTooLong", source, number, place)
            continue
        try:
            key, *rest = line.decode("utf-8").split(None, 1) or [""]
        except UnicodeDecodeError:
            rejections.add("NotUtf8", source, number, place)
            continue
        if key:
            yield number, key, rest[0] if rest else ""
