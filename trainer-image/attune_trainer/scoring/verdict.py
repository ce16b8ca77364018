"""What follows from an evaluation: ranking, gates, and a verdict with the figure that decided."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attune.contract.measures import Decision, Gate, Metric

from attune_trainer.scoring.bootstrap import BootstrapInterval, bootstrap_change, choose_blocks, smallest_change
from attune_trainer.scoring.entities import Span
from attune_trainer.scoring.errors import total
from attune_trainer.scoring.figures import Judged, Measured, measure_figures
from attune_trainer.scoring.gates import GateOutcome, break_of, check_slices, describe_gate, write_bound
from attune_trainer.scoring.significance import compare_matched_pairs
from attune_trainer.scoring.slices import Slice, find_gaps, measure_slices

_MOST_WORDS = 1_000_000


@dataclass(frozen=True)
class Failed:
    """A candidate that could not be judged.

    Attributes:
        name: of the candidate.
        reason: CamelCase.
        message: what happened and what to change; no transcript and no secret.
    """

    name: str
    reason: str
    message: str


@dataclass(frozen=True)
class Question:
    """What candidates are judged by.

    Attributes:
        blocks: speaker or group of each utterance.
        baseline: name of the candidate that the others are compared with.
        gates: bounds. Those on the change do not apply to the baseline.
        confidence: of the intervals.
        seed: of the draws.
        metrics: that were asked for; those of gates are added.
        slices: of the split.
        spans: entities of each reference.
        failed: candidates that could not be measured.
    """

    blocks: Sequence[str]
    baseline: str
    gates: Sequence[Gate] = ()
    confidence: float = 0.95
    seed: int = 7
    metrics: Sequence[Metric] = (Metric.WER,)
    slices: Sequence[Slice] = ()
    spans: Sequence[Sequence[Span]] = ()
    failed: Sequence[Failed] = ()

    @property
    def wanted(self) -> tuple[Metric, ...]:
        """Metrics that were asked for, by themselves or by a gate."""
        return tuple(dict.fromkeys([*self.metrics, *(gate.metric for gate in self.gates)]))


@dataclass(frozen=True)
class Judgement:
    """The outcome of an evaluation.

    Attributes:
        leaderboard: best first.
        winner: what should serve; None where nothing should yet.
        decision: what to do.
        reason: one sentence with the figures that decided; another one where candidates could not be judged.
        would_change: what would lead to another decision.
        over_utterances: true where there were too few speakers or groups to draw from.
        joint: confidence of each interval of change, such that all of them hold together.
    """

    leaderboard: tuple[Judged, ...]
    winner: str | None
    decision: Decision
    reason: str
    would_change: str
    over_utterances: bool
    joint: float


@dataclass(frozen=True)
class _Answer:
    decision: Decision
    winner: str | None
    reason: str
    would_change: str


def judge(candidates: Sequence[Measured], question: Question) -> Judgement:
    """Ranks candidates and decides.

    A candidate is promoted when its paired interval lies entirely below no change and it keeps every gate; of several,
    the one with the lowest WER. Where there are several, the intervals of change hold for all of them together
    (Bonferroni): the best of seven equals otherwise looks better than the baseline by luck.

    Args:
        candidates: measured on the same utterances, one at least; the baseline is one of them, or one that failed.
        question: what they are judged by.
    """
    drawn, over_utterances = choose_blocks(question.blocks)
    base = next((one for one in candidates if one.name == question.baseline), None)
    others = [one for one in candidates if one is not base]
    joint = 1.0 - (1.0 - question.confidence) / max(1, len(others))
    by_wer = sorted(candidates, key=lambda one: (total(one.words).rate, one is not base))
    leaderboard = tuple(_judge_one(one, base, rank, question, drawn, joint) for rank, one in enumerate(by_wer, start=1))
    answer = _decide(leaderboard, question, joint)
    return Judgement(
        leaderboard=leaderboard,
        winner=answer.winner,
        decision=answer.decision,
        reason=answer.reason + _name_failed(question),
        would_change=answer.would_change,
        over_utterances=over_utterances,
        joint=joint,
    )


def _judge_one(
    one: Measured, base: Measured | None, rank: int, question: Question, drawn: Sequence[str], joint: float
) -> Judged:
    compared = base is not None and one is not base
    change = bootstrap_change(base.words, one.words, drawn, joint, question.seed) if base and compared else None
    series = one.series(Metric.WER)
    slices = measure_slices(
        question.slices,
        base.series(Metric.WER) if base is not None and compared else None,
        series,
        question.blocks,
        question.confidence,
        question.seed,
    )
    return Judged(
        measured=one,
        rank=rank,
        counts=total(one.words),
        figures=measure_figures(one, question.wanted, question.spans, drawn, question.confidence, question.seed),
        change=change,
        matched=(compare_matched_pairs(base.slots, one.slots) if base is not None and compared and one.slots else None),
        detectable=None if change is None else smallest_change(change, joint),
        slices=slices,
        gaps=find_gaps(slices, series, question.blocks, question.confidence, question.seed),
        gates=_check_gates(one, base, question),
    )


def _check_gates(one: Measured, base: Measured | None, question: Question) -> tuple[GateOutcome, ...]:
    """Checks each gate: those without a slice by the figure of the whole split, the others on each slice."""
    before = base if one is not base else None
    counted = [gate.metric for gate in question.gates if gate.slice is not None]
    on_slices = check_slices(
        question.gates,
        question.slices,
        {metric: one.series(metric, question.spans) for metric in counted},
        None if before is None else {metric: before.series(metric, question.spans) for metric in counted},
        question.blocks,
        question.confidence,
    )
    outcomes = []
    for place, gate in enumerate(question.gates):
        if place in on_slices:
            outcomes.append(on_slices[place])
            continue
        text = break_of(
            gate,
            _value(gate.metric, one, question),
            None if before is None else _value(gate.metric, before, question),
        )
        outcomes.append(GateOutcome(gate, () if text is None else (text,)))
    return tuple(outcomes)


def _value(metric: Metric, measured: Measured, question: Question) -> float:
    if metric.is_counted:
        return measured.series(metric, question.spans).rate
    if metric is Metric.LATENCY:
        return measure_figures(measured, [metric], (), question.blocks, question.confidence, question.seed)[
            metric
        ].value
    return measured.real_time_factor


def _name_failed(question: Question) -> str:
    names = [one.name for one in question.failed]
    if not names or question.baseline in names:
        return ""
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")  # noqa: PLR2004
    return f" Not judged: {listed}."


def _wanted_change(gates: Sequence[Gate]) -> float:
    """The relative change of WER that a candidate must reach: 0, or less where a gate demands it."""
    bounds = [
        float(gate.max_change_from_baseline)
        for gate in gates
        if gate.metric is Metric.WER and gate.max_change_from_baseline is not None and gate.slice is None
    ]
    return min([0.0, *bounds])


def _decide(leaderboard: Sequence[Judged], question: Question, confidence: float) -> _Answer:
    base = next((one for one in leaderboard if one.name == question.baseline), None)
    if base is None:
        return _decide_without_baseline(leaderboard[0], question)
    others = [one for one in leaderboard if one is not base]
    if not others:
        return _decide_alone(base, question, confidence)
    for one in others:
        if one.change is not None and one.change.high < 0 and not one.failed_gates and not one.open_gates:
            return _Answer(Decision.PROMOTE, one.name, _compare(one, base, confidence), _unseat(one, base))
    wanted = _wanted_change(question.gates)
    undecided = [one for one in others if not _is_hopeless(one, base, wanted)]
    best = others[0]
    open_question = next((one for one in undecided if not one.failed_gates), None)
    if open_question is None and base.failed_gates:
        return _Answer(
            Decision.FINE_TUNE,
            None,
            (
                f"No candidate keeps the gates and is better than {base.name} beyond doubt: {base.name} fails "
                f"({_join(base.failed_gates)}), {best.name} {_shortcoming(best, base, confidence)}."
            ),
            f"a model that keeps the gates: {_join([_target(base, one) for one in _broken(base)])}",
        )
    if not undecided:
        reason = f"{base.name} stays: the best candidate, {best.name}, {_shortcoming(best, base, confidence)}."
        return _Answer(Decision.KEEP, base.name, reason, _overtake(best, base, wanted))
    one = open_question or undecided[0]
    reason, change = _open(one, base, wanted, confidence)
    return _Answer(Decision.INCONCLUSIVE, None, reason, change)


def _decide_without_baseline(best: Judged, question: Question) -> _Answer:
    failed = next((one for one in question.failed if one.name == question.baseline), None)
    why = f" ({failed.reason})" if failed is not None else ""
    return _Answer(
        Decision.INCONCLUSIVE,
        None,
        (
            f"The baseline, {question.baseline}, could not be judged{why}, and without it no candidate can be called "
            f"better; the best, {best.name}, has {_percent(best.wer.value)} WER on {best.counts.words} words."
        ),
        f"a baseline that can be judged: mend {question.baseline}, or name another candidate in spec.baseline",
    )


def _decide_alone(base: Judged, question: Question, confidence: float) -> _Answer:
    """Decides on a baseline alone: its being good enough must be beyond doubt, training needs not."""
    figure = f"{base.name} has {_percent(base.wer.value)} WER ({_interval(base.wer, confidence)})"
    bounded = [gate for gate in question.gates if gate.max is not None or gate.min is not None]
    if not bounded:
        return _Answer(
            Decision.NO_FINE_TUNE_NEEDED,
            base.name,
            f"{figure}, and no gate asks for less; set a gate with max to have it judged.",
            f"a gate on Wer with max below {_percent(base.wer.low)}, or a candidate to compare with",
        )
    in_doubt = [gate for gate in bounded if gate.slice is None and _is_in_doubt(gate, base)]
    if base.failed_gates:
        # To try training in vain costs an hour; to serve a model that is not good enough costs every day.
        doubt = ", though its interval reaches what is allowed" if in_doubt else ""
        reason = f"{figure}; it fails: {_join(base.failed_gates)}{doubt}."
        change = f"a model that keeps the gates: {_join([_target(base, one) for one in _broken(base)])}"
        return _Answer(Decision.FINE_TUNE, None, reason, change)
    if in_doubt:
        gate = in_doubt[0]
        interval, bound = base.figures[gate.metric], _bound(gate)
        more = _more_words(base.counts.words, interval, bound)
        return _Answer(
            Decision.INCONCLUSIVE,
            None,
            (
                f"{base.name} has {_percent(interval.value)} {_name(gate.metric)}, and the allowed "
                f"{_percent(bound)} lies inside its {_interval(interval, confidence)}: {more}."
            ),
            more,
        )
    if base.open_gates:
        return _Answer(
            Decision.INCONCLUSIVE,
            None,
            f"{figure}, but not beyond doubt on every slice: {_join(base.open_gates)}.",
            "more holdout audio of these slices",
        )
    allowed = ", ".join(
        (
            f"{write_bound(gate.metric, gate.max or gate.min or '0')} {_name(gate.metric)}"
            + (f" in each {gate.slice}" if gate.slice else "")
        )
        for gate in bounded
    )
    room = ", ".join(_headroom(gate, base) for gate in bounded if gate.slice is None)
    return _Answer(
        Decision.NO_FINE_TUNE_NEEDED,
        base.name,
        f"{figure}; the gates allow {allowed}.",
        f"stricter gates ({room})" if room else "stricter gates",
    )


def _is_in_doubt(gate: Gate, base: Judged) -> bool:
    """Tells whether the bound lies inside the figure's interval though the figure itself keeps it."""
    interval = base.figures[gate.metric]
    return gate.metric.is_counted and interval.low <= _bound(gate) <= interval.high and not _is_end(gate, interval)


def _is_end(gate: Gate, interval: BootstrapInterval) -> bool:
    """Whether the bound is the interval's better end, or kept by all of it."""
    return interval.high <= _bound(gate) if gate.max is not None else interval.low >= _bound(gate)


def _bound(gate: Gate) -> float:
    return float(gate.max if gate.max is not None else gate.min or 0)


def _name(metric: Metric) -> str:
    return metric.value.upper() if metric in {Metric.WER, Metric.CER} else metric.value


def _join(texts: Sequence[str]) -> str:
    """Joins sentences; of many the first three, so that what follows is still read."""
    rest = len(texts) - 3
    return "; ".join(texts[:3]) + (f"; and {rest} more" if rest > 0 else "")


def _broken(one: Judged) -> list[GateOutcome]:
    return [outcome for outcome in one.gates if outcome.broken]


def _target(one: Judged, outcome: GateOutcome) -> str:
    """Says what keeping a gate takes, in errors where these are what is bounded."""
    gate = outcome.gate
    if gate.metric is Metric.WER and gate.max is not None and gate.slice is None:
        fewer = one.counts.errors - math.floor(float(gate.max) * one.counts.words)
        return f"Wer at most {write_bound(gate.metric, gate.max)}, {fewer} errors fewer on {one.counts.words} words"
    return describe_gate(gate)


def _headroom(gate: Gate, base: Judged) -> str:
    figure = base.figures[gate.metric]
    if gate.max is not None:
        return f"{gate.metric.value} max below {_write(gate.metric, figure.high)}"
    return f"{gate.metric.value} min above {_write(gate.metric, figure.low)}"


def _write(metric: Metric, value: float) -> str:
    return _percent(value) if metric.is_counted else f"{value:.3g}"


def _is_hopeless(one: Judged, base: Judged, wanted: float) -> bool:
    """Tells whether more audio can not be expected to make this candidate one to promote."""
    if base.counts.errors == 0:
        return True
    if one.change is not None and one.change.low >= wanted:
        return True
    for outcome in _broken(one):
        gate = outcome.gate
        if gate.slice is not None:
            return True  # broken on a slice beyond doubt
        if gate.metric is Metric.WER and gate.max_change_from_baseline is not None:
            continue  # its interval was looked at above
        interval = one.figures[gate.metric] if gate.metric.is_counted else None
        if interval is None or gate.max_change_from_baseline is not None:
            return True
        if (gate.max is not None and interval.low > _bound(gate)) or (
            gate.min is not None and interval.high < _bound(gate)
        ):
            return True
    return False


def _shortcoming(one: Judged, base: Judged, confidence: float) -> str:
    if base.counts.errors == 0:
        return f"cannot be better than {base.name}, which makes no error on {base.counts.words} words"
    compared = _difference(one, base, confidence)
    if one.failed_gates:
        return f"{compared} and fails: {_join(one.failed_gates)}"
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


def _unseat(one: Judged, base: Judged) -> str:
    """Says what would keep a candidate from being promoted."""
    tight = [
        f"{outcome.gate.metric.value} of at most {write_bound(outcome.gate.metric, outcome.gate.max)}"
        for outcome in one.gates
        if outcome.gate.max is not None and outcome.gate.slice is None
    ]
    beside = f", or a gate that it does not keep (now: {', '.join(tight[:2])})" if tight else ""
    return f"new holdout audio on which {one.name}'s interval reaches {base.name}'s errors{beside}"


def _overtake(best: Judged, base: Judged, wanted: float) -> str:
    """Says what a candidate would need to replace the baseline."""
    if base.counts.errors == 0:
        return f"holdout audio on which {base.name} errs"
    if _broken(best) and best.change is not None and best.change.high < 0:
        return f"a model that keeps the gates: {_join([_target(best, one) for one in _broken(best)])}"
    asked = f"at least {abs(100 * wanted):.4g} % fewer errors than {base.name}" if wanted < 0 else "fewer errors"
    seen = (
        f"; differences from about {100 * best.detectable:.0f} % on show on this holdout"
        if best.detectable is not None and best.detectable > 0
        else ""
    )
    return f"a candidate with {asked}{seen}"


def _open(one: Judged, base: Judged, wanted: float, confidence: float) -> tuple[str, str]:
    """Says what is not settled, and what would settle it."""
    if one.change is None:
        return (
            (
                f"{base.name} makes too few errors ({base.counts.errors} on {base.counts.words} words) "
                f"to tell whether {one.name} is better; add holdout audio."
            ),
            "more holdout audio",
        )
    if one.change.high < 0 and one.open_gates:
        need = _more_of_slice(one)
        return f"{one.name} {_difference(one, base, confidence)}, but {_join(one.open_gates)}: {need}.", need
    bound = 0.0 if one.change.value <= wanted else wanted
    need = _more_words(base.counts.words, one.change, bound)
    return f"{one.name} {_difference(one, base, confidence)}: {need}.", need


def _more_of_slice(one: Judged) -> str:
    """Says what settles the first gate that is in doubt on a slice."""
    outcome = next(outcome for outcome in one.gates if outcome.in_doubt)
    gate = outcome.gate
    for figures in one.slices:
        here = f" in {figures.slice.name} "
        if gate.max_change_from_baseline is None or figures.change is None or here not in outcome.in_doubt[0]:
            continue
        if gate.metric is Metric.WER:
            more = _more_words(figures.slice.words, figures.change, float(gate.max_change_from_baseline))
            return f"{more} of {figures.slice.name}"
    return f"the holdout needs more words of each {gate.slice}"


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
