"""Thin typed clients of what lies outside: the Kubernetes API, Prometheus, a pod's progress."""
