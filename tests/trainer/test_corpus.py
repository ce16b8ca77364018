"""What a run hears: never what is held out, wherever that is said."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from attune.contract.job import (
    DatasetInput,
    FinetuneRecipe,
    JobSpec,
    ModelInput,
    Owner,
    PrepareRecipe,
    Retention,
    Split,
    TrainingInput,
)
from attune.contract.training import Ewc, Hyperparameters, Replay
from attune_trainer.data.dataset import Utterance, load_split, total_seconds
from attune_trainer.failures import InvalidInput
from attune_trainer.job import RecipeContext
from attune_trainer.lineage import Generation, TrainedOn
from attune_trainer.progress import ProgressReporter
from attune_trainer.recipes import prepare
from attune_trainer.store import Store
from attune_trainer.training.corpus import choose_corpus
from attune_trainer.training.mixture import Mixture

from tests.trainer.conftest import S3Server
from tests.trainer.test_prepare import good_audio, line, recipe, upload

APART = (Split.VALIDATION, Split.HOLDOUT)


@pytest.fixture(scope="module")
def store(s3_server: S3Server) -> Store:
    return s3_server.store()


@pytest.fixture(scope="module")
def datasets(store: Store, tmp_path_factory: pytest.TempPathFactory) -> list[DatasetInput]:
    """The same forty recordings, divided in three ways: what one trains on another holds out."""
    upload(store, "corpus/in", [line(number) for number in range(40)], good_audio(40))
    made = []
    for seed in (1, 2, 3):
        rule = {"by": "Speaker", "validation": "0.2", "holdout": "0.2", "seed": seed}
        spec = JobSpec(
            owner=Owner(kind="Test", namespace="speech", name="calls", uid="0"),
            result_key="unused",
            recipe=recipe("corpus", splits=rule),  # type: ignore[arg-type] # the discriminator picks the model
        )
        assert isinstance(spec.recipe, PrepareRecipe)
        work = tmp_path_factory.mktemp("prepare")
        context = RecipeContext(spec, store, ProgressReporter(), work, "attempt-1", threading.Event())
        prepared = prepare.run(spec.recipe, context)
        made.append(DatasetInput(name=f"seed-{seed}", revision=prepared.revision, uri=prepared.uri))
    return made


def wish(
    named: Sequence[DatasetInput], retention: Retention | None = None, epochs: int = 1, **more: Any
) -> FinetuneRecipe:
    return FinetuneRecipe(
        base=ModelInput(uri="s3://attune/base"),
        datasets=[TrainingInput(**one.model_dump()) for one in named],
        retention=retention,
        hyperparameters=Hyperparameters(epochs=epochs),
        model_id="ft:base:abcdef",
        output_prefix="",
        checkpoint_prefix="",
        **more,
    )


def generation(*heard: DatasetInput) -> Generation:
    return Generation(
        model_id="ft:base:000000",
        base_model="s3://attune/base",
        base_digest="sha256:" + "0" * 64,
        datasets=tuple(TrainedOn(name=one.name, revision=one.revision, uri=one.uri) for one in heard),
    )


def texts(utterances: Sequence[Utterance]) -> set[str]:
    return {one.text for one in utterances}


def in_splits(store: Store, named: Sequence[DatasetInput], *splits: Split) -> set[str]:
    return texts([one for dataset in named for split in splits for one in load_split(store, dataset, split)])


def test_a_lone_dataset_is_taken_as_it_was_divided(store: Store, datasets: list[DatasetInput]) -> None:
    found = choose_corpus(store, wish(datasets[:1]), ())
    assert [one for _, one in found.train] == load_split(store, datasets[0], Split.TRAIN)
    assert [one for _, one in found.validation] == load_split(store, datasets[0], Split.VALIDATION)
    assert (found.old_validation, found.sample, found.mixture) == ((), (), None)


def test_what_one_dataset_holds_out_is_not_trained_on_for_another(store: Store, datasets: list[DatasetInput]) -> None:
    found = choose_corpus(store, wish(datasets[:2]), ())
    assert found.train
    assert not texts([one for _, one in found.train]) & in_splits(store, datasets[:2], *APART)
    assert {part for part, _ in found.train} == {0, 1}


def test_neither_domain_is_trained_on_what_the_other_holds_out(store: Store, datasets: list[DatasetInput]) -> None:
    retention = Retention(dataset=datasets[1], replay=Replay(ratio="0.5"), ewc=Ewc(strength="1", samples=3))
    found = choose_corpus(store, wish(datasets[:1], retention, epochs=50), ())
    apart = in_splits(store, datasets[:2], *APART)
    assert {part for part, _ in found.train} == {0, 1}
    assert not texts([one for _, one in found.train]) & apart
    assert len(found.sample) == 3
    assert texts(found.sample) <= in_splits(store, datasets[1:2], Split.TRAIN) - apart
    assert texts(found.old_validation) == in_splits(store, datasets[1:2], Split.VALIDATION)
    assert found.mixture == Mixture(weights=(1.0,), replay=0.5)


def pair(store: Store, datasets: list[DatasetInput], *, whole: bool) -> tuple[DatasetInput, DatasetInput]:
    """Two of them: all of the first one's validation split, or not all of it, is in the second one's train split."""
    return next(
        (one, other)
        for one in datasets
        for other in datasets
        if one != other
        and (in_splits(store, [one], Split.VALIDATION) <= in_splits(store, [other], Split.TRAIN)) is whole
    )


def test_what_an_earlier_generation_holds_out_is_not_trained_on_and_what_it_heard_not_validated_on(
    store: Store, datasets: list[DatasetInput]
) -> None:
    new, earlier = pair(store, datasets, whole=False)
    found = choose_corpus(store, wish([new]), (generation(), generation(earlier)))
    assert found.train
    assert found.validation
    assert not texts([one for _, one in found.train]) & in_splits(store, [new, earlier], *APART)
    assert not texts([one for _, one in found.validation]) & in_splits(store, [earlier], Split.TRAIN)


def test_to_be_tuned_on_the_same_dataset_once_more_leaves_its_splits_alone(
    store: Store, datasets: list[DatasetInput]
) -> None:
    again = choose_corpus(store, wish(datasets[:1]), (generation(datasets[0]),))
    assert again == choose_corpus(store, wish(datasets[:1]), ())


def test_a_validation_split_that_an_earlier_generation_was_trained_on_is_refused(
    store: Store, datasets: list[DatasetInput]
) -> None:
    new, earlier = pair(store, datasets, whole=True)
    with pytest.raises(InvalidInput, match=f"trained on all of the Validation split of {new.name}; take") as raised:
        choose_corpus(store, wish([new]), (generation(earlier),))
    assert raised.value.reason == "AlreadyTrainedOn"


def test_data_of_an_earlier_generation_that_is_gone_holds_nobody_up(store: Store, datasets: list[DatasetInput]) -> None:
    gone = DatasetInput(name="gone", revision="sha256:" + "1" * 64, uri=datasets[0].uri.replace("out/", "nowhere/"))
    found = choose_corpus(store, wish(datasets[:1]), (generation(gone),))
    assert found.train == choose_corpus(store, wish(datasets[:1]), ()).train


def test_of_a_large_old_domain_only_as_much_is_fetched_as_the_run_can_hear(
    store: Store, datasets: list[DatasetInput]
) -> None:
    retention = Retention(dataset=datasets[1], replay=Replay(ratio="0.1"))
    found = choose_corpus(store, wish(datasets[:1], retention, epochs=2), ())
    new = total_seconds(one for part, one in found.train if part == 0)
    old = total_seconds(one for part, one in found.train if part == 1)
    assert 2 * new / 9 <= old < 2 * new / 9 + 1


def test_weights_and_temperature_make_a_mixture(store: Store, datasets: list[DatasetInput]) -> None:
    asked = wish(datasets[:2], dataset_temperature="3")
    heavier = asked.datasets[1].model_copy(update={"weight": "2"})
    found = choose_corpus(store, asked.model_copy(update={"datasets": [asked.datasets[0], heavier]}), ())
    assert found.mixture == Mixture(weights=(1.0, 2.0), temperature=3.0)
