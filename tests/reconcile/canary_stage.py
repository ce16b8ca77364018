"""What a Canary's tests stand on: a Gateway, a golden set, pods that start, and a Prometheus that is really asked."""

import contextlib
import http.server
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attune.adapters.cluster import DEPLOYMENT, EVENT, GATEWAY, HTTP_ROUTE, JOB, POD, SERVICE, Cluster, Object
from attune.api import Canary
from attune.contract import metrics
from attune.reconcile.boundary import Outcome, reconcile
from attune.reconcile.queue import Key
from attune.render.inference import LABEL_REVISION, LABEL_TRACK
from attune.settings import Settings

from devcluster import binaries
from tests.reconcile.kubelet import Namespace, find_condition, now, wait_for

ANSWER_SECONDS = 150.0
WORDS_EACH = 5
GOLDEN = 400


def build_spec(prometheus: str, name: str = "base", **changes: Any) -> dict[str, Any]:
    """What a person writes."""
    return {
        "model": {"uri": f"s3://attune/models/{name}"},
        "template": {
            "spec": {
                "containers": [
                    {
                        "name": "server",
                        # Quantities that the API server writes in another way.
                        "resources": {"requests": {"cpu": "1000m", "memory": "1024Mi"}, "limits": {"memory": "2Gi"}},
                        "env": [{"name": "LOG", "value": ""}],
                    }
                ]
            }
        },
        "traffic": {"gatewayRef": {"name": "public"}, "hostnames": ["asr.example.com"]},
        "steps": [{"weight": 5}, {"weight": 50}, {"weight": 100}],
        "analysis": {
            "intervalSeconds": 1,
            "prometheus": {"url": prometheus},
            "golden": {"datasetRef": {"name": "calls"}},
            "wer": {"minWords": 200},
        },
        "progressDeadlineSeconds": 60,
        **changes,
    }


@dataclass
class Exposition:
    """What scorers export. sums: (namespace, rollout) -> values of contract.metrics.PAIRED_SERIES."""

    sums: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)

    def put(self, namespace: str, rollout: str, errors: tuple[int, int], utterances: int = 100) -> None:
        """Lets the arms make so many errors in each utterance, but for every tenth, where neither makes any."""
        stable, canary = errors
        n = utterances * 9 // 10
        self.sums[namespace, rollout] = (
            utterances,
            utterances * WORDS_EACH,
            n * stable,
            n * canary,
            n * stable**2,
            n * canary**2,
            n * stable * canary,
            GOLDEN,
            GOLDEN * WORDS_EACH,
            0,
        )

    def render(self) -> str:
        lines = []
        for (namespace, rollout), values in list(self.sums.items()):
            labels = (
                f'{metrics.LABEL_NAMESPACE}="{namespace}",{metrics.LABEL_CANARY}="voice",'
                f'{metrics.LABEL_ROLLOUT}="{rollout}"'
            )
            lines += [f"{name}{{{labels}}} {value}" for name, value in zip(metrics.PAIRED_SERIES, values, strict=True)]
        return "\n".join([*lines, ""])


def serve(answer: Callable[[str], tuple[int, str, str]]) -> tuple[http.server.ThreadingHTTPServer, int]:
    """Serves HTTP on a free port of the loopback; answer: path -> (status, content type, body)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            # A busy machine may keep a scrape waiting until Prometheus has given up on it.
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(body.encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, int(server.server_address[1])


def run_prometheus(folder: Path, target: int) -> Iterator[str]:
    """Runs a real Prometheus that scrapes one target every second; gives its URL."""
    binaries.ensure(["prometheus"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": "scorer", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    process = subprocess.Popen(
        [
            str(binaries.find("prometheus")),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: _answers(f"http://127.0.0.1:{port}/-/ready"), "Prometheus")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class Killed(BaseException):
    """The operator's process has just been killed; nothing catches it."""


class Stage:
    """One Canary named voice, passes over it, and the kubelet of its pods."""

    def __init__(self, cluster: Cluster, namespace: Namespace, settings: Settings, prometheus: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.settings = settings
        self.prometheus = prometheus
        self.key = Key(Canary.KIND, namespace.name, "voice")
        # Models (or an arm's: "stable/tuned") whose pods never become ready, and what the kubelet says of them.
        self.waiting: dict[str, dict[str, str]] = {}
        self.weights: list[int] = []

    # --- what people and other controllers do ---

    def apply(self, name: str = "base", **changes: Any) -> None:
        spec = build_spec(self.prometheus, name, **changes)
        self.namespace.apply("Canary", "voice", spec)

    def put_gateway(self) -> None:
        gateway = {
            "apiVersion": GATEWAY.api_version,
            "kind": "Gateway",
            "metadata": {"name": "public", "namespace": self.namespace.name},
            "spec": {
                "gatewayClassName": "test",
                "listeners": [{"name": "web", "port": 80, "protocol": "HTTP"}],
            },
        }
        stored = self.cluster.apply(gateway)
        condition = {
            "type": "Programmed",
            "status": "True",
            "reason": "Programmed",
            "message": "",
            "lastTransitionTime": now(),
            "observedGeneration": stored["metadata"]["generation"],
        }
        status = {"status": {"conditions": [condition]}}
        self.cluster.patch(GATEWAY, self.namespace.name, "public", status, subresource="status")

    def put_dataset(self, words: int = GOLDEN * WORDS_EACH, revision: str = "1") -> None:
        body = self.namespace.apply(
            "Dataset",
            "calls",
            {"sources": [{"s3": {"uri": "s3://internal/calls/"}, "format": "Directory"}], "language": "en"},
        )
        split = {"utterances": GOLDEN, "hours": "0.2", "speakers": 3, "words": words}
        conditions = [
            {
                "type": kind,
                "status": state,
                "reason": "Prepared",
                "message": "",
                "lastTransitionTime": now(),
                "observedGeneration": 1,
            }
            for kind, state in (("Ready", "True"), ("Reconciling", "False"), ("Stalled", "False"))
        ]
        self.cluster.apply_status(
            {
                "apiVersion": body["apiVersion"],
                "kind": "Dataset",
                "metadata": {"name": "calls", "namespace": self.namespace.name},
                "status": {
                    "revision": "sha256:" + revision * 64,
                    "uri": f"s3://attune/datasets/calls/{revision}",
                    "splits": {"train": split, "validation": split, "holdout": split},
                    "conditions": conditions,
                },
            }
        )

    # --- reading ---

    @property
    def canary(self) -> Object:
        return self.namespace.get("Canary", "voice")

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.canary.get("status") or {})

    @property
    def ready(self) -> dict[str, Any]:
        return find_condition(self.canary, "Ready")

    def arm(self, track: str) -> Object | None:
        return self.cluster.get(DEPLOYMENT, self.namespace.name, f"voice-{track}")

    @property
    def route(self) -> Object | None:
        return self.cluster.get(HTTP_ROUTE, self.namespace.name, "voice")

    @property
    def split(self) -> tuple[int, int]:
        """Weights of stable and canary on the route."""
        assert self.route is not None
        one, other = self.route["spec"]["rules"][0]["backendRefs"]
        return one["weight"], other["weight"]

    @property
    def events(self) -> list[str]:
        found = [
            one for one in self.cluster.list(EVENT, self.namespace.name) if one["involvedObject"]["name"] == "voice"
        ]
        return [one["reason"] for one in sorted(found, key=lambda one: str(one["firstTimestamp"]))]

    def versions(self) -> dict[str, str]:
        """resourceVersion of everything that the operator may write."""
        kinds = (DEPLOYMENT, SERVICE, HTTP_ROUTE, JOB, EVENT)
        found = [one for kind in kinds for one in self.cluster.list(kind, self.namespace.name)]
        return {
            f"{one['kind']}/{one['metadata']['name']}": one["metadata"]["resourceVersion"]
            for one in [*found, self.canary]
        }

    # --- time ---

    def step(self, cluster: Cluster | None = None) -> Outcome:
        """One pass."""
        outcome = reconcile(cluster or self.cluster, self.settings, self.key, datetime.now(UTC).replace(microsecond=0))
        if self.route is not None:
            weight = self.split[1]
            if self.weights[-1:] != [weight]:
                self.weights.append(weight)
        return outcome

    def play_kubelet(self) -> None:
        """Starts pods, or leaves them waiting where their model cannot be started."""
        for pod in self.cluster.list(POD, self.namespace.name):
            labels = pod["metadata"]["labels"]
            if LABEL_TRACK not in labels or pod["metadata"].get("deletionTimestamp"):
                continue
            environment = {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}
            model = str(environment["ATTUNE_MODEL_ID"])
            waiting = self.waiting.get(model) or self.waiting.get(f"{labels[LABEL_TRACK]}/{model}")
            state: dict[str, Any] = {"running": {"startedAt": now()}} if waiting is None else {"waiting": waiting}
            if (find_condition(pod, "Ready").get("status") == "True") == (waiting is None) and pod["status"].get(
                "containerStatuses"
            ):
                continue
            ready = "True" if waiting is None else "False"
            self.namespace.say(
                pod,
                {
                    "phase": "Running" if waiting is None else "Pending",
                    "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": now()}],
                    "containerStatuses": [
                        {
                            "name": "server",
                            "image": "inference",
                            "imageID": "",
                            "ready": waiting is None,
                            "restartCount": 0,
                            "state": state,
                        }
                    ],
                },
            )
            assert labels[LABEL_REVISION]

    def drive(
        self,
        until: Callable[[], bool],
        what: str,
        *,
        each: Callable[[], object] = lambda: None,
        step: Callable[[], object] | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> None:
        """Passes over the Canary, and lets pods start, until something is the case."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}; status: {self.status}"
            (step or self.step)()
            self.play_kubelet()
            each()
            time.sleep(0.05)  # between two passes

    def drive_phase(self, phase: str, **more: Any) -> None:
        self.drive(lambda: self.status.get("phase") == phase, f"phase {phase}", **more)
