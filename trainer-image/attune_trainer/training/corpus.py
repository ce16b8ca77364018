"""Which utterances a run hears: those of its Datasets, some of an old domain's, and none that is held out anywhere."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from attune.contract.job import DatasetInput, FinetuneRecipe, Retention, Split

from attune_trainer.data.dataset import Utterance, load_split, total_seconds
from attune_trainer.failures import AccessDenied, InvalidInput, NotFound
from attune_trainer.lineage import Generation
from attune_trainer.store import Store
from attune_trainer.training.mixture import Mixture, draw_sample

_log = logging.getLogger(__name__)

# Of the old domain, after each epoch: as much as of the new one, and at least this.
_OLD_VALIDATION_SECONDS: Final = 1800.0


@dataclass(frozen=True)
class Corpus:
    """The utterances of a run.

    Attributes:
        train: with the part of the mixture that each belongs to.
        validation: of the new domain, with the number of its Dataset.
        old_validation: of the old domain; empty where none is kept.
        sample: of the old domain's train split, for elastic weight consolidation.
        mixture: how an epoch is made of train; None takes each utterance once.
    """

    train: tuple[tuple[int, Utterance], ...]
    validation: tuple[tuple[int, Utterance], ...]
    old_validation: tuple[Utterance, ...] = ()
    sample: tuple[Utterance, ...] = ()
    mixture: Mixture | None = None

    def utterances(self) -> list[Utterance]:
        """Lists all of them; some twice."""
        return [one for _, one in (*self.train, *self.validation)] + [*self.old_validation, *self.sample]


def choose_corpus(store: Store, recipe: FinetuneRecipe, history: Sequence[Generation]) -> Corpus:
    """Reads the splits of all Datasets, and chooses.

    Each Dataset was divided by itself, so a recording may be in the train split of one and held out by another: by one
    of this run, or by one that an earlier generation of the base model was trained on. It is then left out of training.
    And what an earlier generation was trained on tells nothing in validation.

    Args:
        store: where the Datasets are.
        recipe: what is wanted.
        history: of the base model.

    Raises:
        InvalidInput: EmptySplit.
        RecipeFailure: the store's.
    """
    old = recipe.retention
    named = [*recipe.datasets, *([old.dataset] if old is not None else [])]
    earlier = [
        DatasetInput(name=one.name, revision=one.revision, uri=one.uri)
        for generation in history
        for one in generation.datasets
    ]
    held_out = _read_held_out(store, named, earlier)
    heard = _recordings(store, earlier, (Split.TRAIN,), lenient=True)
    parts = [_without(load_split(store, one, Split.TRAIN), held_out, one) for one in recipe.datasets]
    new = [(number, one) for number, part in enumerate(parts) for one in part]
    if not new:
        raise _empty(Split.TRAIN, recipe.datasets)
    validation = _read_validation(store, recipe.datasets, heard)
    if old is None:
        return Corpus(train=tuple(new), validation=validation, mixture=_describe_mixture(recipe))
    sources = _without(load_split(store, old.dataset, Split.TRAIN), held_out, old.dataset)
    if not sources:
        raise _empty(Split.TRAIN, [old.dataset])
    old_validation = [one for _, one in _read_validation(store, [old.dataset], heard)]
    seed = recipe.hyperparameters.seed
    room = max(_OLD_VALIDATION_SECONDS, total_seconds(one for _, one in validation))
    replayed = _draw_replayed(old, sources, total_seconds(one for _, one in new), recipe)
    return Corpus(
        train=(*new, *((len(parts), one) for one in replayed)),
        validation=validation,
        old_validation=tuple(old_validation[index] for index in sorted(_draw(old_validation, room, seed))),
        sample=tuple(
            sources[index] for index in _draw(sources, float("inf"), seed)[: old.ewc.samples if old.ewc else 0]
        ),
        mixture=_describe_mixture(recipe),
    )


def _describe_mixture(recipe: FinetuneRecipe) -> Mixture | None:
    replay = recipe.retention.replay if recipe.retention is not None else None
    weighted = any(one.weight is not None for one in recipe.datasets)
    if replay is None and not weighted and recipe.dataset_temperature is None:
        return None
    return Mixture(
        weights=tuple(float(one.weight or 1) for one in recipe.datasets),
        temperature=float(recipe.dataset_temperature or 1),
        replay=float(replay.ratio) if replay is not None else 0.0,
    )


def _draw_replayed(
    old: Retention, sources: Sequence[Utterance], new_seconds: float, recipe: FinetuneRecipe
) -> list[Utterance]:
    """Draws as much of the old domain as the run can hear: the rest of a large Dataset need not be fetched."""
    if old.replay is None:
        return []
    ratio = float(old.replay.ratio)
    wanted = recipe.hyperparameters.epochs * new_seconds * ratio / (1 - ratio)
    return [sources[index] for index in sorted(_draw(sources, wanted, recipe.hyperparameters.seed))]


def _draw(utterances: Sequence[Utterance], wanted: float, seed: int) -> list[int]:
    return draw_sample([one.seconds for one in utterances], wanted, seed=seed)


def _read_held_out(store: Store, named: Sequence[DatasetInput], earlier: Sequence[DatasetInput]) -> set[str]:
    """Reads which recordings any Dataset validates on or holds out; a lone one keeps its own splits apart already."""
    apart = (Split.VALIDATION, Split.HOLDOUT)
    if len({one.revision for one in (*named, *earlier)}) == 1:
        return set()
    return _recordings(store, named, apart) | _recordings(store, earlier, apart, lenient=True)


def _recordings(
    store: Store, datasets: Iterable[DatasetInput], splits: Sequence[Split], *, lenient: bool = False
) -> set[str]:
    """Gives the digests of the recordings in these splits. lenient: a revision that cannot be read has none."""
    found: set[str] = set()
    for dataset in {one.revision: one for one in datasets}.values():
        try:
            for split in splits:
                found |= {one.audio_digest for one in load_split(store, dataset, split)}
        except (NotFound, AccessDenied) as failure:
            if not lenient:
                raise
            extra = {"dataset": dataset.name, "reason": failure.reason}
            _log.warning("what an earlier generation heard and held out is not known", extra=extra)
    return found


def _without(utterances: Sequence[Utterance], held_out: set[str], dataset: DatasetInput) -> list[Utterance]:
    kept = [one for one in utterances if one.audio_digest not in held_out]
    if len(kept) < len(utterances):
        count = len(utterances) - len(kept)
        _log.warning("utterances left out: held out elsewhere", extra={"dataset": dataset.name, "count": count})
    return kept


def _read_validation(
    store: Store, datasets: Sequence[DatasetInput], heard: set[str]
) -> tuple[tuple[int, Utterance], ...]:
    """Reads what is validated on, with the number of the Dataset.

    Raises:
        InvalidInput: EmptySplit, AlreadyTrainedOn.
    """
    found = [
        (number, one) for number, dataset in enumerate(datasets) for one in load_split(store, dataset, Split.VALIDATION)
    ]
    if not found:
        raise _empty(Split.VALIDATION, datasets)
    kept = tuple((number, one) for number, one in found if one.audio_digest not in heard)
    if not kept:
        message = (
            f"an earlier generation of the base model was trained on all of the Validation split of {_names(datasets)}"
            "; take the Dataset that it was trained on, or audio that is new"
        )
        raise InvalidInput("AlreadyTrainedOn", message)
    if len(kept) < len(found):
        count = len(found) - len(kept)
        _log.warning("not validated on: an earlier generation was trained on them", extra={"count": count})
    return kept


def _empty(split: Split, datasets: Sequence[DatasetInput]) -> InvalidInput:
    return InvalidInput(
        "EmptySplit",
        f"the {split.value} split of {_names(datasets)} is empty; give the Dataset more audio, or other shares in "
        "spec.splits",
    )


def _names(datasets: Sequence[DatasetInput]) -> str:
    return ", ".join(one.name for one in datasets)
