"""`python -m attune_trainer`: runs the mounted job.json; `python -m attune_trainer serve`: the inference server."""

import importlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from attune.contract.environment import JOB_FILE, JOB_FILE_VARIABLE, STOP_SECONDS
from attune.contract.exitcode import ExitCode

from attune_trainer import job
from attune_trainer.failures import RecipeFailure, Terminated, from_exception
from attune_trainer.logs import configure_logging
from attune_trainer.progress import ProgressReporter, ProgressServer
from attune_trainer.recipes import COMMANDS
from attune_trainer.store import Store

_log = logging.getLogger("attune_trainer")


def run_job(stop: threading.Event) -> ExitCode:
    """Runs the job file's recipe to its end, leaves the Summary, and gives the exit code."""
    recipe = "the Job"
    try:
        spec = job.read_spec(Path(os.environ.get(JOB_FILE_VARIABLE) or JOB_FILE))
        recipe = spec.recipe.recipe
        _log.info("recipe starts", extra={"recipe": recipe, "owner": f"{spec.owner.kind}/{spec.owner.name}"})
        reporter = ProgressReporter()
        with ProgressServer(reporter):
            result = job.run(spec, Store.from_environment(), reporter, stop=stop)
        job.write_termination_message(job.summarise(result=result))
    except Exception as error:  # noqa: BLE001 (whatever ends a recipe becomes an exit code and a message)
        failure = from_exception(error, recipe)
        if failure.code is ExitCode.INTERNAL_ERROR:
            _log.exception("recipe failed", extra={"recipe": recipe, "reason": failure.reason})
        else:
            _log.error("recipe failed", extra={"recipe": recipe, "reason": failure.reason, "detail": failure.message})
        job.write_termination_message(job.summarise(failure=failure.to_failure()))
        return failure.code
    _log.info("recipe finished", extra={"recipe": recipe})
    return ExitCode.OK


def give_up() -> None:
    """Ends the process at once, as one that was told to; what it was doing is lost, and its last checkpoint is not."""
    message = f"the Job did not end within {STOP_SECONDS} s of being asked to; it goes on from its last checkpoint"
    _log.warning("ends in the middle of its work", extra={"seconds": STOP_SECONDS})
    job.write_termination_message(job.summarise(failure=Terminated(message).to_failure()))
    os._exit(int(ExitCode.TERMINATED))


def main(arguments: list[str]) -> int:
    """Gives the process's exit status: that of a command, or the ExitCode of the job file's recipe."""
    configure_logging()
    if arguments:
        command, *rest = arguments
        if command not in COMMANDS:
            _log.error("unknown command", extra={"command": command, "known": sorted(COMMANDS)})
            return int(ExitCode.INVALID_INPUT)
        try:
            return int(importlib.import_module(COMMANDS[command]).main(rest) or 0)
        except RecipeFailure as failure:
            _log.error("command failed", extra={"reason": failure.reason, "detail": failure.message})
            return int(failure.code)
    stop = threading.Event()

    def request_stop(number: int, _frame: FrameType | None) -> None:
        _log.info("asked to end", extra={"signal": signal.Signals(number).name})
        if not stop.is_set():
            last_moment = threading.Timer(STOP_SECONDS, give_up)
            last_moment.daemon = True
            last_moment.start()
        stop.set()

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, request_stop)
    return int(run_job(stop))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
