"""Tells in a Canary's status what has been decided, and makes it the Plan."""

from attune.api.canary import AnalysisStatus, AnalysisVerdict, ArmModel, ArmStatus, Canary, CanaryStatus, RolloutStatus
from attune.contract.metrics import Track
from attune.domain.actions import DeleteArm, EnsureArm, EnsureRoute, Plan
from attune.domain.arms import ObservedArm
from attune.domain.canary.events import announce
from attune.domain.canary.history import tell_history
from attune.domain.canary.next import MESSAGE_CHARACTERS, Next
from attune.domain.canary.observed import ObservedCanary, is_serving
from attune.domain.times import format_time
from attune.domain.verdict import Judgement


def tell(o: ObservedCanary, following: Next) -> Plan:
    """Writes the status and announces what is new in it."""
    metadata = o.canary.metadata
    before = o.status
    record = following.record
    analysis = _tell_analysis(following.judgement) or before.analysis
    serving = any(isinstance(action, EnsureRoute) for action in following.actions) or is_serving(o)
    status = CanaryStatus(
        observed_generation=metadata.generation,
        phase=following.standing.phase,
        conditions=following.standing.conditions(
            before.conditions, terminal=Canary.TERMINAL_CONDITION, generation=metadata.generation, now=o.now
        ),
        stable=_tell_stable(o, following, 100 - following.weight if serving else 0),
        canary=_tell_trial(o, following),
        rollout=_tell_rollout(o, following),
        analysis=analysis,
        history=tell_history(o, record, following.standing, analysis),
    )
    events = announce(before, status, following.standing)
    return Plan((*following.actions, *events), status, following.look_again_seconds)


def _tell_stable(o: ObservedCanary, following: Next, weight: int) -> ArmStatus | None:
    arm = next(
        (one for one in following.actions if isinstance(one, EnsureArm) and one.track is Track.STABLE),
        None,
    )
    model = arm.model if arm is not None else o.stable.model if o.stable is not None else None
    if model is None:
        return o.status.stable
    return _tell_arm(model, weight, o.stable)


def _tell_trial(o: ObservedCanary, following: Next) -> ArmStatus | None:
    if any(isinstance(action, DeleteArm) for action in following.actions):
        return None
    arm = next(
        (one for one in following.actions if isinstance(one, EnsureArm) and one.track is Track.CANARY),
        None,
    )
    model = arm.model if arm is not None else o.trial.model if o.trial is not None else None
    return None if model is None else _tell_arm(model, following.weight, o.trial)


def _tell_arm(model: ArmModel, weight: int, arm: ObservedArm | None) -> ArmStatus:
    return ArmStatus(
        revision=model.revision,
        model_id=model.model_id,
        uri=model.uri,
        digest=model.digest,
        weight=weight,
        ready_replicas=arm.ready if arm is not None else 0,
    )


def _tell_rollout(o: ObservedCanary, following: Next) -> RolloutStatus | None:
    record = following.record
    if record is None or (record.failed_reason is not None and not record.promoting):
        return None
    told = o.status.rollout
    last_data = told.last_data_time if told is not None and told.id == record.id else None
    if following.judgement is not None and following.judgement.verdict is not AnalysisVerdict.UNKNOWN:
        last_data = format_time(o.now)
    return RolloutStatus(
        id=record.id,
        step=record.step or 0,
        steps=len(o.spec.steps),
        started_time=record.started,
        step_started_time=record.step_started,
        last_data_time=last_data,
        promoting=record.promoting,
    )


def _tell_analysis(judgement: Judgement | None) -> AnalysisStatus | None:
    if judgement is None:
        return None
    return AnalysisStatus(
        verdict=judgement.verdict,
        message=judgement.message[:MESSAGE_CHARACTERS],
        utterances=judgement.utterances,
        words=judgement.words,
        golden_utterances=judgement.golden_utterances,
        stable_wer=_decimal(judgement.stable_wer),
        canary_wer=_decimal(judgement.canary_wer),
        difference=_decimal(judgement.difference),
        low=_decimal(judgement.low),
        high=_decimal(judgement.high),
        needs_utterances=judgement.needs_utterances,
    )


def _decimal(value: float | None) -> str | None:
    """Writes a rate with four digits: 0.12345 -> "0.1235"; never "-0.0000"."""
    if value is None:
        return None
    text = f"{value:.4f}"
    return text.removeprefix("-") if float(text) == 0 else text
