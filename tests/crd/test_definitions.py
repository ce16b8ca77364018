"""What can be said of the generated files without an API server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from attune.api import KINDS
from attune.api.meta import Resource
from attune.contract.base import DECIMAL_BOUNDS, DecimalString, between
from attune.crdgen.__main__ import build_files, build_template, main
from attune.crdgen.definition import build_definition, build_root_schema
from attune.crdgen.structural import build_structural_schema
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

ROOT = Path(__file__).resolve().parents[2]

Nodes = Iterator[tuple[str, dict[str, Any]]]


def walk(schema: dict[str, Any], path: str) -> Nodes:
    """Every schema below spec and status, with its path."""
    yield path, schema
    for name, value in schema.get("properties", {}).items():
        yield from walk(value, f"{path}.{name}")
    if "items" in schema:
        yield from walk(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        yield from walk(schema["additionalProperties"], f"{path}{{}}")


def parts(kind: type[Resource]) -> Nodes:
    root = build_root_schema(kind)["properties"]
    for part in ("spec", "status"):
        yield from walk(root[part], f"{kind.KIND}.{part}")


def is_bounded(schema: dict[str, Any]) -> bool:
    match schema["type"]:
        case "string":
            return "maxLength" in schema or "enum" in schema
        case "array":
            return "maxItems" in schema
        case "object":
            return "properties" in schema or "maxProperties" in schema
        case "integer":
            return "minimum" in schema or "enum" in schema
        case other:
            return bool(other == "boolean")


def is_structural(schema: dict[str, Any]) -> bool:
    foreign = {
        "$ref", "$defs", "anyOf", "oneOf", "allOf", "not", "const", "title", "nullable", "propertyNames",
        "x-kubernetes-preserve-unknown-fields", DECIMAL_BOUNDS,
    }  # fmt: skip
    return (
        not schema.keys() & foreign
        and ("properties" in schema) + ("additionalProperties" in schema) == (schema["type"] == "object")
        and ("items" in schema) == (schema["type"] == "array")
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_every_string_list_map_and_number_is_bounded(kind: type[Resource]) -> None:
    assert [path for path, schema in parts(kind) if not is_bounded(schema)] == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_every_schema_is_structural(kind: type[Resource]) -> None:
    assert [path for path, schema in parts(kind) if not is_structural(schema)] == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_every_field_explains_itself(kind: type[Resource]) -> None:
    mute = [
        path
        for path, schema in parts(kind)
        if not schema.get("description") and not path.endswith(("[]", "{}"))  # kubectl explain prints no items
    ]
    assert mute == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_statuses_state_no_defaults(kind: type[Resource]) -> None:
    assert [path for path, schema in parts(kind) if ".status" in path and "default" in schema] == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_lists_say_how_they_merge_and_keyed_lists_require_their_keys(kind: type[Resource]) -> None:
    for path, schema in parts(kind):
        if schema["type"] == "array":
            merge = schema["x-kubernetes-list-type"]
            assert merge in {"atomic", "set", "map"}, path
            assert set(schema.get("x-kubernetes-list-map-keys", ())) <= set(schema["items"].get("required", ())), path
            assert (merge == "map") == ("x-kubernetes-list-map-keys" in schema), path


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_names_group_columns_and_subresource(kind: type[Resource]) -> None:
    definition = build_definition(kind)
    version = definition["spec"]["versions"][0]
    names = definition["spec"]["names"]
    assert definition["metadata"]["name"] == f"{names['plural']}.attune.dev"
    assert names["categories"] == ["attune"]
    assert version["subresources"] == {"status": {}}
    columns = [column["name"] for column in version["additionalPrinterColumns"]]
    assert {columns[0], columns[-1]} == {"Phase", "Age"}
    assert len(set(columns)) == len(columns)


def test_short_names_differ() -> None:
    assert sorted(kind.SHORT_NAME for kind in KINDS) == ["acn", "ads", "aev", "aft"]


def test_every_decimal_bound_of_the_models_is_a_rule_too() -> None:
    learning_rate = _field("FineTune", "spec", "hyperparameters", "learningRate")
    assert learning_rate["x-kubernetes-validations"] == [
        {"rule": "double(self) >= 1e-09 && double(self) <= 1.0", "message": "must be between 1e-9 and 1"}
    ]
    increase = _field("Canary", "spec", "analysis", "wer", "maxIncrease")
    assert increase["x-kubernetes-validations"][0]["message"] == "must be between 0 and 10"


def _field(kind: str, *path: str) -> dict[str, Any]:
    schema = build_root_schema(next(one for one in KINDS if kind == one.KIND))
    for name in path:
        schema = schema["properties"][name]
    return schema


def test_bounded_decimals_are_checked_by_the_model_too() -> None:
    bounded: TypeAdapter[str] = TypeAdapter(Annotated[DecimalString, between("0.01", "0.5")])
    assert bounded.validate_python("0.5") == "0.5"
    with pytest.raises(ValidationError, match=r"must be between 0\.01 and 0\.5, is 0\.51"):
        bounded.validate_python("0.51")


class _Union(BaseModel):
    value: int | str = Field(description="Either.")


class _Anything(BaseModel):
    value: dict[str, Any] = Field(description="Whatever.")


class _Float(BaseModel):
    value: float = Field(description="Digits that change on the way.")


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (_Union, r"_Union\.value: a union needs optional members"),
        (_Anything, r"_Anything\.value: a map must say what its values are"),
        (_Float, r"_Float\.value: type number is not used"),
    ],
)
def test_what_no_structural_schema_can_say_is_refused_with_its_path(model: type[BaseModel], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build_structural_schema(model, defaults=True)


def test_a_description_that_helm_would_evaluate_is_refused() -> None:
    with pytest.raises(ValueError, match="Helm would evaluate"):
        build_template("metadata:\n  labels:\n    a: '{{ boom }}'\n")


def test_generated_files_are_up_to_date() -> None:
    stale = [name for name, content in build_files().items() if (ROOT / name).read_text() != content]
    assert stale == [], "run: python -m attune.crdgen"


def test_check_reports_what_is_out_of_date_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").touch()
    assert main(["--root", str(tmp_path)]) == 0
    assert main(["--root", str(tmp_path), "--check"]) == 0
    changed = tmp_path / "crds" / "attune.dev_canaries.yaml"
    changed.write_text(changed.read_text().replace("acn", "can"))
    capsys.readouterr()
    assert main(["--root", str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().out == "out of date: crds/attune.dev_canaries.yaml\nrun: python -m attune.crdgen\n"
    assert "can" in yaml.safe_load(changed.read_text())["spec"]["names"]["shortNames"]
