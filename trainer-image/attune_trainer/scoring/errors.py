"""Word and character errors of one transcript against another, as counts."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import jiwer

from attune_trainer.scoring.normaliser import WITHOUT_SPACES


@dataclass(frozen=True)
class ErrorCounts:
    """What the best alignment of a hypothesis with its reference holds. Counts of several utterances add up.

    Attributes:
        words: words of the reference (characters, from count_characters): hits + substitutions + deletions.
    """

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0

    @classmethod
    def from_row(cls, row: Sequence[int]) -> "ErrorCounts":
        """Reads what `row` gives."""
        hits, substitutions, deletions, insertions = row
        return cls(hits, substitutions, deletions, insertions, hits + substitutions + deletions)

    @property
    def row(self) -> tuple[int, int, int, int]:
        """Hits, substitutions, deletions, insertions: all of it, as it is stored."""
        return self.hits, self.substitutions, self.deletions, self.insertions

    @property
    def errors(self) -> int:
        """Substitutions + deletions + insertions."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per word of the reference; 0 without words and errors, infinite with errors but no words."""
        if self.words == 0:
            return float("inf") if self.errors else 0.0
        return self.errors / self.words

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.words + other.words,
        )


def total(counts: Iterable[ErrorCounts]) -> ErrorCounts:
    """Adds counts up; the rate of the sum is the corpus rate, which the mean of the rates is not."""
    whole = ErrorCounts()
    for one in counts:
        whole += one
    return whole


HISTOGRAM: Final = (
    ("0", 0, 0),
    ("1", 1, 1),
    ("2", 2, 2),
    ("3 to 5", 3, 5),
    ("6 to 29", 6, 29),
    ("30 or more", 30, 1 << 62),
)


def histogram(counts: Sequence[ErrorCounts]) -> list[int]:
    """Counts utterances by their number of word errors: 0, 1, 2, 3 to 5, 6 to 29, 30 or more."""
    by_errors = Counter(one.errors for one in counts)
    return [sum(by_errors[number] for number in by_errors if low <= number <= high) for _, low, high in HISTOGRAM]


@dataclass(frozen=True)
class Alignment:
    """Where the errors of one utterance are.

    Attributes:
        counts: how many of each kind.
        slots: one number for each word of the reference, and one for its end: twice the words inserted before it, plus
            1 where it was substituted or deleted. "press one now" heard as "um press won" -> (2, 1, 1, 0).
        substitutions: (word of the reference, word that it was taken for).
    """

    counts: ErrorCounts
    slots: tuple[int, ...]
    substitutions: tuple[tuple[str, str], ...]


def align(reference: str, hypothesis: str) -> Alignment:
    """Aligns two texts word by word; both are taken as they are, so normalise them first."""
    words, heard = reference.split(), hypothesis.split()
    if not words:
        return Alignment(ErrorCounts(insertions=len(heard)), (2 * len(heard),), ())
    measured = jiwer.process_words(reference, hypothesis)
    slots = [0] * (len(words) + 1)
    substitutions: list[tuple[str, str]] = []
    for chunk in measured.alignments[0]:
        if chunk.type == "insert":
            slots[chunk.ref_start_idx] += 2 * (chunk.hyp_end_idx - chunk.hyp_start_idx)
        elif chunk.type != "equal":
            for place in range(chunk.ref_start_idx, chunk.ref_end_idx):
                slots[place] += 1
        if chunk.type == "substitute":
            pairs = zip(
                words[chunk.ref_start_idx : chunk.ref_end_idx],
                heard[chunk.hyp_start_idx : chunk.hyp_end_idx],
                strict=True,
            )
            substitutions.extend(pairs)
    counts = ErrorCounts(
        measured.hits,
        measured.substitutions,
        measured.deletions,
        measured.insertions,
        measured.hits + measured.substitutions + measured.deletions,
    )
    return Alignment(counts, tuple(slots), tuple(substitutions))


def slot_errors(slot: int) -> int:
    """Errors at one slot of an alignment: words inserted there, and the word itself where it was heard wrong."""
    return (slot >> 1) + (slot & 1)


def count_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Counts word errors; both texts are taken as they are, so normalise them first.

    count_errors("press one now", "press won") -> hits 1, substitutions 1, deletions 1, insertions 0, words 3.
    An empty reference has no words, and every word of the hypothesis is an insertion.
    """
    return align(reference, hypothesis).counts


def count_characters(reference: str, hypothesis: str, language: str = "en") -> ErrorCounts:
    """Counts character errors of normalised texts; `words` holds the reference's characters.

    Spaces between words count as characters, but not where the script has none and the normaliser has put them there.

    Args:
        reference: what was said.
        hypothesis: what was heard.
        language: ISO 639 code, with or without a region.
    """
    if language.lower().partition("-")[0] in WITHOUT_SPACES:
        reference, hypothesis = reference.replace(" ", ""), hypothesis.replace(" ", "")
    if not reference.strip():
        return ErrorCounts(insertions=len(hypothesis.strip()))
    measured = jiwer.process_characters(reference, hypothesis)
    return ErrorCounts(
        measured.hits,
        measured.substitutions,
        measured.deletions,
        measured.insertions,
        measured.hits + measured.substitutions + measured.deletions,
    )
