"""Ordinary client traffic: sends prompts through the Gateway at an even pace and counts what comes back.

python examples/telephone-prompts/traffic.py --url http://127.0.0.1:8080 --host asr.example.com \
    --audio FOLDER --per-minute 30 --seconds 600 --report report.json

It needs nothing but Python, talks to loopback addresses only (a port that kubectl forwards), ends by itself, and
writes its report at the end as well as on SIGTERM or SIGINT. No transcript is kept.
"""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import json
import math
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATH = "/v1/audio/transcriptions"
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3"})
REQUEST_TIMEOUT_SECONDS = 45
MAX_SECONDS = 4 * 3600
MAX_PER_MINUTE = 6000
CONCURRENT = 16


@dataclass
class Tally:
    """Counts of answers; safe to add to from several threads."""

    requests: int = 0
    failures: int = 0
    late: int = 0  # not sent, because as many as are allowed were under way
    kinds: Counter[str] = field(default_factory=Counter)
    tracks: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, seconds: float, track: str, model: str) -> None:
        """Counts an answer with status 200."""
        with self.lock:
            self.requests += 1
            self.tracks[track] += 1
            self.models[model] += 1
            self.latencies.append(seconds)

    def failed(self, kind: str, track: str | None) -> None:
        """Counts any other outcome."""
        with self.lock:
            self.requests += 1
            self.failures += 1
            self.kinds[kind] += 1
            if track is not None:
                self.tracks[track] += 1

    def report(self, seconds: float) -> dict[str, Any]:
        """Gives the figures; latencies in seconds, over the answered requests."""
        with self.lock:
            ordered = sorted(self.latencies)
            return {
                "requests": self.requests,
                "failures": self.failures,
                "notSent": self.late,
                "failureKinds": dict(self.kinds),
                "tracks": dict(self.tracks),
                "models": dict(self.models),
                "seconds": round(seconds, 1),
                "latency": {
                    name: percentile(ordered, share)
                    for name, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
                },
            }


def percentile(ordered: list[float], share: float) -> float | None:
    """Gives the smallest value that at least this share of all values do not exceed: [1, 2, 3, 4], 0.5 -> 2."""
    if not ordered:
        return None
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 4)


def loopback(url: str) -> tuple[str, int]:
    """Gives host and port of an http URL whose host is a loopback address, written as a number.

    Raises:
        ValueError: for anything else; a demo that could be pointed at strangers would be a load generator.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None or parts.path.strip("/"):
        raise ValueError("the URL must be http://ADDRESS:PORT")
    try:
        address = ipaddress.ip_address(parts.hostname)
    except ValueError:
        raise ValueError("the URL's host must be a loopback address such as 127.0.0.1, not a name") from None
    if not address.is_loopback:
        raise ValueError(f"{address} is no loopback address")
    return parts.hostname, parts.port or 80


def build_form(name: str, audio: bytes) -> tuple[bytes, str]:
    """Builds the multipart body that OpenAI's clients send, and its content type."""
    boundary = uuid.uuid4().hex
    fields = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in (("model", "whisper-1"), ("response_format", "json"))
    )
    head = (
        f'{fields}--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return head.encode() + audio + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def send(address: tuple[str, int], host: str, file: Path, tally: Tally) -> None:
    """Sends one prompt on a connection of its own, without a second try, and counts the outcome."""
    body, content_type = build_form(file.name, file.read_bytes())
    connection = http.client.HTTPConnection(*address, timeout=REQUEST_TIMEOUT_SECONDS)
    began = time.monotonic()
    try:
        connection.request(
            "POST", PATH, body, {"Host": host, "Content-Type": content_type, "User-Agent": "telephone-prompts"}
        )
        response = connection.getresponse()
        answer = response.read()
        track, model = response.headers.get("x-attune-track"), response.headers.get("x-attune-model-id")
        if response.status != http.HTTPStatus.OK:
            tally.failed(f"status {response.status}", track)
        elif not isinstance(json.loads(answer).get("text"), str):
            tally.failed("no text", track)
        else:
            tally.answered(time.monotonic() - began, track or "unknown", model or "unknown")
    except (OSError, http.client.HTTPException, ValueError) as error:
        tally.failed(type(error).__name__, None)
    finally:
        connection.close()


def run(options: argparse.Namespace, files: list[Path], tally: Tally, stop: threading.Event) -> float:
    """Sends until the time is over or stop is set, waits for what is under way, and gives the seconds that it took."""
    began = time.monotonic()
    places = threading.Semaphore(CONCURRENT)

    def send_and_leave(file: Path) -> None:
        try:
            send(options.address, options.host, file, tally)
        finally:
            places.release()

    with ThreadPoolExecutor(CONCURRENT, thread_name_prefix="client") as pool:
        number = 0
        while not stop.is_set():
            due = began + number * 60 / options.per_minute
            if due - began >= options.seconds:
                break
            if stop.wait(max(0.0, due - time.monotonic())):
                break
            if places.acquire(blocking=False):
                pool.submit(send_and_leave, files[number % len(files)])
            else:
                with tally.lock:
                    tally.late += 1
            number += 1
    return time.monotonic() - began


def bounded(low: int, high: int) -> Any:
    """Builds an argument type for whole numbers from low to high."""

    def read(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}")
        return value

    return read


def read_options(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line; anything that is wrong ends the program with a message."""
    parser = argparse.ArgumentParser(description="Sends telephone prompts through a Gateway and counts the answers.")
    parser.add_argument("--url", required=True, help="http://127.0.0.1:PORT, a forwarded port of the Gateway")
    parser.add_argument("--host", required=True, help="hostname of the route, sent as the Host header")
    parser.add_argument("--audio", required=True, type=Path, help="folder with audio files")
    parser.add_argument("--per-minute", type=bounded(1, MAX_PER_MINUTE), default=30)
    parser.add_argument("--seconds", type=bounded(1, MAX_SECONDS), default=600)
    parser.add_argument("--report", required=True, type=Path, help="file for the figures, as JSON")
    options = parser.parse_args(arguments)
    try:
        options.address = loopback(options.url)
    except ValueError as error:
        parser.error(str(error))
    options.files = sorted(file for file in options.audio.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
    if not options.files:
        parser.error(f"{options.audio} holds no audio file")
    return options


def main(arguments: list[str]) -> int:
    """Sends, and leaves the report; 0 whatever came back, because judging it is the caller's."""
    options = read_options(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    tally = Tally()
    seconds = run(options, options.files, tally, stop)
    report = tally.report(seconds)
    partial = options.report.with_name(f".{options.report.name}.part")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(options.report)
    print(f"{report['requests']} requests, {report['failures']} failed, by arm: {report['tracks']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
