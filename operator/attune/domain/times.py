"""Times as Kubernetes writes them: RFC 3339 in UTC, whole seconds."""

from datetime import UTC, datetime


def format_time(moment: datetime) -> str:
    """Writes a time: 2026-11-21T13:50:46Z."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    """Reads a time as Kubernetes writes it, with or without fractions of a second.

    Raises:
        ValueError: when it is none.
    """
    return datetime.fromisoformat(text)
