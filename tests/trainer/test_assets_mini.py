"""The mini model and its corpora: what the other tests stand on."""

import json
import wave
from pathlib import Path

import pytest
from attune_trainer.modeling.recognizer import load_recognizer
from transformers import AutoTokenizer, WhisperForConditionalGeneration

from tests.assets import mini_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Path:
    return mini_model.ensure_mini_model()


@pytest.mark.parametrize("kind", ["old", "new-voices"])
def test_a_corpus_repeats_no_sentence_and_names_files_that_are_there(kind: mini_model.CorpusKind) -> None:
    folder = mini_model.ensure_mini_corpus(kind)
    rows = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == {"old": 200, "new-voices": 400}[kind]
    assert len({row["text"] for row in rows}) == len(rows)
    assert len({row["speaker"] for row in rows}) == {"old": 6, "new-voices": 12}[kind]
    assert {word for row in rows for word in row["text"].split()} == set(mini_model.WORDS)
    for row in rows:
        with wave.open(str(folder / row["audio"])) as audio:
            assert audio.getframerate() == 16000
            assert 0.3 < audio.getnframes() / 16000 < 6


def test_the_corpora_share_neither_sentence_nor_speaker() -> None:
    old, new = (mini_model.read_corpus(mini_model.ensure_mini_corpus(kind)) for kind in ("old", "new-voices"))
    assert not {utterance.text for utterance in old} & {utterance.text for utterance in new}
    assert not {utterance.speaker for utterance in old} & {utterance.speaker for utterance in new}


def test_transformers_itself_loads_the_folder_without_a_parameter_missing(model: Path) -> None:
    loaded, report = WhisperForConditionalGeneration.from_pretrained(
        model, local_files_only=True, output_loading_info=True
    )
    assert {kind: names for kind, names in report.items() if names} == {}
    assert loaded.config.vocab_size == 33
    assert (model / "model.safetensors").stat().st_size < 2_000_000


def test_every_word_survives_the_tokenizer_and_text_comes_before_special_tokens(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    text = " ".join(mini_model.WORDS)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < min(tokenizer.all_special_ids)


def test_it_hears_its_own_voices(model: Path) -> None:
    utterances = mini_model.read_corpus(mini_model.ensure_mini_corpus("old"))
    assert mini_model.measure_wer(load_recognizer(model, "cpu"), utterances) <= mini_model.MAX_DEV_WER


def test_it_mishears_new_voices_but_not_beyond_what_tuning_can_mend(model: Path) -> None:
    utterances = mini_model.read_corpus(mini_model.ensure_mini_corpus("new-voices"))
    assert 0.15 < mini_model.measure_wer(load_recognizer(model, "cpu"), utterances) < 0.8
