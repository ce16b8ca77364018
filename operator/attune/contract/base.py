"""The base of every model that crosses a process boundary, and the scalar types that they share."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic_core import core_schema


class ContractModel(BaseModel):
    """Is immutable, refuses unknown keys, and is written in camelCase."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")


# JSON schema keyword for the bounds of a decimal string, [low, high]; the CRD generator turns it into a CEL rule.
DECIMAL_BOUNDS = "x-decimal-bounds"


@dataclass(frozen=True)
class DecimalBounds:
    """Restricts a decimal string to [low, high], and says so in the JSON schema."""

    low: str
    high: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Adds the check to the string's own."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Adds DECIMAL_BOUNDS to the string's schema."""
        return {**handler(schema), DECIMAL_BOUNDS: [self.low, self.high]}

    def _check(self, value: str) -> str:
        if not Decimal(self.low) <= Decimal(value) <= Decimal(self.high):
            raise ValueError(f"must be between {self.low} and {self.high}, is {value}")
        return value


def between(low: str, high: str) -> DecimalBounds:
    """Restricts a decimal string to [low, high]; the CRD states the same bound as a CEL rule."""
    return DecimalBounds(low, high)


# Decimals travel as strings: a float changes its digits on the way through JSON, etcd and a diff tool.
DecimalString = Annotated[str, Field(pattern=r"^-?(0|[1-9][0-9]{0,8})(\.[0-9]{1,9})?$", max_length=20)]
# Learning rates are the one place where people write exponents.
ScientificString = Annotated[
    str, Field(pattern=r"^(0|[1-9][0-9]{0,8})(\.[0-9]{1,9})?([eE]-?[0-9]{1,2})?$", max_length=20)
]
Uri = Annotated[
    str,
    Field(
        pattern=r"^(s3|hf)://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._/@=+-]*)?$",
        min_length=6,
        max_length=1024,
        description="Where the files are: s3://bucket/prefix, or hf://organisation/name[@revision] on a model hub.",
    ),
]
S3Uri = Annotated[
    str,
    Field(
        pattern=r"^s3://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._/@=+-]*)?$",
        min_length=6,
        max_length=1024,
        description="Where the files are: s3://bucket/prefix.",
    ),
]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71)]
DnsLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=63)]
