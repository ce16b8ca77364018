"""Says how a rollout fares: what the test says, whether it has failed, whether the next step may begin."""

from dataclasses import replace
from datetime import datetime
from typing import Final

from attune.api.canary import AnalysisVerdict
from attune.domain.actions import RolloutRecord
from attune.domain.arms import ObservedArm, PodProblem
from attune.domain.canary.next import Problem
from attune.domain.canary.observed import ObservedCanary, has_all_pods
from attune.domain.canary.reasons import ANALYSIS_TIMED_OUT, CANARY_NOT_READY, NO_DATA
from attune.domain.canary.record import compute_weight, find_start
from attune.domain.canary.scorer import describe_scorer
from attune.domain.times import parse_time
from attune.domain.verdict import Judgement, judge

# A pod may be moved or restarted; one that comes and goes serves nobody, and each loss gives the step its time again.
LOSSES_IN_A_STEP: Final = 3


def judge_rollout(o: ObservedCanary, record: RolloutRecord) -> Judgement:
    """Judges by the word errors so far; where they do not decide, says what keeps the scorer from telling more."""
    judgement = judge(o.evidence, o.spec.analysis.wer)
    if judgement.verdict in {AnalysisVerdict.PASS, AnalysisVerdict.FAIL}:
        return judgement
    unknown = judgement.verdict is AnalysisVerdict.UNKNOWN
    if unknown and record.step is None:
        return replace(judgement, message="the canary is not ready yet; nothing has been compared")
    failed = describe_scorer(o, record)
    if failed is None:
        return judgement
    reason, message = failed
    return replace(judgement, reason=reason, message=message if unknown else f"{judgement.message}; {message}")


def find_failure(
    o: ObservedCanary, record: RolloutRecord, trial: ObservedArm | None, judgement: Judgement, *, decided: bool
) -> Problem | None:
    """Says why the rollout must end; None when it may go on.

    decided: the next step may begin. However late that is seen, since the operator may have been away, no time has run
    out then.
    """
    if judgement.verdict is AnalysisVerdict.FAIL:
        return Problem(judgement.reason, judgement.message)
    return _find_pod_failure(o, record, trial) or (None if decided else _find_timeout(o, record, judgement))


def _find_pod_failure(o: ObservedCanary, record: RolloutRecord, trial: ObservedArm | None) -> Problem | None:
    ailment = trial.problem if trial is not None else None
    if ailment is not None and ailment.fatal:
        return Problem(ailment.reason, f"the canary's pods do not serve: {ailment.message}")
    deadline = o.spec.progress_deadline_seconds
    if trial is not None and trial.rolled_out:
        # Late or not: the operator may have been away, or suspended, while they became ready.
        return None
    late = trial is not None and trial.deadline_exceeded
    waited = (o.now - find_start(o, record)).total_seconds()
    if record.step is None:
        # The Deployment's own deadline may never come: for a pod that quota forbids, or while its controller is away.
        late = late or waited > 2 * deadline
    elif trial is None or trial.ready == 0:
        # Its weight has been taken away, and the step's clock began anew with that.
        waits = o.route is not None and o.route.canary_weight == 0
        late = late or (waits and waited > deadline)
        if not waits and record.losses >= LOSSES_IN_A_STEP:
            return Problem(
                CANARY_NOT_READY,
                f"the canary lost all of its pods {record.losses + 1} times in one step{_explain(ailment)}",
            )
    if not late:
        return None
    reason = ailment.reason if ailment is not None else CANARY_NOT_READY
    return Problem(reason, f"the canary's pods were not ready within {deadline} s{_explain(ailment)}")


def _explain(ailment: PodProblem | None) -> str:
    return f": {ailment.message}" if ailment is not None else ""


def _find_timeout(o: ObservedCanary, record: RolloutRecord, judgement: Judgement) -> Problem | None:
    if record.step is None:
        return None
    analysis = o.spec.analysis
    began = find_start(o, record)
    silent = (o.now - max(began, _last_data(o, record, judgement))).total_seconds()
    if judgement.verdict is AnalysisVerdict.UNKNOWN and silent > analysis.no_data_timeout_seconds:
        return Problem(NO_DATA, f"nothing was known for {analysis.no_data_timeout_seconds} s: {judgement.message}")
    pause = o.spec.steps[min(record.step, len(o.spec.steps) - 1)].pause
    lasted = (o.now - began).total_seconds() - (pause.seconds if pause is not None else 0)
    if lasted > analysis.max_step_seconds:
        message = f"the step was undecided for {analysis.max_step_seconds} s: {judgement.message}"
        return Problem(ANALYSIS_TIMED_OUT, message)
    return None


def _last_data(o: ObservedCanary, record: RolloutRecord, judgement: Judgement) -> datetime:
    """When the analysis last knew something."""
    if judgement.verdict is not AnalysisVerdict.UNKNOWN:
        return o.now
    told = o.status.rollout
    if told is not None and told.id == record.id and told.last_data_time is not None:
        return parse_time(told.last_data_time)
    return parse_time(record.started)


def may_go_on(o: ObservedCanary, record: RolloutRecord, trial: ObservedArm, judgement: Judgement) -> bool:
    """Whether the next step may begin: this one has lasted, both arms stand, and the test says Pass."""
    if record.step is None or o.stable is None or not o.stable.rolled_out or not has_all_pods(o, trial):
        return False
    step = o.spec.steps[min(record.step, len(o.spec.steps) - 1)]
    lasts = step.pause.seconds if step.pause is not None else o.spec.analysis.interval_seconds
    if (o.now - parse_time(record.step_started)).total_seconds() < lasts:
        return False
    # A pause before the first weight has nothing to be judged by.
    nothing_yet = compute_weight(o.spec.steps, record.step) == 0
    return judgement.verdict is AnalysisVerdict.PASS or nothing_yet
