"""What Normalize and Filter measure and change: loudness, level, noise, speech, rate, language, likeness."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
from attune.contract.job import FilterRules, Normalization, PrepareRecipe, SplitBy, SplitRule
from attune_trainer.data import voice
from attune_trainer.data.audio import decode_audio
from attune_trainer.data.conditioning import Conditions
from attune_trainer.data.language import is_other_language
from attune_trainer.data.levels import estimate_snr, measure_level, measure_loudness, set_loudness
from attune_trainer.data.rejections import RejectedLine
from attune_trainer.data.similarity import Recordings, fingerprint
from attune_trainer.data.voice import CHUNK, find_speech, speech_probabilities

from .speech import CODED, RATE, silence, speak, write_coded

TEXTS = (
    "please hold while I connect your call",
    "your account balance is twelve dollars",
    "press star to return to the main menu",
    "the number you have dialed is not in service",
    "all of our agents are busy right now",
    "leave a message after the tone",
)


def whole(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)


def sine(hertz: float, seconds: float, amplitude: float, rate: int = RATE) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


class TestLevels:
    @pytest.mark.parametrize("rate", [16000, 48000])
    @pytest.mark.parametrize(("amplitude", "lufs"), [(1.0, -3.01), (0.1, -23.01)])
    def test_the_standard_s_sine_has_the_loudness_that_the_standard_says(
        self, rate: int, amplitude: float, lufs: float
    ) -> None:
        assert measure_loudness(sine(997, 5, amplitude, rate), rate) == pytest.approx(lufs, abs=0.05)

    def test_pauses_do_not_count_and_bass_counts_less(self) -> None:
        tone = sine(997, 5, 0.1)
        quiet = sine(997, 5, 0.1 * 10 ** (-36 / 20))
        alone = measure_loudness(tone, RATE)
        assert measure_loudness(np.concatenate([tone, silence(20)]), RATE) == pytest.approx(alone, abs=0.3)
        assert measure_loudness(np.concatenate([tone, quiet, quiet]), RATE) == pytest.approx(alone, abs=0.3)
        assert measure_loudness(sine(30, 5, 0.1), RATE) < alone - 5
        assert measure_loudness(sine(5000, 5, 0.1), RATE) == pytest.approx(alone + 3.3, abs=0.5)
        assert measure_loudness(silence(1), RATE) == float("-inf")
        assert measure_loudness(sine(997, 0.1, 0.1), RATE) == pytest.approx(alone, abs=0.5)
        assert measure_loudness(silence(0), RATE) == float("-inf")

    def test_speech_is_brought_to_a_loudness_without_clipping(self) -> None:
        spoken = speak(TEXTS[0])
        for gain in (0.02, 0.2, 1.0):
            louder = set_loudness(spoken * gain, RATE, -23)
            assert measure_loudness(louder, RATE) == pytest.approx(-23, abs=0.1)
        shouted = set_loudness(spoken, RATE, -1)
        assert np.abs(shouted).max() == pytest.approx(10 ** (-1 / 20), abs=1e-3)
        assert np.array_equal(set_loudness(silence(1), RATE, -23), silence(1))

    def test_level_is_that_of_a_sine(self) -> None:
        assert measure_level(sine(440, 1, 1.0)) == pytest.approx(-3.01, abs=0.01)
        assert measure_level(sine(440, 1, 0.01)) == pytest.approx(-43.01, abs=0.01)

    @pytest.mark.parametrize("wanted", [0, 10, 20, 30])
    def test_noise_that_was_added_is_found_again(self, wanted: int) -> None:
        spoken = np.concatenate([silence(0.4), *(speak(text) for text in TEXTS[:2]), silence(0.4)])
        active = spoken[np.abs(spoken) > 1e-4]
        noise = np.random.default_rng(7).standard_normal(len(spoken)).astype(np.float32)
        noise *= np.sqrt(np.mean(np.square(active))) * 10 ** (-wanted / 20)
        # Of the loudest tenth, which lies some decibels above the whole.
        assert estimate_snr(spoken + noise, RATE) == pytest.approx(wanted + 5, abs=4)
        assert estimate_snr(spoken[:100], RATE) == 0.0


class TestVoice:
    def test_numpy_computes_what_the_detector_s_own_network_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch  # noqa: PLC0415

        found = importlib.util.find_spec("silero_vad")
        assert found is not None
        assert found.origin is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather be given another format
            network = torch.jit.load(str(Path(found.origin).parent / "data" / "silero_vad.jit"))
        # Its weights come from another training than those of the plain file.
        theirs = {name.removeprefix("_model."): value.numpy() for name, value in network.state_dict().items()}
        weights = {
            "stft_conv.weight": theirs["stft.forward_basis_buffer"],
            "final_conv.weight": theirs["decoder.decoder.2.weight"],
            "final_conv.bias": theirs["decoder.decoder.2.bias"],
        }
        for index in range(4):
            for part in ("weight", "bias"):
                weights[f"conv{index + 1}.{part}"] = theirs[f"encoder.{index}.reparam_conv.{part}"]
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            weights[f"lstm_cell.{part}"] = theirs[f"decoder.rnn.{part}"]
        monkeypatch.setattr(voice, "_load_weights", lambda: weights)
        rng = np.random.default_rng(3)
        clip = np.concatenate([silence(0.5), speak(TEXTS[0]), silence(0.7), speak(TEXTS[1], "en-gb"), silence(0.3)])
        clip = clip + (0.003 * rng.standard_normal(len(clip))).astype(np.float32)
        padded = np.pad(clip, (0, -len(clip) % CHUNK))
        network.reset_states()
        with torch.no_grad():
            wanted = np.array([float(network(torch.from_numpy(part), RATE)) for part in padded.reshape(-1, CHUNK)])
        assert np.abs(speech_probabilities(clip) - wanted).max() < 2e-3
        assert wanted.max() > 0.9
        assert wanted.min() < 0.1

    def test_speech_is_found_between_silence_and_noise(self) -> None:
        spoken = speak(TEXTS[0])
        noise = (0.002 * np.random.default_rng(3).standard_normal(9 * RATE)).astype(np.float32)
        clip = np.pad(spoken, (2 * RATE, 3 * RATE))
        for one in (clip, clip + noise[: len(clip)]):
            speech = find_speech(one)
            assert speech is not None
            assert speech.first / RATE == pytest.approx(2.0, abs=0.25)
            assert speech.last / RATE == pytest.approx(2.0 + len(spoken) / RATE, abs=0.35)
        assert find_speech(silence(2)) is None
        assert find_speech(noise) is None
        assert find_speech(sine(440, 2, 0.3)) is None
        assert find_speech(silence(0)) is None


@pytest.mark.parametrize(
    ("text", "language", "other"),
    [
        (TEXTS[0], "en", False),
        (TEXTS[0], "en-GB", False),
        (TEXTS[0], "de", True),
        ("der Anrufer hat die Leitung verlassen und wartet", "en", True),
        ("der Anrufer hat die Leitung verlassen und wartet", "de", False),
        ("una llamada perdida de un cliente", "pt-BR", True),
        ("no no no", "de", False),
        ("acetaminophen ibuprofen", "en", False),
        (TEXTS[0], "tlh", False),
    ],
)
def test_only_what_is_surely_in_another_language_is_said_to_be(text: str, language: str, *, other: bool) -> None:
    assert is_other_language(text, language) is other


class TestLikeness:
    def test_copies_by_other_codecs_levels_and_rates_sound_the_same(self, tmp_path: Path) -> None:
        recordings = Recordings()
        assert not recordings.add(fingerprint(whole(speak(TEXTS[0]))), "text")
        for suffix in CODED:
            write_coded(tmp_path / f"copy{suffix}", speak(TEXTS[0]))
            copy = decode_audio(tmp_path / f"copy{suffix}", RATE, 0.1, 30)
            assert recordings.add(fingerprint(copy), "text"), suffix
        assert recordings.add(fingerprint(whole(0.1 * speak(TEXTS[0]))), "text")
        telephone = soxr.resample(soxr.resample(speak(TEXTS[0]), RATE, 8000), 8000, RATE)
        assert recordings.add(fingerprint(whole(telephone)), "text")

    def test_other_recordings_do_not(self) -> None:
        recordings = Recordings()
        voices = ("en-us", "en-gb", "en-us+f2", "en-us+m3")
        clips = [speak(text, voice) for text in TEXTS for voice in voices]
        # As long as each other, so that duration alone tells none apart.
        shortest = min(map(len, clips))
        assert not [
            index for index, clip in enumerate(clips) if recordings.add(fingerprint(whole(clip[:shortest])), "text")
        ]

    def test_another_sentence_is_another_recording_whatever_it_sounds_like(self) -> None:
        recordings = Recordings()
        assert not recordings.add(fingerprint(whole(speak(TEXTS[0]))), "one")
        assert not recordings.add(fingerprint(whole(speak(TEXTS[0]))), "another")
        assert recordings.add(fingerprint(whole(speak(TEXTS[0]))), "one")


def conditions(normalization: dict[str, Any] | None = None, language: str = "en", **rules: Any) -> Conditions:
    recipe = PrepareRecipe(
        sources=[],
        language=language,
        splits=SplitRule(by=SplitBy.SPEAKER, validation="0.1", holdout="0.1", seed=7),
        max_rejected_share="0",
        output_prefix="",
        normalization=Normalization.model_validate(normalization or {}),
        rules=FilterRules.model_validate(rules),
    )
    return Conditions.of(recipe)


class TestConditions:
    @pytest.mark.parametrize(
        ("rules", "samples", "sentence", "reason"),
        [
            ({"maxClippedShare": "0.01"}, speak(TEXTS[0]), TEXTS[0], "Clipped"),
            ({"minLevelDb": "-40"}, 0.01 * speak(TEXTS[0]), TEXTS[0], "TooQuiet"),
            ({"minSnrDb": "15"}, sine(440, 2, 0.2), TEXTS[0], "TooNoisy"),
            ({"minCharactersPerSecond": "4"}, speak(TEXTS[0]), "yes", "SpokenTooSlowly"),
            ({"maxCharactersPerSecond": "30"}, speak(TEXTS[0]), " ".join(TEXTS), "SpokenTooFast"),
            ({"matchLanguage": True}, speak(TEXTS[0]), "der anrufer hat die leitung verlassen", "OtherLanguage"),
        ],
    )
    def test_each_rule_leaves_out_what_breaks_it_and_nothing_else(
        self, rules: dict[str, Any], samples: np.ndarray, sentence: str, reason: str
    ) -> None:
        clipped = 0.05 if reason == "Clipped" else 0.0
        with pytest.raises(RejectedLine) as caught:
            conditions(**rules).apply(whole(samples), clipped, sentence)
        assert caught.value.reason == reason
        good = whole(np.concatenate([silence(0.3), speak(TEXTS[0]), silence(0.3)]))
        assert np.array_equal(conditions(**rules).apply(good, 0.0, TEXTS[0]), good)
        assert np.array_equal(conditions().apply(whole(samples), clipped, sentence), whole(samples))

    def test_silence_is_cut_down_to_what_is_kept_before_durations_count(self) -> None:
        spoken = speak(TEXTS[0])
        long = whole(np.concatenate([silence(20), spoken, silence(20)]))
        trimming = conditions({"keepSilenceSeconds": "0.2"}, minCharactersPerSecond="8")
        assert trimming.decode_seconds == 60
        kept = trimming.apply(long, 0.0, TEXTS[0])
        assert len(kept) / RATE == pytest.approx(len(spoken) / RATE + 0.4, abs=0.4)
        with pytest.raises(RejectedLine, match="NoSpeech"):
            trimming.apply(whole(sine(440, 2, 0.3)), 0.0, TEXTS[0])
        with pytest.raises(RejectedLine, match="TooLong"):
            conditions().apply(long, 0.0, TEXTS[0])

    def test_loudness_is_set_after_the_level_was_judged(self) -> None:
        quiet = whole(0.01 * speak(TEXTS[0]))
        louder = conditions({"loudnessLufs": "-23"}).apply(quiet, 0.0, TEXTS[0])
        assert measure_loudness(louder / np.float32(32768), RATE) == pytest.approx(-23, abs=0.5)
        with pytest.raises(RejectedLine, match="TooQuiet"):
            conditions({"loudnessLufs": "-23"}, minLevelDb="-40").apply(quiet, 0.0, TEXTS[0])
