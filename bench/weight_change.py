"""From a weight's change on an HTTPRoute to the first request on the new split, at a real Gateway under requests.

Two tiny servers stand behind a route of the benchmark's own; the weights swap between 100/0 and 0/100. The time runs
from the moment that the change is sent to the API server, over a connection that is open already, to the end of the
first answer on the new split. Needs the cluster (`make up`).
"""

import http.client
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

from kubernetes import config
from kubernetes.client import CustomObjectsApi

from bench.report import Row, report
from devcluster import client

NAMESPACE = "attune-bench"
HOST = "bench.example.com"
CHANGES = 30
MANIFEST = """
apiVersion: v1
kind: Namespace
metadata: {{name: {namespace}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: bench, namespace: {namespace}}}
spec:
  parentRefs: [{{name: public, namespace: gateway}}]
  hostnames: [{host}]
  rules: [{{backendRefs: [{{name: one, port: 8000, weight: 100}}, {{name: two, port: 8000, weight: 0}}]}}]
"""
BACKEND = """
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec: {{selector: {{app: {name}}}, ports: [{{port: 8000}}]}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      containers:
        - name: server
          image: localhost/attune/operator:dev
          imagePullPolicy: IfNotPresent
          command: [python, -c]
          args:
            - |
              from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
              class Handler(BaseHTTPRequestHandler):
                  protocol_version = "HTTP/1.1"
                  def do_GET(self):
                      self.send_response(200); self.send_header("Content-Length", "3"); self.end_headers()
                      self.wfile.write(b"{name}")
                  def log_message(self, *args): pass
              ThreadingHTTPServer(("", 8000), Handler).serve_forever()
          readinessProbe: {{httpGet: {{port: 8000}}, periodSeconds: 1}}
"""


def ask(port: int) -> tuple[int, str]:
    """Sends one request; returns status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/", headers={"Host": HOST})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def wait_for(port: int, name: str, seconds: float) -> int:
    """Asks until a backend answers; returns how many requests failed meanwhile."""
    deadline = time.monotonic() + seconds
    failures = 0
    while time.monotonic() < deadline:
        status, body = ask(port)
        if status == http.client.OK and body == name:
            return failures
        failures += status != http.client.OK
        time.sleep(0.002)
    raise SystemExit(f"{name} did not answer within {seconds} s")


def time_change(change: Callable[[], None], port: int, name: str) -> tuple[float, int]:
    """Makes a change that lets a backend answer; returns the seconds until it does, and how many requests failed."""
    began = time.monotonic()
    change()
    failures = wait_for(port, name, 30)
    return time.monotonic() - began, failures


class Route:
    """The benchmark's HTTPRoute, changed by this very process: starting kubectl would take as long as the change."""

    def __init__(self) -> None:
        # Named here, because the client looked at the variable when it was imported.
        self._api = CustomObjectsApi(config.new_client_from_config(os.environ.get("KUBECONFIG")))
        self._path = ("gateway.networking.k8s.io", "v1", NAMESPACE, "httproutes", "bench")
        self._api.get_namespaced_custom_object(*self._path, _request_timeout=10)  # opens the connection

    def send_all_to(self, target: str) -> None:
        """Gives a backend all the weight."""
        weights = [
            {"op": "replace", "path": f"/spec/rules/0/backendRefs/{index}/weight", "value": 100 * (name == target)}
            for index, name in enumerate(("one", "two"))
        ]
        self._api.patch_namespaced_custom_object(
            *self._path, weights, _content_type="application/json-patch+json", _request_timeout=10
        )


def main() -> None:
    """Swaps the weights and times each swap."""
    client.load_cluster_environment()
    manifest = MANIFEST.format(namespace=NAMESPACE, host=HOST)
    manifest += "".join(BACKEND.format(namespace=NAMESPACE, name=name) for name in ("one", "two"))
    client.kubectl("apply", "-f", "-", text=manifest)
    times, failures = [], 0
    try:
        client.kubectl("rollout", "status", "deployment", "one", "two", "-n", NAMESPACE, "--timeout=60s")
        with client.forwarded("service/public", "gateway", 80) as port:
            wait_for(port, "one", 30)
            route = Route()
            for change in range(CHANGES):
                target = ("two", "one")[change % 2]
                seconds, failed = time_change(partial(route.send_all_to, target), port, target)
                times.append(seconds)
                failures += failed
    finally:
        client.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    middle, slowest = statistics.median(times), max(times)
    report(
        "weight-change",
        [
            Row("weight change to first request, median", middle, "s", "under 1 s", holds=middle < 1),
            Row("weight change to first request, slowest", slowest, "s", "under 1 s", holds=slowest < 1),
            Row("failed requests", failures, "", "0", holds=failures == 0, versus=f"{CHANGES} changes"),
        ],
    )


if __name__ == "__main__":
    main()
