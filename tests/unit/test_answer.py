"""Servers that never end, or end too early, keep nobody waiting."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import requests
from attune.adapters.answer import read_bounded
from attune.adapters.progress import read_progress
from attune.contract.result import Progress
from attune.errors import Unavailable

Start = Callable[..., int]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.fixture
def start() -> Iterator[Start]:
    """Serves one answer, piece by piece, with a pause after each; gives the port."""
    listeners = []

    def begin(*pieces: bytes, pause: float = 0.0) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def answer() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    for piece in pieces:
                        connection.sendall(piece)
                        time.sleep(pause)

        threading.Thread(target=answer, daemon=True).start()
        return int(listener.getsockname()[1])

    yield begin
    for listener in listeners:
        listener.close()


def read(port: int, *, most_bytes: int = 100, seconds: float = 5.0) -> bytes:
    with requests.get(f"http://127.0.0.1:{port}", stream=True, timeout=5) as response:
        return read_bounded(response, most_bytes=most_bytes, seconds=seconds)


def test_a_body_is_read_whole_in_whatever_pieces_it_comes(start: Start) -> None:
    assert read(start(HEAD + b"Content-Length: 6\r\n\r\nab", b"cd", b"ef", pause=0.02)) == b"abcdef"
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    assert read(start(chunked, b"3\r\ndef\r\n0\r\n\r\n", pause=0.02)) == b"abcdef"


def test_of_a_longer_body_one_byte_more_is_read(start: Start) -> None:
    assert read(start(HEAD + b"Content-Length: 9\r\n\r\nabcdefghi"), most_bytes=3) == b"abcd"


def test_a_body_that_drips_is_given_up(start: Start) -> None:
    port = start(HEAD + b"Content-Length: 50\r\n\r\n", *[b" "] * 50, pause=0.1)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="not complete"):
        read(port, seconds=0.3)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(HEAD + b"Content-Length: 50\r\n\r\n{", id="cut off"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\nfff\r\n{", id="cut off in a chunk"),
        pytest.param(HEAD + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", id="not what it says"),
        pytest.param(HEAD + b"Content-Length: 2\r\n\r\n{}", id="no progress"),
        pytest.param(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", id="busy"),
        pytest.param(b"?", id="no HTTP"),
    ],
)
def test_progress_that_cannot_be_read_is_none(start: Start, answer: bytes) -> None:
    assert read_progress("127.0.0.1", start(answer)) is None


def test_progress_is_read(start: Start) -> None:
    told = Progress(stage="Training", percent=7)
    body = told.model_dump_json(by_alias=True).encode()
    port = start(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert read_progress("127.0.0.1", port) == told
