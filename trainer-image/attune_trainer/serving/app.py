"""The HTTP application: OpenAI's transcription API, health and metrics."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from enum import StrEnum
from time import monotonic, time
from typing import Any, Final, TypeVar

from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import FormData, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from attune_trainer.headers import BACKGROUND, MODEL_ID_HEADER, PRIORITY_HEADER, TRACK_HEADER
from attune_trainer.serving.audio import (
    SAMPLE_RATE,
    AudioLimits,
    Samples,
    UnusableAudioError,
    decode_audio,
)
from attune_trainer.serving.batching import Batcher, OverloadedError
from attune_trainer.serving.exposition import ServeMetrics
from attune_trainer.serving.settings import ServeSettings

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

TRANSCRIPTIONS_PATH: Final = "/v1/audio/transcriptions"

_MAX_FIELDS: Final = 16
_GRANULARITIES: Final = "timestamp_granularities[]"
_FIELDS: Final = frozenset(
    {"file", "model", "language", "response_format", "temperature", "prompt", "stream", _GRANULARITIES}
)
_CLIENT_GONE: Final = 499  # nginx's status for a client that went away; only the metrics ever see it


class Phase(StrEnum):
    """Where the server is in its life."""

    LOADING = "Loading"
    READY = "Ready"
    DRAINING = "Draining"  # still answers, but wants no new clients


class ResponseFormat(StrEnum):
    """How a transcription is written; OpenAI's srt and vtt would need timestamps that nothing here computes."""

    JSON = "json"
    TEXT = "text"
    VERBOSE_JSON = "verbose_json"


class ApiError(Exception):
    """An answer in OpenAI's error shape. The code is one of a fixed set: it labels a metric."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.kind = kind
        self.param = param
        self.retry_after_seconds = retry_after_seconds

    def to_response(self) -> JSONResponse:
        """Gives {"error": {message, type, param, code}}, with Retry-After where trying again may help."""
        headers = {} if self.retry_after_seconds is None else {"retry-after": str(self.retry_after_seconds)}
        body = {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
        return JSONResponse(body, self.status, headers)


@dataclass(eq=False)
class Service:
    """What the request handlers share. Belongs to the event loop's thread.

    Attributes:
        decoders: threads for decoding, apart from the one that runs the model.
        batcher: present from the moment that the model is loaded and warm.
        languages: ISO 639-1 codes that the model transcribes; with several it finds out by itself unless told.
    """

    settings: ServeSettings
    metrics: ServeMetrics
    decoders: Executor
    phase: Phase = Phase.LOADING
    batcher: Batcher | None = None
    languages: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time()))

    def enter(self, phase: Phase) -> None:
        """Moves on to a phase."""
        self.phase = phase
        self.metrics.ready.set(1 if phase is Phase.READY else 0)


@dataclass(frozen=True)
class TranscriptionRequest:
    """A request whose every field was understood."""

    file: UploadFile
    response_format: ResponseFormat
    language: str | None


def read_request(form: FormData, model_names: tuple[str, ...], languages: tuple[str, ...]) -> TranscriptionRequest:
    """Checks every field of a transcription request; none is ignored.

    Raises:
        ApiError: a field is missing, unknown, or asks for what this server does not do.
    """
    upload = _check_fields(form)
    model = form.get("model")
    if model is None:
        raise ApiError(
            400, "missing_required_parameter", f"Name the model; here it is '{model_names[0]}'.", param="model"
        )
    if model not in model_names:
        choices = ", ".join(f"'{name}'" for name in model_names)
        raise ApiError(404, "model_not_found", f"That model is not served here. Use one of {choices}.", param="model")
    language = str(form.get("language") or "").lower() or None
    if language is not None and language not in languages:
        raise ApiError(400, "unsupported_value", f"The model transcribes {', '.join(languages)}.", param="language")
    _check_unsupported(form)
    return TranscriptionRequest(upload, _read_format(form), language)


def _check_fields(form: FormData) -> UploadFile:
    upload: UploadFile | None = None
    for name, value in form.multi_items():
        if name not in _FIELDS:
            raise ApiError(400, "unknown_parameter", "The request has a parameter that this server does not know.")
        if (name == "file") != isinstance(value, UploadFile):
            raise ApiError(400, "invalid_type", f"'{name}' has the wrong type; only 'file' is an upload.", param=name)
        if isinstance(value, UploadFile):
            upload = value
    if upload is None:
        raise ApiError(400, "missing_required_parameter", "Send the audio as 'file'.", param="file")
    return upload


def _read_format(form: FormData) -> ResponseFormat:
    try:
        response_format = ResponseFormat(str(form.get("response_format") or ResponseFormat.JSON))
    except ValueError:
        choices = ", ".join(ResponseFormat)
        raise ApiError(
            400, "unsupported_value", f"'response_format' is one of {choices}.", param="response_format"
        ) from None
    granularities = form.getlist(_GRANULARITIES)
    if granularities and (response_format is not ResponseFormat.VERBOSE_JSON or set(granularities) != {"segment"}):
        raise ApiError(
            400, "unsupported_value", "Only segments have timestamps here, and only in verbose_json.",
            param=_GRANULARITIES,
        )  # fmt: skip
    return response_format


def _check_unsupported(form: FormData) -> None:
    temperature = str(form.get("temperature") or "0")
    try:
        zero = float(temperature) == 0
    except ValueError:
        zero = False
    if not zero:
        raise ApiError(
            400, "unsupported_value", "Decoding is greedy: 'temperature' can only be 0.", param="temperature"
        )
    if form.get("prompt"):
        raise ApiError(400, "unsupported_value", "Prompts are not supported; leave 'prompt' out.", param="prompt")
    if str(form.get("stream") or "false").lower() != "false":
        raise ApiError(400, "unsupported_value", "Answers are not streamed; leave 'stream' out.", param="stream")


def build_app(service: Service) -> ASGIApp:
    """Builds the application; every one of its responses names the model and the arm."""

    async def transcribe(request: Request) -> Response:
        return await _measured(service, request)

    async def models(_request: Request) -> Response:
        data = [
            {"id": name, "object": "model", "created": service.created, "owned_by": "attune"}
            for name in service.settings.model_names
        ]
        return JSONResponse({"object": "list", "data": data})

    async def live(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ready(_request: Request) -> Response:
        return PlainTextResponse(f"{service.phase}\n", 200 if service.phase is Phase.READY else 503)

    async def metrics(_request: Request) -> Response:
        return Response(service.metrics.render(), media_type=None, headers={"content-type": CONTENT_TYPE_LATEST})

    app = Starlette(
        routes=[
            Route(TRANSCRIPTIONS_PATH, transcribe, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/healthz", live, methods=["GET"]),
            Route("/readyz", ready, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _http_error},
    )
    return Identified(app, service)


async def _http_error(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    codes = {404: ("not_found", "There is nothing here."), 405: ("method_not_allowed", "Use another method.")}
    code, message = codes.get(status, ("bad_request", "The request could not be understood."))
    response = ApiError(status, code, message).to_response()
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)
    return response


class Identified:
    """Adds model and arm to every response; while draining, asks clients to take their next request elsewhere."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection event as ASGI demands."""
        settings = self._service.settings

        async def send_identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[MODEL_ID_HEADER] = settings.model_id
                headers[TRACK_HEADER] = settings.track.value
                if self._service.phase is Phase.DRAINING:
                    headers["connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_identified)


async def _measured(service: Service, request: Request) -> Response:
    """Answers a transcription request and records what became of it."""
    started = monotonic()
    error_code: str | None = None
    try:
        response = await _transcribe(service, request)
    except ApiError as error:
        response, error_code = error.to_response(), error.code
    except OverloadedError as error:
        busy = ApiError(
            429,
            "overloaded",
            "The server has as much to do as it accepts. Try again later.",
            kind="rate_limit_error",
            retry_after_seconds=error.retry_after_seconds,
        )
        response, error_code = busy.to_response(), busy.code
    except ClientDisconnect:
        response, error_code = Response(status_code=_CLIENT_GONE), "client_gone"
    except Exception:  # noqa: BLE001 (one request's misfortune must not end the others)
        # JsonFormatter leaves out the messages of exceptions that could quote what was said.
        _log.exception("transcription failed")
        failed = ApiError(500, "internal_error", "The transcription failed.", kind="server_error")
        response, error_code = failed.to_response(), failed.code
    service.metrics.observe_request(response.status_code, monotonic() - started, error_code)
    return response


async def _transcribe(service: Service, request: Request) -> Response:
    settings, batcher = service.settings, service.batcher
    if batcher is None:
        raise ApiError(503, "loading", "The model is being loaded.", kind="server_error", retry_after_seconds=5)
    with batcher.admit():
        with batcher.announce():
            bounded = Request(request.scope, _bounded(request.receive, settings.max_upload_bytes))
            form = await _read_form(bounded, settings.max_upload_seconds)
            try:
                asked = read_request(form, settings.model_names, service.languages)
                samples = await _decode(service, asked.file)
            finally:
                await form.close()
            background = request.headers.get(PRIORITY_HEADER) == BACKGROUND
            # In the queue before it is no longer on its way, or the batch that waits for it would leave without it.
            answer = batcher.transcribe(samples, asked.language, background=background)
        text = await _unless_gone(request, answer)
    match asked.response_format:
        case ResponseFormat.TEXT:
            return PlainTextResponse(f"{text}\n")
        case ResponseFormat.JSON:
            return JSONResponse({"text": text})
        case ResponseFormat.VERBOSE_JSON:
            only = service.languages[0] if len(service.languages) == 1 else None
            return JSONResponse(_verbose(text, len(samples) / SAMPLE_RATE, asked.language or only))


def _verbose(text: str, seconds: float, language: str | None) -> dict[str, Any]:
    """Gives the verbose form; the clip is one segment, because nothing here times anything within it."""
    duration = round(seconds, 3)
    body: dict[str, Any] = {"task": "transcribe", "duration": duration, "text": text}
    if language is not None:
        body["language"] = language
    body["segments"] = [{"id": 0, "start": 0.0, "end": duration, "text": text}] if text else []
    return body


def _bounded(receive: Receive, max_bytes: int) -> Receive:
    seen = 0

    async def receive_bounded() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > max_bytes:
                raise ApiError(413, "file_too_large", f"The request is larger than {max_bytes} bytes.", param="file")
        return message

    return receive_bounded


async def _read_form(request: Request, max_seconds: float) -> FormData:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise ApiError(415, "unsupported_media_type", "Send the request as multipart/form-data.")
    try:
        async with asyncio.timeout(max_seconds):
            return await request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=64 * 1024)
    except TimeoutError:
        raise ApiError(408, "upload_too_slow", f"The upload took longer than {max_seconds:g} s.") from None
    except HTTPException:
        raise ApiError(400, "invalid_multipart", "The body is not the multipart form that this takes.") from None


async def _decode(service: Service, upload: UploadFile) -> Samples:
    limits = AudioLimits(service.settings.max_audio_seconds, service.settings.max_decode_seconds)
    try:
        return await asyncio.get_running_loop().run_in_executor(service.decoders, decode_audio, upload.file, limits)
    except UnusableAudioError as error:
        raise ApiError(400, error.code, error.message, param="file") from error


async def _unless_gone(request: Request, answer: asyncio.Future[_Answer]) -> _Answer:
    """Awaits the answer, and cancels it when the client goes away meanwhile.

    Raises:
        ClientDisconnect: the client went away.
    """
    gone = asyncio.ensure_future(_disconnected(request.receive))
    either: set[asyncio.Future[Any]] = {answer, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
