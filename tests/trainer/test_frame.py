"""The Job's process: exit codes, Summary, published result, progress, logs, a request to end."""

import importlib.util
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attune.contract.environment import TERMINATION_MESSAGE_BYTES
from attune.contract.exitcode import ExitCode
from attune.contract.job import JobSpec
from attune.contract.result import Failure, Rejection, Summary
from attune_trainer import failures, job
from attune_trainer.decimals import decimal_string
from attune_trainer.failures import RecipeFailure
from attune_trainer.logs import JsonFormatter
from attune_trainer.progress import ProgressReporter, ProgressServer
from attune_trainer.recipes import COMMANDS, RECIPES
from attune_trainer.store import Store

from .conftest import S3Server, free_port, read_summary
from .server_process import wait_until
from .test_prepare import good_audio, line, recipe, tone, upload, wav

PRIVATE_TEXT = "the caller said something private"


def spec(key_prefix: str, the_recipe: dict[str, Any]) -> dict[str, Any]:
    owner = {"kind": "Dataset", "namespace": "speech", "name": "calls", "uid": "1"}
    return {"version": "v1", "owner": owner, "resultKey": f"{key_prefix}/result.json", "recipe": the_recipe}


def start(environment: dict[str, str], content: dict[str, Any] | str) -> "subprocess.Popen[str]":
    Path(environment["ATTUNE_JOB_FILE"]).write_text(content if isinstance(content, str) else json.dumps(content))
    return subprocess.Popen(
        [sys.executable, "-m", "attune_trainer"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(environment: dict[str, str], content: dict[str, Any] | str) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Runs the Job's container to its end: exit code, Summary, log lines."""
    process = start(environment, content)
    output, _ = process.communicate(timeout=300)
    summary = read_summary(environment)
    assert summary is not None, output
    Summary.model_validate(summary)
    return process.returncode, summary, [json.loads(one) for one in output.splitlines()]


def test_a_job_publishes_its_result_and_says_it_again(
    s3_store: Store, key_prefix: str, job_environment: dict[str, str]
) -> None:
    lines = [line(number, text=f"{PRIVATE_TEXT} {number}") for number in range(40)]
    upload(s3_store, f"{key_prefix}/in", lines, good_audio(40))
    content = spec(key_prefix, recipe(key_prefix))
    code, summary, log = run(job_environment, content)
    assert code == ExitCode.OK
    published = json.loads(s3_store.read_bytes(f"{key_prefix}/result.json"))
    assert summary["result"] == published
    assert published["stats"]["utterances"] == 40
    assert {"time", "level", "logger", "message"} <= set(log[0])
    assert PRIVATE_TEXT not in json.dumps(log)
    # The sources are gone, so only what was published can be said again.
    for key in s3_store.list(f"{key_prefix}/in/"):
        s3_store.delete(key)
    code, again, log = run(job_environment, content)
    assert (code, again) == (ExitCode.OK, summary)
    assert "result is already published" in {one["message"] for one in log}


def test_an_attempt_that_comes_late_changes_nothing_that_was_published(
    s3_store: Store, key_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(s3_store, f"{key_prefix}/in", [line(number) for number in range(40)], good_audio(40))
    asked = JobSpec.model_validate(spec(key_prefix, recipe(key_prefix)))
    prepare = job.load_recipe("prepare")

    def attempt(uid: str) -> Any:
        return job.run(asked, s3_store, ProgressReporter(), work_directory=tmp_path / uid, attempt_uid=uid)

    def be_late(the_recipe: Any, context: job.RecipeContext) -> Any:
        """Works until the pod that took over is done."""
        monkeypatch.setattr(job, "load_recipe", lambda name: prepare)
        others.append(attempt("newer"))
        return prepare(the_recipe, context).model_copy(update={"uri": "s3://late"})

    others: list[Any] = []
    monkeypatch.setattr(job, "load_recipe", lambda name: be_late)
    assert [attempt("older")] == others
    assert json.loads(s3_store.read_bytes(asked.result_key))["uri"] == others[0].uri != "s3://late"


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        pytest.param({}, ExitCode.NOT_FOUND, "SourceEmpty", id="nothing in the source"),
        pytest.param({"ATTUNE_STORE_BUCKET": "no-such"}, ExitCode.NOT_FOUND, "BucketNotFound", id="no bucket"),
        pytest.param(
            {"ATTUNE_STORE_SECRET_KEY": "wrong-key"}, ExitCode.ACCESS_DENIED, "WrongCredentials", id="wrong secret key"
        ),
        pytest.param(
            {"ATTUNE_STORE_ACCESS_KEY": "unknown"}, ExitCode.ACCESS_DENIED, "WrongCredentials", id="unknown access key"
        ),
        pytest.param({"ATTUNE_STORE_ENDPOINT": ""}, ExitCode.INVALID_INPUT, "StoreNotConfigured", id="no endpoint"),
        pytest.param(
            {"ATTUNE_STORE_ENDPOINT": "http://127.0.0.1:9"},
            ExitCode.STORE_UNAVAILABLE,
            "StoreUnavailable",
            id="nobody answers",
        ),
    ],
)
def test_what_goes_wrong_is_an_exit_code_and_a_reason(
    s3_server: S3Server,
    key_prefix: str,
    job_environment: dict[str, str],
    changes: dict[str, str],
    code: ExitCode,
    reason: str,
) -> None:
    ended, summary, log = run(job_environment | changes, spec(key_prefix, recipe(key_prefix)))
    assert (ended, summary["failure"]["reason"]) == (code, reason)
    assert len(summary["failure"]["message"]) > 20
    assert s3_server.secret_key not in json.dumps([summary, log])
    assert "wrong-key" not in json.dumps([summary, log])


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="no JSON"),
        pytest.param({"version": "v1"}, id="parts missing"),
        pytest.param(spec("x", {"recipe": "unheard of"}), id="unknown recipe"),
        pytest.param(spec("x", recipe("x", unknownField=PRIVATE_TEXT)), id="unknown field"),
    ],
)
def test_a_job_of_another_contract_is_refused(job_environment: dict[str, str], content: dict[str, Any] | str) -> None:
    code, summary, log = run(job_environment, content)
    assert (code, summary["failure"]["reason"]) == (ExitCode.INVALID_INPUT, "InvalidJob")
    assert PRIVATE_TEXT not in json.dumps([summary, log])


@pytest.mark.parametrize("name", ["prepare", "finetune"])
def test_a_job_that_leaves_the_arithmetic_to_others_needs_no_torch(name: str) -> None:
    check = f"import sys, attune_trainer.job as job; job.load_recipe({name!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False, timeout=300).returncode == 0


def test_every_recipe_and_command_has_its_module() -> None:
    for name in RECIPES:
        assert "\ndef run(" in (importlib.util.find_spec(RECIPES[name]).loader.get_source(RECIPES[name]) or ""), name
    assert set(COMMANDS) == {"serve"}
    unknown = subprocess.run(
        [sys.executable, "-m", "attune_trainer", "dance"], capture_output=True, text=True, check=False, timeout=300
    )
    assert unknown.returncode == ExitCode.INVALID_INPUT
    assert json.loads(unknown.stdout)["known"] == ["serve"]


def fetch(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return str(answer.read().decode())


def test_sigterm_ends_with_143_and_the_next_attempt_finishes(
    s3_store: Store, key_prefix: str, job_environment: dict[str, str]
) -> None:
    audio = {f"a/{number}.wav": wav(tone(9, 200 + number, rate=44100), 44100) for number in range(40)}
    lines = [line(number, audio=f"a/{number % 40}.wav") for number in range(200)]
    upload(s3_store, f"{key_prefix}/in", lines, audio)
    port = free_port()
    # Each recording is listed five times with different texts, which makes work and is four times rejected.
    content = spec(key_prefix, recipe(key_prefix, maxRejectedShare="1"))
    process = start(job_environment | {"ATTUNE_PROGRESS_PORT": str(port)}, content)
    try:

        def decoding() -> bool:
            assert process.poll() is None
            try:
                progress = json.loads(fetch(port, "/progress"))
            except (urllib.error.URLError, ConnectionError):
                return False
            return bool(progress["stage"] == "Decoding" and progress["step"] >= 1)

        wait_until(decoding, 300)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == ExitCode.TERMINATED
    summary = read_summary(job_environment)
    assert summary is not None
    assert summary["failure"]["reason"] == "Terminated"
    assert not s3_store.exists(f"{key_prefix}/result.json")
    code, _, _ = run(job_environment, content)
    assert code == ExitCode.OK


def test_a_recipe_that_does_not_stop_is_ended_before_the_kubelet_kills_it(
    job_environment: dict[str, str], s3_store: Store, key_prefix: str
) -> None:
    """Killed by the kubelet it would be told from one that ran out of memory by nobody, and fail for good."""
    check = (
        "import os, signal, sys, time, attune_trainer.recipes.prepare as p, attune_trainer.__main__ as m\n"
        "def run(recipe, context):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    while True: time.sleep(1)\n"
        "p.run, m.STOP_SECONDS = run, 0.1\nsys.exit(m.main([]))"
    )
    Path(job_environment["ATTUNE_JOB_FILE"]).write_text(json.dumps(spec(key_prefix, recipe(key_prefix))))
    ended = subprocess.run(
        [sys.executable, "-c", check], env=job_environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == ExitCode.TERMINATED
    summary = read_summary(job_environment)
    assert summary is not None
    assert summary["failure"]["reason"] == "Terminated"
    assert "did not end within" in summary["failure"]["message"]


def test_an_unexpected_error_tells_its_type_and_place_but_quotes_nothing(
    job_environment: dict[str, str], s3_store: Store, key_prefix: str
) -> None:
    check = (
        "import sys, attune_trainer.recipes.prepare as p, attune_trainer.__main__ as m\n"
        f"def run(recipe, context): raise ValueError({PRIVATE_TEXT!r})\n"
        "p.run = run\nsys.exit(m.main([]))"
    )
    Path(job_environment["ATTUNE_JOB_FILE"]).write_text(json.dumps(spec(key_prefix, recipe(key_prefix))))
    ended = subprocess.run(
        [sys.executable, "-c", check], env=job_environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == ExitCode.INTERNAL_ERROR
    summary = read_summary(job_environment)
    assert summary is not None
    assert summary["failure"]["reason"] == "InternalError"
    assert "ValueError" in summary["failure"]["message"]
    assert PRIVATE_TEXT not in ended.stdout + ended.stderr + json.dumps(summary)
    traced = next(json.loads(one) for one in ended.stdout.splitlines() if "exception" in one)
    assert traced["exception"][0] == "builtins.ValueError"
    assert any("in run" in one for one in traced["exception"])


def test_memory_that_ran_out_says_what_to_lower() -> None:
    import torch  # noqa: PLC0415 (of the whole module only this test needs it)

    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        failure = failures.from_exception(error, "finetune")
        assert (failure.code, failure.reason) == (ExitCode.OUT_OF_MEMORY, "OutOfMemory")
        assert "maxBatchSeconds" in failure.message
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert failures.from_exception(caught.value, "evaluate").code is ExitCode.OUT_OF_MEMORY
    assert failures.from_exception(RuntimeError("other"), "evaluate").code is ExitCode.INTERNAL_ERROR


def test_a_disk_that_is_full_says_what_to_raise(tmp_path: Path) -> None:
    import torch  # noqa: PLC0415 (of the whole module only the test before this one needs it too)

    full = tmp_path / "full"
    full.symlink_to("/dev/full")  # what replaced a file instead of writing to it would replace the link

    def write() -> None:
        full.write_bytes(b"x")

    def fetch() -> None:
        try:
            write()
        except OSError as error:
            raise RuntimeError("not fetched") from error

    def save() -> None:
        torch.save({"weights": torch.zeros(1 << 20)}, full)

    for fill in (write, fetch, save):
        with pytest.raises((OSError, RuntimeError)) as caught:
            fill()
        failure = failures.from_exception(caught.value, "finetune")
        assert (failure.code, failure.reason) == (ExitCode.INVALID_INPUT, "EphemeralStorageFull")
        assert "ephemeral-storage in spec.resources.requests" in failure.message
    assert failures.from_exception(PermissionError("other"), "finetune").code is ExitCode.INTERNAL_ERROR


@pytest.mark.parametrize("character", ["x", "\u0939", "\x00", "\U0001f600"])
def test_a_failure_always_fits_in_a_termination_message(character: str) -> None:
    rejections = [
        Rejection(reason=f"Reason{'x' * 40}{index}", count=10**9, examples=[character * 128] * 3) for index in range(16)
    ]
    failure = RecipeFailure(ExitCode.INVALID_INPUT, "TooManyRejected", character * 5000, rejections).to_failure()
    message = job.summarise(failure=failure).to_message()
    assert len(message.encode()) <= TERMINATION_MESSAGE_BYTES
    read = Summary.model_validate_json(message).failure
    assert isinstance(read, Failure)
    assert read.reason == "TooManyRejected"
    assert len(read.message) > 300


def test_progress_is_answered_while_the_recipe_runs() -> None:
    now = [100.0]
    reporter = ProgressReporter(clock=lambda: now[0])
    with ProgressServer(reporter, host="127.0.0.1", port=0) as server:
        assert json.loads(fetch(server.port, "/progress")) == {"stage": "Starting", "percent": 0, "metrics": []}
        reporter.update(stage="Training", percent=20.7, step=900, total_steps=1000, epoch=1.5, metrics={"loss": 0.25})
        now[0] += 10
        reporter.update(step=920, metrics={"wer": math.nan})
        progress = json.loads(fetch(server.port, "/progress"))
        assert progress == {
            "stage": "Training",
            "percent": 20,
            "step": 920,
            "totalSteps": 1000,
            "epoch": "1.5",
            "estimatedRemainingSeconds": 40,  # 20 steps in 10 s, 80 to go; the 900 are of an earlier attempt
            "metrics": [{"name": "loss", "value": "0.25"}],
        }
        exported = fetch(server.port, "/metrics")
        assert 'attune_job_figure{name="loss"} 0.25' in exported
        assert "attune_job_step 920.0" in exported
        assert fetch(server.port, "/healthz") == "ok\n"
        with pytest.raises(urllib.error.HTTPError, match="404") as caught:
            fetch(server.port, "/other")
        caught.value.close()
    reporter.update(stage="Publishing", percent=50)
    now[0] += 10
    assert reporter.snapshot().step is None
    assert reporter.snapshot().estimated_remaining_seconds == 20


def test_progress_may_be_updated_from_many_threads() -> None:
    reporter = ProgressReporter()

    def work(number: int) -> None:
        for step in range(200):
            reporter.update(step=step, total_steps=200, metrics={f"figure{number}": step})
            reporter.snapshot()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {metric.value for metric in reporter.snapshot().metrics} == {"199"}


@pytest.mark.parametrize(
    ("value", "places", "expected"),
    [
        (0.1130000001, 6, "0.113"),
        (-0.0, 6, "0"),
        (-0.00000004, 6, "0"),
        (1e-7, 9, "0.0000001"),
        (12, 4, "12"),
        (0.12345, 4, "0.1234"),
        (123456789.5, 1, "123456789.5"),
        (np.float32(0.5), 6, "0.5"),
        (100.0, 0, "100"),
    ],
)
def test_decimals(value: float, places: int, expected: str) -> None:
    assert decimal_string(value, places) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_decimal_form(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        decimal_string(value)


def test_log_lines_are_json_with_extra_fields() -> None:
    record = logging.LogRecord("a.b", logging.WARNING, __file__, 1, "took %d s", (3,), None)
    record.step = 7
    entry = json.loads(JsonFormatter().format(record))
    assert (entry["level"], entry["logger"], entry["message"], entry["step"]) == ("warning", "a.b", "took 3 s", 7)
    assert os.linesep not in JsonFormatter().format(record)
