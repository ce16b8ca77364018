"""Reads how far a Job's pod is, from the pod itself."""

import requests
from pydantic import ValidationError

from attune.adapters.answer import read_bounded
from attune.contract.environment import PROGRESS_PORT
from attune.contract.result import Progress
from attune.errors import Unavailable

_TIMEOUT = (1.0, 2.0)  # seconds to connect, and between two bytes
_ANSWER_SECONDS = 4.0
_MAX_BYTES = 64 * 1024


def read_progress(ip: str, port: int = PROGRESS_PORT) -> Progress | None:
    """Asks a pod how far it is; None when it does not say. Progress is a courtesy: no failure here matters."""
    host = f"[{ip}]" if ":" in ip else ip
    session = requests.Session()
    # A proxy of the operator's surroundings does not lead to pods.
    session.trust_env = False
    try:
        with session.get(
            f"http://{host}:{port}/progress", timeout=_TIMEOUT, stream=True, allow_redirects=False
        ) as response:
            if response.status_code != requests.codes.ok:
                return None
            raw = read_bounded(response, most_bytes=_MAX_BYTES, seconds=_ANSWER_SECONDS)
        return Progress.model_validate_json(raw)
    except (requests.RequestException, Unavailable, OSError, ValidationError):
        return None
    finally:
        session.close()
