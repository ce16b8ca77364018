"""Word and character errors of one transcript against another, as counts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


def count_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Counts word errors; both texts are taken as they are, so normalise them first.

    count_errors("press one now", "press won") -> hits 1, substitutions 1, deletions 1, insertions 0, words 3.
    An empty reference has no words, and every word of the hypothesis is an insertion.
    """
    if not reference.split():
        return ErrorCounts(insertions=len(hypothesis.split()))
    measured = jiwer.process_words(reference, hypothesis)
    return ErrorCounts(
        measured.hits,
        measured.substitutions,
        measured.deletions,
        measured.insertions,
        measured.hits + measured.substitutions + measured.deletions,
    )


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
