"""Builds Events on custom resources."""

import hashlib
from typing import Any, Protocol

from attune.api.meta import GROUP, VERSION
from attune.contract.job import Owner

MESSAGE_CHARACTERS = 1024  # the API server refuses longer ones


class Announcement(Protocol):
    """What is said; the domain's EmitEvent is one."""

    @property
    def type(self) -> str:
        """Normal or Warning."""

    @property
    def reason(self) -> str:
        """CamelCase."""

    @property
    def message(self) -> str:
        """A sentence."""


def build_event(owner: Owner, announcement: Announcement, now: str, instance: str) -> dict[str, Any]:
    """Builds an Event whose name follows from what it says: the same announcement is the same object, counted.

    now is RFC 3339 in UTC; instance is the operator's pod.
    """
    said = f"{owner.uid}\0{announcement.type}\0{announcement.reason}\0{announcement.message}"
    digest = hashlib.sha256(said.encode()).hexdigest()
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{owner.name}.{digest[:16]}", "namespace": owner.namespace},
        "involvedObject": {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": owner.kind,
            "namespace": owner.namespace,
            "name": owner.name,
            "uid": owner.uid,
        },
        "type": announcement.type,
        "reason": announcement.reason,
        "message": announcement.message[:MESSAGE_CHARACTERS],
        "count": 1,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "source": {"component": "attune"},
        "reportingComponent": "attune.dev/operator",
        "reportingInstance": instance,
    }
