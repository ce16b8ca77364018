"""Reads the body of an HTTP answer within bounds of size and of time."""

import time
from typing import Final

import requests
import urllib3

from attune.errors import Unavailable

_CHUNK_BYTES: Final = 64 * 1024


def read_bounded(response: requests.Response, *, most_bytes: int, seconds: float) -> bytes:
    """Reads a streamed answer's body, and at most one byte more than most_bytes of it.

    The time limit of requests is one between two bytes: a server that sends one now and then would never meet it.

    Raises:
        Unavailable: when the body was not there in time, or was cut off.
    """
    end = time.monotonic() + seconds
    body = b""
    try:
        while len(body) <= most_bytes and (
            chunk := response.raw.read1(min(_CHUNK_BYTES, most_bytes + 1 - len(body)), decode_content=True)
        ):
            body += chunk
            if time.monotonic() > end:
                raise Unavailable(f"the answer was not complete after {seconds:.0f} s")
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Unavailable(f"the answer was cut off ({type(error).__name__})") from error
    return body
