"""Which utterances an epoch contains: the shares that were asked for, and nobody left out."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from attune_trainer.modeling.buckets import BUCKETS
from attune_trainer.training.batches import plan_epoch
from attune_trainer.training.mixture import Mixture, choose_utterances, draw_sample, plan_shares
from hypothesis import given, settings
from hypothesis import strategies as st

parts_of_a_run = st.lists(st.lists(st.floats(0.1, 30), min_size=1, max_size=30), min_size=2, max_size=4)


def lay_out(parts: Sequence[Sequence[float]]) -> tuple[list[float], list[int]]:
    """Durations one after the other, and the part that each belongs to."""
    return [one for part in parts for one in part], [number for number, part in enumerate(parts) for _ in part]


def spent(chosen: Sequence[int], seconds: Sequence[float], parts: Sequence[int]) -> list[float]:
    """Seconds of each part in an epoch."""
    totals = [0.0] * (max(parts) + 1)
    for index in chosen:
        totals[parts[index]] += seconds[index]
    return totals


class TestShares:
    @pytest.mark.parametrize(
        ("sizes", "mixture", "expected"),
        [
            pytest.param([300, 100], Mixture(weights=(1, 1)), [0.75, 0.25], id="by size"),
            pytest.param([300, 100], Mixture(weights=(1, 3)), [0.5, 0.5], id="a weight multiplies what size gives"),
            pytest.param([100, 100], Mixture(weights=(2, 1)), [2 / 3, 1 / 3], id="of equals one is heard twice"),
            pytest.param([400, 100], Mixture(weights=(1, 1), temperature=2), [2 / 3, 1 / 3], id="temperature 2: roots"),
            pytest.param([10**6, 1], Mixture(weights=(1, 1), temperature=100), [0.534, 0.466], id="temperature 100"),
            pytest.param([300, 100], Mixture(weights=(1, 1), replay=0.2), [0.6, 0.2, 0.2], id="replay takes its share"),
            pytest.param([100, 0], Mixture(weights=(1, 5)), [1, 0], id="a Dataset without audio gets nothing"),
        ],
    )
    def test_shares_follow_size_weight_and_temperature(
        self, sizes: list[float], mixture: Mixture, expected: list[float]
    ) -> None:
        assert plan_shares(sizes, mixture) == pytest.approx(expected, abs=1e-3)


class TestChoice:
    @settings(max_examples=100, deadline=None)
    @given(parts_of_a_run, st.integers(0, 5))
    def test_without_wishes_every_utterance_is_there_once(self, laid: list[list[float]], epoch: int) -> None:
        seconds, parts = lay_out(laid)
        mixture = Mixture(weights=(1.0,) * len(laid))
        chosen = choose_utterances(seconds, parts, mixture, seed=7, epoch=epoch)
        assert chosen == list(range(len(seconds)))
        planned = plan_epoch(seconds, BUCKETS, batch_size=8, max_batch_seconds=48, seed=7, epoch=epoch, chosen=chosen)
        assert planned == plan_epoch(seconds, BUCKETS, batch_size=8, max_batch_seconds=48, seed=7, epoch=epoch)

    @settings(max_examples=100, deadline=None)
    @given(
        parts_of_a_run,
        st.lists(st.floats(0.2, 5), min_size=4, max_size=4),
        st.floats(1, 100),
        st.sampled_from([0.0, 0.1, 0.5]),
    )
    def test_every_part_has_its_share_of_the_seconds_up_to_one_utterance(
        self, laid: list[list[float]], weights: list[float], temperature: float, replay: float
    ) -> None:
        seconds, parts = lay_out(laid)
        datasets = len(laid) - bool(replay)
        mixture = Mixture(weights=tuple(weights[:datasets]), temperature=temperature, replay=replay)
        whole = sum(sum(part) for part in laid[:datasets]) / (1 - replay)
        shares = plan_shares([sum(part) for part in laid[:datasets]], mixture)
        for epoch in range(3):
            chosen = choose_utterances(seconds, parts, mixture, seed=7, epoch=epoch)
            for number, found in enumerate(spent(chosen, seconds, parts)):
                assert found == pytest.approx(shares[number] * whole, abs=max(laid[number]) + 0.1)

    @settings(max_examples=50, deadline=None)
    @given(parts_of_a_run, st.floats(0.2, 5), st.integers(1, 6))
    def test_over_the_epochs_nobody_of_a_part_is_heard_twice_more_than_another(
        self, laid: list[list[float]], weight: float, epochs: int
    ) -> None:
        seconds, parts = lay_out(laid)
        mixture = Mixture(weights=(weight, *[1.0] * (len(laid) - 2)), replay=0.25)
        heard = Counter(dict.fromkeys(range(len(seconds)), 0))
        for epoch in range(epochs):
            heard.update(choose_utterances(seconds, parts, mixture, seed=7, epoch=epoch))
        for number in range(len(laid)):
            counts = [heard[index] for index in range(len(seconds)) if parts[index] == number]
            assert max(counts) - min(counts) <= 1

    def test_replay_takes_nothing_from_the_new_audio_and_brings_other_old_audio_in_each_epoch(self) -> None:
        seconds, parts = lay_out([[1.0] * 30, [1.0] * 40])
        mixture = Mixture(weights=(1.0,), replay=0.25)
        first, second = (choose_utterances(seconds, parts, mixture, seed=7, epoch=epoch) for epoch in (0, 1))
        assert [index for index in first if parts[index] == 0] == list(range(30))
        old = [{index for index in chosen if parts[index] == 1} for chosen in (first, second)]
        assert [len(one) for one in old] == [10, 10]
        assert not old[0] & old[1]

    def test_a_choice_depends_on_seed_and_epoch_alone(self) -> None:
        seconds, parts = lay_out([np.random.default_rng(0).uniform(0.3, 9, 40).tolist() for _ in range(2)])
        mixture = Mixture(weights=(1.0,), replay=0.3)

        def choose(seed: int, epoch: int) -> list[int]:
            return choose_utterances(seconds, parts, mixture, seed=seed, epoch=epoch)

        assert choose(7, 1) == choose(7, 1)
        assert choose(7, 1) != choose(7, 2)
        assert choose(7, 1) != choose(8, 1)

    def test_what_was_chosen_several_times_is_trained_on_as_often(self) -> None:
        chosen = [0, 1, 1, 2, 2, 2]
        steps = plan_epoch([1.0, 2.0, 3.0], BUCKETS, batch_size=2, max_batch_seconds=48, seed=7, epoch=0, chosen=chosen)
        assert Counter(index for (batch,) in steps for index in batch.members) == Counter(chosen)


class TestSample:
    def test_it_ends_as_soon_as_it_is_long_enough(self) -> None:
        drawn = draw_sample([1.0] * 100, 9.5, seed=7)
        assert len(drawn) == len(set(drawn)) == 10
        assert draw_sample([1.0] * 100, 20, seed=7)[:10] == drawn
        assert draw_sample([1.0] * 100, 9.5, seed=8) != drawn

    def test_of_too_little_audio_it_takes_all(self) -> None:
        assert sorted(draw_sample([1.0] * 5, float("inf"), seed=7)) == [0, 1, 2, 3, 4]
