"""What augmentation does to audio, measured on the audio: each test hears the difference."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from attune.contract.training import Augmentation, CodecKind, NoiseKind, SpecAugment
from attune_trainer.augmentation import effects, recordings
from attune_trainer.augmentation.augmenter import Augmenter
from attune_trainer.augmentation.recordings import fetch_recordings
from attune_trainer.data.dataset import digest_samples
from attune_trainer.failures import InvalidInput, NotFound, Terminated
from attune_trainer.modeling.buckets import BUCKETS
from attune_trainer.store import Store
from attune_trainer.training.batches import plan_epoch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

RATE = 16000
EVERYTHING: dict[str, Any] = {
    "speed": {},
    "roomImpulseResponse": {"probability": "1"},
    "noise": {"kinds": ["White", "Pink", "Brown", "Babble"], "probability": "1"},
    "codec": {"probability": "1"},
    "specAugment": {},
}


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@functools.cache
def speech(seed: int = 0, seconds: float = 2.0) -> effects.Audio:
    """Gives syllables of a voice: harmonics of a moving pitch up to 7 kHz, four times a second."""
    times = np.arange(int(seconds * RATE)) / RATE
    pitch = 2 * np.pi * (110 + 10 * seed % 50) * times + np.sin(2 * np.pi * times)
    voice = sum(np.sin(harmonic * pitch) / harmonic for harmonic in range(1, 60))
    return (0.1 * voice * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * times))).astype(np.float32)


def power(samples: np.ndarray) -> float:
    return float(np.square(samples, dtype=np.float64).mean())


def decibels(ratio: float) -> float:
    return 10 * float(np.log10(ratio))


def spectrum(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gives frequencies in Hz and the power at each."""
    return np.fft.rfftfreq(len(samples), 1 / RATE), np.square(np.abs(np.fft.rfft(samples)))


def share_above(samples: np.ndarray, hertz: float) -> float:
    frequencies, powers = spectrum(samples)
    return float(powers[frequencies > hertz].sum() / powers.sum())


def pitch_of(samples: np.ndarray) -> float:
    frequencies, powers = spectrum(samples)
    return float(frequencies[powers.argmax()])


def make(wanted: dict[str, Any], clips: Sequence[np.ndarray], **changes: Any) -> Augmenter:
    fields: dict[str, Any] = {"seed": 7, "epoch": 0, "window_seconds": 30.0}
    return Augmenter(
        Augmentation.model_validate(wanted),
        [len(clip) / RATE for clip in clips],
        lambda position: clips[position],
        **(fields | changes),
    )


class TestSpeed:
    @pytest.mark.parametrize("factor", [0.9, 1.1, 1.2345678])
    def test_duration_is_divided_and_pitch_multiplied(self, factor: float) -> None:
        tone = np.sin(2 * np.pi * 1000 * np.arange(3 * RATE) / RATE).astype(np.float32)
        heard = effects.change_speed(tone, factor)
        assert heard.dtype == np.float32
        assert len(heard) == pytest.approx(3 * RATE / factor, abs=1)
        assert pitch_of(heard) == pytest.approx(1000 * factor, rel=1e-3)
        assert decibels(power(heard) / power(tone)) == pytest.approx(0, abs=0.1)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=20), st.integers(0, 3))
    def test_every_clip_as_it_is_heard_has_room_in_its_batch_and_in_the_window(
        self, recorded: list[float], epoch: int
    ) -> None:
        clips = [np.zeros(round(seconds * RATE), np.float32) for seconds in recorded]
        augmenter = make({"speed": {"min": "0.5", "max": "1.5"}}, clips, epoch=epoch, window_seconds=10.0)
        assert all(seconds <= 10.0 + 1e-9 for seconds in augmenter.seconds)
        buckets = (*(bucket for bucket in BUCKETS if bucket < 10), 10.0)
        planned = plan_epoch(augmenter.seconds, buckets, batch_size=8, max_batch_seconds=48, seed=7, epoch=epoch)
        for (batch,) in planned:
            for position in batch.members:
                heard = len(augmenter.hear(position, clips[position])) / RATE
                assert heard == pytest.approx(augmenter.seconds[position], abs=1.5 / RATE)
                assert heard + 0.5 <= batch.bucket + 1.5 / RATE or batch.bucket == 10

    def test_factors_fill_their_range_and_differ_between_epochs(self) -> None:
        clips = [np.zeros(RATE, np.float32)] * 500
        first, second = (np.array(make({"speed": {}}, clips, epoch=epoch).seconds) for epoch in (0, 1))
        assert 1 / 1.1 <= first.min() < 0.915
        assert 1.1 < first.max() <= 1 / 0.9
        assert (first != second).all()

    def test_only_so_many_are_changed(self) -> None:
        clips = [np.zeros(RATE, np.float32)] * 2000
        changed = np.array(make({"speed": {"probability": "0.3"}}, clips).seconds) != 1.0
        assert changed.mean() == pytest.approx(0.3, abs=0.04)


class TestNoise:
    @pytest.mark.parametrize(
        ("kind", "slope"), [(NoiseKind.WHITE, 0.0), (NoiseKind.PINK, -3.0), (NoiseKind.BROWN, -6.0)]
    )
    def test_a_colour_falls_by_its_decibels_an_octave(self, kind: NoiseKind, slope: float) -> None:
        frequencies, powers = spectrum(effects.make_noise(kind, 10 * RATE, draw()))
        octaves = [(low, 2 * low) for low in (100, 200, 400, 800, 1600, 3200)]
        levels = [decibels(float(powers[(low <= frequencies) & (frequencies < high)].mean())) for low, high in octaves]
        assert float(np.polyfit(range(len(levels)), levels, 1)[0]) == pytest.approx(slope, abs=0.3)

    @settings(max_examples=20, deadline=None)
    @given(st.floats(-20, 60), st.sampled_from(["White", "Pink", "Brown"]), st.integers(400, 20000))
    def test_the_ratio_that_was_drawn_is_the_ratio_that_is_heard(self, snr_db: float, kind: str, length: int) -> None:
        clip = np.resize(speech(), length)
        mixed = effects.mix(clip, effects.make_noise(NoiseKind(kind), length, draw()), snr_db)
        heard = decibels(power(clip) / power(mixed.astype(np.float64) - clip))
        assert heard == pytest.approx(snr_db, abs=0.5)

    def test_ratios_fill_the_range_that_was_asked_for(self) -> None:
        clips = [speech(seed, 0.3) for seed in range(100)]
        augmenter = make({"noise": {"snrDbMin": 5, "snrDbMax": 25, "probability": "1"}}, clips)
        ratios = [
            decibels(power(clip) / power(augmenter.hear(position, clip) - clip)) for position, clip in enumerate(clips)
        ]
        assert 4.9 < min(ratios) < 7
        assert 23 < max(ratios) < 25.1

    def test_babble_is_made_of_others_and_never_of_the_speaker(self) -> None:
        # Each talker is a tone, so that the spectrum tells who speaks.
        tones = [
            np.sin(2 * np.pi * 500 * (1 + index) * np.arange(RATE) / RATE).astype(np.float32) for index in range(10)
        ]
        wanted = {"noise": {"kinds": ["Babble"], "snrDbMin": 0, "snrDbMax": 0, "probability": "1"}}
        augmenter = make(wanted, tones)
        for position, tone in enumerate(tones):
            _, powers = spectrum(augmenter.hear(position, tone) - tone)
            talkers = {index for index in range(10) if powers[500 * (1 + index)] > 0.02 * powers.max()}
            assert 3 <= len(talkers) <= 6
            assert position not in talkers

    def test_own_recordings_are_heard_as_they_are(self, tmp_path: Path) -> None:
        file = tmp_path / "fan.flac"
        soundfile.write(file, 0.1 * np.sin(2 * np.pi * 3000 * np.arange(RATE // 2) / RATE), RATE)
        wanted = {"noise": {"kinds": [], "uri": "s3://noise/fans", "probability": "1"}}
        clip = speech()
        noise = make(wanted, [clip], noises=[file]).hear(0, clip) - clip
        assert pitch_of(noise) == pytest.approx(3000, abs=2)  # all of a clip that is longer than the recording
        assert decibels(power(noise[: RATE // 2]) / power(noise[-RATE // 2 :])) == pytest.approx(0, abs=0.5)

    def test_own_recordings_are_one_kind_among_the_others(self, tmp_path: Path) -> None:
        file = tmp_path / "fan.flac"
        soundfile.write(file, 0.1 * np.sin(2 * np.pi * 3000 * np.arange(RATE) / RATE), RATE)
        wanted = {"noise": {"kinds": ["White"], "uri": "s3://noise/fans", "probability": "1"}}
        clips = [speech(0, 0.5)] * 100
        augmenter = make(wanted, clips, noises=[file])
        recorded = [share_above(augmenter.hear(index, clips[0]) - clips[0], 4000) < 0.01 for index in range(100)]
        assert 30 < sum(recorded) < 70

    def test_silence_stays_silence(self) -> None:
        silence = np.zeros(RATE, np.float32)
        assert not make({"noise": {"probability": "1"}}, [silence]).hear(0, silence).any()


class TestRoom:
    @pytest.mark.parametrize("rt60", [0.2, 0.6])
    def test_an_echo_falls_by_60_decibels_in_the_time_that_was_drawn(self, rt60: float) -> None:
        response = effects.simulate_room(rt60, 0.0, draw())
        # Schroeder's backward integration; the line from -5 to -25 dB, three times as long (ISO 3382).
        energy = np.cumsum(np.square(response[1:], dtype=np.float64)[::-1])[::-1]
        level = 10 * np.log10(energy / energy[0])
        fitted = (level < -5) & (level > -25)
        slope = np.polyfit(np.flatnonzero(fitted) / RATE, level[fitted], 1)[0]
        assert -60 / slope == pytest.approx(rt60, rel=0.15)

    @pytest.mark.parametrize("direct_db", [0.0, 12.0])
    def test_the_direct_path_comes_first_and_has_its_share(self, direct_db: float) -> None:
        response = effects.simulate_room(0.4, direct_db, draw())
        assert response[0] == 1.0
        assert decibels(1 / float(np.square(response[1:]).sum())) == pytest.approx(direct_db, abs=0.01)

    def test_what_ends_goes_on_sounding_and_nothing_is_delayed(self) -> None:
        click = np.zeros(RATE, np.float32)
        click[4000] = 0.5
        heard = effects.reverberate(click, effects.simulate_room(0.3, 0.0, draw()))
        assert int(np.abs(heard).argmax()) == 4000
        assert np.abs(heard[:4000]).max() < 1e-6
        after, later = power(heard[4001:4801]), power(heard[4001 + 2400 : 4801 + 2400])
        assert decibels(after / later) == pytest.approx(60 * 0.15 / 0.3, abs=3)

    def test_length_and_level_are_kept(self) -> None:
        clip = speech()
        heard = effects.reverberate(clip, effects.simulate_room(0.5, 3.0, draw()))
        assert len(heard) == len(clip)
        assert heard.dtype == np.float32
        assert decibels(power(heard) / power(clip)) == pytest.approx(0, abs=0.01)
        assert not np.allclose(heard, clip, atol=0.01)

    def test_an_own_response_is_heard_instead_from_its_direct_path_on(self, tmp_path: Path) -> None:
        response = np.zeros(1600)
        response[[300, 1100]] = 0.9, 0.45  # silence before, and one echo 50 ms later
        file = tmp_path / "hall.flac"
        soundfile.write(file, response, RATE)
        click = np.zeros(RATE, np.float32)
        click[4000] = 0.5
        wanted = {"roomImpulseResponse": {"uri": "s3://rooms/halls", "probability": "1"}}
        heard = make(wanted, [click], rooms=[file]).hear(0, click)
        assert np.flatnonzero(np.abs(heard) > 0.01).tolist() == [4000, 4800]
        assert heard[4800] / heard[4000] == pytest.approx(0.5, abs=1e-3)


class TestCodec:
    @pytest.mark.parametrize("kind", [CodecKind.GSM, CodecKind.MULAW])
    def test_a_telephone_carries_nothing_above_4_khz(self, kind: CodecKind) -> None:
        clip = speech()
        heard = effects.pass_codec(clip, kind)
        assert share_above(clip, 4100) > 1e-3
        assert share_above(heard, 4100) < 1e-5

    def test_opus_at_its_lowest_rate_is_a_narrow_band_and_at_a_high_one_is_not(self) -> None:
        clip = speech()
        assert share_above(effects.pass_codec(clip, CodecKind.OPUS, 6), 5000) < 0.1 * share_above(clip, 5000)
        assert share_above(effects.pass_codec(clip, CodecKind.OPUS, 64), 5000) > 0.5 * share_above(clip, 5000)

    def test_the_poorer_the_rate_the_more_is_lost(self) -> None:
        clip = speech()
        left = [
            decibels(power(clip) / power(effects.pass_codec(clip, CodecKind.OPUS, kbps) - clip)) for kbps in (6, 16, 64)
        ]
        assert left == sorted(left)
        assert left[2] > left[0] + 6

    def test_mulaw_has_the_distortion_of_its_eight_bits(self) -> None:
        # Below 4 kHz, so that only quantisation is left: G.711 keeps some 38 dB over a wide range of levels.
        tone = (0.25 * np.sin(2 * np.pi * 1001 * np.arange(RATE) / RATE)).astype(np.float32)
        lost = effects.pass_codec(tone, CodecKind.MULAW)[800:-800] - tone[800:-800]
        assert 34 < decibels(power(tone) / power(lost)) < 42

    @pytest.mark.parametrize("kind", list(CodecKind))
    @pytest.mark.parametrize("length", [1, 161, 2 * RATE + 7])
    def test_length_time_and_level_are_kept(self, kind: CodecKind, length: int) -> None:
        clip = speech(0, 3)[:length]
        heard = effects.pass_codec(clip, kind, 16)
        assert len(heard) == length
        assert heard.dtype == np.float32
        if length > RATE:
            middle = clip[1000:-1000]
            alike = [float(middle @ heard[start : start + len(middle)]) for start in range(950, 1050)]
            assert abs(int(np.argmax(alike)) - 50) <= 2
            assert decibels(power(heard) / power(clip)) == pytest.approx(0, abs=1.5)

    @pytest.mark.parametrize("kind", list(CodecKind))
    def test_what_is_too_loud_is_clipped_and_never_wraps_around(self, kind: CodecKind) -> None:
        loud = (3 * np.sin(2 * np.pi * 300 * np.arange(RATE) / RATE)).astype(np.float32)
        heard = effects.pass_codec(loud, kind, 16)
        assert float(heard @ np.sign(loud)) / len(loud) > 0.7


class TestSpecAugment:
    @settings(max_examples=100, deadline=None)
    @given(
        frames=st.integers(1, 400),
        masks=st.tuples(st.integers(0, 4), st.integers(1, 4)),
        shares=st.tuples(st.sampled_from(["0.05", "0.15", "0.9"]), st.sampled_from(["0.05", "0.2", "0.9"])),
        seed=st.integers(0, 99),
    )
    def test_masks_stay_within_the_utterance_and_their_bounds(
        self, frames: int, masks: tuple[int, int], shares: tuple[str, str], seed: int
    ) -> None:
        features = draw(1).standard_normal((80, 400)).astype(np.float32)
        features[:, frames:] = -1.5
        wanted = SpecAugment(
            time_masks=masks[0],
            frequency_masks=masks[1],
            time_mask_share=shares[0],
            frequency_mask_share=shares[1],
            time_mask_seconds="0.5",
        )
        masked = effects.mask_features(features, frames, wanted, draw(seed))
        changed = masked != features
        assert not changed[:, frames:].any()
        longest, widest = min(50, float(shares[0]) * frames), float(shares[1]) * 80
        assert changed.sum() <= masks[0] * longest * 80 + masks[1] * widest * frames
        columns, rows = changed[:, :frames].all(axis=0), changed[:, :frames].all(axis=1)
        # Whatever is changed lies in a whole column or a whole row.
        assert not (changed[:, :frames] & ~(columns[None, :] | rows[:, None])).any()

    def test_the_share_that_is_masked_is_the_share_to_be_expected(self) -> None:
        features = draw(1).standard_normal((80, 1000)).astype(np.float32)
        wanted = SpecAugment(
            time_masks=1, frequency_masks=0, time_mask_share="0.2", time_mask_seconds="5", frequency_mask_share="0.2"
        )
        shares = [
            float((effects.mask_features(features, 1000, wanted, draw(seed)) != features).mean()) for seed in range(300)
        ]
        assert max(shares) <= 0.2
        assert float(np.mean(shares)) == pytest.approx(0.1, abs=0.01)

    def test_seconds_bound_long_utterances(self) -> None:
        features = draw(1).standard_normal((80, 1000)).astype(np.float32)
        wanted = SpecAugment(time_masks=1, frequency_masks=0, time_mask_share="0.9", time_mask_seconds="0.4")
        widths = [
            int((effects.mask_features(features, 1000, wanted, draw(seed)) != features).any(axis=0).sum())
            for seed in range(200)
        ]
        assert 35 <= max(widths) <= 40

    def test_what_is_blank_has_the_mean_of_the_utterance(self) -> None:
        features = draw(1).uniform(0, 1, (80, 100)).astype(np.float32)
        features[:, 50:] = -1.5
        masked = effects.mask_features(features, 50, SpecAugment(), draw())
        assert masked[masked != features] == pytest.approx(features[:, :50].mean(), abs=1e-6)


class TestDraws:
    clips = [speech(seed, 1 + seed / 10) for seed in range(6)]

    def hear_all(self, **changes: Any) -> list[np.ndarray]:
        augmenter = make(EVERYTHING, self.clips, **changes)
        return [augmenter.hear(position, clip) for position, clip in enumerate(self.clips)]

    def test_the_same_seed_and_epoch_give_the_very_same_samples_in_whatever_order(self) -> None:
        first = self.hear_all()
        augmenter = make(EVERYTHING, self.clips)
        for position in (3, 0, 5, 5, 1):
            assert np.array_equal(augmenter.hear(position, self.clips[position]), first[position])

    @pytest.mark.parametrize("changes", [{"seed": 8}, {"epoch": 1}])
    def test_another_seed_or_epoch_gives_others(self, changes: dict[str, Any]) -> None:
        for one, other in zip(self.hear_all(), self.hear_all(**changes), strict=True):
            shared = min(len(one), len(other))
            assert not np.allclose(one[:shared], other[:shared], atol=1e-3)

    def test_masks_follow_seed_epoch_and_position_too(self) -> None:
        features = draw(1).standard_normal((80, 200)).astype(np.float32)

        def mask(position: int, **changes: Any) -> bytes:
            return make({"specAugment": {}}, self.clips, **changes).mask(position, features, RATE).tobytes()

        assert mask(0) == mask(0)
        assert len({mask(0), mask(1), mask(0, seed=8), mask(0, epoch=1)}) == 4

    def test_an_effect_that_is_turned_on_leaves_the_draws_of_the_others_alone(self) -> None:
        alone = make({"speed": {}}, self.clips)
        together = make(EVERYTHING, self.clips)
        assert alone.seconds == together.seconds
        room = {"roomImpulseResponse": {"probability": "1"}}
        clip = self.clips[0]
        quiet = make({**room, "noise": {"snrDbMin": 60, "snrDbMax": 60, "probability": "1"}}, self.clips).hear(0, clip)
        assert np.allclose(make(room, self.clips).hear(0, clip), quiet, atol=2e-3)

    def test_what_is_not_asked_for_is_not_done(self) -> None:
        clip = self.clips[0]
        augmenter = make({"specAugment": {}}, self.clips)
        assert augmenter.hear(0, clip) is clip
        assert augmenter.seconds == [len(one) / RATE for one in self.clips]
        features = draw(1).standard_normal((80, 200)).astype(np.float32)
        assert make({"speed": {}}, self.clips).mask(0, features, RATE) is features

    def test_nothing_that_is_heard_is_beyond_reason(self) -> None:
        for heard, clip in zip(self.hear_all(), self.clips, strict=True):
            assert heard.dtype == np.float32
            assert np.isfinite(heard).all()
            assert 0.1 < power(heard) / power(clip) < 3


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing at all": ({}, "at least one of speed"),
    "slowest above fastest": ({"speed": {"min": "1.1", "max": "0.9"}}, "speed.min must be at most speed.max"),
    "slower than speech": ({"speed": {"min": "0.4"}}, "must be between 0.5 and 2"),
    "loudest above softest": ({"noise": {"snrDbMin": 20, "snrDbMax": 10}}, "noise.snrDbMin must be at most"),
    "noise of nothing": ({"noise": {"kinds": []}}, "noise needs kinds, or a uri with recordings"),
    "noise from a model hub": ({"noise": {"uri": "hf://noise/fans"}}, "should match pattern"),
    "a room drier than the default wettest": (
        {"roomImpulseResponse": {"rt60MinSeconds": "0.7"}}, "rt60MinSeconds (0.15 where absent) must be at most",
    ),
    "rooms simulated and recorded": (
        {"roomImpulseResponse": {"uri": "s3://rooms", "rt60MaxSeconds": "0.5"}}, "not both",
    ),
    "no codec": ({"codec": {"kinds": []}}, "at least 1 item"),
    "never": ({"codec": {"probability": "0"}}, "must be between 0.01 and 1"),
    "no masks": ({"specAugment": {"timeMasks": 0, "frequencyMasks": 0}}, "needs timeMasks or frequencyMasks"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_itself_is_refused_by_its_name(case: str) -> None:
    wanted, says = REFUSED[case]
    with pytest.raises(ValidationError) as raised:
        Augmentation.model_validate(wanted)
    assert says in str(raised.value)


class TestRecordings:
    def upload(self, store: Store, folder: Path, prefix: str, sounds: dict[str, np.ndarray], rate: int = RATE) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "LICENSE.md").write_text("CC0")
        for name, samples in sounds.items():
            soundfile.write(folder / name, samples, rate)
        return store.upload_directory(folder, prefix)

    def fetch(self, store: Store, uri: str, folder: Path, longest: float = 10) -> tuple[Path, ...]:
        return fetch_recordings(store, uri, folder, field="spec.augmentation.noise.uri", longest_seconds=longest)

    def test_what_a_folder_holds_comes_at_16_khz_named_by_its_samples(
        self, s3_store: Store, key_prefix: str, tmp_path: Path
    ) -> None:
        tones = {f"{hertz}.wav": 0.1 * np.sin(hertz * np.arange(44100) / 7018) for hertz in (500, 900)}
        tones["again.wav"] = tones["500.wav"]
        uri = self.upload(s3_store, tmp_path / "in", key_prefix, tones, rate=44100)
        files = self.fetch(s3_store, uri, tmp_path / "out")
        assert files == tuple(sorted(files))
        assert len(files) == 2
        for file in files:
            samples, rate = soundfile.read(file, dtype="int16")
            assert (rate, len(samples)) == (RATE, RATE)
            assert file.stem == digest_samples(samples)
        assert [file.name for file in self.fetch(s3_store, uri, tmp_path / "again")] == [file.name for file in files]

    @pytest.mark.parametrize(
        ("sound", "why"),
        [(np.zeros(RATE), "AudioSilent"), (np.full(11 * RATE, 0.1), "TooLong"), (None, "AudioNotDecodable")],
    )
    def test_one_that_cannot_be_used_is_named(
        self, s3_store: Store, key_prefix: str, tmp_path: Path, sound: np.ndarray | None, why: str
    ) -> None:
        (tmp_path / "in").mkdir()
        if sound is None:
            (tmp_path / "in" / "fan.wav").write_text("no sound")
        uri = self.upload(s3_store, tmp_path / "in", key_prefix, {} if sound is None else {"fan.wav": sound})
        with pytest.raises(InvalidInput, match=rf"spec\.augmentation\.noise\.uri: fan\.wav .*{why}") as raised:
            self.fetch(s3_store, uri, tmp_path / "out")
        assert raised.value.reason == "RecordingNotUsable"

    def test_a_folder_without_audio_is_named(self, s3_store: Store, key_prefix: str, tmp_path: Path) -> None:
        uri = self.upload(s3_store, tmp_path / "in", key_prefix, {})
        with pytest.raises(NotFound, match=r"noise\.uri: there is no audio file below s3://"):
            self.fetch(s3_store, uri, tmp_path / "out")

    @pytest.mark.parametrize(("bound", "value"), [("MAX_FILES", 1), ("MAX_BYTES", 1000), ("MAX_SECONDS", 1.5)])
    def test_more_than_there_may_be_is_refused(
        self,
        s3_store: Store,
        key_prefix: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        bound: str,
        value: float,
    ) -> None:
        sounds = {f"{number}.wav": draw(number).uniform(-0.1, 0.1, RATE) for number in range(2)}
        uri = self.upload(s3_store, tmp_path / "in", key_prefix, sounds)
        assert len(self.fetch(s3_store, uri, tmp_path / "out")) == 2
        monkeypatch.setattr(recordings, bound, value)
        with pytest.raises(InvalidInput) as raised:
            self.fetch(s3_store, uri, tmp_path / "out")
        assert raised.value.reason == "TooManyRecordings"

    def test_a_job_that_is_to_end_fetches_no_more(self, s3_store: Store, key_prefix: str, tmp_path: Path) -> None:
        uri = self.upload(s3_store, tmp_path / "in", key_prefix, {"fan.wav": draw().uniform(-0.1, 0.1, RATE)})

        def stop() -> None:
            raise Terminated

        with pytest.raises(Terminated):
            fetch_recordings(s3_store, uri, tmp_path / "out", field="x", longest_seconds=10, raise_if_stopped=stop)
        assert not list((tmp_path / "out").iterdir())
