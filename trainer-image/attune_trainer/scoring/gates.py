"""Gates: bounds that a candidate must keep, over the whole split or on each slice of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from attune.contract.measures import Gate, Metric

from attune_trainer.scoring.bootstrap import Series, choose_blocks
from attune_trainer.scoring.significance import adjust_holm, compare_rates, compare_with_bound
from attune_trainer.scoring.slices import FEWEST_UTTERANCES, FEWEST_WORDS, Slice


@dataclass(frozen=True)
class GateOutcome:
    """What became of a gate.

    Attributes:
        gate: which.
        broken: one short sentence where it is broken: by the whole split's figure, or on a slice beyond doubt.
        in_doubt: one where it is broken on a slice, but not beyond doubt, or where no slice is large enough.
    """

    gate: Gate
    broken: tuple[str, ...] = ()
    in_doubt: tuple[str, ...] = ()

    @property
    def is_kept(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.broken and not self.in_doubt


@dataclass(frozen=True)
class _Trial:
    """A gate on one slice."""

    gate: Gate
    text: str | None  # how it is broken by the figure itself; None where it is kept
    p_value: float  # small where it is broken beyond doubt


def break_of(gate: Gate, value: float, before: float | None) -> str | None:
    """Says how a figure breaks a gate; None when it keeps it.

    Args:
        gate: on the metric of the figure.
        value: the candidate's.
        before: the baseline's; None for the baseline itself, whose change cannot be bounded.
    """
    name = gate.metric.value
    if gate.max is not None and value > float(gate.max):
        return f"{name} {write_value(gate.metric, value)} is above {write_bound(gate.metric, gate.max)}"
    if gate.min is not None and value < float(gate.min):
        return f"{name} {write_value(gate.metric, value)} is below {write_bound(gate.metric, gate.min)}"
    if gate.max_change_from_baseline is not None and before is not None:
        worse = 0.0 if value == 0 else math.inf
        change = value / before - 1.0 if before > 0 else worse
        if change > float(gate.max_change_from_baseline):
            bound = 100 * float(gate.max_change_from_baseline)
            return f"{name} change {100 * change:+.1f} % is above {bound:+.4g} %"
    return None


def check_slices(
    gates: Sequence[Gate],
    slices: Sequence[Slice],
    candidate: dict[Metric, Series],
    baseline: dict[Metric, Series] | None,
    blocks: Sequence[str],
    confidence: float,
) -> dict[int, GateOutcome]:
    """Checks gates on slices; gives the outcome by the gate's place.

    With many slices some break a bound by chance. So a slice fails its gate only when it is broken beyond doubt, after
    Holm's correction over all slices and gates of this candidate; where the figure breaks it, but not beyond doubt, the
    gate is in doubt. Slices that are too small say neither.

    Args:
        gates: all of them; those without a slice are passed over.
        slices: of all labels.
        candidate: what its metrics are made of.
        baseline: the same of the baseline; None for the baseline itself, or where there is none.
        blocks: speaker or group of each utterance.
        confidence: as of the intervals.
    """
    outcomes: dict[int, GateOutcome] = {}
    trials: list[tuple[int, _Trial]] = []
    for place, gate in enumerate(gates):
        if gate.slice is None:
            continue
        outcomes[place] = GateOutcome(gate)
        if gate.max_change_from_baseline is not None and baseline is None:
            continue
        of_label = [one for one in slices if one.label == gate.slice]
        large = [one for one in of_label if not one.is_too_small]
        if not large:
            text = (
                f"no value of {gate.slice} has the {FEWEST_WORDS} words and {FEWEST_UTTERANCES} utterances that a gate "
                "needs"
            )
            outcomes[place] = GateOutcome(gate, in_doubt=(text,))
        trials += [(place, trial) for one in large for trial in _try(gate, one, candidate, baseline, blocks)]
    adjusted = adjust_holm([trial.p_value for _, trial in trials])
    for (place, trial), p_value in zip(trials, adjusted, strict=True):
        if trial.text is None:
            continue
        outcome = outcomes[place]
        if p_value < (1.0 - confidence) / 2.0:
            outcomes[place] = replace(outcome, broken=(*outcome.broken, trial.text))
        else:
            outcomes[place] = replace(outcome, in_doubt=(*outcome.in_doubt, trial.text))
    return outcomes


def _try(
    gate: Gate,
    one: Slice,
    candidate: dict[Metric, Series],
    baseline: dict[Metric, Series] | None,
    blocks: Sequence[str],
) -> list[_Trial]:
    """Tries a gate on one slice; nothing where the slice has none of what the metric counts."""
    here = candidate[gate.metric].take(one.places)
    if here.whole == 0:
        return []
    before = baseline[gate.metric].take(one.places) if baseline is not None else None
    drawn, _ = choose_blocks([blocks[place] for place in one.places])
    text = break_of(gate, here.rate, before.rate if before is not None else None)
    if text is not None:
        text = f"{text} in {one.name} ({one.words} words)"
    if gate.max_change_from_baseline is not None and before is not None:
        compared = compare_rates(before, here, drawn, 1.0 + float(gate.max_change_from_baseline))
        return [_Trial(gate, text, compared.p_above)]
    if gate.max is not None:
        return [_Trial(gate, text, compare_with_bound(here, drawn, float(gate.max)).p_above)]
    missed = Series(tuple(whole - part for part, whole in zip(here.parts, here.wholes, strict=True)), here.wholes)
    return [_Trial(gate, text, compare_with_bound(missed, drawn, 1.0 - float(gate.min or 0)).p_above)]


def write_value(metric: Metric, value: float) -> str:
    """Writes a figure for people: rates in percent, latency in seconds, the real-time factor as it is."""
    if metric is Metric.REAL_TIME_FACTOR:
        return f"{value:.3g}"
    if metric is Metric.LATENCY:
        return f"{value:.3g} s"
    return f"{100 * value:.1f} %"


def write_bound(metric: Metric, bound: str) -> str:
    """Writes a gate's bound as people wrote it, in the unit of write_value."""
    if metric is Metric.REAL_TIME_FACTOR:
        return bound
    if metric is Metric.LATENCY:
        return f"{bound} s"
    return f"{100 * float(bound):.4g} %"


def describe_gate(gate: Gate) -> str:
    """Names a gate: "Wer at most 10 %"; "Wer change at most +2 % in each accent"."""
    where = f" in each {gate.slice}" if gate.slice is not None else ""
    name = gate.metric.value
    if gate.max is not None:
        return f"{name} at most {write_bound(gate.metric, gate.max)}{where}"
    if gate.min is not None:
        return f"{name} at least {write_bound(gate.metric, gate.min)}{where}"
    return f"{name} change at most {100 * float(gate.max_change_from_baseline or 0):+.4g} %{where}"
