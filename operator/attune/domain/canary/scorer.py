"""Asks for the scorer: the Job that replays the golden set to both arms of one rollout."""

from typing import Final

from attune.api.canary import ArmModel
from attune.contract.job import DatasetInput, ScoreRecipe, Split
from attune.contract.metrics import Track
from attune.domain.actions import CanaryAction, DeleteJob, EnsureScorer, RolloutRecord
from attune.domain.canary.models import resolve_stable
from attune.domain.canary.observed import ObservedCanary
from attune.domain.jobs import ObservedJob, Wording, describe_failure

# Each Job has tried several pods of its own before it fails for good.
SCORER_ATTEMPTS: Final = 5
_FIRST_PAUSE_SECONDS: Final = 60
_WORDS: Final = Wording("Unknown", "", "", "replays golden utterances", "use a smaller golden set")


def resolve_golden_input(o: ObservedCanary) -> DatasetInput | None:
    """Finds the golden set's Dataset at its present revision; None before there is one."""
    if o.dataset is None or o.dataset.status.revision is None or o.dataset.status.uri is None:
        return None
    status = o.dataset.status
    return DatasetInput(name=o.dataset.metadata.name, revision=status.revision or "", uri=status.uri or "")


def name_scorer(o: ObservedCanary, record: RolloutRecord, attempt: int = 1) -> str:
    """Names the scorer of a rollout; one in place of a failed one bears its number."""
    name = f"{o.canary.metadata.name}-score-{record.id}"
    return name if attempt == 1 else f"{name}-{attempt}"


def find_scorers(o: ObservedCanary, record: RolloutRecord) -> dict[int, ObservedJob]:
    """Finds the scorers of a rollout by their number. Failed ones are kept until it ends: they are what is counted."""
    jobs = {job.name: job for job in o.scorers}
    names = {attempt: name_scorer(o, record, attempt) for attempt in range(1, SCORER_ATTEMPTS + 1)}
    return {attempt: jobs[name] for attempt, name in names.items() if name in jobs}


def _find_newest(o: ObservedCanary, record: RolloutRecord) -> tuple[int, ObservedJob | None]:
    present = find_scorers(o, record)
    attempt = max(present, default=0)
    return attempt, present.get(attempt)


def delete_other_scorers(o: ObservedCanary, record: RolloutRecord) -> tuple[DeleteJob, ...]:
    """Clears away what earlier rollouts have left."""
    kept = {job.name for job in find_scorers(o, record).values()}
    return tuple(DeleteJob(job.name) for job in o.scorers if job.name not in kept and not job.deleting)


def compute_pause(attempt: int) -> int:
    """Seconds between a scorer's failure and the next one: 60 after the first, 480 after the fourth."""
    return int(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))


def describe_scorer(o: ObservedCanary, record: RolloutRecord) -> tuple[str, str] | None:
    """Gives reason and message of the newest scorer's failure, and what follows; None when it has not failed."""
    attempt, job = _find_newest(o, record)
    if job is None or not job.failed:
        return None
    reason, message, _ = describe_failure(job, _WORDS)
    following = f"another is started {compute_pause(attempt)} s after it"
    if attempt == SCORER_ATTEMPTS:
        following = f"it was the last of {SCORER_ATTEMPTS}; for another: kubectl delete job {job.name}"
    return reason, f"the scorer (Job {job.name}) failed: {message}; {following}"


def _choose_attempt(o: ObservedCanary, record: RolloutRecord) -> int | None:
    """Chooses the number of the scorer to start now; None when none is due."""
    attempt, job = _find_newest(o, record)
    if job is None:
        return 1
    if not job.failed or attempt == SCORER_ATTEMPTS:
        return None
    passed = (o.now - job.finished).total_seconds() if job.finished is not None else 0.0
    return attempt + 1 if passed >= compute_pause(attempt) else None


def ensure_scorer(o: ObservedCanary, record: RolloutRecord, model: ArmModel) -> tuple[CanaryAction, ...]:
    """Asks for the scorer, unless it is there or is to rest; without the golden set there is nothing to start."""
    attempt = _choose_attempt(o, record)
    golden = resolve_golden_input(o)
    if golden is None or attempt is None:
        return ()
    metadata = o.canary.metadata
    wanted = o.spec.analysis.golden

    def url(track: Track) -> str:
        return f"http://{metadata.name}-{track.value}.{metadata.namespace}.svc:{o.spec.service.port}"

    recipe = ScoreRecipe(
        dataset=golden,
        split=Split(wanted.split),
        stable_url=url(Track.STABLE),
        canary_url=url(Track.CANARY),
        stable_model_id=resolve_stable(o).model_id,
        canary_model_id=model.model_id,
        requests_per_minute=wanted.requests_per_minute,
        canary=metadata.name,
        namespace=metadata.namespace,
        rollout=record.id,
    )
    return (EnsureScorer(name_scorer(o, record, attempt), recipe),)
