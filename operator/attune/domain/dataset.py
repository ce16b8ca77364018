"""Dataset: sources -> a prepare Job -> a revision with its statistics."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from attune.api.dataset import (
    Dataset,
    DatasetSpec,
    DatasetStatus,
    QualityStatus,
    RejectionStatus,
    SliceStatus,
    Source,
    SplitsStatus,
    SplitStatus,
    StatisticsStatus,
)
from attune.contract.environment import source_mount
from attune.contract.job import (
    Contradiction,
    FilterRules,
    KnownWords,
    ModelInput,
    Normalization,
    PrepareRecipe,
    PrepareSource,
    PrepareVolume,
    SplitRule,
)
from attune.contract.result import PrepareResult, SplitStatistics
from attune.domain.actions import Access, EnsureJob, Plan
from attune.domain.jobs import (
    ObservedJob,
    Standing,
    Surroundings,
    Wording,
    build_ensure_job,
    build_key,
    build_plan,
    decide_course,
    decide_outdated,
)
from attune.domain.names import fingerprint, is_same_run

PREPARED: Final = "Prepared"
_RUN: Final = Wording(
    pending="False",
    phase="Preparing",
    reason="Preparing",
    does="prepares the Dataset",
    more_memory="raise spec.resources.limits.memory",
)


@dataclass(frozen=True)
class ObservedDataset:
    """A Dataset and its Jobs."""

    resource: Dataset
    jobs: tuple[ObservedJob, ...]
    now: datetime
    surroundings: Surroundings


def decide_dataset(observed: ObservedDataset) -> Plan:
    """Decides the next step of a Dataset. The last good revision stays in the status until the next one is there."""
    dataset = observed.resource
    status = dataset.status
    wanted = build_prepare_job(dataset)
    if status.revision is not None and is_same_run(status.job_name, wanted.name):
        actions = decide_outdated(wanted.name, observed.jobs, keep_same_run=True)
        return build_plan(observed.resource, status, _describe_ready(status), observed.now, actions)
    course = decide_course(wanted, observed.jobs, words=_RUN, now=observed.now, surroundings=observed.surroundings)
    if isinstance(course.result, PrepareResult):
        status = _take_result(status, course.result, wanted.name)
        return build_plan(observed.resource, status, _describe_ready(status), observed.now, course.actions)
    if status.revision is None:
        # With a revision, job_name is the Job that made it: that is how a later pass knows whether it is current.
        status = status.model_copy(update={"job_name": wanted.name})
    return build_plan(
        observed.resource, status, course.standing, observed.now, course.actions, course.look_again_seconds
    )


def build_prepare_job(dataset: Dataset) -> EnsureJob:
    """Builds the wish for the Job that prepares this spec."""
    spec, owner = dataset.spec, dataset.owner()
    recipe = _build_recipe(spec)
    run = fingerprint(owner.uid, recipe)
    secrets = tuple(
        (index, source.s3.credentials_secret_ref.name)
        for index, source in enumerate(spec.sources)
        if source.s3 is not None and source.s3.credentials_secret_ref is not None
    )
    claims = tuple(
        (index, source.persistent_volume_claim.claim_name)
        for index, source in enumerate(spec.sources)
        if source.persistent_volume_claim is not None
    )
    return build_ensure_job(
        owner,
        recipe.model_copy(update={"output_prefix": build_key("datasets", owner, run)}),
        run,
        turn=spec,
        suspended=spec.suspend,
        resources=spec.resources,
        access=Access(source_secrets=secrets, source_claims=claims),
    )


# A step's fields that are told as they are, by the part of the recipe that they belong to.
_PLAIN: Final = ("sample_rate", "min_seconds", "max_seconds")
_NORMALIZATION: Final = ("loudness_lufs", "keep_silence_seconds")
_RULES: Final = (
    "min_characters_per_second",
    "max_characters_per_second",
    "max_clipped_share",
    "min_level_db",
    "min_snr_db",
    "match_language",
    "max_same_text",
    "similar_audio",
)


def _build_recipe(spec: DatasetSpec) -> PrepareRecipe:
    words = spec.known_words
    return PrepareRecipe(
        sources=[_build_source(index, source) for index, source in enumerate(spec.sources)],
        language=spec.language,
        splits=SplitRule(
            by=spec.splits.by,
            validation=spec.splits.validation,
            holdout=spec.splits.holdout,
            seed=spec.splits.seed,
        ),
        slices=spec.slices,
        known_words=KnownWords(uri=words.uri, format=words.format) if words is not None else None,
        max_rejected_share=spec.max_rejected_share,
        output_prefix="",
        **_build_steps(spec),
    )


def _build_source(index: int, source: Source) -> PrepareSource:
    common: dict[str, Any] = {
        "format": source.format,
        "manifest": source.manifest,
        "tar_shards": source.tar_shards,
        "channels": source.channels,
    }
    claim = source.persistent_volume_claim
    if claim is not None:
        volume = PrepareVolume(mount=source_mount(index), path=claim.path)
        return PrepareSource(uri=f"pvc://{claim.claim_name}/{claim.path}", volume=volume, **common)
    own = source.s3 is not None and source.s3.credentials_secret_ref is not None
    uri = source.s3.uri if source.s3 is not None else ""
    return PrepareSource(uri=uri, credentials_index=index if own else None, **common)


def _build_steps(spec: DatasetSpec) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for step in spec.pipeline:
        given = {name: value for name in step.model_fields_set if (value := getattr(step, name)) is not None}
        options |= {name: given[name] for name in _PLAIN if name in given}
        if step.step == "Normalize" and not given.keys().isdisjoint(_NORMALIZATION):
            options["normalization"] = Normalization(**{name: given[name] for name in _NORMALIZATION if name in given})
        rules: dict[str, Any] = {name: given[name] for name in _RULES if name in given}
        if step.contradiction is not None:
            rules["contradiction"] = Contradiction(
                model=ModelInput(uri=step.contradiction.model_uri),
                max_word_error_rate=step.contradiction.max_word_error_rate,
            )
        if step.step == "Filter" and rules:
            options["rules"] = FilterRules(**rules)
    return options


def _take_result(status: DatasetStatus, result: PrepareResult, job_name: str) -> DatasetStatus:
    def split(counts: SplitStatistics) -> SplitStatus:
        return SplitStatus.model_validate(counts.model_dump())

    return status.model_copy(
        update={
            "revision": result.revision,
            "uri": result.uri,
            "stats": StatisticsStatus.model_validate(result.stats.model_dump()),
            "splits": SplitsStatus(
                train=split(result.splits.train),
                validation=split(result.splits.validation),
                holdout=split(result.splits.holdout),
            ),
            "quality": QualityStatus(
                rejected=result.rejected,
                rejections=[RejectionStatus.model_validate(one.model_dump()) for one in result.rejections],
                warnings=result.warnings,
            ),
            "slices": [SliceStatus.model_validate(one.model_dump()) for one in result.slices],
            "report": result.report_uri,
            "job_name": job_name,
        }
    )


def _describe_ready(status: DatasetStatus) -> Standing:
    stats, quality = status.stats, status.quality
    message = "prepared"
    if stats is not None:
        message = f"{stats.utterances} utterances, {stats.hours} hours, {stats.speakers} speakers"
    if quality is not None and quality.rejected:
        reasons = ", ".join(f"{one.count} {one.reason}" for one in quality.rejections)
        message += f"; {quality.rejected} left out" + (f" ({reasons})" if reasons else "")
    return Standing("True", "Ready", PREPARED, message)
