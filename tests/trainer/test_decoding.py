"""Decoding: what the telephone and the web record, spans and channels, and files that mean harm."""

import os
import random
import subprocess
import threading
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from attune_trainer.data import decoder
from attune_trainer.data.audio import Bounds, Cut, Span, cut_spans, decode_audio, measure_clipping
from attune_trainer.data.decoder import Decoders
from attune_trainer.data.rejections import RejectedLine

from .speech import CODED, CODED_BY_SNDFILE, RATE, likeness, silence, speak, write_coded, write_wav

BOUNDS = Bounds(RATE, 0.1, 30.0)
TEXT = "please hold while I connect your call"


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    with Decoders(1) as pool:
        yield pool


def cut(decoders: Decoders, path: Path, *spans: Span) -> list[Cut]:
    """In the order of the spans."""
    cuts = list(decoders.cut_spans(path, spans or [Span()], BOUNDS))
    assert sorted(one.index for one in cuts) == list(range(len(spans) or 1))
    return sorted(cuts, key=lambda one: one.index)


def as_float(one: Cut) -> np.ndarray:
    assert one.samples is not None, one.reason
    return one.samples.astype(np.float32) / 32768


@pytest.mark.parametrize("suffix", [*CODED, *CODED_BY_SNDFILE])
def test_every_codec_gives_the_speech_back(suffix: str, tmp_path: Path, decoders: Decoders) -> None:
    spoken = speak(TEXT)
    write_coded(tmp_path / f"call{suffix}", spoken)
    whole, part = cut(decoders, tmp_path / f"call{suffix}", Span(), Span(0.5, 1.25))
    heard = as_float(whole)
    assert len(heard) == pytest.approx(len(spoken), abs=0.13 * RATE)
    alike, delay = likeness(heard, spoken)
    assert alike > (0.75 if suffix in {".amr", ".gsm"} else 0.93)
    assert abs(delay) < 0.03
    assert len(as_float(part)) == pytest.approx(0.75 * RATE, abs=2)
    inside = heard[RATE // 2 : RATE // 2 + 12000]
    assert likeness(as_float(part), inside)[0] > 0.99


def test_a_stereo_call_is_one_mix_or_a_channel_for_each_party(tmp_path: Path, decoders: Decoders) -> None:
    agent, customer = speak(TEXT), speak("my card does not work any more", "en-gb")
    size = max(len(agent), len(customer))
    call = np.stack([np.pad(one, (0, size - len(one))) for one in (agent, customer)], axis=1)
    write_wav(tmp_path / "call.wav", call)
    mix, left, right, third = cut(
        decoders, tmp_path / "call.wav", Span(), Span(channel=0), Span(channel=1), Span(channel=2)
    )
    assert likeness(as_float(left), agent)[0] > 0.999
    assert likeness(as_float(right), customer)[0] > 0.999
    assert np.allclose(as_float(mix), (as_float(left) + as_float(right)) / 2, atol=1e-4)
    assert third.reason == "ChannelNotFound"


def test_spans_come_as_their_ends_are_reached_and_what_is_outside_is_rejected(tmp_path: Path) -> None:
    ramp = np.arange(10 * RATE) / (20 * RATE)
    write_wav(tmp_path / "long.wav", ramp)
    spans = [
        Span(7.0, 8.0),
        Span(1.0, 4.0),
        Span(2.0, 3.0),
        Span(9.5, 10.3),
        Span(9.0, 11.0),
        Span(12.0, 13.0),
        Span(0.0, 0.05),
        Span(5.0),
    ]
    cuts = list(cut_spans(tmp_path / "long.wav", spans, Bounds(RATE, 0.1, 4.0)))
    assert [one.index for one in cuts] == [6, 2, 1, 0, 7, 4, 3, 5]
    by_index = {one.index: one for one in cuts}
    assert [by_index[index].reason for index in range(8)] == [
        None, None, None, None, "SpanOutsideAudio", "SpanOutsideAudio", "TooShort", "TooLong",
    ]  # fmt: skip
    for index in range(4):
        samples = as_float(by_index[index])
        begin, end = spans[index].start or 0.0, min(10.0, spans[index].end or 10.0)
        assert len(samples) == pytest.approx((end - begin) * RATE, abs=1)
        assert samples[0] == pytest.approx(begin / 20, abs=1e-3)
        assert samples[-1] == pytest.approx(end / 20, abs=1e-3)


def test_hours_of_recording_are_cut_without_being_held(tmp_path: Path, decoders: Decoders) -> None:
    hour = np.zeros(3600 * 8000, dtype=np.uint8) + 128
    hour[::40] = 255
    with wave.open(str(tmp_path / "hour.wav"), "wb") as output:
        output.setnchannels(1)
        output.setsampwidth(1)
        output.setframerate(8000)
        output.writeframes(hour.tobytes())
    spans = [Span(float(second), second + 2.0) for second in range(0, 3590, 90)]
    cuts = cut(decoders, tmp_path / "hour.wav", *spans)
    assert all(len(as_float(one)) == 2 * RATE for one in cuts)


def test_more_spans_at_a_time_than_memory_is_for_are_rejected(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", speak(TEXT))
    cuts = list(cut_spans(tmp_path / "a.wav", [Span(0.0, 1.0)] * 70, BOUNDS))
    assert [one.reason for one in sorted(cuts, key=lambda one: one.index)] == [None] * 64 + ["SpansOverlap"] * 6


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        pytest.param(b"RIFF, but no more of it", ".wav", id="a header alone"),
        pytest.param(b"#EXTM3U\n#EXTINF:3,\nother.wav\n", ".m4a", id="a playlist"),
        pytest.param(b"ffconcat version 1.0\nfile other.wav\n", ".wav", id="a list of files"),
        pytest.param(b"<html>not found</html>", ".mp3", id="a page"),
        pytest.param(b"\0" * 4096, ".ogg", id="zeros"),
        pytest.param(b"text\n" * 1000, ".flac", id="text"),
    ],
)
def test_what_is_no_audio_is_rejected_and_reads_no_other_file(
    content: bytes, suffix: str, tmp_path: Path, decoders: Decoders
) -> None:
    write_wav(tmp_path / "other.wav", speak(TEXT))
    (tmp_path / f"bad{suffix}").write_bytes(content)
    (bad,) = cut(decoders, tmp_path / f"bad{suffix}")
    assert bad.reason in {"AudioNotDecodable", "AudioEmpty"}
    assert cut(decoders, tmp_path / "other.wav")[0].reason is None  # the process goes on


@pytest.mark.parametrize("suffix", [".flac", ".m4a", ".mp3", ".opus", ".amr", ".wav"])
def test_damaged_files_never_take_the_decoder_down(suffix: str, tmp_path: Path, decoders: Decoders) -> None:
    write_coded(tmp_path / f"good{suffix}", speak(TEXT))
    good = (tmp_path / f"good{suffix}").read_bytes()
    chance = random.Random(7)
    for number in range(20):
        harmed = bytearray(good[: chance.randrange(1, len(good))] if number % 2 else good)
        for _ in range(chance.randrange(1, 40)):
            harmed[chance.randrange(len(harmed))] = chance.randrange(256)
        path = tmp_path / f"bad-{number}{suffix}"
        path.write_bytes(harmed)
        for one in cut(decoders, path, Span(), Span(0.2, 0.6)):
            assert (one.samples is None) == (one.reason is not None)
            assert one.reason != "DecoderFailed"


def test_not_a_number_silence_and_length_have_their_reasons(tmp_path: Path) -> None:
    def reason(samples: np.ndarray, subtype: str = "FLOAT", limit: float = 30.0) -> str:
        write_wav(tmp_path / "a.wav", samples, subtype=subtype)
        with pytest.raises(RejectedLine) as caught:
            decode_audio(tmp_path / "a.wav", RATE, 0.1, limit)
        return caught.value.reason

    spoken = speak(TEXT)
    broken = spoken.copy()
    broken[5000] = np.nan
    assert reason(broken) == "AudioNotFinite"
    broken[5000] = np.inf
    assert reason(broken) == "AudioNotFinite"
    assert reason(silence(1.0)) == "AudioSilent"
    assert reason(spoken, limit=1.0) == "TooLong"
    assert reason(spoken[:800]) == "TooShort"
    assert reason(silence(0.0)) in {"AudioEmpty", "AudioNotDecodable"}


def test_clipping_is_flat_tops_and_not_loud_speech(tmp_path: Path, decoders: Decoders) -> None:
    sine = np.sin(2 * np.pi * 100 * np.arange(RATE) / RATE).astype(np.float32)
    assert measure_clipping(sine) == 0.0
    assert measure_clipping(np.clip(2 * sine, -1, 1)) == pytest.approx(2 / 3, abs=0.01)
    assert measure_clipping(2 * sine) == pytest.approx(2 / 3, abs=0.01)
    assert measure_clipping(np.empty(0, np.float32)) == 0.0
    spoken = speak(TEXT)
    loud = spoken / np.abs(spoken).max() * 0.99
    for gain, low, high in ((1.0, 0.0, 0.001), (8.0, 0.02, 0.9)):
        write_wav(tmp_path / "a.wav", np.clip(gain * loud, -1, 1))
        assert low <= cut(decoders, tmp_path / "a.wav")[0].clipped <= high


def test_a_file_that_takes_too_long_is_given_up_and_the_next_is_decoded(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", speak(TEXT))
    os.mkfifo(tmp_path / "endless.wav")  # opening it waits for a writer that never comes
    with Decoders(1, file_seconds=3.0) as pool:
        assert [one.reason for one in cut(pool, tmp_path / "endless.wav", Span(), Span(1.0, 2.0))] == [
            "DecodingTimedOut"
        ] * 2
    with Decoders(1) as pool:
        assert cut(pool, tmp_path / "a.wav")[0].reason is None


def test_a_decoder_that_dies_costs_the_rest_of_its_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wav(tmp_path / "a.wav", speak(TEXT))
    started: list[subprocess.Popen[bytes]] = []
    start = decoder._start

    def start_and_kill_the_first() -> subprocess.Popen[bytes]:
        started.append(start())
        if len(started) == 1:
            started[0].kill()
            started[0].wait()
        return started[-1]

    monkeypatch.setattr(decoder, "_start", start_and_kill_the_first)
    with Decoders(1) as pool:
        assert [one.reason for one in cut(pool, tmp_path / "a.wav", Span(), Span(1.0, 2.0))] == ["DecoderFailed"] * 2
        assert cut(pool, tmp_path / "a.wav")[0].reason is None
        started[1].kill()  # while it has nothing to do: nobody notices
        started[1].wait()
        assert cut(pool, tmp_path / "a.wav")[0].reason is None
    assert len(started) == 3
    assert all(process.poll() is not None for process in started)


def test_a_decoder_has_no_credentials_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTUNE_STORE_SECRET_KEY", "not for decoders")
    process = decoder._start()
    try:
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert b"PYTHONPATH" in environment
        assert b"ATTUNE_" not in environment
    finally:
        decoder._kill(process)


def test_many_threads_share_few_decoders(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", speak(TEXT))
    found: list[str | None] = []
    with Decoders(2) as pool:
        threads = [
            threading.Thread(target=lambda: found.extend(one.reason for one in cut(pool, tmp_path / "a.wav")))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert found == [None] * 8
