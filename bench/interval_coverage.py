"""Coverage: how often a 95 % interval of an evaluation holds the truth.

Holdouts are drawn from a known population of speakers who are heard differently well, say utterances of different
lengths, and now and then send a recogniser into a loop. Of each holdout the very functions that an Evaluation uses make
their intervals, and what they should hold is known from the population. Beside them: how often the matched-pairs test
and the slices, corrected by Holm, call two equally good systems different.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from attune_trainer.scoring.bootstrap import BootstrapInterval, Series, bootstrap_rate, bootstrap_rate_change
from attune_trainer.scoring.significance import compare_matched_pairs
from attune_trainer.scoring.slices import divide, measure_slices
from numpy.typing import NDArray

from bench.report import Row, report

CONFIDENCE: Final = 0.95
LOWEST, HIGHEST = 93.0, 97.5
TRIALS: Final = 2000
SPEAKERS: Final = (12, 40, 120)
UTTERANCES_EACH: Final = 15
# The population: mean share of words heard wrong, how much speakers differ, and how much better the candidate is.
ERROR_RATE: Final = 0.12
SPREAD: Final = 12.0  # of the beta distribution; 12 means a standard deviation of 9 points between speakers
BETTER: Final = 0.85
LOOPS: Final = 0.003  # of utterances
LOOP_WORDS: Final = 12
TRUTH_SPEAKERS: Final = 200_000
SLICES: Final = 8

_Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Holdout:
    """Utterances of a draw of speakers; arrays of shape (utterances,)."""

    speakers: _Counts
    words: _Counts
    errors: _Counts  # of the baseline
    errors_of_candidate: _Counts
    characters: _Counts
    character_errors: _Counts
    entities: _Counts
    right_entities: _Counts


def draw_holdout(generator: np.random.Generator, speakers: int) -> Holdout:
    """Draws speakers and what they say; both systems hear the same utterances."""
    count = speakers * UTTERANCES_EACH
    rate = generator.beta(ERROR_RATE * SPREAD, (1 - ERROR_RATE) * SPREAD, speakers)
    ratio = np.minimum(BETTER * generator.gamma(20, 1 / 20, speakers), 1 / np.maximum(rate, 1e-9))
    owner = np.repeat(np.arange(speakers), UTTERANCES_EACH)
    words = 1 + generator.poisson(generator.gamma(2.0, 3.5, count))
    errors = generator.binomial(words, rate[owner])
    # What the candidate hears wrong is mostly what the baseline did: the same words are hard for both.
    kept = generator.binomial(errors, np.minimum(1.0, 0.8 * ratio[owner]))
    fresh = np.clip(rate[owner] * (ratio[owner] - np.minimum(1.0, 0.8 * ratio[owner])) / (1 - rate[owner]), 0, 1)
    errors_of_candidate = kept + generator.binomial(words - errors, fresh)
    loops = LOOP_WORDS * (generator.random((2, count)) < LOOPS)
    characters = words * 5
    entities = np.minimum(words, generator.poisson(0.4, count))
    right = generator.binomial(entities, 1 - rate[owner])
    return Holdout(
        speakers=owner,
        words=words,
        errors=errors + loops[0],
        errors_of_candidate=errors_of_candidate + loops[1],
        characters=characters,
        character_errors=generator.binomial(errors * 4, 0.55) + 5 * loops[0],
        entities=entities,
        right_entities=right,
    )


def series(parts: _Counts, wholes: _Counts) -> Series:
    """What a rate is made of."""
    return Series(tuple(parts.tolist()), tuple(wholes.tolist()))


def right_sentences(holdout: Holdout) -> Series:
    """Utterances without an error."""
    return series((holdout.errors == 0).astype(np.int64), np.ones_like(holdout.words))


Interval = Callable[[Holdout, Sequence[str], int], BootstrapInterval | None]
RATES: Final[dict[str, Callable[[Holdout], Series]]] = {
    "WER": lambda one: series(one.errors, one.words),
    "CER": lambda one: series(one.character_errors, one.characters),
    "sentence accuracy": right_sentences,
    "entity accuracy": lambda one: series(one.right_entities, one.entities),
}


def change_of(holdout: Holdout) -> tuple[Series, Series]:
    """Baseline and candidate."""
    return series(holdout.errors, holdout.words), series(holdout.errors_of_candidate, holdout.words)


def measure_coverage(trials: int, speakers: int, truth: dict[str, float], seed: int) -> dict[str, float]:
    """Gives the share of intervals that hold the truth, in percent, by metric."""
    held = dict.fromkeys(truth, 0)
    for trial in range(trials):
        holdout = draw_holdout(np.random.default_rng([seed, speakers, trial]), speakers)
        blocks = [str(owner) for owner in holdout.speakers]
        intervals = {name: bootstrap_rate(make(holdout), blocks, CONFIDENCE, trial) for name, make in RATES.items()}
        change = bootstrap_rate_change(*change_of(holdout), blocks, CONFIDENCE, trial)
        if change is not None:
            intervals["change of WER, paired"] = change
        for name, interval in intervals.items():
            held[name] += interval.low <= truth[name] <= interval.high
    return {name: 100 * count / trials for name, count in held.items()}


def find_truth() -> dict[str, float]:
    """Gives the figures of the population, from a draw so large that its own error does not count."""
    everybody = draw_holdout(np.random.default_rng(99), TRUTH_SPEAKERS)
    truth = {name: make(everybody).rate for name, make in RATES.items()}
    base, candidate = change_of(everybody)
    return truth | {"change of WER, paired": candidate.rate / base.rate - 1.0}


def measure_false_alarms(trials: int, seed: int) -> tuple[float, float]:
    """Gives how often equally good systems are called different, in percent.

    By the matched-pairs test, and by any of several slices after Holm's correction.
    """
    by_test = by_slices = 0
    for trial in range(trials):
        generator = np.random.default_rng([seed, trial])
        lengths = 3 + generator.poisson(7, 240)
        one, other = ([make_slots(generator, length) for length in lengths] for _ in range(2))
        by_test += compare_matched_pairs(one, other).p_value < 1 - CONFIDENCE
        words = lengths.tolist()
        labels = [str(place % SLICES) for place in range(len(words))]
        sums = [Series(tuple(sum(slots) for slots in heard), tuple(words)) for heard in (one, other)]
        places = [str(place) for place in range(len(words))]
        figures = measure_slices(divide("accent", labels, words), sums[0], sums[1], places, CONFIDENCE, trial)
        by_slices += any((slice_.p_adjusted or 1.0) < 1 - CONFIDENCE for slice_ in figures)
    return 100 * by_test / trials, 100 * by_slices / trials


def make_slots(generator: np.random.Generator, length: int) -> tuple[int, ...]:
    """Draws which words of an utterance are heard wrong."""
    return (*(generator.random(length) < ERROR_RATE).astype(int).tolist(), 0)


def main() -> None:
    """Simulates and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=TRIALS, help="holdouts to draw, for each number of speakers")
    arguments = parser.parse_args()
    began = time.monotonic()
    truth = find_truth()
    rows = []
    for speakers in SPEAKERS:
        coverage = measure_coverage(arguments.trials, speakers, truth, 7)
        rows += [
            Row(
                f"coverage of 95 % intervals: {name}, {speakers} speakers",
                share,
                "%",
                f"{LOWEST:g} to {HIGHEST:g} %",
                holds=LOWEST <= share <= HIGHEST,
                versus=f"{arguments.trials} holdouts of {speakers * UTTERANCES_EACH} utterances",
            )
            for name, share in coverage.items()
        ]
        print(f"{time.monotonic() - began:.0f} s: {speakers} speakers", flush=True)
    by_test, by_slices = measure_false_alarms(max(1, arguments.trials // 4), 11)
    alarms = (("matched-pairs test", by_test), (f"any of {SLICES} slices, corrected", by_slices))
    rows += [
        Row(f"equal systems called different: {name}", share, "%", "at most 7 %", holds=share <= 7.0)  # noqa: PLR2004
        for name, share in alarms
    ]
    report("interval-coverage", rows, keep=arguments.trials >= TRIALS)


if __name__ == "__main__":
    main()
