"""Division of utterances into train, validation and holdout, so that nothing heard in one is heard in another."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attune.contract.job import Split


@dataclass(frozen=True)
class SplitItem:
    """What the division needs to know of an utterance.

    Attributes:
        label: speaker or group; never crosses.
        sentence: normalised text; never crosses.
    """

    label: str
    sentence: str


@dataclass(frozen=True)
class Division:
    """Where each utterance went.

    Attributes:
        splits: of each utterance, in order; None where it is left out, because its sentence belongs to another split
            than its label.
    """

    splits: tuple[Split | None, ...]

    @property
    def left_out(self) -> int:
        """How many utterances are in no split."""
        return sum(split is None for split in self.splits)

    def counts(self) -> Counter[Split]:
        """How many utterances each split has."""
        return Counter(split for split in self.splits if split is not None)


def divide(items: Sequence[SplitItem], shares: Mapping[Split, float], seed: int) -> Division:
    """Divides utterances so that no label and no sentence is in two splits.

    Two ways are tried. The first keeps everything: labels that share a sentence stay together, as connected components
    of the graph of labels and sentences. Where speakers have many sentences in common ("yes", or the same list read by
    all) that leaves one large component, and nothing to divide. The second divides the labels alone, gives each shared
    sentence to one split, and leaves out its copies in the others. Of the two, the one is taken that is nearer to the
    wanted shares, what it leaves out counted as missed too; a way that leaves a wanted split empty is never preferred.

    The same items and seed give the same division, in whatever order the items come.

    Args:
        items: the utterances.
        shares: of validation and holdout, as fractions of the utterances; train gets the rest.
        seed: decides who goes where.
    """
    whole = _assign_components(items, shares, seed)
    if _misses(whole, shares) <= _NEAR_ENOUGH:
        return whole
    ways = [
        whole,
        *(_assign_labels_and_sentences(items, shares, seed, generous=generous) for generous in (False, True)),
    ]
    return min(ways, key=lambda division: (len(missing_splits(division, shares)), _misses(division, shares)))


# Whole labels rarely add up to the shares exactly; within this much nothing is left out for their sake.
_NEAR_ENOUGH = 0.1


def missing_splits(division: Division, shares: Mapping[Split, float]) -> list[Split]:
    """Lists the splits that should have utterances and have none."""
    counts = division.counts()
    return [split for split in Split if (split is Split.TRAIN or shares.get(split, 0.0) > 0) and not counts[split]]


def _misses(division: Division, shares: Mapping[Split, float]) -> float:
    total = len(division.splits)
    counts = division.counts()
    return (
        sum(abs(counts[split] / total - shares.get(split, 0.0)) for split in (Split.VALIDATION, Split.HOLDOUT))
        + division.left_out / total
        + len(missing_splits(division, shares))
    )


def _assign_components(items: Sequence[SplitItem], shares: Mapping[Split, float], seed: int) -> Division:
    parents: dict[tuple[str, str], tuple[str, str]] = {}

    def find(node: tuple[str, str]) -> tuple[str, str]:
        parents.setdefault(node, node)
        root = node
        while parents[root] != root:
            root = parents[root]
        while parents[node] != root:
            parents[node], node = root, parents[node]
        return root

    for item in items:
        label, sentence = find(("label", item.label)), find(("sentence", item.sentence))
        # The smaller name becomes the root, so that a component is named alike in whatever order the items come.
        parents[max(label, sentence)] = min(label, sentence)
    roots = [find(("label", item.label)) for item in items]
    chosen = _fill(Counter(name for _, name in roots), shares, seed, len(items))
    return Division(tuple(chosen[name] for _, name in roots))


def _assign_labels_and_sentences(
    items: Sequence[SplitItem], shares: Mapping[Split, float], seed: int, *, generous: bool
) -> Division:
    """Divides labels, then shared sentences; generous gives a split one more sentence than its share has room for."""
    by_label = _fill(Counter(item.label for item in items), shares, seed, len(items))
    copies: dict[str, Counter[Split]] = defaultdict(Counter)
    for item in items:
        copies[item.sentence][by_label[item.label]] += 1
    crossing = {sentence: counts for sentence, counts in copies.items() if len(counts) > 1}
    owner = {sentence: next(iter(counts)) for sentence, counts in copies.items()}
    # Shared sentences are dealt out by the same shares, counted in utterances, to splits in which they occur.
    total = sum(counts.total() for counts in crossing.values())
    dealt: Counter[Split] = Counter()
    for sentence in sorted(crossing, key=lambda text: _rank(seed, text)):
        counts = crossing[sentence]
        room = {split: shares.get(split, 0.0) * total - dealt[split] for split in (Split.HOLDOUT, Split.VALIDATION)}
        wanting = [
            split
            for split in room
            if counts[split] and (room[split] > 0 if generous else counts.total() <= room[split])
        ]
        split = wanting[0] if wanting else max(counts, key=lambda one: (counts[one], one))
        owner[sentence] = split
        dealt[split] += counts.total()
    return Division(
        tuple(by_label[item.label] if by_label[item.label] is owner[item.sentence] else None for item in items)
    )


def _fill(sizes: Mapping[str, int], shares: Mapping[Split, float], seed: int, total: int) -> dict[str, Split]:
    """Gives whole parts to splits: in the order of their hashes, holdout and validation first while a part fits."""
    order = sorted(sizes, key=lambda name: _rank(seed, name))
    chosen: dict[str, Split] = dict.fromkeys(order, Split.TRAIN)
    wanted = [split for split in (Split.HOLDOUT, Split.VALIDATION) if shares.get(split, 0.0) > 0]
    for split in wanted:
        room = max(1, round(shares[split] * total))
        for name in order:
            if chosen[name] is Split.TRAIN and sizes[name] <= room:
                chosen[name] = split
                room -= sizes[name]
    for split in wanted:
        in_train = [name for name in order if chosen[name] is Split.TRAIN]
        if split not in chosen.values() and len(in_train) > 1:
            # Every part is larger than the share: the smallest is the nearest to it.
            chosen[min(in_train, key=lambda name: sizes[name])] = split
    return chosen


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


def count_labels(items: Iterable[SplitItem]) -> int:
    """Counts different labels."""
    return len({item.label for item in items})
