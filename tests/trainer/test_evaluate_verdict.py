"""What follows from counts: ranking, gates, verdicts, and that the Summary always fits."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from attune.contract.environment import TERMINATION_MESSAGE_BYTES
from attune.contract.measures import Decision, Gate, Metric
from attune.contract.result import EvaluateResult, LeaderboardRow, Summary, Verdict
from attune.contract.training import Padding
from attune_trainer.job import summarise
from attune_trainer.scoring import ErrorCounts
from attune_trainer.scoring.verdict import Judgement, Measured, judge

DIGEST = "sha256:" + "a" * 64
UTTERANCES, WORDS_EACH = 200, 10


def measured(name: str, errors: Sequence[int], *, work_seconds: float = 10.0) -> Measured:
    counts = tuple(ErrorCounts(WORDS_EACH - e, e, 0, 0, WORDS_EACH) for e in errors)
    return Measured(name, DIGEST, Padding.WINDOW, counts, counts, work_seconds, 100.0)


def drawn(name: str, rate: float, seed: int = 1, utterances: int = UTTERANCES) -> Measured:
    return measured(name, np.random.default_rng(seed).binomial(WORDS_EACH, rate, utterances).tolist())


def decide(candidates: Sequence[Measured], *gates: Gate, blocks: Sequence[str] | None = None) -> Judgement:
    ids = [str(index) for index in range(len(candidates[0].words))]
    return judge(candidates, blocks or ids, candidates[0].name, gates, 0.95, 7)


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
            [BASE], [wer_gate("0.3")], Decision.NO_FINE_TUNE_NEEDED, "base", "allow 30.0 % WER", id="base alone passes"
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
        "tuned makes 63.4 % fewer word errors than base (95 % interval: 61.5 to 65.6 % fewer), "
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
        real_time_factor="0.1234",
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
    )
    message = summarise(result=result).to_message()
    assert len(message.encode()) <= TERMINATION_MESSAGE_BYTES
    read = Summary.model_validate(json.loads(message)).result
    assert isinstance(read, EvaluateResult)
    assert [one.candidate for one in read.leaderboard] == names
    assert read.verdict == result.verdict
    assert [(one.wer, one.wer_low, one.wer_high) for one in read.leaderboard] == [("0.1234", "0.1111", "0.1333")] * 8
    assert read.leaderboard[0].model_digest == DIGEST  # of the winner, whatever else is left out
