"""What follows from an evaluation: ranking, gates, and a verdict with the figure that decided."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attune.contract.measures import Decision, Gate, Metric
from attune.contract.training import Padding

from attune_trainer.scoring.bootstrap import BootstrapInterval, bootstrap_change, bootstrap_wer, choose_blocks
from attune_trainer.scoring.errors import ErrorCounts, total

_MOST_WORDS = 1_000_000


@dataclass(frozen=True)
class Measured:
    """What a candidate made of the split, utterance by utterance, in the split's order.

    Attributes:
        name: of the candidate.
        model_digest: of its files.
        padding: how its audio was padded, as in serving.
        words: word errors of each utterance.
        characters: character errors of each utterance.
        work_seconds: spent in transcription.
        audio_seconds: length of the audio.
    """

    name: str
    model_digest: str
    padding: Padding
    words: tuple[ErrorCounts, ...]
    characters: tuple[ErrorCounts, ...]
    work_seconds: float
    audio_seconds: float

    @property
    def sentence_accuracy(self) -> float:
        """Share of utterances without a word error."""
        return sum(one.errors == 0 for one in self.words) / len(self.words)

    @property
    def real_time_factor(self) -> float:
        """Seconds of work for a second of audio."""
        return self.work_seconds / self.audio_seconds


@dataclass(frozen=True)
class Judged:
    """A candidate's figures.

    Attributes:
        measured: what they come from.
        rank: 1 is the lowest WER.
        counts: word errors of the whole split.
        wer: with its interval.
        cer: with its interval.
        change: relative to the baseline's WER, with the paired interval; None for the baseline, and where the baseline
            makes too few errors for a ratio.
        failed_gates: one short sentence each.
    """

    measured: Measured
    rank: int
    counts: ErrorCounts
    wer: BootstrapInterval
    cer: BootstrapInterval
    change: BootstrapInterval | None
    failed_gates: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the candidate."""
        return self.measured.name


@dataclass(frozen=True)
class Judgement:
    """The outcome of an evaluation.

    Attributes:
        leaderboard: best first.
        winner: what should serve; None where nothing should yet.
        decision: what to do.
        reason: one sentence with the figures that decided.
        over_utterances: true where there were too few speakers or groups to draw from.
    """

    leaderboard: tuple[Judged, ...]
    winner: str | None
    decision: Decision
    reason: str
    over_utterances: bool


def judge(
    candidates: Sequence[Measured],
    blocks: Sequence[str],
    baseline: str,
    gates: Sequence[Gate],
    confidence: float,
    seed: int,
) -> Judgement:
    """Ranks candidates and decides.

    A candidate is promoted when its paired interval lies entirely below no change and it keeps every gate; of several,
    the one with the lowest WER. Where there are several, the intervals of change hold for all of them together
    (Bonferroni): the best of seven equals otherwise looks better than the baseline by luck.

    Args:
        candidates: measured on the same utterances; the baseline is one of them.
        blocks: speaker or group of each utterance.
        baseline: its name.
        gates: bounds. Those on the change do not apply to the baseline.
        confidence: of the intervals.
        seed: of the draws.
    """
    drawn, over_utterances = choose_blocks(blocks)
    base = next(one for one in candidates if one.name == baseline)
    others = len(candidates) - 1
    joint = 1.0 - (1.0 - confidence) / max(1, others)
    by_wer = sorted(candidates, key=lambda one: (total(one.words).rate, one.name != baseline))
    leaderboard = []
    for rank, one in enumerate(by_wer, start=1):
        change = None if one is base else bootstrap_change(base.words, one.words, drawn, joint, seed)
        judged = Judged(
            measured=one,
            rank=rank,
            counts=total(one.words),
            wer=bootstrap_wer(one.words, drawn, confidence, seed),
            cer=bootstrap_wer(one.characters, drawn, confidence, seed),
            change=change,
            failed_gates=tuple(text for gate in gates if (text := gate_failure(gate, one, base)) is not None),
        )
        leaderboard.append(judged)
    # Of one candidate alone both are the same; beside others every interval that is told is one of change.
    decision, winner, reason = _decide(leaderboard, baseline, gates, joint)
    return Judgement(tuple(leaderboard), winner, decision, reason, over_utterances)


def _value(metric: Metric, measured: Measured) -> float:
    if metric is Metric.WER:
        return total(measured.words).rate
    if metric is Metric.CER:
        return total(measured.characters).rate
    if metric is Metric.REAL_TIME_FACTOR:
        return measured.real_time_factor
    return measured.sentence_accuracy


def gate_failure(gate: Gate, one: Measured, base: Measured) -> str | None:
    """Says how a candidate fails a gate by its point estimate; None when it keeps it."""
    value = _value(gate.metric, one)
    if gate.max is not None and value > float(gate.max):
        if gate.metric is Metric.REAL_TIME_FACTOR:
            return f"{gate.metric.value} {value:.3g} is above {gate.max}"
        return f"{gate.metric.value} {_percent(value)} is above {100 * float(gate.max):.4g} %"
    if gate.max_change_from_baseline is not None and one is not base:
        before = _value(gate.metric, base)
        worse = 0.0 if value == 0 else math.inf
        change = value / before - 1.0 if before > 0 else worse
        if change > float(gate.max_change_from_baseline):
            bound = 100 * float(gate.max_change_from_baseline)
            return f"{gate.metric.value} change {100 * change:+.1f} % is above {bound:+.4g} %"
    return None


def _wanted_change(gates: Sequence[Gate]) -> float:
    """The relative change of WER that a candidate must reach: 0, or less where a gate demands it."""
    bounds = [
        float(gate.max_change_from_baseline)
        for gate in gates
        if gate.metric is Metric.WER and gate.max_change_from_baseline is not None
    ]
    return min([0.0, *bounds])


def _decide(
    leaderboard: Sequence[Judged], baseline: str, gates: Sequence[Gate], confidence: float
) -> tuple[Decision, str | None, str]:
    base = next(one for one in leaderboard if one.name == baseline)
    others = [one for one in leaderboard if one is not base]
    if not others:
        return _decide_alone(base, gates, confidence)
    for one in others:
        if one.change is not None and one.change.high < 0 and not one.failed_gates:
            return Decision.PROMOTE, one.name, _compare(one, base, confidence)
    wanted = _wanted_change(gates)
    undecided = [one for one in others if not _is_hopeless(one, base, gates, wanted)]
    best = others[0]
    open_question = next((one for one in undecided if not one.failed_gates), None)
    if open_question is None and base.failed_gates:
        return (
            Decision.FINE_TUNE,
            None,
            (
                f"No candidate keeps the gates and is better than {base.name} beyond doubt: {base.name} fails "
                f"({'; '.join(base.failed_gates)}), {best.name} {_shortcoming(best, base, confidence)}."
            ),
        )
    if not undecided:
        return (
            Decision.KEEP,
            base.name,
            f"{base.name} stays: the best candidate, {best.name}, {_shortcoming(best, base, confidence)}.",
        )
    one = open_question or undecided[0]
    return Decision.INCONCLUSIVE, None, _open(one, base, wanted, confidence)


def _decide_alone(base: Judged, gates: Sequence[Gate], confidence: float) -> tuple[Decision, str | None, str]:
    """Decides on a baseline alone: its being good enough must be beyond doubt, training needs not."""
    figure = f"{base.name} has {_percent(base.wer.value)} WER ({_interval(base.wer, confidence)})"
    bounds = [(gate.metric, float(gate.max)) for gate in gates if gate.max is not None]
    if not bounds:
        return (
            Decision.NO_FINE_TUNE_NEEDED,
            base.name,
            f"{figure}, and no gate asks for less; set a gate with max to have it judged.",
        )
    in_doubt = [
        (metric, bound, interval)
        for metric, bound in bounds
        for interval in [_interval_of(metric, base)]
        if interval is not None and interval.low <= bound < interval.high
    ]
    if base.failed_gates:
        # To try training in vain costs an hour; to serve a model that is not good enough costs every day.
        doubt = ", though its interval reaches what is allowed" if in_doubt else ""
        return Decision.FINE_TUNE, None, f"{figure}; it fails: {'; '.join(base.failed_gates)}{doubt}."
    if in_doubt:
        metric, bound, interval = in_doubt[0]
        more = _more_words(base.counts.words, interval, bound)
        name = metric.value.upper()
        return (
            Decision.INCONCLUSIVE,
            None,
            (
                f"{base.name} has {_percent(interval.value)} {name}, and the allowed {_percent(bound)} lies inside its "
                f"{_interval(interval, confidence)}: {more}."
            ),
        )
    allowed = ", ".join(
        f"{_percent(bound)} {metric.value.upper()}"
        if metric in {Metric.WER, Metric.CER}
        else f"{metric.value} {bound:.4g}"
        for metric, bound in bounds
    )
    return Decision.NO_FINE_TUNE_NEEDED, base.name, f"{figure}; the gates allow {allowed}."


def _interval_of(metric: Metric, judged: Judged) -> BootstrapInterval | None:
    if metric is Metric.WER:
        return judged.wer
    return judged.cer if metric is Metric.CER else None


def _is_hopeless(one: Judged, base: Judged, gates: Sequence[Gate], wanted: float) -> bool:
    """Tells whether more audio can not be expected to make this candidate one to promote."""
    if base.counts.errors == 0:
        return True
    if one.change is not None and one.change.low >= wanted:
        return True
    for gate in gates:
        if gate_failure(gate, one.measured, base.measured) is None:
            continue
        if gate.metric is Metric.WER and gate.max is None:
            continue  # its interval was looked at above
        interval = _interval_of(gate.metric, one)
        if interval is None or gate.max is None or interval.low > float(gate.max):
            return True
    return False


def _shortcoming(one: Judged, base: Judged, confidence: float) -> str:
    if base.counts.errors == 0:
        return f"cannot be better than {base.name}, which makes no error on {base.counts.words} words"
    compared = _difference(one, base, confidence)
    if one.failed_gates:
        return f"{compared} and fails: {'; '.join(one.failed_gates)}"
    return compared


def _difference(one: Judged, base: Judged, confidence: float) -> str:
    rates = f"{_percent(one.wer.value)} against {_percent(base.wer.value)} WER on {base.counts.words} words"
    if one.change is None:
        return f"has {rates}"
    if one.change.low == one.change.high == 0:
        return f"makes the same word errors as {base.name} ({rates})"
    return (
        f"makes {_more_or_fewer(one.change.value)} word errors than {base.name} "
        f"({_change(one.change, confidence)}), {rates}"
    )


def _compare(one: Judged, base: Judged, confidence: float) -> str:
    return f"{one.name} {_difference(one, base, confidence)}."


def _open(one: Judged, base: Judged, wanted: float, confidence: float) -> str:
    if one.change is None:
        return (
            f"{base.name} makes too few errors ({base.counts.errors} on {base.counts.words} words) "
            f"to tell whether {one.name} is better; add holdout audio."
        )
    bound = 0.0 if one.change.value <= wanted else wanted
    need = _more_words(base.counts.words, one.change, bound)
    return f"{one.name} {_difference(one, base, confidence)}: {need}."


def _more_words(words: int, interval: BootstrapInterval, bound: float) -> str:
    """Says how many more words the holdout needs for the interval to leave a bound out.

    An interval's width falls with the square root of the words: 1,000 words, half width 0.10, distance 0.05 to the
    bound -> 4,000 words -> 3,000 more. The figure is an estimate: the value itself moves as well.
    """
    distance = abs(interval.value - bound)
    half = interval.high - interval.value if interval.value <= bound else interval.value - interval.low
    if distance == 0 or words * (half / distance) ** 2 - words > _MOST_WORDS:
        return "the difference is too small to be settled by a million more words of holdout"
    more = max(1.0, words * (half / distance) ** 2 - words)
    step = 10 ** max(0, math.floor(math.log10(more)) - 1)
    return f"the holdout needs about {math.ceil(more / step) * step:,} more words"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(interval: BootstrapInterval, confidence: float) -> str:
    return f"{100 * confidence:.4g} % interval {100 * interval.low:.1f} to {100 * interval.high:.1f} %"


def _change(change: BootstrapInterval, confidence: float) -> str:
    """Writes an interval of change for people: "95 % interval: 21.3 to 51.0 % fewer"; "12.6 % fewer to 3.0 % more"."""
    inner, outer = sorted((change.low, change.high), key=abs)
    span = (
        f"{abs(100 * inner):.1f} to {_more_or_fewer(outer)}"
        if inner * outer > 0
        else f"{_more_or_fewer(change.low)} to {_more_or_fewer(change.high)}"
    )
    return f"{100 * confidence:.4g} % interval: {span}"


def _more_or_fewer(value: float) -> str:
    return f"{abs(100 * value):.1f} % {'fewer' if value < 0 else 'more'}"
