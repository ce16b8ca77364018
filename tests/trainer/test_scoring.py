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
from attune_trainer.scoring.bootstrap import Series, bootstrap_gap, bootstrap_quantile, bootstrap_rate, expanded_tail
from attune_trainer.scoring.entities import count_entities, find_entities
from attune_trainer.scoring.errors import align, slot_errors, total
from attune_trainer.scoring.noise import estimate_noise_ratio
from attune_trainer.scoring.significance import (
    adjust_holm,
    compare_matched_pairs,
    compare_rates,
    compare_with_bound,
)
from attune_trainer.scoring.slices import MOST_VALUES, NO_VALUE, OTHER_VALUES, divide
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

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
        pytest.param("مَرْحَبًا، بِكُم؟", "ar", "مَرْحَبًا بِكُم", id="Arabic keeps its vowel marks"),
        pytest.param("你好，世界！", "zh", "你 好 世 界", id="Chinese by character"),
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


@pytest.mark.parametrize(
    ("reference", "hypothesis", "slots"),
    [
        pytest.param("press one now", "um press won", (2, 1, 1, 0), id="worked example"),
        pytest.param("a b", "a b c d", (0, 0, 4), id="words after the end"),
        pytest.param("", "a b", (4,), id="nothing was said"),
        pytest.param("a b", "", (1, 1, 0), id="nothing was heard"),
    ],
)
def test_an_alignment_says_where_the_errors_are(reference: str, hypothesis: str, slots: tuple[int, ...]) -> None:
    assert align(reference, hypothesis).slots == slots


@given(SENTENCES, SENTENCES)
def test_slots_hold_every_error_once(reference: str, hypothesis: str) -> None:
    aligned = align(reference, hypothesis)
    assert sum(map(slot_errors, aligned.slots)) == aligned.counts.errors
    assert len(aligned.slots) == aligned.counts.words + 1
    assert len(aligned.substitutions) == aligned.counts.substitutions
    said = reference.split()
    assert all(one in said for one, _ in aligned.substitutions)


ENTITY_TERMS = ["New York City", "New York", "Dr. Müller", "metformin"]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "right", "of"),
    [
        pytest.param("we meet in new york city", "we meet in new york city", 1, 1, id="the longest term counts alone"),
        pytest.param("new york or new york city", "new york or newark city", 1, 2, id="each where it was said"),
        pytest.param("take metformin now", "take met formin now", 0, 1, id="two words instead of one"),
        pytest.param("dr müller here", "dr um müller here", 0, 1, id="a word in between"),
        pytest.param("um metformin", "yes um metformin", 1, 1, id="a word before it is not its fault"),
        pytest.param("ask for metformin", "metformin ask for", 0, 1, id="the same word elsewhere does not count"),
        pytest.param("nothing of note", "nothing of note", 0, 0, id="no entity"),
    ],
)
def test_entities_are_right_where_they_were_said(reference: str, hypothesis: str, right: int, of: int) -> None:
    spans = find_entities([reference], ENTITY_TERMS, "en")
    counted = count_entities(spans, [align(reference, hypothesis).slots])
    assert (counted.part, counted.whole) == (right, of)


@pytest.mark.parametrize(
    ("reference", "language", "numbers"),
    [
        pytest.param("call four one one two now", "en", ["four one one two"], id="spoken in English"),
        pytest.param("call 0800 12 now", "de", ["0800 12"], id="digits in any language"),
        pytest.param("vier eins", "de", [], id="number words of other languages are not known"),
        pytest.param("oh yes two oh two", "en", ["two oh two"], id="oh is a zero beside digits alone"),
        pytest.param("room b12", "en", ["b12"], id="a word with digits"),
    ],
)
def test_numbers_are_entities(reference: str, language: str, numbers: list[str]) -> None:
    words = reference.split()
    (spans,) = find_entities([reference], [], language, numbers=True)
    assert [" ".join(words[first:end]) for first, end in spans] == numbers
    assert find_entities([reference], [], language) == [()]


def test_terms_are_normalised_as_the_language_asks() -> None:
    reference = normalise("नमस्ते दिल्ली", "hi")
    assert find_entities([reference], ["दिल्ली!"], "hi") == [((1, 2),)]
    assert find_entities([normalise("今日は東京", "ja")], ["東京"], "ja") == [((3, 5),)]


def test_the_tail_of_the_interval_is_students() -> None:
    assert expanded_tail(0.95, 10) == pytest.approx(0.0086, abs=5e-5)
    assert expanded_tail(0.95, 1000) == pytest.approx(0.0248, abs=5e-5)
    # The mean of ten normal values: the interval is as wide as Student's, whose width is exact there.
    generator = np.random.default_rng(2)
    widths = []
    for _ in range(20):
        values = generator.normal(1000, 100, 10).round().astype(int).tolist()
        interval = bootstrap_rate(Series(tuple(values), (1000,) * 10), [str(place) for place in range(10)])
        students = stats.t.interval(0.95, 9, np.mean(values), stats.sem(values))
        widths.append((interval.high - interval.low) * 1000 / (students[1] - students[0]))
    assert np.mean(widths) == pytest.approx(1.0, abs=0.06)


def test_the_interval_of_a_quantile_is_near_scipys() -> None:
    values = np.random.default_rng(4).gamma(3.0, 0.2, 400).tolist()
    interval = bootstrap_quantile(values, 0.95)
    oracle = stats.quantile_test(values, p=0.95).confidence_interval(0.95)
    assert interval.value == pytest.approx(np.quantile(values, 0.95))
    assert interval.low == pytest.approx(oracle.low, rel=0.08)
    assert interval.high == pytest.approx(oracle.high, rel=0.08)


def test_the_interval_of_a_gap_is_that_of_two_means() -> None:
    generator = np.random.default_rng(6)
    one, other = generator.binomial(10, 0.1, 300), generator.binomial(10, 0.2, 200)
    ids = [str(place) for place in range(300)]
    gap = bootstrap_gap(
        Series(tuple(one.tolist()), (10,) * 300), Series(tuple(other.tolist()), (10,) * 200), ids, ids[:200]
    )
    oracle = stats.ttest_ind(other / 10, one / 10, equal_var=False).confidence_interval(0.95)
    assert gap.value == pytest.approx(other.mean() / 10 - one.mean() / 10)
    assert (gap.low, gap.high) == (pytest.approx(oracle.low, abs=0.003), pytest.approx(oracle.high, abs=0.003))


def test_matched_pairs_of_single_words_is_the_paired_z_test() -> None:
    # Utterances of one word: every one of them is a segment, where anybody errs.
    generator = np.random.default_rng(1)
    one = [(int(error), 0) for error in generator.random(400) < 0.3]
    other = [(int(error), 0) for error in generator.random(400) < 0.2]
    tested = compare_matched_pairs(one, other)
    differences = [b[0] - a[0] for a, b in zip(one, other, strict=True) if a[0] or b[0]]
    z = np.mean(differences) / (np.std(differences, ddof=1) / np.sqrt(len(differences)))
    assert tested.segments == len(differences)
    assert tested.z == pytest.approx(z)
    assert tested.p_value == pytest.approx(2 * stats.norm.sf(abs(z)))
    assert tested.p_value == pytest.approx(stats.ttest_1samp(differences, 0.0).pvalue, abs=0.002)
    mirrored = compare_matched_pairs(other, one)
    assert (mirrored.z, mirrored.p_value) == (pytest.approx(-tested.z), pytest.approx(tested.p_value))


@pytest.mark.parametrize(
    ("one", "other", "segments", "mean"),
    [
        pytest.param((1, 0, 0, 1, 0), (0, 0, 0, 0, 0), 2, -1.0, id="two right words part segments"),
        pytest.param((1, 0, 1, 0, 0), (0, 0, 0, 0, 0), 1, -2.0, id="one does not"),
        pytest.param((1, 0, 0, 1, 0), (0, 0, 1, 0, 0), 1, -1.0, id="both have to be right"),
        pytest.param((1, 0, 2, 1, 0), (1, 0, 0, 0, 0), 1, -2.0, id="an insertion parts nothing"),
        pytest.param((0, 0, 0, 0), (0, 0, 0, 4), 1, 2.0, id="words behind the end"),
        pytest.param((0, 0, 0), (0, 0, 0), 0, 0.0, id="nobody errs"),
    ],
)
def test_segments_are_cut_where_both_are_right(
    one: tuple[int, ...], other: tuple[int, ...], segments: int, mean: float
) -> None:
    tested = compare_matched_pairs([one], [other])
    assert (tested.segments, tested.mean) == (segments, mean)


def test_matched_pairs_calls_equal_systems_different_as_rarely_as_promised() -> None:
    generator = np.random.default_rng(12)
    alarms = 0
    for _ in range(400):
        one, other = ([(*map(int, generator.random(8) < 0.15), 0) for _ in range(60)] for _ in range(2))
        alarms += compare_matched_pairs(one, other).p_value < 0.05
    # 20 of 400 expected; three standard deviations are 13.
    assert 7 <= alarms <= 33


def test_comparison_of_rates_is_students_paired_test_where_blocks_are_alike() -> None:
    generator = np.random.default_rng(3)
    before, after = generator.binomial(20, 0.2, 25), generator.binomial(20, 0.17, 25)
    ids = [str(place) for place in range(25)]
    series = [Series(tuple(errors.tolist()), (20,) * 25) for errors in (before, after)]
    compared = compare_rates(*series, ids)
    oracle = stats.ttest_rel(after, before)
    assert compared.p_two_sided == pytest.approx(oracle.pvalue)
    assert compared.p_above == pytest.approx(stats.ttest_rel(after, before, alternative="greater").pvalue)
    bound = compare_with_bound(series[0], ids, 0.15)
    assert bound.p_above == pytest.approx(stats.ttest_1samp(before / 20, 0.15, alternative="greater").pvalue)


def test_holms_correction() -> None:
    assert adjust_holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust_holm([]) == []
    assert adjust_holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.2))
def test_holm_rejects_as_its_step_down_rule_says(p_values: list[float], level: float) -> None:
    rejected = set()
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        if p_values[place] * (len(p_values) - rank) >= level:
            break
        rejected.add(place)
    assert {place for place, p_value in enumerate(adjust_holm(p_values)) if p_value < level} == rejected


def test_slices_are_bounded_and_nothing_is_lost() -> None:
    values = [f"v{place}" if place else None for place in range(MOST_VALUES + 20)]
    words = [200 - place for place in range(len(values))]
    slices = divide("accent", values, words)
    assert len(slices) == MOST_VALUES + 1
    assert slices[0].value == NO_VALUE
    assert slices[-1].value == OTHER_VALUES
    assert sorted(place for one in slices for place in one.places) == list(range(len(values)))
    assert sum(one.words for one in slices) == sum(words)


@pytest.mark.parametrize("ratio", [5.0, 15.0, 30.0])
def test_noise_is_estimated_from_pauses(ratio: float) -> None:
    generator = np.random.default_rng(1)
    rate = 16000
    speech = np.sin(2 * np.pi * 200 * np.arange(3 * rate) / rate) * (np.arange(3 * rate) % rate < 0.6 * rate)
    power = 0.5 / 10 ** (ratio / 10)
    noisy = 0.1 * (speech + generator.normal(0, np.sqrt(power), len(speech)))
    assert estimate_noise_ratio(noisy.astype(np.float32), rate) == pytest.approx(ratio, abs=1.5)


def test_noise_of_silence_and_of_clips_too_short_is_a_number() -> None:
    assert estimate_noise_ratio(np.zeros(16000, np.float32), 16000) == 0.0
    assert estimate_noise_ratio(np.zeros(3, np.float32), 16000) == 0.0
