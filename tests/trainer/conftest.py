"""A real S3 server, and what every test of a recipe needs to run it."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from attune.contract.job import JobSpec, Owner
from attune_trainer.job import RecipeContext
from attune_trainer.progress import ProgressReporter
from attune_trainer.store import Store
from minio import Minio

from devcluster import binaries

BUCKET = "attune"


@dataclass(frozen=True)
class S3Server:
    """A running S3 server with one bucket."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str = BUCKET

    def store(self, bucket: str = BUCKET) -> Store:
        return Store(self.endpoint, bucket, access_key=self.access_key, secret_key=self.secret_key)

    def environment(self) -> dict[str, str]:
        return {
            "ATTUNE_STORE_ENDPOINT": self.endpoint,
            "ATTUNE_STORE_BUCKET": self.bucket,
            "ATTUNE_STORE_ACCESS_KEY": self.access_key,
            "ATTUNE_STORE_SECRET_KEY": self.secret_key,
        }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """versitygw, the S3 server of examples/platform, on a loopback port, keeping objects as files."""
    binaries.ensure(["versitygw"])
    folder = tmp_path_factory.mktemp("s3")
    (folder / "data").mkdir()
    port = free_port()
    server = S3Server(f"http://127.0.0.1:{port}", "tester", secrets.token_hex(16))
    environment = {
        "ROOT_ACCESS_KEY": server.access_key,
        "ROOT_SECRET_KEY": server.secret_key,
        "PATH": os.environ["PATH"],
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                binaries.find("versitygw"),
                "--port",
                f"127.0.0.1:{port}",
                "posix",
                "--sidecar",
                folder / "meta",
                folder / "data",
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            (folder / "meta").mkdir(exist_ok=True)
            deadline = time.monotonic() + 120
            while True:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
            client = Minio(f"127.0.0.1:{port}", server.access_key, server.secret_key, secure=False, region="us-east-1")
            client.make_bucket(BUCKET)
            yield server
        finally:
            process.terminate()
            process.wait(timeout=120)


@pytest.fixture
def s3_store(s3_server: S3Server) -> Store:
    """A store in the shared bucket; take keys below `key_prefix`."""
    return s3_server.store()


@pytest.fixture
def key_prefix() -> str:
    """A folder of the bucket that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def make_context(s3_store: Store, tmp_path: Path) -> Callable[..., RecipeContext]:
    """Gives the context in which a recipe runs as a Job would."""

    def make(recipe: dict[str, Any], **changes: Any) -> RecipeContext:
        spec = JobSpec(
            owner=Owner(kind="Test", namespace="speech", name="subject", uid="0"),
            result_key=f"results/{uuid.uuid4().hex}.json",
            recipe=recipe,  # type: ignore[arg-type] # the discriminator picks the model
        )
        fields: dict[str, Any] = {
            "spec": spec,
            "store": s3_store,
            "reporter": ProgressReporter(),
            "work_directory": tmp_path / "work",
            "attempt_uid": "attempt-1",
            "stop": threading.Event(),
        }
        context = RecipeContext(**(fields | changes))
        context.work_directory.mkdir(exist_ok=True)
        return context

    return make


@dataclass(frozen=True)
class Ended:
    """How a Job's container ended."""

    code: int
    summary: dict[str, Any] | None
    log: str


@pytest.fixture
def job_environment(s3_server: S3Server, tmp_path: Path) -> dict[str, str]:
    """The environment that a Job's container gets."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("ATTUNE_")},
        **s3_server.environment(),
        "ATTUNE_JOB_FILE": str(tmp_path / "job.json"),
        "ATTUNE_TERMINATION_MESSAGE_FILE": str(tmp_path / "termination-log"),
        "ATTUNE_WORK_DIRECTORY": str(tmp_path / "work"),
        "ATTUNE_PROGRESS_PORT": "0",
        "ATTUNE_PROGRESS_HOST": "127.0.0.1",
        "ATTUNE_ATTEMPT_UID": "attempt-1",
    }


def read_summary(environment: dict[str, str]) -> dict[str, Any] | None:
    path = Path(environment["ATTUNE_TERMINATION_MESSAGE_FILE"])
    summary: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return summary
