"""A server that speaks OpenAI's transcription API, asked with patience and within bounds."""

import json
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any, Final, Protocol

import httpx
from attune.contract.exitcode import ExitCode
from attune.contract.job import EndpointInput

from attune_trainer.failures import RecipeFailure, Terminated

_log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 30.0
# A transcript of half a minute has some 2 KB; a server that streams for ever must not fill the memory.
_ANSWER_BYTES: Final = 1 << 20
_CONNECT_SECONDS: Final = 10.0


class EndpointFailure(RecipeFailure):
    """The endpoint gives no transcripts; the reason says in which way. No answer of it is quoted."""

    def __init__(self, reason: str, message: str, code: ExitCode = ExitCode.INVALID_INPUT) -> None:
        super().__init__(code, reason, message)


class Clock(Protocol):
    """Time as the client sees it; a test may bring its own."""

    def now(self) -> float:
        """Seconds, never going back."""

    def wait(self, seconds: float) -> bool:
        """Waits; true where the Job is to end."""


@dataclass(frozen=True)
class StoppableClock:
    """The real time, whose waits end when the Job is asked to end."""

    stop: threading.Event

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    def wait(self, seconds: float) -> bool:
        """Waits, or ends the wait early with true."""
        return self.stop.wait(seconds)


@dataclass(frozen=True)
class _Refusal:
    """An attempt that gave no transcript."""

    reason: str
    message: str
    again: bool  # whether the next attempt may do better
    pause_seconds: float = 0.0  # that the server asked for
    code: ExitCode = ExitCode.INVALID_INPUT


class Endpoint:
    """Asks for transcripts. Its methods may be called from several threads."""

    def __init__(self, told: EndpointInput, key: str | None, clock: Clock) -> None:
        """Opens nothing yet.

        Args:
            told: where it is and how it may be asked.
            key: sent as a bearer token; None sends none.
            clock: for pauses and pacing.

        Raises:
            EndpointFailure: EndpointKeyUnusable.
        """
        self._told = told
        self._clock = clock
        self._url = f"{told.url.rstrip('/')}/audio/transcriptions"
        headers = {} if key is None else {"authorization": f"Bearer {_check_key(key)}"}
        timeout = httpx.Timeout(told.timeout_seconds, connect=min(_CONNECT_SECONDS, told.timeout_seconds))
        self._client = httpx.Client(headers=headers, timeout=timeout, follow_redirects=False)
        self._lock = threading.Lock()
        self._next_request = 0.0
        self._sends_language = True

    def close(self) -> None:
        """Closes its connections."""
        self._client.close()

    def transcribe(self, audio: bytes, name: str, language: str) -> tuple[str, float]:
        """Gives the transcript of a FLAC file, and the seconds that the answer took.

        Connection errors, timeouts, 429 and 5xx are tried again with growing pauses; Retry-After is honoured up to
        30 s. So an utterance takes at most max_attempts times (timeout + 30 s).

        Args:
            audio: the file.
            name: of the file, as the server sees it.
            language: ISO 639-1 code; left out from then on when the server refuses it.

        Raises:
            EndpointFailure: EndpointUnreachable, EndpointTimeout, EndpointRateLimited, EndpointFailing,
                EndpointUnauthorized, EndpointNotFound, EndpointNotTranscribing, EndpointRefused.
            Terminated: when the Job was asked to end meanwhile.
        """
        refusal: _Refusal | None = None
        attempt = 0
        while attempt < self._told.max_attempts:
            if attempt and refusal is not None:
                pause = max(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), refusal.pause_seconds)
                self._wait(min(pause, _LONGEST_PAUSE_SECONDS))
            self._wait_for_turn()
            sends_language = self._sends_language
            began = self._clock.now()
            answer = self._ask(audio, name, language if sends_language else None)
            if isinstance(answer, str):
                return answer, self._clock.now() - began
            if answer.reason == "LanguageRefused":
                if sends_language:
                    _log.warning("the endpoint does not know the language; asking without it")
                    self._sends_language = False
                    continue
                answer = _Refusal("EndpointRefused", "refuses the request with status 400", again=False)
            refusal = answer
            if not refusal.again:
                break
            attempt += 1
        if refusal is None:
            raise EndpointFailure("EndpointRefused", f"the endpoint {self._told.url} was never asked")
        tried = f" in {self._told.max_attempts} attempts" if refusal.again else ""
        raise EndpointFailure(
            refusal.reason, f"the endpoint {self._told.url} {refusal.message.format(tried=tried)}", refusal.code
        )

    def _wait(self, seconds: float) -> None:
        if seconds > 0 and self._clock.wait(seconds):
            raise Terminated

    def _wait_for_turn(self) -> None:
        """Keeps to requests_per_minute, whoever asks."""
        if self._told.requests_per_minute is None:
            return
        with self._lock:
            now = self._clock.now()
            turn = max(now, self._next_request)
            self._next_request = turn + 60.0 / self._told.requests_per_minute
        self._wait(turn - now)

    def _ask(self, audio: bytes, name: str, language: str | None) -> str | _Refusal:
        fields = {"model": self._told.model, "response_format": "json", "temperature": "0"}
        if language is not None:
            fields["language"] = language
        seconds = self._told.timeout_seconds
        late = _Refusal(
            "EndpointTimeout",
            f"did not answer within {seconds} s{{tried}}: see what keeps it, or raise timeoutSeconds",
            again=True,
        )
        try:
            files = {"file": (name, audio, "audio/flac")}
            with self._client.stream("POST", self._url, files=files, data=fields) as response:
                body = self._read(response)
                return late if body is None else self._understand(response, body)
        except httpx.TimeoutException:
            return late
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return _Refusal(
                "EndpointUnreachable",
                f"cannot be reached ({type(error).__name__}){{tried}}: correct its url, or see that it runs and that "
                "the Job's pod may connect to it",
                again=True,
            )

    def _read(self, response: httpx.Response) -> bytes | None:
        """Reads an answer up to its bounds; None where it took too long. What is too large is cut, and is no JSON."""
        deadline = self._clock.now() + self._told.timeout_seconds
        body = bytearray()
        for part in response.iter_bytes():
            body += part
            if self._clock.now() > deadline:
                return None
            if len(body) > _ANSWER_BYTES:
                break
        return bytes(body)

    def _understand(self, response: httpx.Response, body: bytes) -> str | _Refusal:
        if response.status_code == httpx.codes.OK:
            return _read_text(response, body)
        return self._read_refusal(response, body)

    def _read_refusal(self, response: httpx.Response, body: bytes) -> _Refusal:
        status = response.status_code
        if status in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
            return _Refusal(
                "EndpointUnauthorized",
                f"refuses the key (status {status}): correct apiKey in the Secret that keySecretRef names",
                again=False,
                code=ExitCode.ACCESS_DENIED,
            )
        if status == httpx.codes.NOT_FOUND:
            return _Refusal(
                "EndpointNotFound",
                f"has no /audio/transcriptions, or no model {self._told.model} (status 404): correct url, which mostly "
                "ends in /v1, or model",
                again=False,
                code=ExitCode.NOT_FOUND,
            )
        if status == httpx.codes.TOO_MANY_REQUESTS:
            return _Refusal(
                "EndpointRateLimited",
                "accepts no more requests (status 429){tried}: set requestsPerMinute to what it allows",
                again=True,
                pause_seconds=_retry_after_seconds(response),
            )
        if response.is_server_error:
            return _Refusal(
                "EndpointFailing",
                f"fails (status {status}){{tried}}: see its own log",
                again=True,
                pause_seconds=_retry_after_seconds(response),
            )
        if response.is_redirect:
            return _Refusal(
                "EndpointRefused", f"redirects (status {status}): give the address where it ends as url", again=False
            )
        if status == httpx.codes.BAD_REQUEST and _refuses_language(body):
            return _Refusal("LanguageRefused", "", again=False)
        return _Refusal("EndpointRefused", f"refuses the request with status {status}", again=False)


def _check_key(key: str) -> str:
    """Gives the key without the line break that files end with."""
    stripped = key.strip()
    if not stripped or not stripped.isascii() or not stripped.isprintable():
        raise EndpointFailure(
            "EndpointKeyUnusable",
            "apiKey in the Secret that keySecretRef names is empty or holds characters that no header can carry: "
            "correct it",
            ExitCode.ACCESS_DENIED,
        )
    return stripped


def _read_text(response: httpx.Response, body: bytes) -> str | _Refusal:
    """Gives the text of an answer; a page of HTML, or JSON without a text, is told by its media type alone."""
    try:
        text = json.loads(body)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if isinstance(text, str):
        return text
    media = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    known = media if media in {"text/html", "text/plain", "application/json", "application/xml"} else "something else"
    return _Refusal(
        "EndpointNotTranscribing",
        f"answers with {known} where JSON with a text is expected: correct url, which mostly ends in /v1",
        again=False,
    )


def _refuses_language(body: bytes) -> bool:
    try:
        answer: Any = json.loads(body)
        return bool(answer["error"]["param"] == "language")
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _retry_after_seconds(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdecimal() else 0.0
