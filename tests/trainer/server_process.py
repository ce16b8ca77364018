"""The inference server as its container runs it: a process of its own, with a model from a real S3 store."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.trainer.conftest import S3Server, free_port

READY_SECONDS = 480  # importing torch takes its time on a busy machine


@dataclass(eq=False)
class ServerProcess:
    """A running `python -m attune_trainer serve`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    termination_message: Path
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60, trust_env=False))

    def transcribe(self, audio: bytes, **fields: str) -> httpx.Response:
        """Sends a clip as OpenAI's own client does."""
        return self.client.post(
            f"{self.url}/v1/audio/transcriptions",
            files={"file": ("clip.wav", audio, "audio/wav")},
            data={"model": "whisper-1"} | fields,
        )

    def sample(self, name: str, **labels: str) -> float:
        """Reads one sample of /metrics; 0 where it is not there."""
        text = self.client.get(f"{self.url}/metrics").text
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                if one.name == name and labels.items() <= one.labels.items():
                    return float(one.value)
        return 0.0

    def is_ready(self) -> bool:
        try:
            return self.client.get(f"{self.url}/readyz").status_code == 200
        except httpx.HTTPError:
            return False


def wait_until(condition: Callable[[], bool], seconds: float = 60.0, what: str = "the condition") -> None:
    """Waits for a condition, with a deadline."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true in {seconds:g} s"
        pause.wait(0.05)


@contextmanager
def start_server(
    s3_server: S3Server, folder: Path, model_uri: str, *, wait: bool = True, **settings: str
) -> Iterator[ServerProcess]:
    """Starts a server and ends it again; settings are environment variables."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ATTUNE_")},
        **s3_server.environment(),
        "OMP_NUM_THREADS": "1",  # the same arithmetic as the offline transcription that is compared with
        "ATTUNE_MODEL_URI": model_uri,
        "ATTUNE_MODEL_ID": "ft:mini:0a1b2c",
        "ATTUNE_TRACK": "stable",
        "ATTUNE_WORK_DIRECTORY": str(folder / "work"),
        "ATTUNE_TERMINATION_MESSAGE_FILE": str(folder / "termination-log"),
        "ATTUNE_HOST": "127.0.0.1",
        "ATTUNE_PORT": str(port),
        "SERVE_DRAIN_SECONDS": "0",
        **settings,
    }
    log = folder / "log"
    output: IO[bytes]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "attune_trainer", "serve"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = ServerProcess(f"http://127.0.0.1:{port}", process, log, folder / "termination-log")
    try:
        if wait:
            wait_until(lambda: process.poll() is not None or server.is_ready(), READY_SECONDS, "readiness")
            assert process.poll() is None, log.read_text()
        yield server
    finally:
        server.client.close()
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
