"""One arm of a rollout as its clients see it: asked over HTTP, with patience and within bounds."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

import httpx
from attune.contract.metrics import Track

from attune_trainer.headers import BACKGROUND, MODEL_ID_HEADER, PRIORITY_HEADER

_log = logging.getLogger(__name__)

_TIMEOUT: Final = httpx.Timeout(connect=5, write=30, read=120, pool=120)
_ATTEMPTS: Final = 4
_FIRST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 15.0
# The generic name: which model answers is what the rollout changes.
_MODEL_NAME: Final = "whisper-1"


class RequestFailedError(Exception):
    """An arm gave no transcript, after every retry that its answers allow; the message is a status or an error type."""


class WrongModelError(Exception):
    """Another model than the arm's answered: a pod of an earlier rollout is still there, or one of a later one is."""


@dataclass
class Arm:
    """Where an arm listens, and which model it is to be.

    Attributes:
        track: stable or canary.
        url: http://host:port of the arm's own Service.
        model_id: answers of other models are refused; None takes any.
        client: shared by the arms; its pool bounds the connections.
        language: ISO 639-1 code that is sent with each utterance; dropped when the arm's model does not know it, which
            then hears as well as it can, as it would for an evaluation.
        first_pause_seconds: before the first retry; each further one waits twice as long.
    """

    track: Track
    url: str
    model_id: str | None
    client: httpx.AsyncClient
    language: str | None = None
    first_pause_seconds: float = _FIRST_PAUSE_SECONDS

    async def is_ready(self) -> bool:
        """Tells whether the arm wants requests and serves the right model.

        A server without /readyz (404) counts as ready when it answers at all.
        """
        try:
            response = await self.client.get(f"{self.url}/readyz", timeout=_TIMEOUT)
        except httpx.HTTPError:
            return False
        if response.status_code == httpx.codes.NOT_FOUND:
            return True
        return response.status_code == httpx.codes.OK and self._is_right_model(response)

    async def transcribe(self, audio: bytes, name: str) -> str:
        """Sends a FLAC file and returns the transcript.

        Connection errors, 429 and 5xx are tried again a few times, with growing pauses (Retry-After is honoured, up to
        15 s).

        Raises:
            RequestFailedError: no transcript after all that, or a refusal that trying again cannot change.
            WrongModelError: the answer is another model's.
        """
        problem = ""
        for attempt in range(_ATTEMPTS):
            pause = self.first_pause_seconds * 2**attempt
            fields = {"model": _MODEL_NAME, "response_format": "json", "temperature": "0"}
            if self.language is not None:
                fields["language"] = self.language
            try:
                response = await self.client.post(
                    f"{self.url}/v1/audio/transcriptions",
                    files={"file": (name, audio, "audio/flac")},
                    data=fields,
                    headers={PRIORITY_HEADER: BACKGROUND},
                    timeout=_TIMEOUT,
                )
            except httpx.HTTPError as error:
                problem = type(error).__name__
            else:
                if response.status_code == httpx.codes.OK:
                    return self._read_text(response)
                problem = f"status {response.status_code}"
                if self.language is not None and _refuses_language(response):
                    _log.warning("the model does not know the language", extra={"track": self.track.value})
                    self.language = None
                    continue
                if response.status_code != httpx.codes.TOO_MANY_REQUESTS and not response.is_server_error:
                    break
                pause = max(pause, _retry_after_seconds(response))
            if attempt + 1 < _ATTEMPTS:
                await asyncio.sleep(min(pause, _LONGEST_PAUSE_SECONDS))
        raise RequestFailedError(problem)

    def _read_text(self, response: httpx.Response) -> str:
        if not self._is_right_model(response):
            raise WrongModelError
        try:
            text = response.json()["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise RequestFailedError("an answer without a text") from error
        if not isinstance(text, str):
            raise RequestFailedError("an answer without a text")
        return text

    def _is_right_model(self, response: httpx.Response) -> bool:
        return self.model_id is None or response.headers.get(MODEL_ID_HEADER) == self.model_id


def _refuses_language(response: httpx.Response) -> bool:
    if response.status_code != httpx.codes.BAD_REQUEST:
        return False
    try:
        return bool(response.json()["error"]["param"] == "language")
    except (ValueError, KeyError, TypeError):
        return False


def _retry_after_seconds(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else 0.0
