"""An utterance as its source lists it, and the rules for the fields that every format has."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from attune.contract.job import SplitBy

from attune_trainer.data.audio import Span
from attune_trainer.data.files import SourceFile
from attune_trainer.data.rejections import RejectedLine

TEXT_CHARACTERS: Final = 4000
LABEL_CHARACTERS: Final = 256
_LATEST_SECONDS: Final = 1e7
_SECONDS: Final = re.compile(r"^[0-9]{1,7}(\.[0-9]{1,9})?$")


@dataclass(frozen=True, slots=True)
class ListedUtterance:
    """An utterance as its source lists it.

    Attributes:
        source: index of the source.
        number: orders it in the source, from 1.
        place: what a person looks for when it is wrong.
        audio: the recording.
        span: where in the recording it is.
        text: the transcript; None where it is all of `sidecar`.
        sidecar: the file that is the transcript.
        speaker: who speaks.
        group: what it was recorded with.
        labels: value of each of the recipe's slices, in their order; empty where it has none.
    """

    source: int
    number: int
    place: str
    audio: SourceFile
    span: Span
    text: str | None
    sidecar: SourceFile | None
    speaker: str
    group: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What a listing needs to know of the recipe.

    Attributes:
        by: the label that never crosses splits.
        slices: names of the labels that figures are told apart by.
        per_speaker: whether each utterance is on a channel of its own, rather than in the mix of all.
    """

    by: SplitBy
    slices: tuple[str, ...] = ()
    per_speaker: bool = False

    def span(self, start: float | None, end: float | None, channel: int | None) -> Span:
        """Makes a span of what a transcript says.

        Raises:
            RejectedLine: LacksChannel, TimesNotOrdered.
        """
        if self.per_speaker and channel is None:
            raise RejectedLine("LacksChannel")
        if start is not None and end is not None and end <= start:
            raise RejectedLine("TimesNotOrdered")
        return Span(start, end, channel if self.per_speaker else None)


def parse_object(line: bytes) -> Any:
    """Reads JSON.

    Raises:
        RejectedLine: NotJson.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise RejectedLine("NotJson") from None


def clean_text(text: str) -> str:
    """Gives a transcript with single spaces.

    Raises:
        RejectedLine: LacksText, TextTooLong, NotUtf8, ControlCharacters.
    """
    if len(text) > TEXT_CHARACTERS:
        raise RejectedLine("TextTooLong")
    text = " ".join(text.split())
    if not text:
        raise RejectedLine("LacksText")
    _check_characters(text)
    return text


def clean_label(value: str) -> str:
    """Gives a label without spaces around it.

    Raises:
        RejectedLine: LabelNotText, NotUtf8, ControlCharacters.
    """
    if len(value) > LABEL_CHARACTERS:
        raise RejectedLine("LabelNotText")
    value = value.strip()
    _check_characters(value)
    return value


def _check_characters(value: str) -> None:
    for character in value:
        category = unicodedata.category(character)
        if category == "Cs":  # half of a surrogate pair, escaped in JSON: no file can hold it
            raise RejectedLine("NotUtf8")
        if category == "Cc":
            raise RejectedLine("ControlCharacters")


def read_labels(fields: Mapping[str, Any], slices: Sequence[str]) -> tuple[str, ...]:
    """Reads the values of the slices; one that is not there is empty.

    Raises:
        RejectedLine: LabelNotText, NotUtf8, ControlCharacters.
    """
    return tuple(read_label(fields, name) for name in slices)


def read_label(fields: Mapping[str, Any], name: str) -> str:
    """Reads a label; one that is not there is empty.

    Raises:
        RejectedLine: LabelNotText, NotUtf8, ControlCharacters.
    """
    value = fields.get(name)
    if value is None:
        return ""
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, int):
        value = str(value)  # speaker numbers are often written as numbers
    if not isinstance(value, str):
        raise RejectedLine("LabelNotText")
    return clean_label(value)


def read_span(fields: Mapping[str, Any], wanted: Wanted) -> Span:
    """Reads start, end (seconds) and channel (from 0).

    Raises:
        RejectedLine: TimesNotNumbers, TimesNotOrdered, ChannelNotNumber, LacksChannel.
    """
    times: list[float | None] = []
    for name in ("start", "end"):
        value = fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RejectedLine("TimesNotNumbers")
        if value is not None and not 0 <= value <= _LATEST_SECONDS:  # which NaN is not either
            raise RejectedLine("TimesNotNumbers")
        times.append(None if value is None else float(value))
    channel = fields.get("channel")
    if channel is not None and (isinstance(channel, bool) or not isinstance(channel, int) or channel < 0):
        raise RejectedLine("ChannelNotNumber")
    return wanted.span(times[0], times[1], channel)


def parse_seconds(text: str) -> float:
    """Reads a time in seconds: "12.34".

    Raises:
        RejectedLine: TimesNotNumbers.
    """
    if not _SECONDS.match(text):
        raise RejectedLine("TimesNotNumbers")
    return float(text)


def parse_channel(text: str) -> int | None:
    """Reads a channel as transcripts of calls write it: A and 1 are the first, B and 2 the second.

    Raises:
        RejectedLine: ChannelNotNumber.
    """
    if len(text) == 1 and text.upper() in "ABCDEFGH":
        return ord(text.upper()) - ord("A")
    if text.isascii() and text.isdigit() and 1 <= int(text) <= 32:  # noqa: PLR2004 (more than any recording has)
        return int(text) - 1
    raise RejectedLine("ChannelNotNumber")
