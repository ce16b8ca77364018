"""The base of every model that crosses a process boundary, and the scalar types that they share."""

from decimal import Decimal
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class ContractModel(BaseModel):
    """Is immutable, refuses unknown keys, and is written in camelCase."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")


def _within(low: str, high: str) -> AfterValidator:
    def check(value: str) -> str:
        if not Decimal(low) <= Decimal(value) <= Decimal(high):
            raise ValueError(f"must be between {low} and {high}, is {value}")
        return value

    return AfterValidator(check)


def between(low: str, high: str) -> AfterValidator:
    """Restricts a decimal string to [low, high]; the CRD states the same bound as a CEL rule."""
    return _within(low, high)


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
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71)]
DnsLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=63)]
