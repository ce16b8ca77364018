"""Attune: fine-tunes speech recognisers inside a cluster and rolls them out by live word error rate."""

__version__ = "0.1.0"
