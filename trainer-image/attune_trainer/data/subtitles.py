"""Format WebVtt: long recordings, each with subtitles beside it (.vtt, or .srt), a cue being an utterance."""

import html
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Final

from attune_trainer.data.files import SourceFile, audio_names
from attune_trainer.data.listed import ListedUtterance, Wanted, clean_label, clean_text
from attune_trainer.data.rejections import RejectedLine, Rejections
from attune_trainer.failures import NotFound

_SUBTITLE_BYTES: Final = 16 * 1024 * 1024
_TIME: Final = r"(?:(\d{1,4}):)?([0-5]?\d):([0-5]?\d)[.,](\d{1,3})"
_TIMES: Final = re.compile(rf"^{_TIME}\s+-->\s+{_TIME}(?:\s.*)?$")
_VOICE: Final = re.compile(r"<v(?:\.[^\s>]*)?\s+([^>]*)>")
_TAG: Final = re.compile(r"<[^>]*>")
_NO_CUES: Final = ("WEBVTT", "NOTE", "STYLE", "REGION")


def list_subtitles(
    source: int, uri: str, files: Mapping[str, SourceFile], wanted: Wanted, rejections: Rejections
) -> Iterator[ListedUtterance]:
    """Lists the cues of the subtitles that lie beside an audio file of the same name.

    A cue's voice (<v NAME>) is its speaker, the same person in all recordings; without one the recording is. The
    recording is the group. Tags are left out of the text.

    Raises:
        RecipeFailure: SourceEmpty.
    """
    number = 0
    for name in audio_names(uri, files):
        stem = posixpath.splitext(name)[0]
        subtitles = files.get(f"{stem}.vtt") or files.get(f"{stem}.srt")
        number += 1
        try:
            cues = _read_cues(subtitles)
        except RejectedLine as rejected:
            rejections.add(rejected.reason, source, number, name)
            continue
        for place, block in cues:
            number += 1
            try:
                yield _read_cue(source, number, place, block, files[name], wanted)
            except RejectedLine as rejected:
                rejections.add(rejected.reason, source, number, place)


def _read_cues(file: SourceFile | None) -> list[tuple[str, list[str]]]:
    """Gives (place, lines) of each cue."""
    cues = [(f"{file.name}:{line}", block) for line, block in _split_cues(_read(file))] if file is not None else []
    if not cues:
        raise RejectedLine("LacksText")
    return cues


def _read(file: SourceFile) -> str:
    if file.size > _SUBTITLE_BYTES:
        raise RejectedLine("SidecarTooLarge")
    try:
        return file.read(_SUBTITLE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RejectedLine("NotUtf8") from None
    except NotFound:
        raise RejectedLine("LacksText") from None


def _split_cues(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, lines) of the blocks between empty lines that are cues."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            block.append(line.strip())
        elif block:
            if not block[0].startswith(_NO_CUES) or any("-->" in one for one in block[1:2]):
                yield number - len(block), block
            block = []


def _read_cue(
    source: int, number: int, place: str, block: list[str], audio: SourceFile, wanted: Wanted
) -> ListedUtterance:
    times, *text = block if "-->" in block[0] else block[1:] or [""]
    match = _TIMES.match(times)
    if match is None:
        raise RejectedLine("TimesNotNumbers")
    start, end = (_seconds(*match.groups()[index : index + 4]) for index in (0, 4))
    whole = " ".join(text)
    voices = {html.unescape(voice).strip() for voice in _VOICE.findall(whole)}
    if len(voices) > 1:
        raise RejectedLine("SeveralSpeakers")
    group = clean_label(audio.name)
    speaker = clean_label(voices.pop()) if voices else ""
    return ListedUtterance(
        source,
        number,
        place,
        audio,
        wanted.span(start, end, None),
        clean_text(html.unescape(_TAG.sub("", whole))),
        None,
        speaker=speaker or group,
        group=group,
        labels=("",) * len(wanted.slices),
    )


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    """Adds a time up: ("1", "02", "03", "5") -> 3723.5."""
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction}")
