"""Observe, decide, act: what turns a key into writes."""
