"""How often a healthy canary is rolled back, and how soon a worse one is found: Attune's test beside the usual rules.

Simulated golden replays: 60 utterances a minute for an hour, each heard by both arms. Utterances have one word and
more (10 on average), some are harder than others for both arms, and one in a hundred ends in a hallucination loop (30
errors, the cap) in either arm. The looks and rules:

- Attune: the word-error test of attune.domain.verdict, tolerance 5 %, after every utterance.
- Argo Rollouts, Flagger: once a minute the canary's word error rate of that minute must not be more than 5 % above
  stable's; more than 3 misses (Argo Rollouts' failureLimit) or 5 misses (Flagger's usual threshold) roll back.
- z-test: a one-sided test at 5 % of all that has been heard, looked at every 100 utterances.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from attune.api.canary import AnalysisVerdict, WerTest
from attune.domain.verdict import MIN_UTTERANCES, PairedSums, compute_boundary, judge
from numpy.typing import NDArray

from bench.report import Row, report

RUNS = 1000
UTTERANCES = 3600
A_MINUTE = 60
MEAN_WORDS = 10
STABLE_WER = 0.12
TOLERANCE = 0.05
ALPHA = 0.05
MOST_ERRORS = 30
LOOPS = 0.01
CHUNK = 250  # runs at a time: bounds the memory
ONE_SIDED = 1.645  # 95 % of a normal distribution lie below
MOST_FALSE_ROLLBACKS = 1.0  # percent
MOST_FALSE_PASSES = 5.0  # percent
NEVER = np.iinfo(np.int64).max

Counts = NDArray[np.int64]
Times = NDArray[np.int64]


@dataclass(frozen=True)
class Replays:
    """Reference words and errors of each arm, by run and utterance."""

    words: Counts
    stable: Counts
    canary: Counts


def simulate(rng: np.random.Generator, canary_wer: float, loops: float) -> Replays:
    """Draws replays; difficulty is shared by the arms, their errors beyond that are independent."""
    shape = (CHUNK, UTTERANCES)
    words = 1 + rng.poisson(MEAN_WORDS - 1, shape)
    difficulty = rng.gamma(2.0, 0.5, shape)

    def arm(rate: float) -> Counts:
        errors = np.minimum(rng.poisson(words * rate * difficulty), MOST_ERRORS)
        return np.where(rng.random(shape) < loops, MOST_ERRORS, errors).astype(np.int64)

    return Replays(words.astype(np.int64), arm(STABLE_WER), arm(canary_wer))


BOUNDARY = np.array([compute_boundary(n, ALPHA) for n in range(1, UTTERANCES + 1)])


def find_attune(replays: Replays) -> tuple[Times, Times]:
    """Gives the first utterance with Fail and with Pass of each run, NEVER where there is none.

    The formula of domain.verdict, for many runs at once; check_formula holds the two together.
    """
    n = np.arange(1, UTTERANCES + 1)
    factor = 1 + TOLERANCE
    difference = replays.canary - factor * replays.stable
    mean = np.cumsum(difference, 1) / n
    variance = np.maximum(np.cumsum(difference**2, 1) / n - mean**2, 0)
    half = BOUNDARY * np.sqrt(variance + 1 / n)
    enough = n >= MIN_UTTERANCES
    return _first((mean - half > 0) & enough), _first((mean + half < 0) & enough)


def find_threshold(replays: Replays, misses: int) -> Times:
    """A rule of thumb: more than so many minutes in which the canary's rate was above stable's and the tolerance."""
    minutes = (CHUNK, UTTERANCES // A_MINUTE, A_MINUTE)
    stable, canary = (errors.reshape(minutes).sum(2) for errors in (replays.stable, replays.canary))
    missed = np.cumsum(canary > (1 + TOLERANCE) * stable, 1) > misses
    first = _first(missed)
    return np.where(first == NEVER, NEVER, first * A_MINUTE)


def find_repeated_z(replays: Replays) -> Times:
    """A test for one look, looked at every hundred utterances."""
    looks = np.arange(100, UTTERANCES + 1, 100)
    difference = (replays.canary - replays.stable).astype(float)
    mean = np.cumsum(difference, 1)[:, looks - 1] / looks
    variance = np.cumsum(difference**2, 1)[:, looks - 1] / looks - mean**2
    first = _first(mean / np.sqrt(variance / looks) > ONE_SIDED)
    return np.where(first == NEVER, NEVER, first * 100)


def _first(hits: NDArray[np.bool_]) -> Times:
    return np.where(hits.any(1), hits.argmax(1) + 1, NEVER)


def check_formula(replays: Replays) -> None:
    """Compares with the operator's own code at some places of some runs.

    Raises:
        AssertionError: when this benchmark measures something else than what the operator does.
    """
    test = WerTest(max_increase=str(TOLERANCE), confidence="0.95", min_words=1)
    fails, passes = find_attune(replays)
    for run in range(0, CHUNK, 10):
        for moment, verdict in ((fails[run], AnalysisVerdict.FAIL), (passes[run], AnalysisVerdict.PASS)):
            if moment == NEVER:
                continue
            for n, expected in ((int(moment), True), (int(moment) - 1, False)):
                s, c, w = (counts[run, :n] for counts in (replays.stable, replays.canary, replays.words))
                sums = PairedSums(
                    utterances=n,
                    words=int(w.sum()),
                    stable_errors=int(s.sum()),
                    canary_errors=int(c.sum()),
                    stable_squared=int((s * s).sum()),
                    canary_squared=int((c * c).sum()),
                    product=int((s * c).sum()),
                    golden_utterances=UTTERANCES,
                    golden_words=10**9,
                )
                if (judge(sums, test).verdict is verdict) is not expected:
                    raise AssertionError(f"run {run}: the operator does not say {verdict} at {moment} first")


def measure(seed: int, canary_wer: float, loops: float, *find: Callable[[Replays], Times]) -> list[Times]:
    """Collects the moments at which each rule ends its runs."""
    rng = np.random.default_rng(seed)
    found: list[list[Times]] = [[] for _ in find]
    for number in range(RUNS // CHUNK):
        replays = simulate(rng, canary_wer, loops)
        if number == 0:
            check_formula(replays)
        for rule, moments in zip(find, found, strict=True):
            moments.append(rule(replays))
    return [np.concatenate(moments) for moments in found]


def main() -> None:
    """Measures and reports."""
    began = time.monotonic()

    def fail(replays: Replays) -> Times:
        return find_attune(replays)[0]

    def pass_(replays: Replays) -> Times:
        return find_attune(replays)[1]

    rules: list[tuple[str, Callable[[Replays], Times]]] = [
        ("Attune", fail),
        ("threshold, 4th miss (Argo Rollouts)", lambda replays: find_threshold(replays, 3)),
        ("threshold, 6th miss (Flagger)", lambda replays: find_threshold(replays, 5)),
        ("z-test every 100 utterances", find_repeated_z),
    ]
    rows: list[Row] = []
    for loops, tails in ((0.0, ""), (LOOPS, ", 1 % hallucination loops")):
        for (name, _), moments in zip(rules, measure(11, STABLE_WER, loops, *(rule for _, rule in rules)), strict=True):
            share = 100 * float((moments != NEVER).mean())
            ours = name == "Attune"
            rows.append(
                Row(
                    f"identical models rolled back within an hour{tails}: {name}",
                    round(share, 2),
                    "%",
                    "<= 1 %" if ours else "",
                    share <= MOST_FALSE_ROLLBACKS if ours else None,
                    f"{RUNS} runs, WER {STABLE_WER:.0%}",
                )
            )
    # 2.4 points are 20 % of 12 %.
    for points, target in ((2.4, 600), (3, 400), (5, 130), (10, 60)):
        fails, passes = measure(int(10 * points), STABLE_WER + points / 100, 0.0, fail, pass_)
        middle = float(np.median(fails))
        rows.append(
            Row(
                f"utterances until +{points} points are found (median)",
                middle,
                "utterances",
                f"<= {target}",
                middle <= target,
                f"found in {100 * float((fails != NEVER).mean()):.1f} % of runs within the hour",
            )
        )
        wrong = 100 * float((passes < fails).mean())
        rows.append(Row(f"+{points} points passed instead", round(wrong, 2), "%", "<= 5 %", wrong <= MOST_FALSE_PASSES))
    for wer in (0.07, 0.10):
        fails, passes = measure(31, wer, 0.0, fail, pass_)
        share = 100 * float((passes < fails).mean())
        middle = float(np.median(passes))
        rows.append(
            Row(f"better model ({wer:.0%}) passed", round(share, 1), "%", versus=f"median {middle:.0f} utterances")
        )
    report("false-rollback", rows)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
