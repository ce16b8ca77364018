"""Utterances that were left out: counted by reason, the first places of each kept."""

import threading
from collections import Counter

from attune.contract.result import Rejection

_EXAMPLES = 3
_PLACE_CHARACTERS = 128
_LISTED = 10_000

# Left out on purpose: by the Filter step, the same recording twice, a sentence that belongs to another split, what a
# transcript says is not to be scored.
TOO_SHORT = "TooShort"
TOO_LONG = "TooLong"
NO_SPEECH = "NoSpeech"
SPOKEN_TOO_SLOWLY = "SpokenTooSlowly"
SPOKEN_TOO_FAST = "SpokenTooFast"
CLIPPED = "Clipped"
TOO_QUIET = "TooQuiet"
TOO_NOISY = "TooNoisy"
OTHER_LANGUAGE = "OtherLanguage"
TEXT_REPEATED = "TextRepeated"
CONTRADICTED = "Contradicted"
DUPLICATE = "Duplicate"
SOUNDS_THE_SAME = "SoundsTheSame"
IGNORED = "Ignored"
REPEATED_ACROSS_SPLITS = "RepeatedAcrossSplits"
NOT_BAD = frozenset(
    {
        TOO_SHORT,
        TOO_LONG,
        NO_SPEECH,
        SPOKEN_TOO_SLOWLY,
        SPOKEN_TOO_FAST,
        CLIPPED,
        TOO_QUIET,
        TOO_NOISY,
        OTHER_LANGUAGE,
        TEXT_REPEATED,
        CONTRADICTED,
        DUPLICATE,
        SOUNDS_THE_SAME,
        IGNORED,
        REPEATED_ACROSS_SPLITS,
    }
)


class RejectedLine(Exception):  # noqa: N818 (an expected outcome for a line, not an error of the program)
    """This line or file cannot be used, and why, as a CamelCase reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Rejections:
    """Collects what was left out; safe to add to from any thread.

    Places are kept in the order of the sources, whichever thread found them first, so that a second run says the same.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._places: dict[str, list[tuple[int, int, str]]] = {}

    def add(self, reason: str, source: int, number: int, place: str) -> None:
        """Counts one utterance left out.

        Args:
            reason: CamelCase.
            source: index of the source.
            number: of the line or file in it; orders the examples.
            place: what a person looks for: "transcripts.jsonl:17" or a file's name.
        """
        # File names may hold anything, and this is shown in statuses and logs.
        place = "".join(character if character.isprintable() else "?" for character in place)
        if len(place) > _PLACE_CHARACTERS:
            place = f"...{place[3 - _PLACE_CHARACTERS :]}"
        with self._lock:
            self._counts[reason] += 1
            places = self._places.setdefault(reason, [])
            places.append((source, number, place))
            if len(places) > 2 * _LISTED:
                places.sort()
                del places[_LISTED:]

    @property
    def count(self) -> int:
        """All that were left out."""
        return self._counts.total()

    @property
    def bad(self) -> int:
        """Those that count towards maxRejectedShare: not what was left out on purpose."""
        return sum(count for reason, count in self._counts.items() if reason not in NOT_BAD)

    def listed(self) -> list[Rejection]:
        """Gives counts and first places by reason, the most frequent reason first; at most 16 reasons."""
        return [
            Rejection(
                reason=reason, count=count, examples=[place for _, _, place in sorted(self._places[reason])[:_EXAMPLES]]
            )
            for reason, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))[:16]
        ]

    def places(self) -> list[tuple[str, str]]:
        """Gives (reason, place) of what was left out, in the order of the sources; at most 10,000 of each reason."""
        return [
            (reason, place)
            for _, _, place, reason in sorted(
                (*entry, reason) for reason, entries in self._places.items() for entry in sorted(entries)[:_LISTED]
            )
        ]

    def describe_bad(self) -> str:
        """Says what is wrong in one line: "NotJson 2 (a.jsonl:3, a.jsonl:9), AudioNotFound 1 (a.jsonl:12)"."""
        return ", ".join(
            f"{one.reason} {one.count} ({', '.join(one.examples)})"
            for one in self.listed()
            if one.reason not in NOT_BAD
        )
