"""The inference server over real HTTP, as a process, with the Mini model out of a real S3 store."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from attune_trainer.modeling import load_recognizer
from attune_trainer.store import digest_directory

from tests.assets.mini_model import ensure_mini_corpus, ensure_mini_model
from tests.trainer.conftest import S3Server
from tests.trainer.server_process import ServerProcess, start_server, wait_until

MODEL_KEY = "serve-tests/mini"
MODEL_URI = f"s3://attune/{MODEL_KEY}"
MAX_UPLOAD_BYTES = 2_000_000
MAX_REQUESTS = 24  # and as many clips

pytestmark = pytest.mark.slow  # the Mini model is trained on first use


@pytest.fixture(scope="session")
def mini_model(s3_server: S3Server) -> Path:
    """The Mini model's folder; its files are in the store under MODEL_URI as well."""
    folder = ensure_mini_model()
    s3_server.store().upload_directory(folder, MODEL_KEY)
    return folder


@pytest.fixture(scope="session")
def clips() -> list[bytes]:
    """WAV files of the voices that the Mini model knows."""
    return [file.read_bytes() for file in sorted(ensure_mini_corpus("old").rglob("*.wav"))[:MAX_REQUESTS]]


@pytest.fixture(scope="session")
def texts(mini_model: Path) -> list[str]:
    """What the model makes of the clips without any server."""
    audio = []
    for file in sorted(ensure_mini_corpus("old").rglob("*.wav"))[:MAX_REQUESTS]:
        samples, rate = soundfile.read(file, dtype="float32")
        assert rate == 16000
        audio.append(samples)
    return load_recognizer(mini_model, "cpu").transcribe(audio)


@pytest.fixture(scope="session")
def server(s3_server: S3Server, mini_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start_server(
        s3_server,
        tmp_path_factory.mktemp("serve"),
        MODEL_URI,
        ATTUNE_MODEL_DIGEST=digest_directory(mini_model),
        SERVE_MAX_UPLOAD_BYTES=str(MAX_UPLOAD_BYTES),
        SERVE_MAX_REQUESTS=str(MAX_REQUESTS),
    ) as started:
        yield started


def test_a_clip_is_answered_as_the_model_hears_it(server: ServerProcess, clips: list[bytes], texts: list[str]) -> None:
    response = server.transcribe(clips[0])
    assert response.status_code == 200
    assert response.json() == {"text": texts[0]}
    assert response.headers["x-attune-model-id"] == "ft:mini:0a1b2c"
    assert response.headers["x-attune-track"] == "stable"


def test_every_format_of_the_api_says_the_same(server: ServerProcess, clips: list[bytes], texts: list[str]) -> None:
    plain = server.transcribe(clips[1], response_format="text", temperature="0", language="en")
    assert plain.headers["content-type"].startswith("text/plain")
    assert plain.text == f"{texts[1]}\n"
    fields = {"response_format": "verbose_json", "timestamp_granularities[]": "segment"}
    verbose = server.transcribe(clips[1], **fields).json()
    with soundfile.SoundFile(next(iter(sorted(ensure_mini_corpus("old").rglob("*.wav"))[1:2]))) as sound:
        seconds = sound.frames / sound.samplerate
    assert verbose["duration"] == pytest.approx(seconds, abs=0.001)
    assert verbose == {
        "task": "transcribe",
        "language": "en",
        "duration": verbose["duration"],
        "text": texts[1],
        "segments": [{"id": 0, "start": 0.0, "end": verbose["duration"], "text": texts[1]}],
    }


def test_the_model_is_listed_under_its_id_and_the_generic_name(server: ServerProcess) -> None:
    listed = server.client.get(f"{server.url}/v1/models").json()
    assert [(one["id"], one["object"]) for one in listed["data"]] == [
        ("ft:mini:0a1b2c", "model"),
        ("whisper-1", "model"),
    ]


def test_requests_at_the_same_time_share_batches_and_get_their_own_answers(
    server: ServerProcess, clips: list[bytes], texts: list[str]
) -> None:
    batches = server.sample("attune_serve_batch_utterances_count", track="stable")
    utterances = server.sample("attune_serve_batch_utterances_sum", track="stable")
    with ThreadPoolExecutor(len(clips)) as pool:
        responses = list(pool.map(server.transcribe, clips))
    assert [response.json().get("text") for response in responses] == texts
    assert server.sample("attune_serve_batch_utterances_sum", track="stable") - utterances == len(clips)
    assert server.sample("attune_serve_batch_utterances_count", track="stable") - batches < len(clips)


def test_metrics_belong_to_the_arm(server: ServerProcess, clips: list[bytes]) -> None:
    before = server.sample("attune_serve_requests_total", track="stable", status="200")
    seconds = server.sample("attune_serve_audio_seconds_total", track="stable")
    server.transcribe(clips[0])
    assert server.sample("attune_serve_requests_total", track="stable", status="200") == before + 1
    assert server.sample("attune_serve_audio_seconds_total", track="stable") > seconds
    assert server.sample("attune_serve_request_seconds_count", track="stable") >= before + 1
    assert server.sample("attune_serve_real_time_factor_count", track="stable") >= 1
    assert server.sample("attune_serve_queue_utterances", track="stable") == 0
    assert server.sample("attune_serve_ready", track="stable") == 1
    assert server.sample("attune_serve_model_info", track="stable", model_id="ft:mini:0a1b2c") == 1
    samples = [line for line in server.client.get(f"{server.url}/metrics").text.splitlines() if line[0] != "#"]
    assert samples
    assert all('track="stable"' in line for line in samples)


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "gpt-4o-transcribe"}, 404, "model_not_found", "model"),
        ({"response_format": "srt"}, 400, "unsupported_value", "response_format"),
        ({"temperature": "0.7"}, 400, "unsupported_value", "temperature"),
        ({"temperature": "warm"}, 400, "unsupported_value", "temperature"),
        ({"prompt": "Names: Anna"}, 400, "unsupported_value", "prompt"),
        ({"language": "fr"}, 400, "unsupported_value", "language"),
        ({"stream": "true"}, 400, "unsupported_value", "stream"),
        ({"timestamp_granularities[]": "word"}, 400, "unsupported_value", "timestamp_granularities[]"),
        ({"best_of": "5"}, 400, "unknown_parameter", None),
    ],
)
def test_what_is_not_offered_is_refused_and_not_ignored(
    server: ServerProcess, clips: list[bytes], fields: dict[str, str], status: int, code: str, param: str | None
) -> None:
    response = server.transcribe(clips[0], **fields)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert error["message"]
    assert response.headers["x-attune-track"] == "stable"


def test_audio_that_cannot_be_used_is_the_clients_error(server: ServerProcess) -> None:
    errors = server.sample("attune_serve_errors_total", track="stable", code="invalid_audio")
    for garbage in (b"", b"no audio at all", np.random.default_rng(3).bytes(100_000), b"RIFF\x24\x00\x00\x00WAVEfmt "):
        response = server.transcribe(garbage)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_audio")
        assert response.json()["error"]["param"] == "file"
    assert server.sample("attune_serve_errors_total", track="stable", code="invalid_audio") == errors + 4


def test_a_form_that_is_none_is_refused(server: ServerProcess, clips: list[bytes]) -> None:
    url = f"{server.url}/v1/audio/transcriptions"
    no_boundary = {"content-type": "multipart/form-data"}
    cases = [
        (server.client.post(url, json={"model": "whisper-1"}), 415, "unsupported_media_type"),
        (server.client.post(url, content=b"x", headers=no_boundary), 400, "invalid_multipart"),
        (server.client.post(url, files={"model": (None, b"whisper-1")}), 400, "missing_required_parameter"),
        (server.client.post(url, files={"file": ("a.wav", clips[0])}), 400, "missing_required_parameter"),
        (server.client.post(url, files=[("file", ("a", b"1")), ("file", ("b", b"2"))]), 400, "invalid_multipart"),
        (server.client.post(url, files={"model": ("a", b"1"), "file": ("b", b"2")}), 400, "invalid_multipart"),
        (server.client.post(url, files={"model": ("a", b"1")}), 400, "invalid_type"),
        (server.client.get(url), 405, "method_not_allowed"),
        (server.client.get(f"{server.url}/v2"), 404, "not_found"),
    ]  # fmt: skip
    for response, status, code in cases:
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_too_much_is_refused_and_the_server_goes_on(
    server: ServerProcess, clips: list[bytes], texts: list[str]
) -> None:
    response = server.transcribe(b"\0" * (3 * MAX_UPLOAD_BYTES))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "file_too_large")
    assert server.transcribe(clips[2]).json() == {"text": texts[2]}


class HalfSent:
    """A request whose upload stops half way until it is let go."""

    def __init__(self, server: ServerProcess, audio: bytes) -> None:
        self._server = server
        self._go = threading.Event()
        built = httpx.Request(
            "POST",
            f"{server.url}/v1/audio/transcriptions",
            files={"file": ("clip.wav", audio, "audio/wav")},
            data={"model": "whisper-1"},
        )
        self._body = built.read()
        self._type = built.headers["content-type"]

    def _halves(self) -> Iterator[bytes]:
        yield self._body[: len(self._body) // 2]
        assert self._go.wait(60)
        yield self._body[len(self._body) // 2 :]

    def send(self) -> httpx.Response:
        return httpx.post(
            f"{self._server.url}/v1/audio/transcriptions",
            content=self._halves(),
            headers={"content-type": self._type},
            timeout=60,
            trust_env=False,
        )

    def go(self) -> None:
        self._go.set()


def test_more_requests_than_are_accepted_get_429_and_lose_nothing_else(
    server: ServerProcess, clips: list[bytes], texts: list[str]
) -> None:
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:
        requests = [HalfSent(server, clip) for clip in clips]
        answers = [pool.submit(request.send) for request in requests]
        accepted = "attune_serve_requests_accepted"
        wait_until(lambda: server.sample(accepted) == MAX_REQUESTS, what="as many requests as are accepted")
        refused = server.transcribe(clips[3])
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert server.is_ready()  # busy is not broken: probes are answered
        for request in requests:
            request.go()
        assert [answer.result().json() for answer in answers] == [{"text": text} for text in texts]
    wait_until(lambda: server.sample(accepted) == 0, what="free places")
    assert server.transcribe(clips[3]).json() == {"text": texts[3]}


def test_sigterm_cuts_no_request_and_says_nothing_of_what_was_said(
    s3_server: S3Server, mini_model: Path, tmp_path: Path, clips: list[bytes], texts: list[str]
) -> None:
    with (
        start_server(s3_server, tmp_path, MODEL_URI, SERVE_DRAIN_SECONDS="60") as server,
        ThreadPoolExecutor(8) as pool,
    ):
        assert "connection" not in server.transcribe(clips[0]).headers
        requests = [HalfSent(server, clip) for clip in clips[:8]]
        answers = [pool.submit(request.send) for request in requests]
        wait_until(lambda: server.sample("attune_serve_requests_accepted") == 8, what="eight accepted requests")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not server.is_ready(), what="the end of readiness")
        late = server.transcribe(clips[9])  # endpoints are not updated at once: who still comes is served
        assert late.json() == {"text": texts[9]}
        assert late.headers["connection"] == "close"
        server.process.send_signal(signal.SIGTERM)  # ends the drain; what is in flight is waited for all the same
        wait_until(lambda: "Shutting down" in server.log.read_text(), what="the closing of the socket")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.url}/healthz", trust_env=False)
        for request in requests:
            request.go()
        assert [answer.result().json() for answer in answers] == [{"text": text} for text in texts[:8]]
        assert server.process.wait(timeout=60) == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert lines[-1]["message"] == "everything accepted is answered"
    for text in (text for text in texts[:10] if " " in text):
        assert text not in server.log.read_text()


def test_sigterm_while_the_model_is_loading_ends_at_once(
    s3_server: S3Server, mini_model: Path, tmp_path: Path, clips: list[bytes]
) -> None:
    with start_server(s3_server, tmp_path, MODEL_URI, wait=False, SERVE_DRAIN_SECONDS="60") as server:

        def is_live() -> bool:
            try:
                return server.client.get(f"{server.url}/healthz").status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(is_live, 300, "liveness")
        # torch is not imported yet, so the model cannot be there.
        early = server.transcribe(clips[0])
        assert (early.status_code, early.json()["error"]["code"]) == (503, "loading")
        assert early.headers["retry-after"] == "5"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("uri", "digest", "status", "reason"),
    [
        ("s3://attune/serve-tests/none", "", 12, "ModelNotFound"),
        (MODEL_URI, f"sha256:{'0' * 64}", 10, "DigestMismatch"),
        ("file:///etc", "", 10, "InvalidSettings"),
    ],
)
def test_a_model_that_cannot_be_served_ends_the_process_with_its_reason(
    s3_server: S3Server, mini_model: Path, tmp_path: Path, uri: str, digest: str, status: int, reason: str
) -> None:
    with start_server(s3_server, tmp_path, uri, wait=False, ATTUNE_MODEL_DIGEST=digest) as server:
        assert server.process.wait(timeout=300) == status
    assert json.loads(server.termination_message.read_text())["failure"]["reason"] == reason


TRAFFIC = Path(__file__).parents[2] / "examples/telephone-prompts/traffic.py"


def start_traffic(url: str, report: Path, **options: str) -> "subprocess.Popen[bytes]":
    arguments = {
        "url": url,
        "host": "asr.example.com",
        "audio": str(ensure_mini_corpus("old")),
        "per-minute": "1200",
        "seconds": "600",
        "report": str(report),
    } | {name.replace("_", "-"): value for name, value in options.items()}
    return subprocess.Popen(
        [sys.executable, TRAFFIC, *(part for name, value in arguments.items() for part in (f"--{name}", value))],
        stderr=subprocess.PIPE,
    )


def test_the_examples_client_counts_what_it_sent(server: ServerProcess, tmp_path: Path) -> None:
    before = server.sample("attune_serve_requests_total", status="200")
    with start_traffic(server.url, tmp_path / "report.json", seconds="2", per_minute="300") as client:
        assert client.wait(timeout=120) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["requests"], report["failures"], report["notSent"]) == (10, 0, 0)
    assert (report["tracks"], report["models"]) == ({"stable": 10}, {"ft:mini:0a1b2c": 10})
    assert 0 < report["latency"]["p50"] <= report["latency"]["p95"] <= report["latency"]["max"]
    assert server.sample("attune_serve_requests_total", status="200") == before + 10


def test_the_examples_client_counts_failures_and_reports_when_it_is_ended(
    server: ServerProcess, tmp_path: Path
) -> None:
    (tmp_path / "noise.wav").write_bytes(b"no audio")
    before = server.sample("attune_serve_requests_total", status="400")
    with start_traffic(server.url, tmp_path / "report.json", audio=str(tmp_path)) as client:
        wait_until(
            lambda: server.sample("attune_serve_requests_total", status="400") >= before + 3, what="three requests"
        )
        client.terminate()
        assert client.wait(timeout=60) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failures"] == report["requests"] >= 3
    assert report["failureKinds"] == {"status 400": report["failures"]}
    assert report["tracks"] == {"stable": report["failures"]}


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1:80", "http://localhost:80", "https://127.0.0.1", "http://[2001:db8::1]"]
)
def test_the_examples_client_speaks_to_loopback_only(tmp_path: Path, url: str) -> None:
    client = start_traffic(url, tmp_path / "report.json")
    _, message = client.communicate(timeout=60)
    assert client.returncode == 2
    assert b"loopback" in message or b"http://ADDRESS:PORT" in message
    assert not (tmp_path / "report.json").exists()
