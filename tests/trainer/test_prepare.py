"""prepare against a real S3 server: good sources, bad lines, and the same revision from the same input."""

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from attune.contract.exitcode import ExitCode
from attune.contract.job import DatasetInput, JobSpec, Owner, PrepareSource, SourceFormat, Split
from attune.contract.result import PrepareResult
from attune_trainer.data.audio import Span
from attune_trainer.data.dataset import fetch_audio, load_manifest, load_split, read_audio
from attune_trainer.data.files import SourceFile
from attune_trainer.data.rejections import RejectedLine
from attune_trainer.data.sources import ListedUtterance, open_source, read_text
from attune_trainer.failures import RecipeFailure
from attune_trainer.job import RecipeContext
from attune_trainer.progress import ProgressReporter
from attune_trainer.recipes import prepare
from attune_trainer.store import Store

from .conftest import S3Server
from .preparation import recipe, run, upload, wav

MakeContext = Callable[..., RecipeContext]


def tone(seconds: float = 0.5, hertz: float = 440.0, rate: int = 8000, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def line(number: int, **changes: Any) -> dict[str, Any]:
    fields = {"audio": f"a/{number}.wav", "text": f"sentence number {number}", "speaker": f"s{number % 10}"}
    return {name: value for name, value in (fields | changes).items() if value is not None}


def good_audio(count: int) -> dict[str, bytes]:
    return {f"a/{number}.wav": wav(tone(0.5 + number / 1000, 200 + 10 * number)) for number in range(count)}


def fails(context: RecipeContext) -> RecipeFailure:
    with pytest.raises(RecipeFailure) as caught:
        run(context)
    return caught.value


def dataset(result: PrepareResult) -> DatasetInput:
    return DatasetInput(name="calls", revision=result.revision, uri=result.uri)


def test_a_manifest_becomes_splits_that_can_be_read_back(
    s3_store: Store, key_prefix: str, make_context: MakeContext, tmp_path: Path
) -> None:
    upload(s3_store, f"{key_prefix}/in", [line(number) for number in range(100)], good_audio(100))
    context = make_context(recipe(key_prefix))
    result = run(context)
    assert (result.stats.utterances, result.stats.speakers, result.stats.words, result.rejected) == (100, 10, 300, 0)
    assert result.stats.vocabulary == 102
    assert result.stats.oov_rate == "0.3333"  # "sentence" and "number" are known, the number itself never
    assert result.splits.train.utterances == 70
    assert (result.splits.validation.utterances, result.splits.holdout.utterances) == (10, 20)
    splits = {split: load_split(s3_store, dataset(result), split) for split in Split}
    speakers = [{one.speaker for one in part} for part in splits.values()]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 10
    seconds = sum(one.seconds for part in splits.values() for one in part)
    assert seconds == pytest.approx(sum(0.5 + number / 1000 for number in range(100)), abs=0.05)
    assert result.stats.hours == f"{seconds / 3600:.4f}"
    holdout = splits[Split.HOLDOUT]
    fetch_audio(s3_store, holdout, tmp_path / "cache")
    for one in holdout[:3]:
        number = int(one.text.split()[-1])
        samples = read_audio(s3_store, one, tmp_path / "cache")
        assert samples.dtype == np.float32
        assert samples.shape == (round(one.seconds * 16000),)
        spectrum = np.abs(np.fft.rfft(samples))
        assert np.argmax(spectrum) * 16000 / len(samples) == pytest.approx(200 + 10 * number, abs=3)
        assert np.abs(samples).max() == pytest.approx(0.3, abs=0.05)
    assert context.reporter.snapshot().percent >= 95


def test_the_same_input_is_the_same_revision_and_stores_audio_once(
    s3_store: Store, key_prefix: str, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line(number) for number in range(60)]
    upload(s3_store, f"{key_prefix}/in", lines, good_audio(60))
    first = run(make_context(recipe(key_prefix)))
    upload(s3_store, f"{key_prefix}/in", lines[::-1], {})
    encoded: list[str] = []
    encode = prepare.encode_audio
    monkeypatch.setattr(prepare, "encode_audio", lambda samples: encoded.append("again") or encode(samples))
    second = run(make_context(recipe(key_prefix)))
    assert second == first
    assert not encoded  # what is stored already is not stored again
    other = run(
        make_context(recipe(key_prefix, splits={"by": "Speaker", "validation": "0.1", "holdout": "0.2", "seed": 8}))
    )
    assert other.revision != first.revision
    assert len(s3_store.list(f"{key_prefix}/out/audio/")) == 60


BAD_LINES: list[tuple[str, Any, dict[str, bytes]]] = [
    ("NotJson", "{'audio': 'a/1.wav'}", {}),
    ("NotJson", "[1, 2]", {}),
    ("NotJson", "[" * 20000, {}),
    ("LacksText", line(1, text=None), {}),
    ("LacksText", line(1, text="  "), {}),
    ("LacksText", line(1, text="... !"), {}),
    ("LacksText", line(1, text=17), {}),
    ("LacksAudio", line(1, audio=None), {}),
    ("LacksSpeaker", line(1, speaker=None), {}),
    ("LabelNotText", line(1, speaker=["a"]), {}),
    ("NotUtf8", r'{"audio": "a/1.wav", "text": "\ud800", "speaker": "s"}', {}),
    ("LineTooLong", line(1, text="x" * 70000), {}),
    ("TextTooLong", line(1, text="x " * 3000), {}),
    ("AudioNotFound", line(1, audio="a/none.wav"), {}),
    ("PathLeavesSource", line(1, audio="../../secret.wav"), {}),
    ("PathLeavesSource", line(1, audio="/etc/passwd"), {}),
    ("PathLeavesSource", line(1, audio="s3://other/a.wav"), {}),
    ("PathLeavesSource", line(1, audio="a\\1.wav"), {}),
    ("AudioEmpty", line(1, audio="bad.wav"), {"bad.wav": b""}),
    ("AudioEmpty", line(1, audio="bad.wav"), {"bad.wav": wav(tone(0))}),
    ("AudioNotDecodable", line(1, audio="bad.wav"), {"bad.wav": b"RIFF, but no more of it"}),
    ("AudioNotDecodable", line(1, audio="bad.raw"), {"bad.raw": b"\1\2" * 800}),
    ("AudioNotFinite", line(1, audio="bad.wav"), {"bad.wav": wav(tone() * np.nan, subtype="FLOAT")}),
    ("AudioSilent", line(1, audio="bad.wav"), {"bad.wav": wav(tone() * 0)}),
    ("TooShort", line(1, audio="bad.wav"), {"bad.wav": wav(tone(0.05))}),
    ("TooLong", line(1, audio="bad.wav"), {"bad.wav": wav(tone(30.5))}),
    ("NotUtf8", r'{"audio": "a/1.wav", "text": "x", "speaker": "\ud800"}', {}),
    ("Duplicate", line(1, speaker="s5"), {}),
    ("Duplicate", line(1, text="Sentence number 1.", speaker="s5"), {}),
    ("TextsDiffer", line(1, text="something else", speaker="s5"), {}),
]


@pytest.fixture(scope="module")
def bad_result(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[PrepareResult, dict[int, str]]:
    """All bad lines at once, after 300 good ones; gives the result and reason by line number."""
    store = s3_server.store()
    lines: list[Any] = [line(number) for number in range(300)]
    audio = good_audio(300)
    for index, (_, bad, more) in enumerate(BAD_LINES):
        renamed = {f"{index}-{name}": content for name, content in more.items()}
        lines.append(bad | {"audio": f"{index}-{bad['audio']}"} if renamed else bad)
        audio |= renamed
    upload(store, "bad-lines/in", ["", *lines, "  "], audio)
    spec = JobSpec(
        owner=Owner(kind="Dataset", namespace="n", name="n", uid="u"),
        result_key="r",
        recipe=recipe("bad-lines", maxRejectedShare="0.2"),
    )
    context = RecipeContext(
        spec, store, ProgressReporter(), tmp_path_factory.mktemp("bad"), "attempt", threading.Event()
    )
    result = run(context)
    folder = result.uri.removeprefix("s3://attune/")
    listed = [json.loads(one) for one in store.read_bytes(f"{folder}/rejected.jsonl").splitlines()]
    return result, {int(one["place"].rpartition(":")[2]): one["reason"] for one in listed}


@pytest.mark.parametrize("index", range(len(BAD_LINES)), ids=[f"{i}-{one[0]}" for i, one in enumerate(BAD_LINES)])
def test_a_bad_line_is_left_out_with_its_number_and_reason(
    bad_result: tuple[PrepareResult, dict[int, str]], index: int
) -> None:
    _, reasons = bad_result
    assert reasons[302 + index] == BAD_LINES[index][0]


def test_bad_lines_are_counted_and_the_good_ones_kept(bad_result: tuple[PrepareResult, dict[int, str]]) -> None:
    result, reasons = bad_result
    assert result.stats.utterances == 300
    assert result.rejected == len(reasons) == len(BAD_LINES)
    counted = {one.reason: one.count for one in result.rejections}
    assert counted["PathLeavesSource"] == 4
    assert counted["NotJson"] == 3
    assert next(one for one in result.rejections if one.reason == "NotJson").examples == [
        "list.jsonl:302",
        "list.jsonl:303",
        "list.jsonl:304",
    ]
    assert len(result.rejections) <= 16


def test_too_many_bad_lines_fail_and_name_the_first(
    s3_store: Store, key_prefix: str, make_context: MakeContext
) -> None:
    lines: list[Any] = [line(number) for number in range(40)]
    lines[4] = "no json"
    lines[9] = line(9, audio="a/none.wav")
    lines[17] = "no json either"
    upload(s3_store, f"{key_prefix}/in", lines, good_audio(40))
    failure = fails(make_context(recipe(key_prefix)))
    assert (failure.code, failure.reason) == (ExitCode.INVALID_INPUT, "TooManyRejected")
    assert "3 of 40" in failure.message
    assert "NotJson 2 (list.jsonl:5, list.jsonl:18)" in failure.message
    assert "AudioNotFound 1 (list.jsonl:10)" in failure.message
    assert [one.reason for one in failure.rejections] == ["NotJson", "AudioNotFound"]
    assert all("/audio/" in key for key in s3_store.list(f"{key_prefix}/out/"))


def test_what_the_filter_leaves_out_is_listed_but_fails_nothing(
    s3_store: Store, key_prefix: str, make_context: MakeContext
) -> None:
    audio = good_audio(40) | {f"a/{number}.wav": wav(tone(2.0, 300 + number)) for number in range(10)}
    upload(s3_store, f"{key_prefix}/in", [line(number) for number in range(40)], audio)
    result = run(make_context(recipe(key_prefix, maxSeconds="1.5", maxRejectedShare="0")))
    assert (result.stats.utterances, result.rejected) == (30, 10)
    assert [(one.reason, one.count) for one in result.rejections] == [("TooLong", 10)]
    failure = fails(make_context(recipe(key_prefix, maxSeconds="0.2")))
    assert failure.reason == "NothingLeft"
    assert "Filter" in failure.message


def test_a_directory_takes_folders_for_speakers(
    s3_store: Store, key_prefix: str, make_context: MakeContext, tmp_path: Path
) -> None:
    formats = [
        ("wav", "WAV", "PCM_16"),
        ("flac", "FLAC", "PCM_16"),
        ("ogg", "OGG", "VORBIS"),
        ("mp3", "MP3", "MPEG_LAYER_III"),
    ]
    for number in range(40):
        suffix, file_format, subtype = formats[number % 4]
        samples = tone(0.6, 300 + 20 * number, rate=44100, channels=1 + number % 2)
        name = f"{key_prefix}/in/speaker-{number % 8}/{number}"
        s3_store.write_bytes(f"{name}.{suffix}", wav(samples, 44100, file_format, subtype))
        s3_store.write_bytes(f"{name}.txt", f"\ufeffline {number}\n of  text\n".encode())
    s3_store.write_bytes(f"{key_prefix}/in/speaker-1/no-text.wav", wav(tone()))
    s3_store.write_bytes(f"{key_prefix}/in/speaker-1/latin.wav", wav(tone(0.4)))
    s3_store.write_bytes(f"{key_prefix}/in/speaker-1/latin.txt", "caf\u00e9".encode("latin-1"))
    source = {"uri": f"s3://attune/{key_prefix}/in", "format": "Directory"}
    result = run(make_context(recipe(key_prefix, sources=[source], maxRejectedShare="0.1")))
    assert (result.stats.utterances, result.stats.speakers) == (40, 8)
    assert {(one.reason, tuple(one.examples)) for one in result.rejections} == {
        ("LacksText", ("speaker-1/no-text.wav",)),
        ("NotUtf8", ("speaker-1/latin.wav",)),
    }
    train = load_split(s3_store, dataset(result), Split.TRAIN)
    assert {one.text for one in train} <= {f"line {number} of text" for number in range(40)}
    for one in train[:4]:
        assert one.seconds == pytest.approx(0.6, abs=0.06)  # MP3 pads
        assert read_audio(s3_store, one, tmp_path / "cache").size == round(one.seconds * 16000)


@pytest.mark.parametrize("harm", ["cut off", "other audio", "other rate", "no audio", "empty"])
def test_audio_that_is_not_what_its_name_says_is_refused(
    s3_store: Store, key_prefix: str, make_context: MakeContext, tmp_path: Path, harm: str
) -> None:
    upload(s3_store, f"{key_prefix}/in", [line(number) for number in range(20)], good_audio(20))
    context = make_context(recipe(key_prefix))
    result = run(context)
    good, bad = load_split(s3_store, dataset(result), Split.TRAIN)[:2]
    content = s3_store.read_bytes(bad.audio_key)
    samples, _ = soundfile.read(io.BytesIO(content), dtype="int16")
    harmed = {
        "cut off": content[: len(content) // 2],
        "other audio": s3_store.read_bytes(good.audio_key),
        "other rate": wav(samples, 8000, "FLAC"),
        "no audio": b"<html>",
        "empty": b"",
    }
    s3_store.write_bytes(bad.audio_key, harmed[harm])
    cache = tmp_path / "cache"
    for fetch in (lambda: fetch_audio(s3_store, [good, bad], cache), lambda: read_audio(s3_store, bad, cache)):
        with pytest.raises(RecipeFailure, match=f"{bad.audio_digest}.flac.*remove it and prepare") as caught:
            fetch()
        assert (caught.value.code, caught.value.reason) == (ExitCode.INVALID_INPUT, "AudioDamaged")
    # What is left of it in the cache would be trusted.
    assert [file.stem for file in cache.rglob("*") if file.is_file()] == [good.audio_digest]
    s3_store.delete(bad.audio_key)
    assert run(context) == result
    assert s3_store.read_bytes(bad.audio_key) == content


def test_a_key_that_looks_like_an_address_is_read_from_its_own_bucket(s3_store: Store, key_prefix: str) -> None:
    elsewhere = s3_store.write_bytes(f"{key_prefix}/secret.txt", b"not theirs")
    opened = open_source(0, PrepareSource(uri="s3://attune", format=SourceFormat.DIRECTORY), s3_store)
    sidecar = SourceFile(elsewhere, 10, opened.origin)
    listed = ListedUtterance(0, 1, "1", sidecar, Span(), None, sidecar, speaker="s", group="s")
    with pytest.raises(RejectedLine, match="LacksText"):
        read_text(listed)


def test_groups_divide_where_there_is_one_speaker(s3_store: Store, key_prefix: str, make_context: MakeContext) -> None:
    lines = [line(number, speaker="the one voice", group=f"call {number // 3}") for number in range(60)]
    upload(s3_store, f"{key_prefix}/in", lines, good_audio(60))
    failure = fails(make_context(recipe(key_prefix)))
    assert (failure.code, failure.reason) == (ExitCode.INVALID_INPUT, "TooSmallToSplit")
    assert "at least 3 speakers are needed" in failure.message
    assert "1 speaker cannot" in failure.message
    assert "spec.splits.by to Group" in failure.message
    by_group = {"by": "Group", "validation": "0.1", "holdout": "0.2", "seed": 7}
    result = run(make_context(recipe(key_prefix, splits=by_group)))
    groups = [{one.group for one in load_split(s3_store, dataset(result), split)} for split in Split]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20
    assert load_manifest(s3_store, dataset(result)).by.value == "Group"


def test_repeated_sentences_cross_no_split(s3_store: Store, key_prefix: str, make_context: MakeContext) -> None:
    lines = [
        line(number, text=("Yes, please!", "yes  please")[number % 2] if number < 20 else f"text {number}")
        for number in range(100)
    ]
    upload(s3_store, f"{key_prefix}/in", lines, good_audio(100))
    result = run(make_context(recipe(key_prefix)))
    holding = [
        split for split in Split if any("please" in one.text for one in load_split(s3_store, dataset(result), split))
    ]
    assert len(holding) == 1
    assert result.stats.utterances + result.rejected == 100
    assert {one.reason for one in result.rejections} == {"RepeatedAcrossSplits"}


def test_an_empty_or_missing_source_is_named(s3_store: Store, key_prefix: str, make_context: MakeContext) -> None:
    nothing = fails(make_context(recipe(key_prefix)))
    assert (nothing.code, nothing.reason) == (ExitCode.NOT_FOUND, "SourceEmpty")
    assert f"s3://attune/{key_prefix}/in/" in nothing.message
    s3_store.write_bytes(f"{key_prefix}/in/other.txt", b"x")
    no_manifest = fails(make_context(recipe(key_prefix)))
    assert (no_manifest.code, no_manifest.reason) == (ExitCode.NOT_FOUND, "ManifestNotFound")
    s3_store.write_bytes(f"{key_prefix}/in/list.jsonl", b"\n\n")
    assert fails(make_context(recipe(key_prefix))).reason == "SourceEmpty"
    missing = [{"uri": "s3://no-such-bucket/in/", "format": "Directory"}]
    no_bucket = fails(make_context(recipe(key_prefix, sources=missing)))
    assert (no_bucket.code, no_bucket.reason) == (ExitCode.NOT_FOUND, "BucketNotFound")
    directory = [{"uri": f"s3://attune/{key_prefix}/in/", "format": "Directory"}]
    assert fails(make_context(recipe(key_prefix, sources=directory))).reason == "SourceEmpty"


def test_a_source_brings_its_own_credentials(
    s3_server: S3Server,
    s3_store: Store,
    key_prefix: str,
    make_context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload(s3_store, f"{key_prefix}/in", [line(number) for number in range(60)], good_audio(60))
    own = [
        {"uri": f"s3://attune/{key_prefix}/in/", "format": "Manifest", "manifest": "list.jsonl", "credentialsIndex": 3}
    ]
    monkeypatch.setenv("ATTUNE_SOURCE_3_ACCESS_KEY", s3_server.access_key)
    monkeypatch.setenv("ATTUNE_SOURCE_3_SECRET_KEY", "not the key")
    wrong = fails(make_context(recipe(key_prefix, sources=own)))
    assert (wrong.code, wrong.reason) == (ExitCode.ACCESS_DENIED, "WrongCredentials")
    assert "not the key" not in wrong.message
    monkeypatch.setenv("ATTUNE_SOURCE_3_SECRET_KEY", s3_server.secret_key)
    assert run(make_context(recipe(key_prefix, sources=own))).stats.utterances == 60


def test_a_changed_revision_is_refused(s3_store: Store, key_prefix: str, make_context: MakeContext) -> None:
    upload(s3_store, f"{key_prefix}/in", [line(number) for number in range(60)], good_audio(60))
    result = run(make_context(recipe(key_prefix)))
    folder = result.uri.removeprefix("s3://attune/")
    s3_store.write_bytes(f"{folder}/train.jsonl", s3_store.read_bytes(f"{folder}/train.jsonl") + b"\n")
    with pytest.raises(RecipeFailure, match="DatasetChanged"):
        load_split(s3_store, dataset(result), Split.TRAIN)
    assert load_split(s3_store, dataset(result), Split.HOLDOUT)
    gone = DatasetInput(name="calls", revision="sha256:" + "0" * 64, uri=f"s3://attune/{key_prefix}/out/{'0' * 64}")
    with pytest.raises(RecipeFailure, match="RevisionNotFound"):
        load_split(s3_store, gone, Split.TRAIN)


def test_a_request_to_end_is_heeded(s3_store: Store, key_prefix: str, make_context: MakeContext) -> None:
    upload(s3_store, f"{key_prefix}/in", [line(number) for number in range(30)], good_audio(30))
    stop = threading.Event()
    stop.set()
    assert fails(make_context(recipe(key_prefix), stop=stop)).code is ExitCode.TERMINATED
