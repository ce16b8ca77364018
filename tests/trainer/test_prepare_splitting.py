"""Division into splits: nothing crosses, shares are met, and the order of the input does not matter."""

import random
from collections import defaultdict

import pytest
from attune.contract.job import Split
from attune_trainer.data.splitting import Division, SplitItem, divide, missing_splits
from hypothesis import given
from hypothesis import strategies as st

SHARES = {Split.VALIDATION: 0.1, Split.HOLDOUT: 0.1}
ITEMS = st.lists(
    st.builds(SplitItem, st.integers(0, 12).map("speaker {}".format), st.integers(0, 30).map("sentence {}".format)),
    min_size=1,
    max_size=120,
)


def assert_nothing_crosses(items: list[SplitItem], division: Division) -> None:
    seen: dict[tuple[str, str], set[Split]] = defaultdict(set)
    for item, split in zip(items, division.splits, strict=True):
        if split is not None:
            seen["label", item.label].add(split)
            seen["sentence", item.sentence].add(split)
    assert all(len(splits) == 1 for splits in seen.values())


@given(ITEMS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_nothing_crosses_whatever_is_divided_in_whatever_order(
    items: list[SplitItem], seed: int, shuffle: random.Random
) -> None:
    division = divide(items, SHARES, seed)
    assert_nothing_crosses(items, division)
    order = list(range(len(items)))
    shuffle.shuffle(order)
    again = divide([items[index] for index in order], SHARES, seed)
    assert [division.splits[index] for index in order] == list(again.splits)


@pytest.mark.parametrize("seed", range(5))
def test_sentences_of_their_own_meet_the_shares_and_lose_nothing(seed: int) -> None:
    items = [SplitItem(f"speaker {index // 10}", f"sentence {index}") for index in range(1000)]
    division = divide(items, SHARES, seed)
    assert division.left_out == 0
    assert division.counts() == {Split.TRAIN: 800, Split.VALIDATION: 100, Split.HOLDOUT: 100}


def test_a_few_repeated_sentences_keep_their_speakers_together() -> None:
    items = [SplitItem(f"speaker {index // 4}", f"sentence {index}") for index in range(400)]
    items += [SplitItem("speaker 3", "good bye"), SplitItem("speaker 70", "good bye")]
    division = divide(items, SHARES, 7)
    assert division.left_out == 0
    assert division.splits[12] is division.splits[280]
    assert_nothing_crosses(items, division)


def test_a_list_that_all_speakers_read_is_divided_by_leaving_copies_out() -> None:
    items = [SplitItem(f"speaker {s}", f"sentence {t}") for s in range(40) for t in range(40)]
    division = divide(items, SHARES, 7)
    assert_nothing_crosses(items, division)
    counts = division.counts()
    assert not missing_splits(division, SHARES)
    assert counts[Split.TRAIN] > 800
    assert min(counts[Split.VALIDATION], counts[Split.HOLDOUT]) >= 8


def test_greetings_that_everybody_says_cost_only_their_copies() -> None:
    items = [SplitItem(f"speaker {s}", f"sentence {s} {t}") for s in range(50) for t in range(20)]
    items += [SplitItem(f"speaker {s}", text) for s in range(50) for text in ("hello", "yes", "good bye")]
    division = divide(items, SHARES, 7)
    assert_nothing_crosses(items, division)
    assert division.left_out < 100
    assert min(division.counts()[split] for split in (Split.VALIDATION, Split.HOLDOUT)) > 60


@pytest.mark.parametrize(
    ("speakers", "missing"),
    [
        pytest.param(1, {Split.VALIDATION, Split.HOLDOUT}, id="one speaker"),
        pytest.param(2, {Split.VALIDATION}, id="two speakers"),
        pytest.param(3, set(), id="three speakers"),
    ],
)
def test_each_split_needs_a_speaker(speakers: int, missing: set[Split]) -> None:
    items = [SplitItem(f"speaker {index % speakers}", f"sentence {index}") for index in range(60)]
    assert set(missing_splits(divide(items, SHARES, 7), SHARES)) == missing


def test_another_seed_divides_differently() -> None:
    items = [SplitItem(f"speaker {index // 10}", f"sentence {index}") for index in range(1000)]
    assert divide(items, SHARES, 1) != divide(items, SHARES, 2)


def test_a_share_of_nothing_leaves_the_split_empty() -> None:
    items = [SplitItem(f"speaker {index}", f"sentence {index}") for index in range(50)]
    division = divide(items, {Split.VALIDATION: 0.0, Split.HOLDOUT: 0.2}, 1)
    assert division.counts() == {Split.TRAIN: 40, Split.HOLDOUT: 10}
    assert not missing_splits(division, {Split.VALIDATION: 0.0, Split.HOLDOUT: 0.2})
