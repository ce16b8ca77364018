"""Tells how a rollout ended, once, in the history that the status keeps."""

from typing import Final

from attune.api.canary import AnalysisStatus, ArmModel, HistoryEntry, Outcome
from attune.domain.actions import RolloutRecord
from attune.domain.canary.models import resolve_stable, resolve_target
from attune.domain.canary.next import MESSAGE_CHARACTERS
from attune.domain.canary.observed import ObservedCanary
from attune.domain.canary.record import compute_weight, recall_record
from attune.domain.jobs import Standing
from attune.domain.times import format_time

HISTORY_LENGTH: Final = 10


def tell_history(
    o: ObservedCanary, record: RolloutRecord | None, standing: Standing, analysis: AnalysisStatus | None
) -> list[HistoryEntry]:
    """Adds the rollout that has just ended.

    It ended when the route's record (or, where a write of the status was lost, the status) still had it and the plan
    has not, or has it as failed and is not on its way back from a promotion any more.
    """
    history = o.status.history
    on_route = o.route.rollout if o.route is not None else None
    past = on_route or (recall_record(o.status.rollout) if o.status.rollout is not None else None)
    if past is None or any((one.id, one.started_time) == (past.id, past.started) for one in history):
        return history
    same = record is not None and (record.id, record.started) == (past.id, past.started)
    if same and record is not None and (record.failed_reason is None or record.promoting):
        return history
    trial = o.trial.model if o.trial is not None else o.status.canary
    outcome, reason, message = _name_outcome(o, past, record if same else None, standing, trial)
    reached = max(compute_weight(o.spec.steps, past.step), o.route.canary_weight if o.route is not None else 0)
    model = resolve_stable(o) if outcome is Outcome.PROMOTED or trial is None else trial
    compared = analysis is not None and analysis.utterances > 0
    entry = HistoryEntry(
        id=past.id,
        revision=model.revision,
        model_id=model.model_id,
        outcome=outcome,
        reason=reason,
        message=message[:MESSAGE_CHARACTERS],
        weight=reached,
        started_time=past.started,
        finished_time=format_time(o.now),
        stable_wer=analysis.stable_wer if compared and analysis is not None else None,
        canary_wer=analysis.canary_wer if compared and analysis is not None else None,
        utterances=analysis.utterances if compared and analysis is not None else 0,
    )
    return [entry, *history][:HISTORY_LENGTH]


def _name_outcome(
    o: ObservedCanary,
    past: RolloutRecord,
    failed: RolloutRecord | None,
    standing: Standing,
    trial: ArmModel | None,
) -> tuple[Outcome, str, str]:
    if failed is not None:
        return Outcome.ROLLED_BACK, failed.failed_reason or standing.reason, failed.failed_message or ""
    if past.failed_reason is not None:
        return Outcome.ROLLED_BACK, past.failed_reason, past.failed_message or ""
    if past.promoting and (trial is None or trial.revision == resolve_stable(o).revision):
        figures = o.status.analysis.message if o.status.analysis is not None else "every step passed"
        return Outcome.PROMOTED, "Promoted", figures
    target = resolve_target(o)
    if isinstance(target, ArmModel) and target.revision == resolve_stable(o).revision:
        return Outcome.WITHDRAWN, "Withdrawn", "spec.model went back to the model that stable serves"
    return Outcome.SUPERSEDED, "Superseded", "spec.model or spec.template was changed before the rollout had ended"
