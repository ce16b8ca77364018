"""Asks for the scorer: the Job that replays the golden set to both arms of one rollout."""

from attune.api.canary import ArmModel
from attune.contract.job import DatasetInput, ScoreRecipe, Split
from attune.contract.metrics import Track
from attune.domain.actions import CanaryAction, EnsureScorer, RolloutRecord
from attune.domain.canary.models import resolve_stable
from attune.domain.canary.observed import ObservedCanary


def resolve_golden_input(o: ObservedCanary) -> DatasetInput | None:
    """Finds the golden set's Dataset at its present revision; None before there is one."""
    if o.dataset is None or o.dataset.status.revision is None or o.dataset.status.uri is None:
        return None
    status = o.dataset.status
    return DatasetInput(name=o.dataset.metadata.name, revision=status.revision or "", uri=status.uri or "")


def name_scorer(o: ObservedCanary, record: RolloutRecord) -> str:
    """Names the scorer of a rollout."""
    return f"{o.canary.metadata.name}-score-{record.id}"


def ensure_scorer(o: ObservedCanary, record: RolloutRecord, model: ArmModel) -> tuple[CanaryAction, ...]:
    """Asks for the scorer, unless it is there; without the golden set there is nothing to start."""
    name = name_scorer(o, record)
    golden = resolve_golden_input(o)
    if golden is None or any(job.name == name for job in o.scorers):
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
    return (EnsureScorer(name, recipe),)
