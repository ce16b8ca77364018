"""What follows from counts: ranking, gates, verdicts, and that the Summary always fits."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from attune.contract.environment import TERMINATION_MESSAGE_BYTES
from attune.contract.measures import Decision, Gate, Metric
from attune.contract.result import EvaluateResult, FailedCandidate, LeaderboardRow, SliceGap, Summary, Verdict
from attune.contract.training import Padding
from attune_trainer.job import summarise
from attune_trainer.scoring import ErrorCounts
from attune_trainer.scoring.figures import Measured
from attune_trainer.scoring.slices import Slice, divide
from attune_trainer.scoring.verdict import Failed, Judgement, Question, judge

DIGEST = "sha256:" + "a" * 64
UTTERANCES, WORDS_EACH = 200, 10


def measured(name: str, errors: Sequence[int], *, work_seconds: float = 10.0) -> Measured:
    counts = tuple(ErrorCounts(WORDS_EACH - e, e, 0, 0, WORDS_EACH) for e in errors)
    return Measured(name, DIGEST, Padding.WINDOW, counts, counts, work_seconds, 100.0)


def drawn(name: str, rate: float, seed: int = 1, utterances: int = UTTERANCES) -> Measured:
    return measured(name, np.random.default_rng(seed).binomial(WORDS_EACH, rate, utterances).tolist())


def decide(candidates: Sequence[Measured], *gates: Gate, **changes: Any) -> Judgement:
    ids = [str(index) for index in range(len(candidates[0].words))]
    fields = {"blocks": ids, "baseline": candidates[0].name, "gates": gates}
    return judge(candidates, Question(**(fields | changes)))


def wer_gate(value: str) -> Gate:
    return Gate(metric=Metric.WER, max=value)


def change_gate(value: str) -> Gate:
    return Gate(metric=Metric.WER, max_change_from_baseline=value)


BASE = drawn("base", 0.2)
BETTER = measured("tuned", [one.errors // 2 for one in BASE.words])
SAME = measured("tuned", [one.errors for one in BASE.words])
WORSE = measured("tuned", [min(10, one.errors + 1) for one in BASE.words])
SHUFFLED = drawn("tuned", 0.2, seed=2)


@pytest.mark.parametrize(
    ("candidates", "gates", "decision", "winner", "says"),
    [
        pytest.param(
            [BASE], [wer_gate("0.1")], Decision.FINE_TUNE, None, "Wer 20.5 % is above 10 %", id="base alone fails"
        ),
        pytest.param(
            [BASE], [wer_gate("0.3")], Decision.NO_FINE_TUNE_NEEDED, "base", "allow 30 % WER", id="base alone passes"
        ),
        pytest.param([BASE], [], Decision.NO_FINE_TUNE_NEEDED, "base", "no gate", id="base alone without a gate"),
        pytest.param(
            [BASE], [wer_gate("0.21")], Decision.INCONCLUSIVE, None, "more words", id="base passes by luck, maybe"
        ),
        pytest.param(
            [BASE], [wer_gate("0.2")], Decision.FINE_TUNE, None, "interval reaches", id="base fails by ill luck, maybe"
        ),
        pytest.param(
            [BASE], [change_gate("-0.05")], Decision.NO_FINE_TUNE_NEEDED, "base", "no gate", id="nothing to change from"
        ),
        pytest.param([BASE, BETTER], [], Decision.PROMOTE, "tuned", "fewer", id="better beyond doubt"),
        pytest.param(
            [BASE, BETTER], [change_gate("-0.05")], Decision.PROMOTE, "tuned", "fewer", id="better by more than asked"
        ),
        pytest.param(
            [BASE, BETTER],
            [change_gate("-0.9")],
            Decision.KEEP,
            "base",
            "Wer change -63.4 % is above -90 %",
            id="better, not by so much",
        ),
        pytest.param([BASE, SAME], [], Decision.KEEP, "base", "the same word errors", id="the very same output"),
        pytest.param([BASE, WORSE], [], Decision.KEEP, "base", "more", id="worse beyond doubt"),
        pytest.param([BASE, SHUFFLED], [], Decision.INCONCLUSIVE, None, "holdout", id="no difference to be seen"),
        pytest.param(
            [BASE, WORSE], [wer_gate("0.1")], Decision.FINE_TUNE, None, "base fails", id="worse than a base that fails"
        ),
        pytest.param(
            [BASE, BETTER], [wer_gate("0.01")], Decision.FINE_TUNE, None, "base fails", id="better yet not good enough"
        ),
        pytest.param(
            [BASE, measured("slow", [one.errors for one in BETTER.words], work_seconds=90), BETTER],
            [Gate(metric=Metric.REAL_TIME_FACTOR, max="0.3")],
            Decision.PROMOTE,
            "tuned",
            "tuned",
            id="the best is too slow, the next is promoted",
        ),
        pytest.param(
            [measured("base", [0] * UTTERANCES), WORSE],
            [],
            Decision.KEEP,
            "base",
            "makes no error",
            id="nothing beats a perfect base",
        ),
    ],
)
def test_verdict(
    candidates: list[Measured], gates: list[Gate], decision: Decision, winner: str | None, says: str
) -> None:
    judgement = decide(candidates, *gates)
    assert (judgement.decision, judgement.winner) == (decision, winner), judgement.reason
    assert says in judgement.reason
    assert judgement.reason.endswith(".")
    assert len(judgement.reason) <= 512
    assert 0 < len(judgement.would_change) <= 256
    assert not judgement.would_change.endswith(".")


def test_ranking_is_by_corpus_rate_and_the_baseline_wins_ties() -> None:
    judgement = decide(
        [
            BASE,
            measured("worse", [one.errors for one in WORSE.words]),
            SAME,
            BETTER.__class__(
                **{**{name: getattr(BETTER, name) for name in BETTER.__dataclass_fields__}, "name": "best"}
            ),
        ]
    )
    assert [(one.name, one.rank) for one in judgement.leaderboard] == [
        ("best", 1),
        ("base", 2),
        ("tuned", 3),
        ("worse", 4),
    ]
    assert [one.change is None for one in judgement.leaderboard] == [False, True, False, False]


def test_inconclusive_names_words_that_would_have_decided() -> None:
    base = drawn("base", 0.20, utterances=60)
    generator = np.random.default_rng(3)
    slightly = [
        max(0, one.errors - int(generator.random() < 0.3) + int(generator.random() < 0.15)) for one in base.words
    ]
    judgement = decide([base, measured("tuned", slightly)])
    assert judgement.decision is Decision.INCONCLUSIVE
    more = int(judgement.reason.partition("needs about ")[2].partition(" more words")[0].replace(",", ""))
    grown = 1 + 1.5 * more / (60 * WORDS_EACH)
    times = int(np.ceil(grown))
    enough = decide([measured("base", [one.errors for one in base.words] * times), measured("tuned", slightly * times)])
    assert enough.decision is Decision.PROMOTE, (more, enough.reason)


def test_a_reason_is_one_sentence_with_the_figures() -> None:
    assert decide([BASE, BETTER]).reason == (
        "tuned makes 63.4 % fewer word errors than base (95 % interval: 61.4 to 65.6 % fewer), "
        "7.5 % against 20.5 % WER on 2000 words."
    )


def test_the_interval_that_is_told_is_the_one_that_holds_for_all_candidates_together() -> None:
    judgement = decide([BASE, BETTER, WORSE])
    change = judgement.leaderboard[0].change
    assert change is not None
    told = f"97.5 % interval: {-100 * change.high:.1f} to {-100 * change.low:.1f} % fewer"
    assert told in judgement.reason


def test_few_speakers_are_said_to_be_few() -> None:
    judgement = decide([BASE], blocks=["only one"] * UTTERANCES)
    assert judgement.over_utterances
    assert judgement.leaderboard[0].wer.low < judgement.leaderboard[0].wer.high
    assert not decide([BASE], blocks=[str(index % 20) for index in range(UTTERANCES)]).over_utterances


def test_equal_models_are_promoted_no_oftener_than_the_confidence_allows() -> None:
    promoted = 0
    for seed in range(40):
        candidates = [drawn(f"model-{index}", 0.2, seed=1000 * seed + index, utterances=80) for index in range(6)]
        promoted += decide(candidates).decision is Decision.PROMOTE
    # 5 % two-sided over all five comparisons: 1 of 40 expected on the better side; without the joint interval 5.
    assert promoted <= 4


ACCENTS = ["us", "scottish"] * (UTTERANCES // 2)
BY_ACCENT = divide("accent", ACCENTS, [WORDS_EACH] * UTTERANCES)


def with_accent(name: str, like: Measured, scottish: int) -> Measured:
    """As another candidate, but with so many errors more (or fewer) in each utterance of the second accent."""
    return measured(
        name,
        [
            min(WORDS_EACH, max(0, one.errors + (scottish if accent == "scottish" else 0)))
            for one, accent in zip(like.words, ACCENTS, strict=True)
        ],
    )


def test_a_candidate_that_is_worse_on_one_accent_beyond_doubt_is_not_promoted() -> None:
    gate = Gate(metric=Metric.WER, max_change_from_baseline="0.02", slice="accent")
    better = with_accent("tuned", with_accent("us", BASE, 0), -1)
    assert decide([BASE, better], gate, slices=BY_ACCENT).decision is Decision.PROMOTE
    uneven = measured(
        "tuned",
        [
            one.errors + 1 if accent == "scottish" else max(0, one.errors - 2)
            for one, accent in zip(BASE.words, ACCENTS, strict=True)
        ],
    )
    assert decide([BASE, uneven]).decision is Decision.PROMOTE  # nothing is seen of it over all
    judgement = decide([BASE, uneven], gate, slices=BY_ACCENT)
    assert (judgement.decision, judgement.winner) == (Decision.KEEP, "base")
    assert "in accent=scottish (1000 words)" in judgement.reason
    assert judgement.would_change == "a model that keeps the gates: Wer change at most +2 % in each accent"
    figures = {one.slice.value: one for one in judgement.leaderboard[0].slices}
    assert figures["us"].change is not None
    assert figures["us"].change.high < 0
    assert figures["scottish"].change is not None
    assert figures["scottish"].change.low > 0


def test_a_gate_that_is_broken_on_a_slice_by_chance_perhaps_leaves_the_verdict_open() -> None:
    gate = Gate(metric=Metric.WER, max_change_from_baseline="0", slice="accent")
    generator = np.random.default_rng(8)
    errors = []
    for one, accent in zip(BASE.words, ACCENTS, strict=True):
        drawn = int(generator.random() < 0.30) - int(generator.random() < 0.22)
        errors.append(min(WORDS_EACH, max(0, one.errors + (drawn if accent == "scottish" else -2))))
    judgement = decide([BASE, measured("tuned", errors)], gate, slices=BY_ACCENT)
    assert judgement.decision is Decision.INCONCLUSIVE, judgement.reason
    assert "but Wer change +" in judgement.reason
    assert judgement.would_change.endswith("more words of accent=scottish")


def test_slices_that_are_too_small_are_marked_and_say_nothing() -> None:
    few = ["welsh" if place < 9 else "us" for place in range(UTTERANCES)]
    slices = divide("accent", few, [WORDS_EACH] * UTTERANCES)
    assert [(one.value, one.is_too_small) for one in slices] == [("us", False), ("welsh", True)]
    worse_there = measured(
        "tuned",
        [WORDS_EACH if place < 9 else max(0, one.errors - 1) for place, one in enumerate(BASE.words)],
    )
    gate = Gate(metric=Metric.WER, max_change_from_baseline="0", slice="accent")
    judgement = decide([BASE, worse_there], gate, slices=slices)
    assert judgement.decision is Decision.PROMOTE
    welsh = judgement.leaderboard[0].slices[1]
    assert (welsh.change, welsh.p_value) == (None, None)
    assert not judgement.leaderboard[0].gaps
    only_small = divide("accent", [str(place // 5) for place in range(UTTERANCES)], [WORDS_EACH] * UTTERANCES)
    judgement = decide([BASE, BETTER], gate, slices=only_small)
    assert judgement.decision is Decision.INCONCLUSIVE
    assert "no value of accent has the 100 words" in judgement.reason


def test_the_gap_table_names_the_best_and_the_worst_value() -> None:
    uneven = with_accent("base", BASE, 2)
    judgement = decide([uneven], slices=BY_ACCENT)
    (gap,) = judgement.leaderboard[0].gaps
    assert (gap.best.slice.value, gap.worst.slice.value, gap.values, gap.too_small) == ("us", "scottish", 2, 0)
    rates = {
        accent: sum(one.errors for one, of in zip(uneven.words, ACCENTS, strict=True) if of == accent) / 1000
        for accent in ("us", "scottish")
    }
    assert gap.difference.value == pytest.approx(rates["scottish"] - rates["us"])
    assert 0 < gap.difference.low < gap.difference.value < gap.difference.high


def test_of_equal_models_no_slice_is_called_different() -> None:
    slices: list[Slice] = divide("accent", [str(place % 10) for place in range(UTTERANCES)], [WORDS_EACH] * UTTERANCES)
    alarms = raw = 0
    for seed in range(40):
        base, other = drawn("base", 0.2, seed=2 * seed + 100), drawn("tuned", 0.2, seed=2 * seed + 101)
        figures = next(one for one in decide([base, other], slices=slices).leaderboard if one.name == "tuned").slices
        alarms += any(one.p_adjusted is not None and one.p_adjusted < 0.05 for one in figures)
        raw += any(one.p_value is not None and one.p_value < 0.05 for one in figures)
    assert raw >= 8  # about 40 % of the trials have one of ten below 0.05 by chance
    assert alarms <= 6  # 2 of 40 expected


def test_a_baseline_that_failed_leaves_the_others_their_figures() -> None:
    failed = [Failed("base", "ModelNotFound", "there is no model")]
    judgement = decide([BETTER], baseline="base", failed=failed)
    assert (judgement.decision, judgement.winner) == (Decision.INCONCLUSIVE, None)
    assert "(ModelNotFound)" in judgement.reason
    assert judgement.leaderboard[0].wer.value == pytest.approx(0.075, abs=0.001)
    assert judgement.leaderboard[0].change is None
    judgement = decide([BASE, BETTER], failed=[Failed("vendor", "EndpointTimeout", "did not answer")])
    assert judgement.decision is Decision.PROMOTE
    assert judgement.reason.endswith("Not judged: vendor.")


def test_accuracies_are_bounded_from_below() -> None:
    asked = Gate(metric=Metric.SENTENCE_ACCURACY, min="0.9")
    judgement = decide([BASE], asked)
    assert judgement.decision is Decision.FINE_TUNE
    accuracy = BASE.sentence_accuracy
    assert judgement.leaderboard[0].failed_gates == (f"SentenceAccuracy {100 * accuracy:.1f} % is below 90 %",)
    kept = decide([BASE], Gate(metric=Metric.SENTENCE_ACCURACY, min="0.01"))
    assert kept.decision is Decision.NO_FINE_TUNE_NEEDED
    doubt = decide([BASE], Gate(metric=Metric.SENTENCE_ACCURACY, min=f"{accuracy - 0.01:.3f}"))
    assert doubt.decision is Decision.INCONCLUSIVE


def test_the_smallest_change_that_shows_is_one_that_shows() -> None:
    judgement = decide([BASE, SHUFFLED])
    other = next(one for one in judgement.leaderboard if one.name == "tuned")
    assert other.detectable is not None
    shown = 0
    for seed in range(60):
        base = drawn("base", 0.2, seed=3000 + seed)
        better = drawn("tuned", 0.2 * (1 - other.detectable), seed=9000 + seed)
        change = next(one for one in decide([base, better]).leaderboard if one.name == "tuned").change
        shown += change is not None and change.high < 0
    # 80 % of 60 is 48; three standard deviations of the count are 9.
    assert 39 <= shown <= 57


def row(name: str, rank: int) -> LeaderboardRow:
    return LeaderboardRow(
        candidate=name,
        rank=rank,
        model_digest=DIGEST,
        padding=Padding.BUCKETS,
        utterances=1_000_000,
        words=10_000_000,
        hits=9_000_000,
        substitutions=500_000,
        deletions=400_000,
        insertions=300_000,
        wer="0.1234",
        wer_low="0.1111",
        wer_high="0.1333",
        cer="0.0456",
        sentence_accuracy="0.6543",
        cer_low="0.0412",
        cer_high="0.0499",
        sentence_accuracy_low="0.6234",
        sentence_accuracy_high="0.6789",
        entities=12_345,
        entity_accuracy="0.8765",
        entity_accuracy_low="0.8612",
        entity_accuracy_high="0.8899",
        real_time_factor="0.1234",
        latency_seconds="0.4567",
        p_value="0.000123",
        detectable_change="0.0345",
        change_from_baseline="-0.1234",
        change_low="-0.2345",
        change_high="-0.1111",
        failed_gates=[f"Wer change -{gate}.1 % is above -15 %" for gate in range(16)],
    )


@pytest.mark.parametrize("length", [4, 63], ids=["short names", "longest names"])
def test_summary_of_eight_candidates_fits_in_a_termination_message(length: int) -> None:
    names = [f"{index}" + "n" * (length - 1) for index in range(8)]
    result = EvaluateResult(
        leaderboard=[row(name, rank) for rank, name in enumerate(names, start=1)],
        winner=names[0],
        verdict=Verdict(decision=Decision.PROMOTE, reason="r" * 512),
        report_uri="s3://" + "b" * 63 + "/" + "k" * 180 + "/report.html",
        normaliser="attune-unicode-1",
    )
    message = summarise(result=result).to_message()
    assert len(message.encode()) <= TERMINATION_MESSAGE_BYTES
    read = Summary.model_validate(json.loads(message)).result
    assert isinstance(read, EvaluateResult)
    assert [one.candidate for one in read.leaderboard] == names
    assert read.verdict == result.verdict
    assert [(one.wer, one.wer_low, one.wer_high) for one in read.leaderboard] == [("0.1234", "0.1111", "0.1333")] * 8
    assert read.leaderboard[0].model_digest == DIGEST  # of the winner, whatever else is left out


def test_summary_with_gaps_and_failed_candidates_fits_and_still_names_them() -> None:
    names = [f"{index}" + "n" * 62 for index in range(4)]
    failed = [
        FailedCandidate(candidate=f"{index}" + "f" * 62, reason="EndpointNotTranscribing", message="m" * 256)
        for index in range(4)
    ]
    gap = SliceGap(
        label="l" * 63,
        candidate=names[0],
        best="b" * 63,
        best_wer="0.1",
        worst="w" * 63,
        worst_wer="0.2",
        gap="0.1",
        gap_low="0.05",
        gap_high="0.15",
        values=64,
        too_small=10,
    )
    result = EvaluateResult(
        leaderboard=[row(name, rank) for rank, name in enumerate(names, start=1)],
        winner=names[0],
        verdict=Verdict(decision=Decision.PROMOTE, reason="r" * 512, would_change="w" * 256),
        report_uri="s3://" + "b" * 63 + "/" + "k" * 180 + "/report.html",
        normaliser="attune-unicode-1",
        gaps=[gap] * 8,
        failed=failed,
    )
    message = summarise(result=result).to_message()
    assert len(message.encode()) <= TERMINATION_MESSAGE_BYTES
    read = Summary.model_validate(json.loads(message)).result
    assert isinstance(read, EvaluateResult)
    assert [(one.candidate, one.reason) for one in read.failed] == [(one.candidate, one.reason) for one in failed]
    assert [one.wer for one in read.leaderboard] == ["0.1234"] * 4
    small = result.model_copy(update={"leaderboard": result.leaderboard[:1], "failed": [], "gaps": [gap]})
    assert summarise(result=small).result == small  # what fits stays
