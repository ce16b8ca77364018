import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from attune.contract.training import Padding
from attune_trainer.failures import InvalidInput, UnsupportedModel
from attune_trainer.modeling import Artifact, load_recognizer
from attune_trainer.modeling.artifact import read_artifact, write_artifact
from attune_trainer.modeling.buckets import choose_bucket, fit_buckets, next_bucket
from attune_trainer.modeling.greedy import TOKENS_AT_LEAST, TOKENS_PER_SECOND
from attune_trainer.modeling.recognizer import split_windows
from attune_trainer.modeling.whisper import Whisper, load_whisper
from attune_trainer.store import digest_directory
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.trainer.tiny_whisper import build_tiny_whisper

Audio = np.ndarray


def noise(seconds: float, seed: int = 0) -> Audio:
    return (np.random.default_rng(seed).standard_normal(int(seconds * 16000)) * 0.1).astype(np.float32)


def generate(whisper: Whisper, clip: Audio) -> list[int]:
    features, lengths = whisper.features([clip], 10.0), whisper.lengths([clip], 10.0)
    return whisper.generate(features, lengths)[0]


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_whisper(tmp_path_factory.mktemp("english"))


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_whisper(tmp_path_factory.mktemp("multilingual"), multilingual=True)


@pytest.fixture
def bucketed(english: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bucketed"
    folder.mkdir()
    for file in english.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write_artifact(folder, Artifact(padding=Padding.BUCKETS, buckets=(1.5, 2, 4), model_id="ft:tiny:abcdef"))
    return folder


class TestBuckets:
    def test_a_clip_gets_the_shortest_bucket_that_leaves_it_half_a_second(self) -> None:
        assert choose_bucket(1.2, (1.5, 2, 30)) == 2
        assert choose_bucket(1.0, (1.5, 2, 30)) == 1.5

    def test_a_clip_that_fills_the_window_gets_the_window(self) -> None:
        assert choose_bucket(29.9, (1.5, 2, 30)) == 30

    def test_buckets_end_with_the_models_own_window(self) -> None:
        assert fit_buckets((1.5, 3, 30), 10) == (1.5, 3, 10)

    def test_the_bucket_after_the_last_is_the_last(self) -> None:
        assert (next_bucket(2, (1.5, 2, 30)), next_bucket(30, (1.5, 2, 30))) == (30, 30)

    @given(st.floats(0.01, 30), st.lists(st.floats(0.5, 30), min_size=1).map(sorted))
    def test_a_bucket_is_one_of_those_given_and_no_shorter_one_would_do(
        self, seconds: float, known: list[float]
    ) -> None:
        chosen = choose_bucket(seconds, known)
        assert chosen in known
        assert all(shorter < seconds + 0.5 for shorter in known if shorter < chosen)


class TestEncoder:
    def test_a_whole_window_is_encoded_as_transformers_does(self, english: Path) -> None:
        whisper = load_whisper(english)
        features = whisper.features([noise(7)], whisper.window_seconds)
        original = WhisperForConditionalGeneration.from_pretrained(english).eval()
        with torch.inference_mode():
            expected = original.model.encoder(features).last_hidden_state
            assert torch.equal(whisper.model.model.encoder(features).last_hidden_state, expected)

    def test_a_slice_is_encoded_as_by_an_encoder_that_was_built_that_short(self, english: Path) -> None:
        whisper = load_whisper(english)
        features = whisper.features([noise(2.3), noise(1, 1)], 3.0)
        assert features.shape == (2, 80, 300)
        config = type(whisper.config).from_pretrained(english, max_source_positions=150)
        short = WhisperEncoder(config).eval()
        weights = whisper.model.model.encoder.state_dict()
        weights["embed_positions.weight"] = weights["embed_positions.weight"][:150]
        short.load_state_dict(weights)
        with torch.inference_mode():
            expected = short(features).last_hidden_state
            found = whisper.model.model.encoder(features).last_hidden_state
        assert found.shape == (2, 150, 32)
        torch.testing.assert_close(found, expected)

    def test_more_frames_than_the_window_are_refused(self, english: Path) -> None:
        whisper = load_whisper(english)
        with pytest.raises(ValueError, match="500"):
            whisper.model.model.encoder(whisper.features([noise(1)], 11.0))


class TestTranscribe:
    @pytest.mark.parametrize("language", [None, "en", "de"])
    def test_says_what_transformers_generate_says(
        self, english: Path, multilingual: Path, language: str | None
    ) -> None:
        folder = multilingual if language else english
        recognizer, whisper = load_recognizer(folder, "cpu"), load_whisper(folder)
        clips = [noise(seconds, seed) for seed, seconds in enumerate((3.0, 2.0, 0.7))]
        model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
        model.generation_config.suppress_tokens = whisper.suppressed()
        chosen = {"language": language, "task": "transcribe"} if language else {}
        for clip in clips:
            limit = TOKENS_AT_LEAST + int(np.ceil(TOKENS_PER_SECOND * len(clip) / 16000))
            generated = model.generate(
                whisper.features([clip], 10.0), max_new_tokens=min(limit, 90), do_sample=False, num_beams=1, **chosen
            )
            expected = whisper.tokenizer.decode(generated[0], skip_special_tokens=True).strip()
            assert expected
            assert recognizer.transcribe([clip], language=language)[0][: len(expected)] == expected

    def test_each_language_is_prompted_with_its_own_token(self, multilingual: Path) -> None:
        whisper = load_whisper(multilingual)
        known = whisper.languages()
        assert set(known) == {"de", "en"}
        tokens = whisper.tokenizer.convert_ids_to_tokens(whisper.prompt(known["de"]))
        assert tokens == ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]

    @pytest.mark.parametrize(("own", "languages"), [(None, ("en",)), ("ta", ("ta",))])
    def test_a_model_of_one_language_may_be_told_its_own(
        self, english: Path, tmp_path: Path, own: str | None, languages: tuple[str, ...]
    ) -> None:
        shutil.copytree(english, tmp_path / "model")
        write_artifact(tmp_path / "model", Artifact(padding=Padding.WINDOW, language=own))
        assert load_recognizer(tmp_path / "model", "cpu").languages == languages

    def test_a_multilingual_model_may_be_told_every_language_that_it_has_a_token_for(self, multilingual: Path) -> None:
        assert load_recognizer(multilingual, "cpu").languages == ("de", "en")

    @pytest.mark.parametrize(
        ("seconds", "padded", "bucketed_padded"),
        [(0, 10, 1.5), (3, 10, 4), (10, 10, 10), (10.5, 20, 11.5), (20, 20, 20), (21, 30, 21.5)],
    )
    def test_a_clip_that_fills_the_window_is_one_window(
        self, english: Path, bucketed: Path, seconds: float, padded: float, bucketed_padded: float
    ) -> None:
        assert load_recognizer(english, "cpu").padded_seconds(seconds) == padded
        assert load_recognizer(bucketed, "cpu").padded_seconds(seconds) == bucketed_padded

    def test_an_english_model_is_prompted_with_neither_language_nor_task(self, english: Path) -> None:
        whisper = load_whisper(english)
        tokens = whisper.tokenizer.convert_ids_to_tokens(whisper.prompt())
        assert tokens == ["<|startoftranscript|>", "<|notimestamps|>"]

    def test_without_a_language_a_multilingual_model_picks_the_likelier_one(self, multilingual: Path) -> None:
        recognizer = load_recognizer(multilingual, "cpu")
        clip = noise(2.0)
        whisper = load_whisper(multilingual)
        with torch.inference_mode():
            logits = whisper.model(
                whisper.features([clip], 10.0),
                decoder_input_ids=torch.tensor([[whisper.config.decoder_start_token_id]]),
            ).logits[0, -1]
        likelier = max(whisper.languages().items(), key=lambda entry: float(logits[entry[1]]))[0]
        assert recognizer.transcribe([clip]) == recognizer.transcribe([clip], language=likelier)

    @pytest.mark.parametrize("padding", ["Window", "Buckets"])
    def test_order_is_kept_and_a_batch_says_what_its_clips_say_alone(
        self, english: Path, bucketed: Path, padding: str
    ) -> None:
        recognizer = load_recognizer(english if padding == "Window" else bucketed, "cpu")
        clips = [noise(seconds, seed) for seed, seconds in enumerate((3.1, 0.4, 1.9, 0.9, 3.0, 0.2, 2.6))]
        together = recognizer.transcribe(clips, max_batch=4)
        assert together == [recognizer.transcribe([clip])[0] for clip in clips]
        assert len(set(together)) > 1

    def test_a_model_that_never_ends_is_cut_off_by_the_clips_duration(self, english: Path) -> None:
        whisper = load_whisper(english)
        with torch.no_grad():  # the end token can no longer win
            whisper.model.proj_out.weight[whisper.end] = 0
            whisper.model.model.decoder.layer_norm.bias.fill_(5.0)
        for seconds in (0.1, 1.0):
            tokens = generate(whisper, noise(seconds))
            assert len(tokens) <= TOKENS_AT_LEAST + TOKENS_PER_SECOND * seconds + 1
        long = generate(whisper, noise(10))
        assert len(long) <= whisper.config.max_target_positions - 2

    def test_an_empty_clip_has_an_empty_transcript(self, english: Path) -> None:
        assert load_recognizer(english, "cpu").transcribe([np.zeros(0, np.float32)]) == [""]

    def test_no_clips_give_no_transcripts(self, english: Path) -> None:
        assert load_recognizer(english, "cpu").transcribe([]) == []

    def test_audio_longer_than_the_window_is_transcribed_piece_by_piece(self, english: Path) -> None:
        recognizer = load_recognizer(english, "cpu")
        clip = noise(23)
        pieces = split_windows(clip, 10.0)
        assert len(pieces) == 3
        assert recognizer.transcribe([clip]) == [" ".join(text for text in recognizer.transcribe(pieces) if text)]

    def test_text_never_holds_a_special_token(self, english: Path) -> None:
        texts = load_recognizer(english, "cpu").transcribe([noise(3, seed) for seed in range(4)])
        assert not re.search(r"<\|", " ".join(texts))


class TestSplitWindows:
    def test_cuts_are_made_where_it_is_quiet(self) -> None:
        clip = noise(15)
        clip[int(7.5 * 16000) : int(7.7 * 16000)] = 0.0
        first, second = split_windows(clip, 10.0)
        assert 7.5 <= len(first) / 16000 <= 7.7
        assert np.array_equal(np.concatenate([first, second]), clip)

    @given(st.floats(0.01, 35), st.sampled_from([2.0, 10.0]))
    def test_pieces_add_up_to_the_clip_and_fit_the_window(self, seconds: float, window: float) -> None:
        clip = np.arange(int(seconds * 16000), dtype=np.float32)
        pieces = split_windows(clip, window)
        assert np.array_equal(np.concatenate(pieces), clip)
        assert all(len(piece) <= window * 16000 for piece in pieces)
        assert all(len(piece) > 0 for piece in pieces[:-1])
        assert all(later[0] - earlier[-1] == 1 for earlier, later in pairwise(pieces) if len(later))


class TestLoading:
    def test_without_attune_json_a_model_counts_as_pretrained(self, english: Path) -> None:
        recognizer = load_recognizer(english, "cpu")
        assert recognizer.padding is Padding.WINDOW
        assert recognizer.buckets == (10.0,)
        assert recognizer.model_digest == digest_directory(english)

    def test_attune_json_says_how_audio_is_padded(self, bucketed: Path) -> None:
        recognizer = load_recognizer(bucketed, "cpu")
        recognizer.warm_up()
        assert recognizer.padding is Padding.BUCKETS
        assert recognizer.buckets == (1.5, 2, 4, 10.0)
        assert recognizer.model_id == "ft:tiny:abcdef"

    def test_a_key_of_a_newer_image_does_no_harm(self, bucketed: Path) -> None:
        file = bucketed / "attune.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"invented": 1}))
        assert read_artifact(bucketed).padding is Padding.BUCKETS

    @pytest.mark.parametrize("content", ["{", '{"padding": "Never"}', "[]"])
    def test_an_attune_json_that_cannot_be_understood_is_refused(self, bucketed: Path, content: str) -> None:
        (bucketed / "attune.json").write_text(content)
        with pytest.raises(InvalidInput, match=r"attune\.json") as raised:
            load_recognizer(bucketed, "cpu")
        assert raised.value.reason == "InvalidModelFile"

    def test_another_architecture_is_named_beside_the_known_ones(self, bucketed: Path) -> None:
        edit_json(bucketed / "config.json", architectures=["SpeechT5ForTextToSpeech"], model_type="speecht5")
        with pytest.raises(UnsupportedModel, match=r"SpeechT5ForTextToSpeech.*WhisperForConditionalGeneration"):
            load_recognizer(bucketed, "cpu")

    def test_mel_bins_that_do_not_fit_are_named(self, bucketed: Path) -> None:
        edit_json(bucketed / "preprocessor_config.json", feature_size=128)
        with pytest.raises(InvalidInput, match=r"128 mel bins.*80"):
            load_recognizer(bucketed, "cpu")

    def test_a_missing_preprocessor_config_is_derived_from_the_network(self, bucketed: Path) -> None:
        before = load_recognizer(bucketed, "cpu").transcribe([noise(2)])
        (bucketed / "preprocessor_config.json").unlink()
        assert load_recognizer(bucketed, "cpu").transcribe([noise(2)]) == before

    def test_weights_that_run_code_are_not_read(self, bucketed: Path) -> None:
        state = load_whisper(bucketed).model.state_dict()
        (bucketed / "model.safetensors").unlink()
        torch.save(state, bucketed / "pytorch_model.bin")
        with pytest.raises(InvalidInput, match="safetensors"):
            load_recognizer(bucketed, "cpu")

    def test_weights_that_lack_a_tensor_are_refused_by_name(self, bucketed: Path) -> None:
        edit_json(bucketed / "config.json", encoder_layers=3)
        with pytest.raises(InvalidInput, match=r"encoder\.layers\.2"):
            load_recognizer(bucketed, "cpu")

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "preprocessor_config.json"])
    def test_a_file_that_was_cut_off_is_the_users_to_mend(self, bucketed: Path, name: str) -> None:
        content = (bucketed / name).read_bytes()
        (bucketed / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(InvalidInput, match="cannot be loaded") as raised:
            load_recognizer(bucketed, "cpu")
        assert raised.value.reason == "InvalidModelFile"

    def test_a_model_that_memory_has_no_room_for_is_not_called_damaged(
        self, bucketed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(WhisperForConditionalGeneration, "from_pretrained", fail)
        with pytest.raises(torch.OutOfMemoryError):
            load_recognizer(bucketed, "cpu")

    def test_a_folder_without_config_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match=r"config\.json"):
            load_recognizer(tmp_path, "cpu")


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
