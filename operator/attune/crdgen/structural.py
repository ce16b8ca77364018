"""From a pydantic model to a structural schema of apiextensions.k8s.io/v1."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from attune.api.meta import CEL
from attune.contract.base import DECIMAL_BOUNDS

Schema = dict[str, Any]

_INT32_MAX = 2**31 - 1
# Keywords that mean the same in both dialects.
_KEPT = (
    "description",
    "type",
    "format",
    "enum",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-map-type",
)
# Keywords that are read here, or that say nothing to the API server: it prunes or refuses unknown fields by itself.
_HANDLED = frozenset(
    {
        "$ref",
        "additionalProperties",
        "anyOf",
        "const",
        "default",
        "items",
        "properties",
        "propertyNames",
        "required",
        "title",
        CEL,
        DECIMAL_BOUNDS,
    }
)


class _JsonSchema(GenerateJsonSchema):
    """Pydantic's JSON schema with defaults as a user would write them: in full, and without nulls.

    A mere {} would be filled in as well, but the API server applies the CEL rules to it before that.
    """

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:
        """Takes default factories too."""
        if "default_factory" in schema and not schema.get("default_factory_takes_data"):
            return schema["default_factory"]()  # type: ignore[call-arg]
        return super().get_default_value(schema)

    def encode_default(self, dft: Any) -> Any:
        """Writes parts in camelCase; optional means absent."""
        if isinstance(dft, BaseModel):
            return dft.model_dump(mode="json", by_alias=True, exclude_none=True)
        if isinstance(dft, list):
            return [self.encode_default(item) for item in dft]
        return super().encode_default(dft)


def build_structural_schema(model: type[BaseModel], *, defaults: bool) -> Schema:
    """Builds the structural schema of a model: references inlined, unions with null made optional.

    defaults: whether the API server is to fill in default values. They belong in specs; in a status they would be
    facts that nobody observed.

    Raises:
        ValueError: for a construct that a structural schema can't express, with the path to it.
    """
    document = model.model_json_schema(by_alias=True, mode="validation", schema_generator=_JsonSchema)
    definitions: Mapping[str, JsonSchemaValue] = document.get("$defs", {})
    top = {key: value for key, value in document.items() if key != "$defs"}
    return _Translator(definitions, defaults=defaults).translate(top, model.__name__)


class _Translator:
    def __init__(self, definitions: Mapping[str, JsonSchemaValue], *, defaults: bool) -> None:
        self._definitions = definitions
        self._defaults = defaults

    def translate(self, source: JsonSchemaValue, path: str) -> Schema:
        """Translates one schema and everything below it."""
        source = self._resolve(source, path)
        result: Schema = {key: source[key] for key in _KEPT if key in source}
        rules = list(source.get(CEL, ()))
        if self._defaults and source.get("default") is not None:
            result["default"] = source["default"]
        match source.get("type"):
            case "object":
                self._translate_object(source, result, rules, path)
            case "array":
                result.setdefault("x-kubernetes-list-type", "atomic")
                result["items"] = self.translate(source["items"], f"{path}[]")
            case "integer":
                largest = max(source.get("enum", [source.get("maximum", _INT32_MAX + 1)]))
                result["format"] = "int32" if largest <= _INT32_MAX else "int64"
            case "string":
                rules += [_decimal_rule(*bounds) for bounds in [source.get(DECIMAL_BOUNDS)] if bounds]
            case "boolean":
                pass
            case other:
                raise ValueError(f"{path}: type {other} is not used in this API")
        if rules:
            result[CEL] = rules
        return result

    def _translate_object(
        self, source: JsonSchemaValue, result: Schema, rules: list[dict[str, str]], path: str
    ) -> None:
        if "properties" in source:
            result["properties"] = {
                name: self.translate(value, f"{path}.{name}") for name, value in source["properties"].items()
            }
            if source.get("required"):
                result["required"] = list(source["required"])
            return
        values = source.get("additionalProperties")
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a map must say what its values are")  # noqa: TRY004 (no caller's type is wrong)
        result["additionalProperties"] = self.translate(values, f"{path}{{}}")
        names = source.get("propertyNames", {})
        low, high = names.get("minLength", 0), names.get("maxLength")
        if not low or high is None or names.keys() - {"minLength", "maxLength", "type", "title", "description"}:
            raise ValueError(f"{path}: keys need a minimal and a maximal length, and nothing else can be said of them")
        # A structural schema knows no propertyNames.
        rules.append(
            {
                "rule": f"self.all(key, size(key) >= {low} && size(key) <= {high})",
                "message": f"keys must have {low} to {high} characters",
            }
        )

    def _resolve(self, source: JsonSchemaValue, path: str) -> JsonSchemaValue:
        """Follows references and drops null from unions; what stands outside wins, and rules add up.

        Raises:
            ValueError: for what has no place in a structural schema.
        """
        while "$ref" in source or "anyOf" in source:
            outer = {key: value for key, value in source.items() if key not in {"$ref", "anyOf"}}
            if "$ref" in source:
                inner = self._definitions[source["$ref"].removeprefix("#/$defs/")]
            else:
                members = [member for member in source["anyOf"] if member.get("type") != "null"]
                if len(members) != 1:
                    raise ValueError(f"{path}: a union needs optional members and a CEL rule, not anyOf")
                inner = members[0]
            rules = [*inner.get(CEL, ()), *outer.get(CEL, ())]
            source = {**inner, **outer, **({CEL: rules} if rules else {})}
        unknown = source.keys() - _HANDLED - frozenset(_KEPT)
        if unknown:
            raise ValueError(f"{path}: {', '.join(sorted(unknown))} has no meaning in a structural schema")
        return {**source, "enum": [source["const"]]} if "const" in source else source


def _decimal_rule(low: str, high: str) -> dict[str, str]:
    return {
        "rule": f"double(self) >= {float(low)} && double(self) <= {float(high)}",
        "message": f"must be between {low} and {high}",
    }
