"""The parts of the inference server that need no model: decoding, batching, CPU limits, settings."""

import asyncio
import io
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
import soxr
from attune_trainer.failures import InvalidInput
from attune_trainer.processors import quota_processors, usable_processors
from attune_trainer.serving import batching
from attune_trainer.serving.app import Service, build_app
from attune_trainer.serving.audio import AudioLimits, Samples, UnusableAudioError, decode_audio
from attune_trainer.serving.batching import Batcher, BatchLimits, OverloadedError, choose_batch
from attune_trainer.serving.exposition import ServeMetrics
from attune_trainer.serving.settings import ServeSettings

LIMITS = AudioLimits(max_seconds=20, max_decode_seconds=10)
ENVIRONMENT = {
    "ATTUNE_MODEL_URI": "s3://attune/models/mini",
    "ATTUNE_MODEL_ID": "ft:mini:0a1b2c",
    "ATTUNE_TRACK": "canary",
}


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def encode(samples: np.ndarray, rate: int, container: str, subtype: str | None = None) -> io.BytesIO:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    ("container", "subtype", "rate", "channels"),
    [
        ("WAV", "PCM_16", 16000, 1),
        ("WAV", "ULAW", 8000, 1),
        ("WAV", "FLOAT", 48000, 2),
        ("FLAC", "PCM_24", 44100, 2),
        ("OGG", "VORBIS", 16000, 1),
        ("OGG", "OPUS", 48000, 1),
        ("MP3", "MPEG_LAYER_III", 44100, 1),
    ],
)
def test_what_clients_send_becomes_16_khz_mono(container: str, subtype: str, rate: int, channels: int) -> None:
    samples = decode_audio(encode(tone(7.3, rate, channels), rate, container, subtype), LIMITS)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert len(samples) / 16000 == pytest.approx(7.3, abs=0.15)  # MP3 and Vorbis pad
    middle = samples[32000:64000]
    peak = np.abs(np.fft.rfft(middle)).argmax() * 16000 / len(middle)
    assert peak == pytest.approx(440, abs=1)
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.05)


def test_resampling_in_blocks_equals_resampling_at_once() -> None:
    noise = np.random.default_rng(7).normal(0, 0.1, 12 * 44100).astype(np.float32)
    expected = soxr.resample(noise, 44100, 16000)
    samples = decode_audio(encode(noise, 44100, "WAV", "FLOAT"), LIMITS)
    assert len(samples) == pytest.approx(len(expected), abs=1)
    shared = min(len(samples), len(expected))
    np.testing.assert_allclose(samples[:shared], expected[:shared], atol=1e-4)


def lying_wav() -> io.BytesIO:
    """A header that promises 4 GiB, and no more than a second behind it."""
    data = bytearray(encode(tone(1, 16000), 16000, "WAV", "PCM_16").getvalue())
    place = data.index(b"data") + 4
    data[place : place + 4] = (0xFFFFFFF0).to_bytes(4, "little")
    return io.BytesIO(bytes(data))


def test_a_header_that_lies_about_its_length_costs_nothing() -> None:
    assert len(decode_audio(lying_wav(), LIMITS)) == 16000


@pytest.mark.parametrize(
    ("source", "limits", "code"),
    [
        (io.BytesIO(b""), LIMITS, "invalid_audio"),
        (io.BytesIO(b"\x00" * 4096), LIMITS, "invalid_audio"),
        (io.BytesIO(b"RIFF\xff\xff\xff\xffWAVEfmt "), LIMITS, "invalid_audio"),
        (io.BytesIO(np.random.default_rng(1).bytes(65536)), LIMITS, "invalid_audio"),
        (encode(np.zeros((0, 1)), 16000, "WAV"), LIMITS, "empty_audio"),
        (encode(tone(21, 16000), 16000, "WAV"), LIMITS, "audio_too_long"),
        (encode(tone(1, 16000), 16000, "AIFF"), LIMITS, "unsupported_format"),
        (encode(tone(1, 1000), 1000, "WAV"), LIMITS, "unsupported_sample_rate"),
        (encode(tone(1, 16000, 12), 16000, "WAV"), LIMITS, "too_many_channels"),
        (encode(tone(1, 16000), 16000, "WAV"), AudioLimits(20, -1), "decoding_too_slow"),
    ],
)
def test_unusable_audio_is_refused_with_its_reason(source: io.BytesIO, limits: AudioLimits, code: str) -> None:
    with pytest.raises(UnusableAudioError) as refused:
        decode_audio(source, limits)
    assert refused.value.code == code


def test_samples_that_are_no_numbers_do_not_spread() -> None:
    wave = np.array([np.nan, np.inf, -np.inf, 3.0, 0.25], dtype=np.float32)
    assert decode_audio(encode(wave, 16000, "WAV", "FLOAT"), LIMITS).tolist() == [0.0, 1.0, -1.0, 1.0, 0.25]


@pytest.mark.parametrize(
    ("seconds", "room", "languages", "chosen"),
    [
        ([3.0], 16, [None], [0]),
        ([3, 25, 4, 3.1], 2, [None] * 4, [0, 3]),  # the docstring's example
        ([3, 25, 4, 3.1], 16, [None] * 4, [0, 2, 3]),
        ([0.2, 1.9, 2.0, 4.0], 16, [None] * 4, [0, 1, 2, 3]),
        ([25, 3, 3, 3], 16, [None] * 4, [0]),  # the oldest goes though nothing is like it
        ([3, 3, 3], 16, ["en", None, "en"], [0, 2]),
        ([3, 3, 3], 1, [None] * 3, [0]),
        ([30] * 6, 16, [None] * 6, [0, 1, 2, 3]),  # 120 s, as the limit says
        ([8, 12, 8, 16] * 4, 16, [None] * 16, [0, 1, 2, 4, 5, 6, 8, 10, 12, 14]),  # ten of at most 12 s
        ([600, 600], 16, [None] * 2, [0]),  # one that is longer than a batch goes alone
    ],
)
def test_a_batch_is_the_oldest_and_what_is_like_it(
    seconds: list[float], room: int, languages: list[str | None], chosen: list[int]
) -> None:
    assert choose_batch(seconds, limits(max_utterances=room), languages) == chosen


def limits(**changes: float) -> BatchLimits:
    bounds = {"max_utterances": 4, "max_seconds": 120.0, "max_wait_seconds": 5.0, "max_requests": 100}
    return BatchLimits(**({"max_waiting_seconds": 100.0} | bounds | changes))  # type: ignore[arg-type]


class Recorder:
    """Keeps what the batcher reports."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self._depth = 0
        self._changed = asyncio.Event()

    def observe_batch(self, utterances: int, *_: float) -> None:
        self.batches.append(utterances)

    def observe_queue(self, utterances: int, *_: float) -> None:
        self._depth = utterances
        self._changed.set()

    def observe_requests(self, accepted: int) -> None:
        self.accepted = accepted

    async def until_waiting(self, utterances: int) -> None:
        while self._depth != utterances:
            self._changed.clear()
            await self._changed.wait()


class Held:
    """A recogniser that waits until it is let go, and says how long each clip is."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self, samples: list[Samples], _language: str | None) -> list[str]:
        self.entered.release()
        assert self.go.wait(30)
        if any(len(one) == 13 for one in samples):
            raise ValueError("unlucky")
        return [str(len(one)) for one in samples]


def batcher(recognise: Callable[[list[Samples], str | None], list[str]], **changes: float) -> tuple[Batcher, Recorder]:
    recorder = Recorder()
    queue = Batcher(recognise, lambda seconds: seconds, ThreadPoolExecutor(1), limits(**changes), recorder)
    return queue, recorder


def samples(count: int) -> Samples:
    return np.zeros(count, dtype=np.float32)


def test_what_waits_while_the_worker_is_busy_becomes_one_batch() -> None:
    async def scenario() -> None:
        held = Held()
        queue, recorder = batcher(held)
        running = asyncio.create_task(queue.run())
        first = queue.transcribe(samples(1))
        await asyncio.to_thread(held.entered.acquire)
        rest = [queue.transcribe(samples(count)) for count in range(2, 7)]
        await recorder.until_waiting(5)
        held.go.set()
        assert await first == "1"
        assert await asyncio.gather(*rest) == ["2", "3", "4", "5", "6"]
        assert recorder.batches == [1, 4, 1]
        running.cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize(("patience", "order"), [(3600.0, ["4", "2", "3"]), (0.0, ["2", "3", "4"])])
def test_background_gives_way_for_a_while(patience: float, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_PATIENCE_SECONDS", patience)

    async def scenario() -> None:
        held = Held()
        queue, recorder = batcher(held, max_utterances=1)
        running = asyncio.create_task(queue.run())
        answers: list[str] = []

        async def ask(count: int, *, background: bool) -> None:
            answers.append(await queue.transcribe(samples(count), background=background))

        first = asyncio.create_task(ask(1, background=False))
        await asyncio.to_thread(held.entered.acquire)
        asked = [asyncio.create_task(ask(count, background=count < 4)) for count in (2, 3, 4)]
        await recorder.until_waiting(3)
        held.go.set()
        await asyncio.gather(first, *asked)
        assert answers == ["1", *order]
        running.cancel()

    asyncio.run(scenario())


def test_a_batch_waits_for_what_is_on_its_way_and_for_nothing_else() -> None:
    async def scenario() -> None:
        held = Held()
        held.go.set()
        queue, recorder = batcher(held, max_wait_seconds=3600)
        running = asyncio.create_task(queue.run())
        assert await queue.transcribe(samples(1)) == "1"  # nothing is announced: no hour is waited
        with queue.announce():
            early = queue.transcribe(samples(2))
            await asyncio.sleep(0)
            late = queue.transcribe(samples(3))
        assert await asyncio.gather(early, late) == ["2", "3"]
        assert recorder.batches == [1, 2]
        running.cancel()

    asyncio.run(scenario())


def test_one_bad_utterance_fails_alone() -> None:
    async def scenario() -> None:
        held = Held()
        queue, recorder = batcher(held)
        running = asyncio.create_task(queue.run())
        with queue.announce():
            asked = [queue.transcribe(samples(count)) for count in (12, 13, 14)]
            await recorder.until_waiting(3)
        held.go.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [answers[0], answers[2]] == ["12", "14"]
        assert isinstance(answers[1], ValueError)
        running.cancel()

    asyncio.run(scenario())


def test_what_a_batch_that_failed_had_in_memory_is_gone_when_its_utterances_are_tried_alone() -> None:
    class Tensors:
        pass

    held_by_the_batch: list[weakref.ref[Tensors]] = []

    def recognise(clips: list[Samples], _language: str | None) -> list[str]:
        if len(clips) > 1:
            tensors = Tensors()
            held_by_the_batch.append(weakref.ref(tensors))
            raise MemoryError
        return ["freed" if held_by_the_batch[0]() is None else "still there"]

    async def scenario() -> None:
        queue, _ = batcher(recognise)
        running = asyncio.create_task(queue.run())
        assert await asyncio.gather(queue.transcribe(samples(1)), queue.transcribe(samples(2))) == ["freed", "freed"]
        running.cancel()

    asyncio.run(scenario())


def test_the_last_request_to_arrive_is_in_the_batch_that_waited_for_it() -> None:
    clip = encode(tone(1, 16000), 16000, "WAV").getvalue()
    form = httpx.Request("POST", "http://server", files={"file": clip}, data={"model": "whisper-1"})
    body = form.read()

    async def scenario() -> None:
        held = Held()
        held.go.set()
        queue, recorder = batcher(held, max_wait_seconds=3600)
        settings = ServeSettings.from_environment(ENVIRONMENT)
        service = Service(settings, ServeMetrics(settings.track, settings.model_id), ThreadPoolExecutor(1))
        service.batcher = queue
        running = asyncio.create_task(queue.run())
        late_uploads, early_waits = asyncio.Event(), asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            late_uploads.set()
            yield body[:100]
            await early_waits.wait()
            yield body[100:]

        async with httpx.AsyncClient(transport=httpx.ASGITransport(build_app(service))) as client:

            def send(content: bytes | AsyncIterator[bytes]) -> "asyncio.Task[httpx.Response]":
                url = "http://server/v1/audio/transcriptions"
                headers = {"content-type": form.headers["content-type"]}
                return asyncio.create_task(client.post(url, content=content, headers=headers))

            late = send(slowly())
            await late_uploads.wait()
            early = send(body)
            await recorder.until_waiting(1)
            early_waits.set()
            assert [response.json() for response in await asyncio.gather(early, late)] == [{"text": "16000"}] * 2
        assert recorder.batches == [2]
        running.cancel()

    asyncio.run(scenario())


def test_more_than_the_queue_holds_is_refused_with_a_time_to_come_back() -> None:
    async def scenario() -> None:
        held = Held()
        queue, recorder = batcher(held, max_waiting_seconds=2.0, max_requests=3)
        running = asyncio.create_task(queue.run())
        first = queue.transcribe(samples(16000))
        await asyncio.to_thread(held.entered.acquire)
        second = queue.transcribe(samples(16000))
        await recorder.until_waiting(1)
        with pytest.raises(OverloadedError) as full:
            await queue.transcribe(samples(16001))
        assert 1 <= full.value.retry_after_seconds <= 60
        with queue.admit(), queue.admit(), queue.admit(), pytest.raises(OverloadedError), queue.admit():
            pass
        assert recorder.accepted == 0
        with queue.admit():  # places are given back
            held.go.set()
            assert await asyncio.gather(first, second) == ["16000", "16000"]
        running.cancel()

    asyncio.run(scenario())


def test_a_client_that_gives_up_leaves_the_queue() -> None:
    async def scenario() -> None:
        held = Held()
        queue, recorder = batcher(held)
        running = asyncio.create_task(queue.run())
        first = queue.transcribe(samples(1))
        await asyncio.to_thread(held.entered.acquire)
        gone = queue.transcribe(samples(2))
        await recorder.until_waiting(1)
        gone.cancel()
        await asyncio.wait({gone})
        held.go.set()
        assert await first == "1"
        assert await queue.transcribe(samples(3)) == "3"
        assert recorder.batches == [1, 1]  # the one that left was never transcribed
        running.cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 3.0),
        ({}, None),
    ],
)
def test_the_cpu_limit_is_read_from_either_cgroup_version(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert quota_processors(tmp_path) == quota


@pytest.mark.parametrize(
    ("environment", "limit", "threads"),
    [
        ({}, "150000 100000", 2),
        ({}, "50000 100000", 1),
        ({}, "max 100000", 8),
        ({}, "6400000 100000", 8),
        ({"OMP_NUM_THREADS": "3"}, "150000 100000", 3),
        ({"OMP_NUM_THREADS": "nonsense"}, "150000 100000", 2),
    ],
)
def test_threads_follow_what_was_asked_then_the_limit_then_the_machine(
    tmp_path: Path, environment: dict[str, str], limit: str, threads: int
) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    assert usable_processors(environment, tmp_path, available=8) == threads


def test_settings_come_from_the_environment_and_empty_ones_count_as_absent() -> None:
    settings = ServeSettings.from_environment(
        ENVIRONMENT | {"ATTUNE_MODEL_DIGEST": "", "ATTUNE_PORT": "0", "SERVE_MODEL_ALIASES": "prod, b"}
    )
    assert settings.model_digest is None
    assert settings.port == 0
    assert settings.model_names == ("ft:mini:0a1b2c", "whisper-1", "prod", "b")


@pytest.mark.parametrize(
    ("change", "variable"),
    [
        ({"ATTUNE_MODEL_URI": ""}, "ATTUNE_MODEL_URI"),
        ({"ATTUNE_MODEL_URI": "http://elsewhere/model"}, "ATTUNE_MODEL_URI"),
        ({"ATTUNE_MODEL_ID": "two\r\nlines"}, "ATTUNE_MODEL_ID"),
        ({"ATTUNE_TRACK": "third"}, "ATTUNE_TRACK"),
        ({"SERVE_MAX_REQUESTS": "0"}, "SERVE_MAX_REQUESTS"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, str], variable: str) -> None:
    with pytest.raises(InvalidInput, match=variable):
        ServeSettings.from_environment(ENVIRONMENT | change)


def test_every_setting_is_in_the_reference() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/serving.md").read_text()
    given_by_the_operator = {"model_uri", "model_digest", "model_id", "track"}
    for name in set(ServeSettings.model_fields) - given_by_the_operator:
        prefix = "ATTUNE" if name in {"host", "port"} else "SERVE"
        assert f"`{prefix}_{name.upper()}`" in page
