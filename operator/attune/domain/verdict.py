"""The word-error test: an anytime-valid confidence sequence for how much worse a canary hears than stable.

Both arms hear the same utterances; what an arm never answers counts as an empty transcript of it, all words wrong.
Utterance i has w_i reference words; stable makes s_i word errors and the canary c_i. With m the tolerated relative
increase, d_i = c_i - (1 + m) s_i, and

    E[d] / E[w] = WER_canary - (1 + m) WER_stable

is the quantity that is judged: positive is too bad, negative is good enough. Its sign is that of E[d], so the sequence
is built for E[d] and divided by the mean number of words only to be shown as a difference of word error rates. Summing
errors over words, and not averaging rates of utterances, makes this the corpus word error rate.

The bounds hold at all sample sizes at once, so that one may look after every utterance and stop whenever one likes.
They are the asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas ("Time-uniform central
limit theory and asymptotic confidence sequences", arXiv 2103.06476, theorem 2.2), which is the normal mixture boundary
of Robbins (1970) and of Howard, Ramdas, McAuliffe and Sekhon ("Time-uniform, nonparametric, nonasymptotic confidence
sequences", arXiv 1810.08240) with an estimated variance:

    mean_n +- sigma_n sqrt( 2 (n rho^2 + 1) / (n^2 rho^2) * log( sqrt(n rho^2 + 1) / alpha ) )

Two things keep the asymptotics honest where n is small. Nothing is decided before MIN_UTTERANCES. And the variance is
estimated as if one utterance more had disagreed by one word: two arms that never differed in n utterances may still
differ in the next one, about as the rule of three says.

Everything follows from sums over utterances, so nothing is remembered: whoever has the sums has the verdict.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from attune.api.canary import AnalysisVerdict, WerTest
from attune.contract import metrics

# Calibrated by simulation (bench/false_rollback.py): with fewer, errors that come in bursts fool the estimate of the
# variance more often than the confidence allows.
MIN_UTTERANCES: Final = 20
# The sequence is tightest near this many utterances and nearly as tight from a third to three times as many.
TUNED_FOR_UTTERANCES: Final = 150
# Beyond this no golden set reaches, and the answer is "never".
_MOST_UTTERANCES: Final = 10_000_000
# Sums are exact in floating point far beyond any golden set; what is off by more than this is no rounding.
_ROUNDING: Final = 1e-9

REASON_INCONSISTENT: Final = "InconsistentData"
REASON_NO_DATA: Final = "NoData"
REASON_NOT_ENOUGH: Final = "NotEnoughEvidence"
REASON_PROMETHEUS_UNAVAILABLE: Final = "PrometheusUnavailable"
REASON_PROMETHEUS_NOT_ALLOWED: Final = "PrometheusNotAllowed"


@dataclass(frozen=True)
class NoEvidence:
    """Why nothing is known: reason for machines, message for people."""

    reason: str
    message: str


@dataclass(frozen=True)
class PairedSums:
    """Sums over the utterances that count for both arms, and the size of the golden set that they come from."""

    utterances: int
    words: int
    stable_errors: int
    canary_errors: int
    stable_squared: int
    canary_squared: int
    product: int
    golden_utterances: int
    golden_words: int
    exhausted: bool = False  # every golden utterance has been replayed; no more evidence will come


@dataclass(frozen=True)
class Judgement:
    """What the sums say. Rates and bounds are fractions of the reference words; message is a sentence for people.

    needs_utterances: how many more utterances would decide, at the present estimates; absent when decided or unknown.
    golden_needed: set when the golden set is too small to decide; how many utterances it should hold.
    """

    verdict: AnalysisVerdict
    reason: str
    message: str
    utterances: int = 0
    words: int = 0
    golden_utterances: int | None = None
    stable_wer: float | None = None
    canary_wer: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    needs_utterances: int | None = None
    golden_needed: int | None = None


def read_sums(series: Mapping[str, float]) -> PairedSums | NoEvidence:
    """Turns the values of contract.metrics.PAIRED_SERIES into sums, or says why they can't be trusted.

    Missing series, NaN, infinities, negative or broken counts, and sums that no data can have (n * sum s^2 is never
    below (sum s)^2) give NoEvidence.
    """
    missing = [name for name in metrics.PAIRED_SERIES if name not in series]
    if missing:
        return NoEvidence(REASON_INCONSISTENT, f"the scorer's series {missing[0]} is missing")
    for name in metrics.PAIRED_SERIES:
        value = series[name]
        if not math.isfinite(value) or value < 0 or value != math.floor(value):
            return NoEvidence(REASON_INCONSISTENT, f"{name} is {value}, which is no count")
    whole = {name: int(series[name]) for name in metrics.PAIRED_SERIES}
    sums = PairedSums(
        utterances=whole[metrics.PAIRED_UTTERANCES],
        words=whole[metrics.PAIRED_WORDS],
        stable_errors=whole[metrics.PAIRED_STABLE_ERRORS],
        canary_errors=whole[metrics.PAIRED_CANARY_ERRORS],
        stable_squared=whole[metrics.PAIRED_STABLE_SQUARED],
        canary_squared=whole[metrics.PAIRED_CANARY_SQUARED],
        product=whole[metrics.PAIRED_PRODUCT],
        golden_utterances=whole[metrics.GOLDEN_UTTERANCES],
        golden_words=whole[metrics.GOLDEN_WORDS],
        exhausted=whole[metrics.GOLDEN_EXHAUSTED] > 0,
    )
    problem = _find_contradiction(sums)
    return NoEvidence(REASON_INCONSISTENT, problem) if problem else sums


def judge(evidence: PairedSums | NoEvidence, test: WerTest) -> Judgement:
    """Says Pass, Fail, Inconclusive or Unknown; never Pass or Fail without evidence.

    Worked example, tolerance 5 %, confidence 95 %: over 100 utterances of 5 words stable made 60 errors and the canary
    160, with sums of squares 120 and 420 and of products 110. Then d = 160 - 1.05 * 60 = 97 in all, 0.97 an utterance;
    its variance is (420 - 2.1 * 110 + 1.1025 * 120) / 100 - 0.97^2 + 0.01 = 2.282; the boundary at n = 100 is 0.3051
    standard deviations, 0.461 errors; so d lies within 0.509 and 1.431 errors an utterance, which is 10.2 to 28.6
    points of word error rate: Fail.
    """
    if isinstance(evidence, NoEvidence):
        return Judgement(AnalysisVerdict.UNKNOWN, evidence.reason, evidence.message)
    problem = _find_contradiction(evidence)
    if problem:
        return Judgement(AnalysisVerdict.UNKNOWN, REASON_INCONSISTENT, problem)
    if evidence.utterances == 0:
        return Judgement(
            AnalysisVerdict.UNKNOWN,
            REASON_NO_DATA,
            "no utterance counts for both arms yet",
            golden_utterances=evidence.golden_utterances,
        )
    return _weigh(evidence, test)


def compute_boundary(utterances: int, alpha: float) -> float:
    """Half the width of the confidence sequence, in standard deviations of one utterance.

    alpha is the chance that the sequence ever misses. compute_boundary(100, 0.05) -> 0.3051: at 100 utterances the mean
    is known to within 0.31 standard deviations. A test that looks only once would have 0.196.
    """
    log_term = -2 * math.log(alpha)
    rho_squared = (log_term + math.log(log_term + 1)) / TUNED_FOR_UTTERANCES
    scaled = utterances * rho_squared + 1
    return math.sqrt(2 * scaled / (utterances**2 * rho_squared) * math.log(math.sqrt(scaled) / alpha))


def estimate_utterances(mean: float, variance: float, alpha: float) -> int | None:
    """How many utterances decide when d has this mean and variance; None when no golden set would.

    estimate_utterances(0.97, 2.272, 0.05) -> 29.
    """
    if mean == 0:
        return None

    def decides(utterances: int) -> bool:
        return compute_boundary(utterances, alpha) * math.sqrt(variance + 1 / utterances) < abs(mean)

    high = MIN_UTTERANCES
    while not decides(high):
        high *= 2
        if high > _MOST_UTTERANCES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if decides(middle):
            high = middle
        else:
            low = middle
    return max(high, MIN_UTTERANCES)


def _find_contradiction(sums: PairedSums) -> str | None:
    n = sums.utterances
    if min(n, sums.words, sums.stable_errors, sums.canary_errors, sums.product) < 0:
        return "a sum is negative"
    if n > 0 and sums.words < n:
        return f"{n} utterances have only {sums.words} reference words"
    if n > sums.golden_utterances or sums.words > sums.golden_words:
        return (
            f"{n} utterances with {sums.words} words were scored, but the golden set holds {sums.golden_utterances} "
            f"with {sums.golden_words}"
        )
    slack = 1 + _ROUNDING
    for errors, squared in (
        (sums.stable_errors, sums.stable_squared),
        (sums.canary_errors, sums.canary_squared),
    ):
        if squared < errors or errors**2 > n * squared * slack:
            return "the sums of errors and of their squares contradict each other"
    if sums.product**2 > sums.stable_squared * sums.canary_squared * slack:
        return "the sum of products contradicts the sums of squares"
    return None


def _weigh(sums: PairedSums, test: WerTest) -> Judgement:
    tolerance = float(test.max_increase)
    alpha = 1 - float(test.confidence)
    n = sums.utterances
    factor = 1 + tolerance
    mean = (sums.canary_errors - factor * sums.stable_errors) / n
    second_moment = (sums.canary_squared - 2 * factor * sums.product + factor**2 * sums.stable_squared) / n
    variance = max(second_moment - mean**2, 0.0)
    half_width = compute_boundary(n, alpha) * math.sqrt(variance + 1 / n)
    words_each = sums.words / n
    stable_wer = sums.stable_errors / sums.words
    canary_wer = sums.canary_errors / sums.words
    difference, low, high = (value / words_each for value in (mean, mean - half_width, mean + half_width))

    heard = f"canary heard {_percent(canary_wer)} of words wrong, stable {_percent(stable_wer)}"
    beyond = f"the difference beyond the tolerated {_percent(tolerance)}"
    needs: int | None = None
    golden_needed: int | None = None
    if n >= MIN_UTTERANCES and low > 0:
        verdict, reason = AnalysisVerdict.FAIL, "WordErrorRateTooHigh"
        message = f"{heard}; over {n} utterances {beyond} is at least {_points(low)} points"
    elif n >= MIN_UTTERANCES and high < 0 and sums.words >= test.min_words:
        verdict, reason = AnalysisVerdict.PASS, "WordErrorRateGood"
        limit = f"the tolerated limit, {_percent(tolerance)} above stable"
        message = f"{heard}; over {n} utterances it stays below {limit}, by at least {_points(-high)} points"
    else:
        verdict, reason = AnalysisVerdict.INCONCLUSIVE, REASON_NOT_ENOUGH
        enough = estimate_utterances(mean, variance, alpha)
        if enough is not None and mean < 0:
            enough = max(enough, math.ceil(test.min_words / words_each))
        # One more at least: the estimate moves with the next utterance.
        needs = None if enough is None else max(enough - n, 1)
        golden_needed = _size_golden_set(sums, test, enough)
        message = (
            f"{heard}; over {n} utterances {beyond} lies between {_signed(low)} and {_signed(high)} points"
            f"{_say_what_is_needed(sums, test, needs, golden_needed)}"
        )
    return Judgement(
        verdict=verdict,
        reason=reason,
        message=message,
        utterances=n,
        words=sums.words,
        golden_utterances=sums.golden_utterances,
        stable_wer=stable_wer,
        canary_wer=canary_wer,
        difference=difference,
        low=low,
        high=high,
        needs_utterances=needs,
        golden_needed=golden_needed,
    )


def _size_golden_set(sums: PairedSums, test: WerTest, enough: int | None) -> int | None:
    """How large the golden set would have to be; None when it is large enough, or too little has been heard to know.

    It is too small when neither the canary as it has been heard so far, nor one that makes exactly stable's errors
    (d_i = -m s_i, the best that a canary can do without being better than stable), would be decided with it.
    """
    n = sums.utterances
    words_each = sums.words / n
    if sums.golden_words < test.min_words and (sums.exhausted or enough is None or enough > sums.golden_utterances):
        return math.ceil(test.min_words / words_each)
    if n < MIN_UTTERANCES and not sums.exhausted:
        return None
    if not sums.exhausted and enough is not None and enough <= sums.golden_utterances:
        return None
    tolerance = float(test.max_increase)
    mean = sums.stable_errors / n
    variance = max(sums.stable_squared / n - mean**2, 0.0)
    equal = estimate_utterances(-tolerance * mean, tolerance**2 * variance, 1 - float(test.confidence))
    if equal is not None:
        equal = max(equal, math.ceil(test.min_words / words_each))
        if equal <= sums.golden_utterances and not sums.exhausted:
            return None
    sizes = [size for size in (enough, equal) if size is not None and size > sums.golden_utterances]
    # None where no size helps: stable made no error at all, so a relative tolerance tolerates none.
    return min(sizes, default=None)


def _say_what_is_needed(sums: PairedSums, test: WerTest, needs: int | None, golden_needed: int | None) -> str:
    if sums.exhausted:
        said = f"; all {sums.golden_utterances} golden utterances have been heard"
        return f"{said}, about {golden_needed} would have decided" if golden_needed else said
    if golden_needed is not None:
        return f"; the golden set holds {sums.golden_utterances} utterances, about {golden_needed} would decide"
    if sums.utterances < MIN_UTTERANCES:
        return f"; nothing is decided before {MIN_UTTERANCES}"
    if needs is None:
        return "; no number of utterances would decide so small a difference"
    if sums.words < test.min_words:
        return f"; about {needs} more are needed ({sums.words} of {test.min_words} words so far)"
    return f"; about {needs} more are needed"


def _percent(fraction: float) -> str:
    text = f"{100 * fraction:.1f}"
    return f"{text.removesuffix('.0')} %"


def _points(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _signed(fraction: float) -> str:
    return f"{100 * fraction:+.1f}"
