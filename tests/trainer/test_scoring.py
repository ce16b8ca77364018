# ruff: noqa: RUF001 (characters that look alike are what is tested)
"""Counting of word errors, normalisation, and intervals, against other implementations where there are any."""

import random

import kaldialign
import numpy as np
import pytest
from attune_trainer.scoring import (
    ErrorCounts,
    bootstrap_change,
    bootstrap_wer,
    count_characters,
    count_errors,
    normalise,
)
from attune_trainer.scoring.errors import total
from hypothesis import given
from hypothesis import strategies as st

WORDS = ["zero", "one", "two", "three", "four", "five", "press", "hash"]
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=0, max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        pytest.param("Don’t -- press 3.5, please!", "en", "don't press 3.5 please", id="worked example"),
        pytest.param("'quoted' words' end", "en", "quoted words end", id="quotes are not apostrophes"),
        pytest.param("नमस्ते, दुनिया।", "hi", "नमस्ते दुनिया", id="Hindi keeps its vowel signs and virama"),
        pytest.param("தமிழ் மொழி", "ta", "தமிழ் மொழி", id="Tamil keeps its vowel signs"),
        pytest.param("আমি বাংলায়", "bn", "আমি বাংলায়", id="Bengali keeps its nukta"),
        pytest.param("Straße, GROẞ", "de", "straße groß", id="German sharp s"),
        pytest.param("ISPARTA İzmir", "tr", "ısparta izmir", id="Turkish dotless and dotted i"),
        pytest.param("ＦＵＬＬ　ｗｉｄｔｈ", "en", "full width", id="full-width forms"),
        pytest.param("今日は、晴れ。", "ja", "今 日 は 晴 れ", id="Japanese by character"),
        pytest.param("ภาษาไทย", "th", "ภ า ษ า ไ ท ย", id="Thai by character"),
        pytest.param("week-end\tand\nmore", "en", "week end and more", id="hyphens and white space"),
        pytest.param("at 10:30 for 1,000", "en", "at 10:30 for 1,000", id="marks inside numbers stay"),
        pytest.param("... -- !", "en", "", id="nothing but punctuation"),
        pytest.param("می‌خواهم", "fa", "میخواهم", id="invisible joiners part no words"),
        pytest.param("e\u0301te\u0301", "fr", "été", id="decomposed accents are composed"),
    ],
)
def test_normalise(text: str, language: str, expected: str) -> None:
    assert normalise(text, language) == expected.encode().decode()


@given(st.text(max_size=60), st.sampled_from(["en", "hi", "tr", "zh", "pt-BR"]))
def test_normalising_twice_changes_nothing(text: str, language: str) -> None:
    once = normalise(text, language)
    assert normalise(once, language) == once


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        pytest.param("press one now", "press won", ErrorCounts(1, 1, 1, 0, 3), id="worked example"),
        pytest.param("", "a b", ErrorCounts(0, 0, 0, 2, 0), id="an empty reference makes insertions"),
        pytest.param("a b", "", ErrorCounts(0, 0, 2, 0, 2), id="an empty hypothesis makes deletions"),
        pytest.param("", "", ErrorCounts(), id="nothing said, nothing heard"),
        pytest.param("a", "a a a a", ErrorCounts(1, 0, 0, 3, 1), id="a loop makes insertions"),
    ],
)
def test_count_errors(reference: str, hypothesis: str, expected: ErrorCounts) -> None:
    assert count_errors(reference, hypothesis) == expected


def test_characters_include_spaces_where_the_script_has_them() -> None:
    japanese = [normalise(text, "ja") for text in ("晴れだ", "晴れた")]
    assert count_characters(*japanese, "ja") == ErrorCounts(2, 1, 0, 0, 3)
    assert count_characters("ab cd", "abcd") == ErrorCounts(4, 0, 1, 0, 5)


@given(SENTENCES, SENTENCES)
def test_error_count_is_the_edit_distance_of_kaldialign(reference: str, hypothesis: str) -> None:
    counts = count_errors(reference, hypothesis)
    assert counts.errors == kaldialign.edit_distance(reference.split(), hypothesis.split())["total"]
    assert counts.words == len(reference.split())
    assert counts.hits + counts.substitutions + counts.insertions == len(hypothesis.split())


def test_corpus_rate_is_no_mean_of_rates() -> None:
    counts = [count_errors("a", "b"), count_errors("a b c d e f g h i", "a b c d e f g h i")]
    assert total(counts).rate == pytest.approx(0.1)


def corpus(seed: int, utterances: int, error_rate: float) -> tuple[list[str], list[str]]:
    """References and hypotheses whose words were replaced, dropped or doubled by chance."""
    drawn = random.Random(seed)
    references = [" ".join(drawn.choices(WORDS, k=drawn.randint(1, 9))) for _ in range(utterances)]
    hypotheses = []
    for reference in references:
        heard = []
        for word in reference.split():
            if drawn.random() < error_rate:
                heard += drawn.choice([[], ["noise"], [word, word]])
            else:
                heard.append(word)
        hypotheses.append(" ".join(heard))
    return references, hypotheses


def counts_of(references: list[str], hypotheses: list[str]) -> list[ErrorCounts]:
    return [count_errors(*pair) for pair in zip(references, hypotheses, strict=True)]


def test_interval_over_utterances_is_that_of_kaldialign() -> None:
    references, hypotheses = corpus(1, 300, 0.15)
    interval = bootstrap_wer(counts_of(references, hypotheses), [str(i) for i in range(300)])
    oracle = kaldialign.bootstrap_wer_ci(
        [text.split() for text in references], [text.split() for text in hypotheses], replications=4000, seed=3
    )
    # Percentiles here, mean +- 1.96 deviations there; both from random draws.
    assert interval.value == pytest.approx(oracle["wer"], abs=0.002)
    assert interval.low == pytest.approx(oracle["ci95min"], abs=0.004)
    assert interval.high == pytest.approx(oracle["ci95max"], abs=0.004)


def test_paired_interval_agrees_with_kaldialigns_probability_of_improvement() -> None:
    references, worse = corpus(1, 200, 0.2)
    better = [
        heard if index % 6 else reference
        for index, (reference, heard) in enumerate(zip(references, worse, strict=True))
    ]
    ids = [str(i) for i in range(200)]
    change = bootstrap_change(counts_of(references, worse), counts_of(references, better), ids)
    oracle = kaldialign.bootstrap_wer_ci(
        [text.split() for text in references],
        [text.split() for text in worse],
        [text.split() for text in better],
        replications=2000,
    )
    assert change is not None
    assert oracle["p_s2_improv_over_s1"] > 0.975
    assert change.low < change.value < change.high < 0
    assert change.value == pytest.approx(oracle["system2"]["wer"] / oracle["system1"]["wer"] - 1, abs=0.02)


def test_blocks_that_err_together_widen_the_interval() -> None:
    good, bad = count_errors("a b c d", "a b c d"), count_errors("a b c d", "x y z d")
    counts = [bad if speaker % 5 == 0 else good for speaker in range(20) for _ in range(10)]
    by_speaker = bootstrap_wer(counts, [f"speaker {index // 10}" for index in range(200)])
    by_utterance = bootstrap_wer(counts, [str(index) for index in range(200)])
    assert by_speaker.value == by_utterance.value
    assert by_speaker.high - by_speaker.low > 2 * (by_utterance.high - by_utterance.low)
    assert (by_speaker.blocks, by_utterance.blocks) == (20, 200)


def test_pairing_cancels_what_is_hard_for_both() -> None:
    generator = np.random.default_rng(5)
    base = [ErrorCounts(10 - n, n, 0, 0, 10) for n in generator.integers(0, 10, 150)]
    slightly = [
        ErrorCounts(c.hits + 1, c.substitutions - 1, 0, 0, 10) if c.substitutions and index % 3 else c
        for index, c in enumerate(base)
    ]
    ids = [str(i) for i in range(150)]
    first, second = bootstrap_wer(base, ids), bootstrap_wer(slightly, ids)
    assert second.high > first.low  # apart they overlap
    change = bootstrap_change(base, slightly, ids)
    assert change is not None
    assert change.high < 0  # paired there is no doubt


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(11)
    covered = 0
    for trial in range(150):
        errors = generator.binomial(8, 0.1, 120)
        counts = [ErrorCounts(8 - e, int(e), 0, 0, 8) for e in errors]
        interval = bootstrap_wer(counts, [str(i) for i in range(120)], 0.9, seed=trial)
        covered += interval.low <= 0.1 <= interval.high
    # 90 % of 150 is 135; four standard deviations of the count are 15.
    assert 120 <= covered <= 149


def test_same_seed_same_interval_and_order_of_utterances_does_not_matter() -> None:
    counts = counts_of(*corpus(2, 80, 0.2))
    blocks = [str(index % 13) for index in range(80)]
    interval = bootstrap_wer(counts, blocks, seed=4)
    assert interval == bootstrap_wer(counts, blocks, seed=4)
    assert interval == bootstrap_wer(counts[::-1], blocks[::-1], seed=4)
    assert interval != bootstrap_wer(counts, blocks, seed=5)


def test_no_relative_change_from_a_baseline_without_errors() -> None:
    perfect = [count_errors("a b", "a b")] * 20
    assert bootstrap_change(perfect, perfect, [str(i) for i in range(20)]) is None


def test_a_rate_needs_words_and_a_block_for_each_utterance() -> None:
    with pytest.raises(ValueError, match="at least one word"):
        bootstrap_wer([ErrorCounts(insertions=1)], ["a"])
    with pytest.raises(ValueError, match="its block"):
        bootstrap_wer([ErrorCounts(hits=1, words=1)], ["a", "b"])
