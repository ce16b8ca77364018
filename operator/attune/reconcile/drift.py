"""Tells whether an object in the cluster still is as it was wanted, so that a pass without changes writes nothing."""

import hashlib
import json
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Final

# Hash of what was applied last. It finds what a comparison of the wanted fields can't: a field no longer wanted.
ANNOTATION_APPLIED: Final = "attune.dev/applied"

_SUFFIXES: Final = {
    "m": Decimal("0.001"),
    "": Decimal(1),
    "k": Decimal(10) ** 3,
    "M": Decimal(10) ** 6,
    "G": Decimal(10) ** 9,
    "T": Decimal(10) ** 12,
    "Ki": Decimal(2) ** 10,
    "Mi": Decimal(2) ** 20,
    "Gi": Decimal(2) ** 30,
    "Ti": Decimal(2) ** 40,
}


def sign(wanted: dict[str, Any]) -> dict[str, Any]:
    """Adds the hash of an object to its annotations."""
    text = json.dumps(wanted, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    metadata = wanted["metadata"]
    annotations = {**metadata.get("annotations", {}), ANNOTATION_APPLIED: digest}
    return {**wanted, "metadata": {**metadata, "annotations": annotations}}


def covers(live: Any, wanted: Any, *, exact_lists: bool = False) -> bool:
    """Tells whether everything wanted is there; what is there besides (defaults, others' fields) doesn't matter.

    Lists of named things (containers, variables) are matched by name and may hold more, unless exact_lists. Quantities
    are compared by value: the API server writes "1000m" as "1".
    """
    if isinstance(wanted, Mapping):
        if not isinstance(live, Mapping):
            # The API server leaves out what is empty.
            return live is None and not wanted
        return all(_covers_field(live, key, value, exact_lists=exact_lists) for key, value in wanted.items())
    if isinstance(wanted, list):
        if not isinstance(live, list):
            return live is None and not wanted
        if not exact_lists and wanted and all(isinstance(one, Mapping) and "name" in one for one in wanted):
            by_name = {one.get("name"): one for one in live if isinstance(one, Mapping)}
            return all(covers(by_name.get(one["name"]), one) for one in wanted)
        return len(live) == len(wanted) and all(
            covers(theirs, ours, exact_lists=exact_lists) for theirs, ours in zip(live, wanted, strict=True)
        )
    return bool(live == wanted) or (live is None and (wanted == "" or wanted is False))


def _covers_field(live: Mapping[str, Any], key: str, value: Any, *, exact_lists: bool) -> bool:
    theirs = live.get(key)
    if key in {"limits", "requests"} and isinstance(value, Mapping) and isinstance(theirs, Mapping):
        return all(_same_quantity(theirs.get(name), amount) for name, amount in value.items())
    return covers(theirs, value, exact_lists=exact_lists)


def _same_quantity(one: Any, other: Any) -> bool:
    return one == other or (one is not None and _parse_quantity(one) == _parse_quantity(other) is not None)


def _parse_quantity(text: Any) -> Decimal | None:
    whole = str(text)
    number = whole.rstrip("mkMGTi")
    try:
        return Decimal(number) * _SUFFIXES[whole[len(number) :]]
    except (InvalidOperation, KeyError):
        return None
