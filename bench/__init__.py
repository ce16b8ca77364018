"""Benchmarks: each module measures one promise, `make bench NAME=<module>`."""
