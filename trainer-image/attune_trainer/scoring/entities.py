"""Names, numbers and terms in references, and whether each was heard word for word where it was said."""

from collections.abc import Iterable, Sequence
from typing import Final

from attune_trainer.scoring.bootstrap import Series
from attune_trainer.scoring.normaliser import normalise

# In English numbers are spoken and often written as words; of other languages only digits are known here.
_ENGLISH_NUMBERS: Final = frozenset(
    (  # noqa: SIM905 (lines of words read better)
        "zero oh one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million "
        "billion"
    ).split()
)
# What makes no number alone: "oh" is a zero only beside another digit.
_NEVER_ALONE: Final = frozenset({"oh"})

Span = tuple[int, int]


def find_entities(
    references: Sequence[str], terms: Iterable[str], language: str, *, numbers: bool = False
) -> list[tuple[Span, ...]]:
    """Gives, of each reference, where its entities are: (first word, word behind the last).

    At each place the longest term counts, so that "new york city" holds no "new york"; entities do not overlap, and
    terms come before numbers.

    Args:
        references: normalised.
        terms: as people write them; they are normalised here.
        language: ISO 639 code, with or without a region.
        numbers: whether runs of words with digits count (in English, of number words too).
    """
    known: dict[str, list[tuple[str, ...]]] = {}
    for term in {tuple(normalise(term, language).split()) for term in terms}:
        if term:
            known.setdefault(term[0], []).append(term)
    for same_start in known.values():
        same_start.sort(key=len, reverse=True)
    spoken = _ENGLISH_NUMBERS if language.lower().partition("-")[0] == "en" else frozenset[str]()
    return [_find_in(reference.split(), known, spoken, numbers=numbers) for reference in references]


def _find_in(
    words: Sequence[str], known: dict[str, list[tuple[str, ...]]], spoken: frozenset[str], *, numbers: bool
) -> tuple[Span, ...]:
    found: list[Span] = []
    place = 0
    while place < len(words):
        end = _end_of_term(words, place, known)
        if end == place and numbers:
            end = _end_of_number(words, place, known, spoken)
        if end > place:
            found.append((place, end))
        place = max(end, place + 1)
    return tuple(found)


def _end_of_term(words: Sequence[str], place: int, known: dict[str, list[tuple[str, ...]]]) -> int:
    for term in known.get(words[place], ()):
        if tuple(words[place : place + len(term)]) == term:
            return place + len(term)
    return place


def _end_of_number(
    words: Sequence[str], place: int, known: dict[str, list[tuple[str, ...]]], spoken: frozenset[str]
) -> int:
    end = place
    while end < len(words) and _is_number(words[end], spoken) and _end_of_term(words, end, known) == end:
        end += 1
    return place if end == place + 1 and words[place] in _NEVER_ALONE else end


def _is_number(word: str, spoken: frozenset[str]) -> bool:
    return word in spoken or any(character.isdigit() for character in word)


def count_entities(spans: Sequence[Sequence[Span]], slots: Sequence[Sequence[int]]) -> Series:
    """Counts entities heard right over entities, utterance by utterance.

    An entity is right when each of its words was heard as it was said, and nothing between them: read from the
    alignment, so that the same word elsewhere in the utterance does not make up for it.

    Args:
        spans: of each utterance.
        slots: of each utterance's alignment (see errors.Alignment).
    """
    right = tuple(
        sum(_is_right(span, places) for span in of_utterance) for of_utterance, places in zip(spans, slots, strict=True)
    )
    return Series(right, tuple(len(of_utterance) for of_utterance in spans))


def _is_right(span: Span, slots: Sequence[int]) -> bool:
    first, end = span
    return not slots[first] & 1 and not any(slots[first + 1 : end])
