"""What an installation may set: read once at the start, from ATTUNE_* environment variables."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attune.contract.base import DnsLabel

PREFIX = "ATTUNE_"

_SecretName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253)]
_Image = Annotated[str, Field(pattern=r"^\S+$", min_length=1, max_length=512)]
_Host = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?(:[0-9]{1,5})?$", max_length=259)]


class SettingsError(ValueError):
    """The environment holds settings that cannot be used; the message names each of them."""


class Settings(BaseModel):
    """How this operator is installed. Plain data: nothing here is read from the surroundings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trainer_image: _Image = Field(description="Image of the Jobs: prepare, finetune, evaluate, score.")
    inference_image: _Image = Field(description="Image that serves models where a Canary names none.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[_SecretName, ...] = Field(default=(), description="In the namespace of the pods.")
    store_secret: _SecretName = Field(default="attune-store", description="Secret with the store, in each namespace.")
    job_service_account: _SecretName = Field(default="default", description="ServiceAccount of the Jobs' pods.")
    serve_service_account: _SecretName = Field(default="default", description="ServiceAccount of the inference pods.")
    watch_namespaces: tuple[DnsLabel, ...] = Field(default=(), description="Empty: every namespace.")
    prometheus_hosts: tuple[_Host, ...] = Field(
        default=(), description="host or host:port that a Canary may name for its Prometheus. Empty: any."
    )
    lease_namespace: DnsLabel = Field(default="default", description="Where the leadership Lease lies.")
    lease_name: DnsLabel = "attune-operator"
    lease_seconds: int = Field(default=15, ge=5, le=300)
    identity: str = Field(default="", max_length=253, description="Name in the Lease; POD_NAME in a pod.")
    resync_seconds: int = Field(default=300, ge=1, le=86400, description="Every object is looked at this often.")
    request_seconds: int = Field(default=10, ge=1, le=120, description="Time limit of one API request.")
    workers: int = Field(default=4, ge=1, le=64, description="Reconciles that run at the same time.")
    progress_seconds: int = Field(default=10, ge=1, le=3600, description="Seconds between two reads of progress.")
    retry_seconds: int = Field(
        default=300, ge=1, le=86400, description="Seconds before a Job that the store or hub failed is tried again."
    )
    http_host: str = "0.0.0.0"  # noqa: S104 (probes and Prometheus come from outside the pod)
    http_port: int = Field(default=8080, ge=0, le=65535, description="/healthz, /readyz, /metrics; 0 picks one.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Reads ATTUNE_<NAME> for each field; lists are separated by commas, empty values count as absent.

        Raises:
            SettingsError: naming each variable that is unknown, missing or invalid.
        """
        given: dict[str, Any] = {}
        unknown = []
        for variable, text in environment.items():
            if not variable.startswith(PREFIX) or not text.strip():
                continue
            field = variable.removeprefix(PREFIX).lower()
            if field not in cls.model_fields:
                if field not in _NOT_SETTINGS and not _SERVICE_LINK.search(variable):
                    unknown.append(f"{variable} is not a setting")
            elif field in _LISTS:
                given[field] = tuple(part.strip() for part in text.split(",") if part.strip())
            else:
                given[field] = text.strip()
        given.setdefault("identity", environment.get("POD_NAME", ""))
        given.setdefault("lease_namespace", environment.get("POD_NAMESPACE") or "default")
        try:
            settings = cls.model_validate(given)
        except ValidationError as error:
            problems = [
                f"{PREFIX}{'.'.join(map(str, one['loc'])).upper()}: "
                + ("must be set" if one["type"] == "missing" else one["msg"])
                for one in error.errors()
            ]
            raise SettingsError("; ".join([*unknown, *problems])) from None
        if unknown:
            raise SettingsError("; ".join(unknown))
        return settings


_LISTS = frozenset({"watch_namespaces", "image_pull_secrets", "prometheus_hosts"})
# Read by the Makefile and the development tools from the same environment; none of the operator's business.
_NOT_SETTINGS = frozenset({"cache", "state"})
# What the kubelet sets in every pod for a Service whose name begins with attune.
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_[A-Z]+)?)?)$")
