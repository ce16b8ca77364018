"""What an inference container is told, all of it by environment variables."""

from collections.abc import Mapping
from typing import Annotated, Any, Final

from attune.contract.base import Digest, Uri
from attune.contract.environment import (
    SERVE_MODEL_DIGEST,
    SERVE_MODEL_ID,
    SERVE_MODEL_URI,
    SERVE_PORT,
    SERVE_TRACK,
)
from attune.contract.metrics import Track
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attune_trainer.failures import InvalidInput

# Names that any client may use for whichever model is served: weights change in the middle of a rollout, and a client
# that pinned one arm's id would be refused by the other.
GENERIC_MODEL_NAMES: Final = ("whisper-1",)


class ServeSettings(BaseModel):
    """The model to serve and the bounds to serve it under.

    The first four come from the operator (contract.environment); host and port are ATTUNE_HOST and ATTUNE_PORT, which
    a Canary's pod template may not set, because its Service expects the defaults. Each of the others may be set there,
    as SERVE_<NAME>.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    model_uri: Uri
    model_digest: Digest | None = None
    model_id: Annotated[str, Field(pattern=r"^[!-~]+$", max_length=253)]
    track: Track

    host: str = ""  # every interface, IPv4 and IPv6
    port: Annotated[int, Field(ge=0, le=65535)] = SERVE_PORT
    model_aliases: str = ""  # more names for the model, separated by commas
    max_upload_bytes: Annotated[int, Field(ge=1)] = 25 * 1024 * 1024  # OpenAI's own limit
    max_upload_seconds: Annotated[float, Field(gt=0)] = 60
    max_audio_seconds: Annotated[float, Field(gt=0)] = 600
    max_decode_seconds: Annotated[float, Field(gt=0)] = 10
    max_requests: Annotated[int, Field(ge=1)] = 64  # accepted and not yet answered
    max_waiting_audio_seconds: Annotated[float, Field(gt=0)] = 1200
    max_batch_utterances: Annotated[int, Field(ge=1)] = 16
    # Of audio as padded for the model. Absent: a bound for the device. Where arithmetic is the limit, as on a CPU, a
    # larger batch is hardly more work done but a longer wait for everyone in it.
    max_batch_seconds: Annotated[float, Field(gt=0)] | None = None
    max_batch_wait_seconds: Annotated[float, Field(ge=0)] = 0.02
    # After SIGTERM the pod keeps accepting for this long, while endpoints and proxies learn that it is going.
    drain_seconds: Annotated[float, Field(ge=0)] = 5
    # Longer than any common proxy keeps an idle connection (Traefik 90 s, Envoy 1 h): whoever closes it must be the
    # proxy, else a request crosses the close on its way and is lost.
    keep_alive_seconds: Annotated[int, Field(ge=1)] = 3700

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every name that a request may give as its model; the id first."""
        aliases = [name.strip() for name in self.model_aliases.split(",") if name.strip()]
        return tuple(dict.fromkeys([self.model_id, *GENERIC_MODEL_NAMES, *aliases]))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "ServeSettings":
        """Reads the settings; empty variables count as absent.

        Raises:
            InvalidInput: a variable is missing or has no valid value; the message names the variable.
        """
        variables = {
            "model_uri": SERVE_MODEL_URI,
            "model_digest": SERVE_MODEL_DIGEST,
            "model_id": SERVE_MODEL_ID,
            "track": SERVE_TRACK,
            "host": "ATTUNE_HOST",
            "port": "ATTUNE_PORT",
        }
        variables |= {name: f"SERVE_{name.upper()}" for name in cls.model_fields if name not in variables}
        given: dict[str, Any] = {
            name: environment[variable] for name, variable in variables.items() if environment.get(variable)
        }
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problems = "; ".join(f"{variables[str(item['loc'][0])]}: {item['msg']}" for item in error.errors())
            message = f"the inference container's environment is wrong: {problems}"
            raise InvalidInput("InvalidSettings", message) from None
