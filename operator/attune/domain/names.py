"""Names that follow from what they stand for, so that a repeated create finds what is there."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

OWNER_CHARACTERS = 38  # 38 + 1 + 8 (recipe) + 1 + 8 (run) + 1 + 5 (placement) = 62, and a Job's name may have 63
_INDEX_CHARACTERS = 2  # a pod's host name, which may have 63 as well, is its Job's with up to "-63" behind it


def fingerprint(*parts: BaseModel | Mapping[str, Any] | str | None, digits: int = 8) -> str:
    """Gives the first hexadecimal digits of a SHA-256 over the parts; equal parts give equal digits.

    Of a model only what differs from its defaults counts: a later release that knows one more option must not take
    every finished run for an outdated one.
    """
    digest = hashlib.sha256()
    for part in parts:
        plain = (
            part.model_dump(mode="json", by_alias=True, exclude_defaults=True) if isinstance(part, BaseModel) else part
        )
        digest.update(json.dumps(_without_empty(plain), sort_keys=True, separators=(",", ":")).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:digits]


def _without_empty(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: _without_empty(one) for key, one in value.items()}
        return {key: one for key, one in kept.items() if one not in ({}, [], None)}
    return [_without_empty(one) for one in value] if isinstance(value, list) else value


def build_job_name(owner: str, recipe: str, run: str, placement: str, *, nodes: int = 1) -> str:
    """Names a Job after its owner and what it does: "calls-prepare-1a2b3c4d-5e6f7".

    run is a fingerprint of the owner's uid and of what is done; placement one of how it is done (resources, Secrets),
    so that a Job with more memory is a new Job of the same run. Owner names longer than OWNER_CHARACTERS are cut; the
    fingerprints keep the result unique. With several nodes there is room for a pod's index behind it.
    """
    room = OWNER_CHARACTERS - (_INDEX_CHARACTERS if nodes > 1 else 0)
    return f"{owner[:room].rstrip('-.')}-{recipe}-{run}-{placement}"


def is_same_run(one: str | None, other: str) -> bool:
    """Tells whether two Jobs' names differ at most in their placement."""
    return one is not None and one.rpartition("-")[0] == other.rpartition("-")[0]
