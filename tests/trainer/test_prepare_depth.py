"""prepare with every part of the Dataset's spec, on speech: formats, shards, volumes, filters, slices, the report."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from attune.contract.job import DatasetInput, Split
from attune.contract.result import PrepareResult
from attune_trainer.data.dataset import load_split, read_audio
from attune_trainer.data.levels import measure_loudness
from attune_trainer.failures import RecipeFailure
from attune_trainer.job import RecipeContext, summarise
from attune_trainer.store import Store

from tests.assets.mini_model import ensure_mini_corpus, ensure_mini_model

from .preparation import recipe, run, upload, wav
from .speech import RATE, likeness, silence, speak, write_coded

MakeContext = Callable[..., RecipeContext]

OBJECTS = ("card", "account", "number", "message", "line", "balance")
VERBS = ("check", "open", "close", "repeat", "confirm", "change")
VOICES = ("en-us", "en-gb", "en-us+f2", "en-us+m3", "en-gb+f4", "en-gb+m7")
TEXTS = [f"please {verb} my {thing} again" for verb in VERBS for thing in OBJECTS]


def utterances() -> list[tuple[str, str, np.ndarray]]:
    """(speaker, text, samples) of 36 utterances by 6 voices, each with sentences of its own."""
    return [(VOICES[index // 6], text, speak(text, VOICES[index // 6])) for index, text in enumerate(TEXTS)]


def load(store: Store, result: PrepareResult) -> dict[str, Any]:
    """All utterances by their text."""
    dataset = DatasetInput(name="calls", revision=result.revision, uri=result.uri)
    return {one.text: one for split in Split for one in load_split(store, dataset, split)}


def published(store: Store, result: PrepareResult, name: str) -> str:
    return store.read_bytes(f"{result.uri}/{name}").decode()


def test_long_stereo_calls_in_every_format_give_the_same_utterances(
    s3_store: Store, key_prefix: str, make_context: MakeContext, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    spoken = utterances()
    entries, stm, segments, texts, owners, sides = [], [], [], [], [], []
    for call in range(3):
        channels = []
        for side in range(2):
            position, pieces = 0.5, [silence(0.5)]
            for index in range(6):
                number = (2 * call + side) * 6 + index
                speaker, text, samples = spoken[number]
                seconds = len(samples) / RATE
                times = (round(position, 4), round(position + seconds, 4))
                entries.append(
                    {"audio": f"call{call}.wav", "text": text, "speaker": speaker, "group": f"call {call}"}
                    | {"start": times[0], "end": times[1], "channel": side}
                )
                stm.append(f"call{call} {'AB'[side]} {speaker} {times[0]:.4f} {times[1]:.4f} <o> {text}")
                segments.append(f"u{number} rec{call}-{side} {times[0]:.4f} {times[1]:.4f}")
                texts.append(f"u{number} {text}")
                owners.append(f"u{number} {speaker}")
                pieces += [samples, silence(0.4)]
                position += seconds + 0.4
            channels.append(np.concatenate(pieces))
            sides.append((f"rec{call}-{side}", call, side))
        size = max(map(len, channels))
        stereo = np.stack([np.pad(one, (0, size - len(one))) for one in channels], axis=1)
        for folder in ("manifest", "stm", "kaldi"):
            (volume / folder).mkdir(parents=True, exist_ok=True)
            soundfile.write(volume / folder / f"call{call}.wav", stereo, RATE)
    (volume / "manifest" / "list.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (volume / "stm" / "all.stm").write_text("\n".join(stm))
    kaldi = {
        "wav.scp": [f"{name} call{call}.wav" for name, call, _ in sides],
        "reco2file_and_channel": [f"{name} call{call} {side + 1}" for name, call, side in sides],
        "segments": segments,
        "text": texts,
        "utt2spk": owners,
    }
    for name, content in kaldi.items():
        (volume / "kaldi" / name).write_text("\n".join(content) + "\n")
    results = []
    for folder, source_format in (("manifest", "Manifest"), ("stm", "Stm"), ("kaldi", "Kaldi")):
        source = {
            "uri": f"pvc://calls/{folder}",
            "volume": {"mount": str(volume), "path": folder},
            "format": source_format,
            "channels": "PerSpeaker",
        } | ({"manifest": "list.jsonl"} if source_format == "Manifest" else {})
        results.append(run(make_context(recipe(key_prefix, sources=[source]))))
        assert (results[-1].stats.utterances, results[-1].stats.speakers, results[-1].rejected) == (36, 6, 0)
    stored = [load(s3_store, result) for result in results]
    for _, text, samples in spoken:
        assert len({one[text].audio_digest for one in stored}) == 1
        heard = read_audio(s3_store, stored[0][text], tmp_path / "cache")
        assert likeness(heard, samples)[0] > 0.99
    # One recording is decoded once, and its utterances are stored once.
    assert len(s3_store.list(f"{key_prefix}/out/audio/")) == 36


def test_shards_in_a_bucket_are_read_from_where_they_lie(
    s3_store: Store, key_prefix: str, make_context: MakeContext, tmp_path: Path
) -> None:
    shards: list[io.BytesIO] = [io.BytesIO(), io.BytesIO()]
    archives = [tarfile.open(fileobj=shard, mode="w") for shard in shards]  # noqa: SIM115 (closed below)
    for index, (speaker, text, samples) in enumerate(utterances()):
        write_coded(tmp_path / "one.flac", samples)
        parts = {
            "flac": (tmp_path / "one.flac").read_bytes(),
            "json": json.dumps({"text": text, "speaker": speaker}).encode(),
        }
        for suffix, content in parts.items():
            info = tarfile.TarInfo(f"{index:06}.{suffix}")
            info.size = len(content)
            archives[index % 2].addfile(info, io.BytesIO(content))
    for archive in archives:
        archive.close()
    s3_store.write_bytes(f"{key_prefix}/in/0.tar", shards[0].getvalue())
    s3_store.write_bytes(f"{key_prefix}/in/1.tar.gz", gzip.compress(shards[1].getvalue()))
    source = {"uri": f"s3://attune/{key_prefix}/in/", "format": "Directory", "tarShards": True}
    context = make_context(recipe(key_prefix, sources=[source]))
    result = run(context)
    assert (result.stats.utterances, result.stats.speakers, result.rejected) == (36, 6, 0)
    assert not [path for path in context.work_directory.rglob("*") if path.is_file()]  # nothing is left on the disk


def test_filters_leave_out_what_they_are_for_with_reason_place_and_count(
    s3_store: Store, key_prefix: str, make_context: MakeContext, tmp_path: Path
) -> None:
    spoken = utterances()
    entries = [
        {"audio": f"{index}.wav", "text": text, "speaker": speaker, "accent": speaker[:5]}
        for index, (speaker, text, _) in enumerate(spoken)
    ]
    audio = {f"{index}.wav": wav(samples, RATE) for index, (_, _, samples) in enumerate(spoken)}
    speaker, text, samples = spoken[3]
    write_coded(tmp_path / "copy.opus", samples)
    peak = float(np.abs(samples).max())
    noise = np.random.default_rng(7).standard_normal(len(samples)).astype(np.float32)
    other = speak("der anrufer hat die leitung verlassen und wartet", "de")
    bad: list[tuple[str, str, str, bytes]] = [
        ("SoundsTheSame", "copy.opus", text, (tmp_path / "copy.opus").read_bytes()),
        ("Clipped", "clipped.wav", "a clipped one is this sentence", wav(np.clip(samples * 20 / peak, -1, 1), RATE)),
        ("TooQuiet", "quiet.wav", "a quiet one is this sentence", wav(samples * 0.003, RATE)),
        ("TooNoisy", "noisy.wav", "a noisy one is this sentence", wav(np.clip(noise * 0.2, -0.9, 0.9), RATE)),
        ("SpokenTooFast", "fast.wav", " ".join(TEXTS[:4]), wav(samples[::-1].copy(), RATE)),
        ("SpokenTooSlowly", "slow.wav", "no", wav(np.concatenate([samples, samples[::-1]]), RATE)),
        ("OtherLanguage", "german.wav", "der anrufer hat die leitung verlassen und wartet", wav(other, RATE)),
        ("NoSpeech", "tone.wav", "a tone is no sentence", wav(_hum(2.0), RATE)),
        ("TextRepeated", "repeated.wav", TEXTS[0].upper(), wav(speak(TEXTS[0], "en-us+f5"), RATE)),
    ]
    audio |= {name: content for _, name, _, content in bad}
    entries += [{"audio": name, "text": said, "speaker": speaker, "accent": "x"} for _, name, said, _ in bad]
    upload(s3_store, f"{key_prefix}/in", entries, audio)
    rules = {
        "minCharactersPerSecond": "2",
        "maxCharactersPerSecond": "40",
        "maxClippedShare": "0.01",
        "minLevelDb": "-45",
        "minSnrDb": "6",
        "matchLanguage": True,
        "maxSameText": 1,
        "similarAudio": True,
    }
    normalization = {"loudnessLufs": "-23", "keepSilenceSeconds": "0.1"}
    context = make_context(
        recipe(key_prefix, rules=rules, normalization=normalization, slices=["accent"], maxRejectedShare="0")
    )
    result = run(context)
    rejected = [json.loads(line) for line in published(s3_store, result, "rejected.jsonl").splitlines()]
    assert {one["place"]: one["reason"] for one in rejected} == {
        f"list.jsonl:{37 + index}": reason for index, (reason, _, _, _) in enumerate(bad)
    }
    assert {one.reason: one.count for one in result.rejections} == {reason: 1 for reason, _, _, _ in bad}
    assert (result.stats.utterances, result.rejected) == (36, len(bad))
    for one in load(s3_store, result).values():
        heard = read_audio(s3_store, one, tmp_path / "cache")
        assert measure_loudness(heard, RATE) == pytest.approx(-23, abs=0.6)
        assert one.labels["accent"] in {"en-us", "en-gb"}
    report = published(s3_store, result, "report.html")
    assert result.report_uri == f"{result.uri}/report.html"
    for reason, _, said, _ in bad:
        assert reason in report
        assert said == "no" or said not in report
    assert run(make_context(context.spec.recipe.model_dump(by_alias=True))).revision == result.revision


def _hum(seconds: float) -> np.ndarray:
    """A tone that swells and fades once a second."""
    times = np.arange(round(seconds * RATE)) / RATE
    return (0.2 * np.sin(2 * np.pi * 440 * times) * np.sin(np.pi * times) ** 4).astype(np.float32)


def test_figures_are_told_by_split_and_slice(s3_store: Store, key_prefix: str, make_context: MakeContext) -> None:
    entries = [
        {"audio": f"{index}.wav", "text": text, "speaker": speaker}
        | ({"accent": speaker[:5]} if index % 9 else {})
        | {"call": f"<b>{index}</b>"}
        for index, (speaker, text, _) in enumerate(utterances())
    ]
    audio = {f"{index}.wav": wav(samples, RATE) for index, (_, _, samples) in enumerate(utterances())}
    upload(s3_store, f"{key_prefix}/in", entries, audio)
    own = run(make_context(recipe(key_prefix, slices=["accent", "call"])))
    assert [(one.name, one.values, one.unlabelled) for one in own.slices] == [("accent", 2, 4), ("call", 36, 0)]
    assert own.warnings == ["4 of 36 utterances have no label accent"]
    figures = json.loads(published(s3_store, own, "statistics.json"))
    by_accent = figures["slices"]["accent"]
    assert set(by_accent) == {"en-us", "en-gb"}
    assert sum(part["utterances"] for one in by_accent.values() for part in one.values()) == 32
    assert own.splits.train.oov_rate is None
    assert own.splits.train.vocabulary is not None
    # "please", "my", "again" and the objects are known; each voice has a verb of its own.
    assert own.stats.oov_rate == own.splits.holdout.oov_rate == "0.2"
    report = published(s3_store, own, "report.html")
    assert "&lt;b&gt;7&lt;/b&gt;" in report
    assert "<b>7</b>" not in report

    s3_store.write_bytes(f"{key_prefix}/words.txt", b"please P L IY Z\nmy\n\nAGAIN x\n")
    lexicon = {"uri": f"s3://attune/{key_prefix}/words.txt", "format": "Lexicon"}
    known = run(make_context(recipe(key_prefix, knownWords=lexicon)))
    assert known.stats.oov_rate == known.splits.train.oov_rate == "0.4"  # verb and object of five words
    s3_store.write_bytes(
        f"{key_prefix}/words.txt", f"Please {' '.join(VERBS)}, my\n{' '.join(OBJECTS)} again.".encode()
    )
    text = run(make_context(recipe(key_prefix, knownWords=lexicon | {"format": "Text"})))
    assert text.stats.oov_rate == text.splits.train.oov_rate == "0"
    for content, reason in (
        (None, "KnownWordsNotFound"),
        (b"\xff\xfe", "KnownWordsUnusable"),
        (b"  ", "KnownWordsUnusable"),
    ):
        missing = lexicon | {"uri": f"s3://attune/{key_prefix}/other.txt"}
        if content is not None:
            s3_store.write_bytes(f"{key_prefix}/other.txt", content)
        with pytest.raises(RecipeFailure) as caught:
            run(make_context(recipe(key_prefix, knownWords=missing)))
        assert caught.value.reason == reason


def test_transcripts_that_a_model_hears_otherwise_are_left_out(
    s3_store: Store, key_prefix: str, make_context: MakeContext
) -> None:
    s3_store.upload_directory(ensure_mini_model(), f"{key_prefix}/model")
    corpus = ensure_mini_corpus("old")
    entries = [json.loads(line) for line in (corpus / "transcripts.jsonl").read_text().splitlines()][:60]
    swapped = (7, 18, 40)  # sentences with hardly a word in common
    texts = [entries[index]["text"] for index in swapped]
    for index, text in zip(swapped, [*texts[1:], texts[0]], strict=True):
        entries[index]["text"] = text
    audio = {entry["audio"]: (corpus / entry["audio"]).read_bytes() for entry in entries}
    upload(s3_store, f"{key_prefix}/in", entries, audio)
    contradiction = {"model": {"uri": f"s3://attune/{key_prefix}/model"}, "maxWordErrorRate": "0.6"}
    by_group = {"by": "Speaker", "validation": "0.2", "holdout": "0.2", "seed": 7}
    context = make_context(
        recipe(key_prefix, splits=by_group, rules={"contradiction": contradiction}, maxRejectedShare="0")
    )
    result = run(context)
    rejected = [json.loads(line) for line in published(s3_store, result, "rejected.jsonl").splitlines()]
    contradicted = {one["place"] for one in rejected if one["reason"] == "Contradicted"}
    assert contradicted >= {f"list.jsonl:{index + 1}" for index in swapped}
    assert len(contradicted) < 20  # the small model mishears a few of the others as well
    assert result.stats.utterances == 60 - len(rejected)


def test_a_label_with_ten_thousand_values_keeps_status_and_report_small(
    s3_store: Store, key_prefix: str, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(7)
    audio = wav(0.1 * rng.standard_normal(12000 * 1700).astype(np.float32), RATE)
    entries = [
        {"audio": "long.wav", "text": f"word{index}", "speaker": f"s{index % 50}", "id": f"value {index} " + "x" * 200}
        | {"start": index * 0.12, "end": index * 0.12 + 0.11}
        for index in range(10_000)
    ]
    upload(s3_store, f"{key_prefix}/in", entries, {"long.wav": audio})
    # What is stored of them is of no interest here, and takes minutes.
    monkeypatch.setattr(Store, "write_bytes", _only_small_objects(Store.write_bytes))
    result = run(make_context(recipe(key_prefix, slices=["id"])))
    assert result.stats.utterances == 10_000
    assert [(one.name, one.values) for one in result.slices] == [("id", 10_000)]
    assert "label id has 10000 values" in result.warnings[0]
    assert len(published(s3_store, result, "report.html")) < 300_000
    assert len(summarise(result=result).to_message()) <= 4096


def _only_small_objects(write: Callable[..., str]) -> Callable[..., str]:
    def write_unless_audio(store: Store, key: str, data: bytes, content_type: str = "") -> str:
        return "" if content_type == "audio/flac" else write(store, key, data, content_type)

    return write_unless_audio
