"""From the kinds to the API reference page."""

import json
from collections.abc import Iterable, Iterator

from attune.api.meta import CATEGORY, CEL, GROUP, VERSION, Resource
from attune.crdgen.definition import build_root_schema
from attune.crdgen.structural import Schema

_INTRODUCTION = f"""\
# API reference: {GROUP}/{VERSION}

<!-- Generated from operator/attune/api by `python -m attune.crdgen`; do not edit. -->

Every kind is namespaced, belongs to the category `{CATEGORY}` (`kubectl get {CATEGORY}`), and has a status that only
the operator writes. References never cross a namespace, except a Canary's Gateway. Decimals are strings, so that no
digit changes on the way. A field that is absent has the default of the table, or none. What the last column states is
checked by the API server when an object is applied.
"""


def build_reference(kinds: Iterable[type[Resource]]) -> str:
    """Builds the page in Markdown: for each kind a table of its spec, of its status, and its rules."""
    return "\n".join([_INTRODUCTION, *(line for kind in kinds for line in _kind_lines(kind))])


def _kind_lines(kind: type[Resource]) -> Iterator[str]:
    schema = build_root_schema(kind)
    yield f"## {kind.KIND}"
    yield ""
    yield schema["description"]
    yield ""
    wait = f"kubectl wait --for=condition={kind.TERMINAL_CONDITION} {kind.SHORT_NAME}/NAME"
    yield f"`kubectl get {kind.PLURAL}`, short `{kind.SHORT_NAME}`. Wait for it with `{wait}`."
    yield ""
    for rule in schema.get(CEL, ()):
        yield f"Rule: {rule['message']}."
        yield ""
    for part in ("spec", "status"):
        yield f"### {kind.KIND}.{part}"
        yield ""
        yield from _rules(schema["properties"][part])
        yield "| Field | Type | Default | Description | Checked |"
        yield "|---|---|---|---|---|"
        yield from _rows(schema["properties"][part], "")
        yield ""


def _rules(schema: Schema) -> Iterator[str]:
    for rule in schema.get(CEL, ()):
        yield f"Rule: {rule['message']}."
        yield ""


def _rows(schema: Schema, prefix: str) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        path = f"{prefix}{name}"
        cells = (
            f"`{path}`",
            _type(field) + (", required" if name in schema.get("required", ()) else ""),
            f"`{_default(field['default'])}`" if "default" in field else "",
            field.get("description", "").replace("\n", " "),
            _checks(field),
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        below, suffix = field, "."
        while below["type"] == "array":
            below, suffix = below["items"], f"[]{suffix}"
        yield from _rows(below, f"{path}{suffix}")


def _default(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _type(field: Schema) -> str:
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if "additionalProperties" in field:
        return f"map to {_type(field['additionalProperties'])}"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    return "time" if field.get("format") == "date-time" else str(field["type"])


def _checks(field: Schema) -> str:
    limits = (
        ("minimum", "from {}"),
        ("maximum", "to {}"),
        ("minLength", "characters: from {}"),
        ("maxLength", "characters: to {}"),
        ("minItems", "items: from {}"),
        ("maxItems", "items: to {}"),
        ("maxProperties", "entries: to {}"),
    )
    found = [text.format(field[key]) for key, text in limits if key in field and "enum" not in field]
    if "pattern" in field:
        found.append(f"`{field['pattern']}`")
    found += [rule["message"] for rule in (*field.get(CEL, ()), *field.get("items", {}).get(CEL, ()))]
    return "; ".join(found)
