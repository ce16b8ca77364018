"""Prepared data: how a revision of a Dataset lies in the store, and how it is read."""
