"""What can go wrong in a way that a person can put right."""

from __future__ import annotations


class ClusterError(Exception):
    """The cluster cannot go on; the message says what is missing and what to do about it."""
