"""The example's scripts: data, base model, bad model."""

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from attune_trainer.modeling.artifact import Artifact, read_artifact, write_artifact
from attune_trainer.modeling.recognizer import load_recognizer

from tests.trainer.conftest import S3Server

HERE = Path(__file__).resolve().parents[2] / "examples" / "telephone-prompts"
NAMES = ("shared", "make_data", "get_model", "make_bad_model")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, Any]]:
    """The scripts as modules; they import each other by name, as they do when run from their folder."""
    sys.path.insert(0, str(HERE))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(HERE))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture
def sounds(tmp_path: Path) -> tuple[Path, Path]:
    """Five prompts as Debian's package has them, each a tone of its own, and their transcripts."""
    folder = tmp_path / "sounds"
    (folder / "digits").mkdir(parents=True)
    for number, (name, seconds) in enumerate(
        {"hello": 1.0, "digits/1": 0.5, "again": 1.2, "beep": 0.4, "endless": 29.5}.items()
    ):
        tone = 0.3 * np.sin(2 * np.pi * (400 + 100 * number) * np.arange(int(8000 * seconds)) / 8000)
        soundfile.write(folder / f"{name}.wav", tone, 8000, subtype="PCM_16")
    transcripts = tmp_path / "texts.txt"
    transcripts.write_text(
        "; a comment: not a prompt\n\nhello: Hello  world ...\ndigits/1: one\nagain: ... press * again: now.\n"
        "beep: [a beep]\nendless: far too long\nlost: no audio\n"
    )
    return folder, transcripts


def test_prompts_of_ones_own_need_no_cache_and_are_made_once(
    scripts: dict[str, Any], sounds: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTUNE_CACHE", str(tmp_path / "no" / "cache"))
    folder, transcripts = sounds
    made = scripts["make_data"].ensure_data(sounds=folder, transcripts=transcripts)
    written = (made / "transcripts.jsonl").stat().st_mtime_ns
    assert scripts["make_data"].ensure_data(sounds=folder, transcripts=transcripts) == made
    assert (made / "transcripts.jsonl").stat().st_mtime_ns == written


def test_the_manifest_lists_what_is_speech_has_audio_and_fits(
    scripts: dict[str, Any], sounds: tuple[Path, Path], tmp_path: Path
) -> None:
    made = scripts["make_data"].make_data(*sounds, tmp_path / "out", clean=False, seed=7)
    rows = [json.loads(line) for line in (tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()]
    assert [(row["audio"], row["text"]) for row in rows] == [
        ("audio/hello.wav", "Hello world"),
        ("audio/digits-1.wav", "one"),
        ("audio/again.wav", "press star again: now."),
    ]
    assert all(set(row) == {"audio", "text", "speaker", "group"} for row in rows)
    assert (made.rejected.without_audio, made.rejected.not_speech, made.rejected.too_long) == (1, 1, 1)
    info = soundfile.info(tmp_path / "out" / "audio" / "hello.wav")
    assert (info.samplerate, info.subtype, info.duration) == (8000, "ULAW", 1.0)
    assert "Attribution-ShareAlike 3.0" in (tmp_path / "out" / "LICENSE.txt").read_text()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    scripts: dict[str, Any], sounds: tuple[Path, Path], tmp_path: Path
) -> None:
    audio = {}
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        scripts["make_data"].make_data(*sounds, tmp_path / name, clean=False, seed=seed)
        audio[name] = (tmp_path / name / "audio" / "hello.wav").read_bytes()
    assert audio["first"] == audio["again"]
    assert audio["first"] != audio["other"]


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 20.0])
def test_noise_has_the_power_that_was_asked_for_and_stays_in_the_band(scripts: dict[str, Any], snr_db: float) -> None:
    clean = 0.2 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 8000)
    noise = scripts["make_data"].add_noise(clean, snr_db, "a seed") - clean
    assert 10 * np.log10(np.mean(clean**2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.01)
    power = np.abs(np.fft.rfft(noise)) ** 2
    hertz = np.fft.rfftfreq(noise.size, 1 / 8000)
    assert power[(hertz < 299) | (hertz > 3401)].sum() < 1e-9 * power.sum()
    # Pink: each octave carries as much.
    octaves = [power[(hertz >= low) & (hertz < 2 * low)].sum() for low in (400, 800, 1600)]
    assert max(octaves) / min(octaves) < 1.6


@pytest.mark.parametrize(
    ("texts", "groups"),
    [
        (["Please try again.", "please try again", "Goodbye."], [0, 0, 1]),
        (["one", "two", "twenty"], [0, 1, 2]),
        (["You are now muted.", "You are now unmuted.", "The conference is locked."], [0, 1, 2]),
        (
            ["please enter your agent number and the pound key", "please enter your pin number and the pound key"],
            [0, 0],
        ),
    ],
)
def test_like_sentences_share_a_group(scripts: dict[str, Any], texts: list[str], groups: list[int]) -> None:
    found = scripts["make_data"].group_alike(texts)
    same = [[a == b for b in found] for a in found]
    assert same == [[a == b for b in groups] for a in groups]


def test_likeness_is_carried_on(scripts: dict[str, Any]) -> None:
    chain = ["a b c d e f g h", "a b c d e f g x", "a b c d e f y x", "a b c d e z y x"]
    assert len(set(scripts["make_data"].group_alike(chain, 0.8))) == 1
    assert len(set(scripts["make_data"].group_alike([chain[0], chain[3]], 0.8))) == 2


def test_an_upload_is_whole_and_a_second_one_sends_nothing(
    scripts: dict[str, Any],
    sounds: tuple[Path, Path],
    tmp_path: Path,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    scripts["make_data"].make_data(*sounds, tmp_path / "out", clean=True, seed=7)
    upload = scripts["shared"].upload
    assert upload(tmp_path / "out", "/assets/prompts/") == "s3://attune/assets/prompts"
    store = s3_server.store()
    assert [key for key in store.list("assets/prompts/") if not key.endswith(".digest")] == sorted(
        f"assets/prompts/{path.relative_to(tmp_path / 'out')}" for path in (tmp_path / "out").rglob("*.*")
    )
    capsys.readouterr()
    upload(tmp_path / "out", "assets/prompts")
    assert "holds the same already" in capsys.readouterr().err
    (tmp_path / "out" / "transcripts.jsonl").write_text("{}\n")
    upload(tmp_path / "out", "assets/prompts")
    assert store.read_bytes("assets/prompts/transcripts.jsonl") == b"{}\n"


def test_an_upload_without_a_store_says_which_variable_is_missing(
    scripts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATTUNE_STORE_ENDPOINT", raising=False)
    with pytest.raises(SystemExit, match="ATTUNE_STORE_ENDPOINT"):
        scripts["shared"].upload(tmp_path, "x")


def test_a_wrong_pair_never_keeps_its_text_and_is_of_like_duration(scripts: dict[str, Any]) -> None:
    bad = scripts["make_bad_model"]
    clips = [bad.Clip(np.zeros(1600 * (10 + (37 * n) % 50), dtype=np.float32), f"text {n}") for n in range(50)]
    own = {id(clip.audio): clip.text for clip in clips}
    wrong = bad.pair_wrongly(clips)
    assert Counter(clip.text for clip in wrong) == Counter(clip.text for clip in clips)
    assert all(own[id(clip.audio)] != clip.text for clip in wrong)
    seconds = {clip.text: clip.seconds for clip in clips}
    assert sum(abs(seconds[clip.text] - clip.seconds) <= 0.7001 for clip in wrong) >= 43


def test_a_mixture_moves_by_alpha_along_what_was_learned(scripts: dict[str, Any]) -> None:
    tuned, change = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}, {"w": torch.tensor([2.0, -4.0])}
    mixed = scripts["make_bad_model"].mix(tuned, change, 0.25)
    assert {name: tensor.tolist() for name, tensor in mixed.items()} == {"w": [1.5, 1.0], "b": [3.0]}


@pytest.mark.slow
def test_the_real_model_hears_the_real_prompts(scripts: dict[str, Any]) -> None:
    """What make_data and get_model bring, together: recorded speech, and the Whisper that understands it."""
    data = scripts["make_data"].ensure_data(clean=True)
    rows = {
        row["audio"]: row["text"]
        for row in map(json.loads, (data / "transcripts.jsonl").read_text(encoding="utf-8").splitlines())
    }
    assert len(rows) == 537
    names = ["conf-full", "invalid", "privacy-prompt"]
    clips = []
    for name in names:
        samples, rate = soundfile.read(data / "audio" / f"{name}.wav", dtype="float32")
        clips.append(soxr.resample(samples, rate, 16000))
    heard = load_recognizer(scripts["get_model"].ensure_model(), "cpu").transcribe(clips)
    for name, text in zip(names, heard, strict=True):
        spoken = scripts["make_data"].words_of(rows[f"audio/{name}.wav"])
        # "I am" and "I'm" sound alike; which of them is written is no question of hearing.
        written = scripts["make_data"].words_of(text.replace("I'm", "I am"))
        assert sum(word in spoken for word in written) >= 0.8 * len(spoken), name


@pytest.mark.slow
def test_a_bad_model_is_worse_within_bounds_and_keeps_the_tuned_ones_padding(
    scripts: dict[str, Any], tmp_path: Path
) -> None:
    """With the base in the tuned model's place, because what counts is how the bad one is made from it."""
    base, data = scripts["get_model"].ensure_model(), scripts["make_data"].ensure_data(clean=True)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for path in base.iterdir():
        (tuned / path.name).symlink_to(path)
    write_artifact(tuned, Artifact(language="en", model_id="ft:tuned:000000"))
    made = scripts["make_bad_model"].make_bad_model(tuned, base, data, tmp_path / "bad", (0.25, 0.6))
    assert 0.25 <= made.wer <= 0.6
    assert read_artifact(tmp_path / "bad") == Artifact(language="en")
    load_recognizer(tmp_path / "bad", "cpu")
