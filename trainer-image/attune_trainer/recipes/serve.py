"""`python -m attune_trainer serve`: fetches a model, warms it up, and answers transcription requests until SIGTERM."""

import asyncio
import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import NoReturn

import uvicorn
from attune.contract.environment import WORK_DIRECTORY_VARIABLE
from attune.contract.exitcode import ExitCode

from attune_trainer.failures import RecipeFailure, from_exception
from attune_trainer.job import summarise, write_termination_message
from attune_trainer.processors import usable_processors
from attune_trainer.serving.app import Phase, Service, build_app
from attune_trainer.serving.audio import Samples
from attune_trainer.serving.batching import Batcher, BatchLimits
from attune_trainer.serving.exposition import ServeMetrics
from attune_trainer.serving.settings import ServeSettings
from attune_trainer.store import Store, fetch_model

_log = logging.getLogger(__name__)

_DECODING_THREADS = 2
_CPU_BATCH_SECONDS = 120.0
_GPU_BATCH_SECONDS = 960.0


@dataclass(frozen=True)
class LoadedModel:
    """A model that is warm.

    Attributes:
        transcribe: float32 samples at 16 kHz and their language, where it is known -> texts, in the same order.
        padded_seconds: length of a clip -> the length that it is padded to.
        max_batch_seconds: of padded audio, what the device takes at once.
        languages: ISO 639-1 codes that it may be told.
    """

    transcribe: Callable[[list[Samples], str | None], list[str]]
    padded_seconds: Callable[[float], float]
    max_batch_seconds: float
    languages: tuple[str, ...]


def load_model(settings: ServeSettings, directory: Path) -> LoadedModel:
    """Fetches the model, verifies its digest, loads it and runs it once.

    Raises:
        RecipeFailure: the model is missing, was changed, or is of an unknown architecture.
    """
    started = monotonic()
    path = fetch_model(Store.from_environment(), settings.model_uri, directory, settings.model_digest)
    fetched = monotonic()
    # They take seconds to import, and the server answers its probes meanwhile.
    import torch  # noqa: PLC0415

    from attune_trainer.modeling import load_recognizer  # noqa: PLC0415

    torch.set_num_threads(usable_processors(os.environ))
    imported = monotonic()
    recognizer = load_recognizer(path)
    recognizer.warm_up()
    _log.info(
        "model is ready",
        extra={
            "model_id": settings.model_id,
            "padding": recognizer.padding.value,
            "threads": torch.get_num_threads(),
            "fetch_seconds": round(fetched - started, 2),
            "import_seconds": round(imported - fetched, 2),
            "load_seconds": round(monotonic() - imported, 2),
        },
    )

    def transcribe(samples: list[Samples], language: str | None) -> list[str]:
        return recognizer.transcribe(samples, settings.max_batch_utterances, language)

    device_bound = _GPU_BATCH_SECONDS if recognizer.device.type == "cuda" else _CPU_BATCH_SECONDS
    return LoadedModel(
        transcribe,
        recognizer.padded_seconds,
        settings.max_batch_seconds or device_bound,
        recognizer.languages,
    )


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to serve(): it may only close once the drain is over."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: ServeSettings, load: Callable[[], LoadedModel]) -> None:
    """Answers requests from the moment that the model is loaded until SIGTERM, and everything accepted before it ends.

    On SIGTERM: /readyz says no, requests are still accepted for settings.drain_seconds, then the listening socket
    closes, and what is in flight is answered. A second SIGTERM or SIGINT ends the drain at once.

    Args:
        settings: what to serve, and the bounds.
        load: runs on the model's thread while the server already answers its probes.

    Raises:
        RecipeFailure: the model could not be loaded.
    """
    loop = asyncio.get_running_loop()
    worker = ThreadPoolExecutor(1, thread_name_prefix="model")
    service = Service(
        settings,
        ServeMetrics(settings.track, settings.model_id),
        ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode"),
    )
    server = _Server(
        uvicorn.Config(
            build_app(service),
            host=settings.host,
            port=settings.port,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=settings.keep_alive_seconds,
        )
    )
    asked, hurried = asyncio.Event(), asyncio.Event()

    def on_signal(name: str) -> None:
        _log.info("asked to end", extra={"signal": name})
        (hurried if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number.name)

    async def start() -> None:
        model = await loop.run_in_executor(worker, load)
        limits = BatchLimits(
            max_utterances=settings.max_batch_utterances,
            max_seconds=model.max_batch_seconds,
            max_wait_seconds=settings.max_batch_wait_seconds,
            max_requests=settings.max_requests,
            max_waiting_seconds=settings.max_waiting_audio_seconds,
        )
        service.languages = model.languages
        service.batcher = Batcher(model.transcribe, model.padded_seconds, worker, limits, service.metrics)
        if service.phase is Phase.LOADING:
            service.enter(Phase.READY)
        await service.batcher.run()

    async def drain() -> None:
        await asked.wait()
        loading = service.phase is Phase.LOADING
        service.enter(Phase.DRAINING)
        if not loading:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.drain_seconds):
                    await hurried.wait()
        server.should_exit = True

    serving = asyncio.create_task(server.serve())
    working, draining = asyncio.create_task(start()), asyncio.create_task(drain())
    try:
        await asyncio.wait({serving, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():  # only ever with an error: the model did not load
            server.should_exit = True
            await serving
            working.result()
        serving.result()
        if not asked.is_set():
            raise RuntimeError("the server ended by itself")
    finally:
        for task in (serving, working, draining):
            task.cancel()
        worker.shutdown(wait=False, cancel_futures=True)
        service.decoders.shutdown(wait=False, cancel_futures=True)


def main(arguments: list[str]) -> NoReturn:
    """Serves as the environment says, and ends the process with 0 once it was asked to end.

    Raises:
        RecipeFailure: the settings or the model are at fault; the termination message says so too.
    """
    del arguments
    # Read by OpenMP when numpy or torch are first imported, and by nothing later.
    os.environ["OMP_NUM_THREADS"] = str(usable_processors(os.environ))
    try:
        settings = ServeSettings.from_environment(os.environ)
        configured = os.environ.get(WORK_DIRECTORY_VARIABLE)
        directory = Path(configured or tempfile.mkdtemp(prefix="attune-")) / "model"
        _log.info("serving starts", extra={"model_id": settings.model_id, "track": settings.track.value})
        asyncio.run(serve(settings, lambda: load_model(settings, directory)))
    except Exception as error:
        failure = from_exception(error, "serve")
        if not isinstance(error, RecipeFailure):
            _log.exception("serving failed")
        write_termination_message(summarise(failure=failure.to_failure()))
        raise failure from error
    _log.info("everything accepted is answered")
    # A load that was under way cannot be interrupted, and taking torch apart orderly costs seconds: a pod that has
    # answered everything has no use for either.
    logging.shutdown()
    os._exit(ExitCode.OK)
