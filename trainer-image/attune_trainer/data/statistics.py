"""How much a prepared Dataset holds: over all, by split, and by the values of each slice."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from attune.contract.job import Split, WordsFormat
from attune.contract.result import DatasetStatistics, SliceStatistics, SplitStatistics

from attune_trainer.data.files import SourceFile
from attune_trainer.decimals import decimal_string
from attune_trainer.failures import InvalidInput
from attune_trainer.scoring.normaliser import normalise

# Of a label with more values than this, such as one with an utterance's number in it, the largest are told.
VALUES: Final = 100
_KNOWN_WORDS: Final = 20_000_000


@dataclass(frozen=True, slots=True)
class Counted:
    """What statistics need of an utterance: normalised sentence, values of the slices in their order."""

    sentence: str
    speaker: str
    seconds: float
    labels: tuple[str, ...]


@dataclass
class Tally:
    """Adds utterances up."""

    utterances: int = 0
    seconds: float = 0.0
    words: int = 0
    unknown: int = 0
    speakers: set[str] = field(default_factory=set)
    vocabulary: set[str] = field(default_factory=set)

    def add(self, one: Counted, known: set[str]) -> None:
        """Adds an utterance."""
        words = one.sentence.split()
        self.utterances += 1
        self.seconds += one.seconds
        self.words += len(words)
        self.unknown += sum(word not in known for word in words)
        self.speakers.add(one.speaker)
        self.vocabulary.update(words)

    @property
    def hours(self) -> str:
        """Hours of audio."""
        return decimal_string(self.seconds / 3600, 4)

    @property
    def oov_rate(self) -> str:
        """Share of the words that are not known."""
        return decimal_string(self.unknown / self.words if self.words else 0.0, 4)

    def describe(self) -> dict[str, Any]:
        """Gives the figures by name."""
        return {
            "utterances": self.utterances,
            "hours": self.hours,
            "speakers": len(self.speakers),
            "words": self.words,
            "vocabulary": len(self.vocabulary),
            "oovRate": self.oov_rate,
        }


@dataclass(frozen=True)
class SliceTally:
    """Figures of each value of a label: (value, split) -> tally; the value "" is of utterances that have none."""

    name: str
    tallies: Mapping[tuple[str, Split], Tally]

    def values(self) -> list[str]:
        """Gives the values, the one with most utterances first; at most 100."""
        sizes: dict[str, int] = defaultdict(int)
        for (value, _), tally in self.tallies.items():
            if value:
                sizes[value] += tally.utterances
        return sorted(sizes, key=lambda value: (-sizes[value], value))[:VALUES]

    def summary(self) -> SliceStatistics:
        """Says how many values there are."""
        unlabelled = sum(tally.utterances for (value, _), tally in self.tallies.items() if not value)
        return SliceStatistics(
            name=self.name, values=len({value for value, _ in self.tallies if value}), unlabelled=unlabelled
        )


@dataclass(frozen=True)
class Statistics:
    """All figures of a Dataset. own_words: that the train split's words are what is known."""

    whole: Tally
    splits: Mapping[Split, Tally]
    slices: Sequence[SliceTally]
    own_words: bool

    def dataset(self) -> DatasetStatistics:
        """The figures over all splits."""
        return DatasetStatistics(
            hours=self.whole.hours,
            utterances=self.whole.utterances,
            speakers=len(self.whole.speakers),
            words=self.whole.words,
            vocabulary=len(self.whole.vocabulary),
            oov_rate=self.splits[Split.HOLDOUT].oov_rate,
        )

    def split(self, split: Split) -> SplitStatistics:
        """The figures of a split."""
        tally = self.splits[split]
        return SplitStatistics(
            utterances=tally.utterances,
            hours=tally.hours,
            speakers=len(tally.speakers),
            words=tally.words,
            vocabulary=len(tally.vocabulary),
            oov_rate=None if self.own_words and split is Split.TRAIN else tally.oov_rate,
        )

    def warnings(self) -> list[str]:
        """Says what is worth a look; names of labels, but none of their values."""
        found = []
        for one in self.slices:
            summary = one.summary()
            if summary.unlabelled:
                found.append(f"{summary.unlabelled} of {self.whole.utterances} utterances have no label {one.name}")
            if summary.values > VALUES:
                found.append(
                    f"label {one.name} has {summary.values} values: the report tells the {VALUES} largest; a label for "
                    "slices has few"
                )
        return [text[:256] for text in found[:8]]


def measure(splits: Mapping[Split, Sequence[Counted]], slices: Sequence[str], known: set[str] | None) -> Statistics:
    """Measures a Dataset.

    Args:
        splits: utterances of each split.
        slices: names of the labels.
        known: words that are known beforehand; None takes those of the train split.
    """
    words = known if known is not None else {word for one in splits[Split.TRAIN] for word in one.sentence.split()}
    whole = Tally()
    by_split = {split: Tally() for split in Split}
    by_value: list[dict[tuple[str, Split], Tally]] = [defaultdict(Tally) for _ in slices]
    for split, part in splits.items():
        for one in part:
            for tally in (whole, by_split[split], *_of_values(one, split, by_value)):
                tally.add(one, words)
    tallies = [SliceTally(name, table) for name, table in zip(slices, by_value, strict=True)]
    return Statistics(whole, by_split, tallies, own_words=known is None)


def _of_values(one: Counted, split: Split, by_value: Sequence[dict[tuple[str, Split], Tally]]) -> Iterable[Tally]:
    return [table[value, split] for value, table in zip(one.labels, by_value, strict=True)]


def read_known_words(file: SourceFile, words_format: WordsFormat, language: str) -> set[str]:
    """Reads a list of words, normalised as transcripts are.

    Args:
        file: UTF-8 text; lines of more than 64 KiB are refused.
        words_format: Lexicon takes the first column, Text all words.
        language: of the words.

    Raises:
        InvalidInput: KnownWordsUnusable.
    """
    known: set[str] = set()
    for number, line in file.lines():
        if line is None:
            raise _unusable(f"line {number} is longer than 64 KiB; break it")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise _unusable(f"line {number} is not UTF-8; convert the file") from None
        if words_format is WordsFormat.LEXICON:
            text = (text.split(None, 1) or [""])[0]
        known.update(normalise(text, language).split())
        if len(known) > _KNOWN_WORDS:
            raise _unusable(f"it has more than {_KNOWN_WORDS} different words; is it a list of words?")
    if not known:
        raise _unusable("it holds no words")
    return known


def _unusable(what: str) -> InvalidInput:
    return InvalidInput("KnownWordsUnusable", f"the object that spec.knownWords names cannot be used: {what}")
