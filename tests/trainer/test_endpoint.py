"""An endpoint as an Evaluation's candidate: real HTTP servers, well behaved and otherwise."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from attune.contract.exitcode import ExitCode
from attune.contract.job import EndpointInput
from attune_trainer.failures import Terminated
from attune_trainer.scoring.endpoint import Clock, Endpoint, EndpointFailure, StoppableClock

# What a handler does with one request; the number counts requests from 0.
Answer = Callable[[BaseHTTPRequestHandler, int], None]


def send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, media: str = "application/json", **headers: str
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", media)
    handler.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def say(handler: BaseHTTPRequestHandler, text: str = "press one") -> None:
    send(handler, 200, json.dumps({"text": text}).encode())


class Requests(list[dict[str, Any]]):
    """What a server was asked."""


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, Requests]]:
    seen = Requests()
    lock = threading.Lock()
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                number = len(seen)
                seen.append(
                    {
                        "path": self.path,
                        "headers": {name.lower(): value for name, value in self.headers.items()},
                        "body": body,
                        "over": over,
                    }
                )
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has given up, as it should
                answer(self, number)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", seen
        finally:
            over.set()
            server.shutdown()


class CountingClock:
    """The real time, except that waits are noted and not waited for."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def now(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return False


class VirtualClock(CountingClock):
    """Time that passes only where somebody waits, or where the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> bool:
        self.time += seconds
        return super().wait(seconds)


def ask(url: str, clock: Clock | None = None, key: str | None = None, **told: Any) -> str:
    endpoint = Endpoint(EndpointInput(url=url, **told), key, clock or CountingClock())
    try:
        text, seconds = endpoint.transcribe(b"fLaC", "one.flac", "en")
        assert seconds > 0
        return text
    finally:
        endpoint.close()


def test_a_request_is_as_openai_documents_it() -> None:
    with serving(lambda handler, _: say(handler)) as (url, seen):
        assert ask(url + "/", key="the-key", model="vendor-large") == "press one"
    (request,) = seen
    assert request["path"] == "/v1/audio/transcriptions"
    assert request["headers"]["authorization"] == "Bearer the-key"
    for part in (b'name="file"; filename="one.flac"', b"fLaC", b'name="model"\r\n\r\nvendor-large', b"\r\n\r\nen\r\n"):
        assert part in request["body"]


def test_a_key_may_end_with_a_line_break_and_one_that_no_header_carries_is_said() -> None:
    with serving(lambda handler, _: say(handler)) as (url, seen):
        ask(url, key="the-key\n")
    assert seen[0]["headers"]["authorization"] == "Bearer the-key"
    for key in (" \n", "the\nkey", "schlüssel"):
        with pytest.raises(EndpointFailure) as caught:
            ask(url, key=key)
        assert caught.value.reason == "EndpointKeyUnusable"
        assert "schlüssel" not in caught.value.message


def test_without_a_key_none_is_sent() -> None:
    with serving(lambda handler, _: say(handler)) as (url, seen):
        ask(url)
    assert "authorization" not in seen[0]["headers"]


def test_what_passes_is_tried_again_with_growing_pauses() -> None:
    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        if number == 0:
            send(handler, 503, b"")
        elif number == 1:
            send(handler, 429, b"{}", retry_after="7")
        elif number == 2:
            send(handler, 429, b"{}", retry_after="86400")
        else:
            say(handler)

    clock = CountingClock()
    with serving(answer) as (url, seen):
        assert ask(url, clock) == "press one"
    assert len(seen) == 4
    assert clock.waits == [0.5, 7.0, 30.0]  # a server may not send the Job to sleep for a day


@pytest.mark.parametrize(
    ("answer", "reason", "says", "requests"),
    [
        pytest.param(
            lambda handler, _: send(handler, 429, b"{}"),
            "EndpointRateLimited",
            "set requestsPerMinute",
            3,
            id="429 for ever",
        ),
        pytest.param(
            lambda handler, _: send(handler, 200, b"<html>sign in</html>", "text/html; charset=utf-8"),
            "EndpointNotTranscribing",
            "answers with text/html",
            1,
            id="a page instead of JSON",
        ),
        pytest.param(
            lambda handler, _: send(handler, 200, b'{"text": 3}'),
            "EndpointNotTranscribing",
            "answers with application/json",
            1,
            id="JSON without a text",
        ),
        pytest.param(
            lambda handler, _: send(handler, 200, b'"' + b"x" * (3 << 20) + b'"'),
            "EndpointNotTranscribing",
            "JSON with a text is expected",
            1,
            id="an answer without end",
        ),
        pytest.param(
            lambda handler, _: send(handler, 500, b"secret trace"),
            "EndpointFailing",
            "status 500",
            3,
            id="500 for ever",
        ),
        pytest.param(
            lambda handler, _: send(handler, 401, b"{}"), "EndpointUnauthorized", "correct apiKey", 1, id="a wrong key"
        ),
        pytest.param(
            lambda handler, _: send(handler, 404, b"{}"), "EndpointNotFound", "ends in /v1", 1, id="a wrong path"
        ),
        pytest.param(
            lambda handler, _: send(handler, 302, b"", location="http://127.0.0.1:1/"),
            "EndpointRefused",
            "redirects",
            1,
            id="a redirect is not followed with the key",
        ),
        pytest.param(
            lambda handler, _: send(handler, 400, b'{"error": {"param": "file"}}'),
            "EndpointRefused",
            "status 400",
            1,
            id="refused audio",
        ),
        pytest.param(
            lambda handler, _: send(handler, 400, b'{"error": {"param": "language"}}'),
            "EndpointRefused",
            "status 400",
            2,
            id="a language that is refused even when it is not sent",
        ),
    ],
)
def test_an_endpoint_that_does_not_transcribe_is_named_and_bounded(
    answer: Answer, reason: str, says: str, requests: int
) -> None:
    with serving(answer) as (url, seen), pytest.raises(EndpointFailure) as caught:
        ask(url, key="the-key", max_attempts=3)
    assert caught.value.reason == reason
    assert says in caught.value.message
    assert caught.value.message.startswith(f"the endpoint {url} ")
    assert len(seen) == requests
    for hidden in ("the-key", "secret trace", "sign in", "xxx"):
        assert hidden not in caught.value.message
    if requests == 3:
        assert "in 3 attempts" in caught.value.message


def test_an_endpoint_that_hangs_is_bounded() -> None:
    with (
        serving(lambda handler, number: seen[number]["over"].wait(60)) as (url, seen),  # type: ignore[misc]
        pytest.raises(EndpointFailure) as caught,
    ):
        ask(url, timeout_seconds=1, max_attempts=2)
    assert caught.value.reason == "EndpointTimeout"
    assert "within 1 s in 2 attempts" in caught.value.message


def test_an_endpoint_that_drips_is_bounded() -> None:
    def drip(handler: BaseHTTPRequestHandler, number: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not seen[number]["over"].wait(0.2):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    with serving(drip) as (url, seen), pytest.raises(EndpointFailure) as caught:
        ask(url, timeout_seconds=1, max_attempts=1)
    assert caught.value.reason == "EndpointTimeout"


def test_an_endpoint_that_is_down_is_named() -> None:
    with serving(lambda handler, _: say(handler)) as (url, _):
        pass
    with pytest.raises(EndpointFailure) as caught:
        ask(url, max_attempts=2)
    assert caught.value.reason == "EndpointUnreachable"
    assert "ConnectError" in caught.value.message
    assert caught.value.code is ExitCode.INVALID_INPUT


def test_a_language_that_is_refused_is_left_out_from_then_on() -> None:
    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        if b'name="language"' in seen[number]["body"]:
            send(handler, 400, b'{"error": {"param": "language"}}')
        else:
            say(handler)

    with serving(answer) as (url, seen):
        endpoint = Endpoint(EndpointInput(url=url, max_attempts=1), None, CountingClock())
        for _ in range(2):
            assert endpoint.transcribe(b"fLaC", "one.flac", "en")[0] == "press one"
        endpoint.close()
    assert len(seen) == 3


def test_requests_keep_to_the_rate() -> None:
    clock = VirtualClock()
    with serving(lambda handler, _: say(handler)) as (url, _):
        endpoint = Endpoint(EndpointInput(url=url, requests_per_minute=60), None, clock)
        for _ in range(4):
            endpoint.transcribe(b"fLaC", "one.flac", "en")
            clock.time += 0.25  # what an answer takes
        endpoint.close()
    assert clock.waits == [0.75, 0.75, 0.75]


def test_a_job_that_is_to_end_waits_for_no_endpoint() -> None:
    stop = threading.Event()
    stop.set()
    with serving(lambda handler, _: send(handler, 429, b"{}", retry_after="30")) as (url, seen):
        with pytest.raises(Terminated):
            ask(url, StoppableClock(stop), max_attempts=10)
        assert len(seen) == 1
