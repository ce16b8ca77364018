"""Talks to a cluster as a person would, with kubectl and helm; the demo and the end-to-end tests share it."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from devcluster.build import RECIPES
from devcluster.errors import ClusterError

REPOSITORY = Path(__file__).resolve().parents[1]

Resource = dict[str, Any]


def say(text: str) -> None:
    """Prints a line at once, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def load_cluster_environment() -> None:
    """Takes over KUBECONFIG and PATH from the development cluster, so that kubectl and helm are found."""
    output = subprocess.run(
        [sys.executable, "-m", "devcluster", "env"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    for name, value in re.findall(r'^export (\w+)="?([^"\n]*)"?$', output, flags=re.MULTILINE):
        os.environ[name] = os.path.expandvars(value)


def run(*command: str, text: str | None = None) -> str:
    """Runs a command and returns what it printed.

    Raises:
        ClusterError: when it fails, with what it said.
    """
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command[:4])} ... failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def kubectl(*arguments: str, text: str | None = None) -> str:
    """Runs kubectl."""
    return run("kubectl", *arguments, text=text)


def apply(manifest: Path) -> None:
    """Applies a manifest, as the README tells a person to."""
    for line in kubectl("apply", "-f", str(manifest)).splitlines():
        say(f"kubectl apply: {line}")


def get(kind: str, name: str, namespace: str) -> Resource:
    """Reads one object."""
    found: Resource = json.loads(kubectl("get", kind, name, "-n", namespace, "-o", "json"))
    return found


def condition(resource: Resource, kind: str) -> Resource:
    """Picks a condition; an empty one where it is not set."""
    for each in resource.get("status", {}).get("conditions", []):
        if each["type"] == kind:
            found: Resource = each
            return found
    return {}


def is_current(resource: Resource) -> bool:
    """Tells whether the status speaks of the spec as it is now."""
    return bool(resource.get("status", {}).get("observedGeneration") == resource["metadata"]["generation"])


def wait(
    kind: str,
    name: str,
    namespace: str,
    *,
    until: Callable[[Resource], bool],
    describe: Callable[[Resource], str],
    seconds: int,
    fails: Callable[[Resource], bool] | None = None,
    each: Callable[[Resource], None] | None = None,
) -> Resource:
    """Waits until a resource is as wanted, and says whatever changes meanwhile.

    Raises:
        ClusterError: when ``fails`` becomes true, or the time is up; with the resource's conditions.
    """
    deadline = time.monotonic() + seconds
    last = ""
    while True:
        resource = get(kind, name, namespace)
        now = describe(resource)
        if now != last:
            say(f"{kind}/{name}: {now}")
            last = now
        if each is not None:
            each(resource)
        if is_current(resource):
            if until(resource):
                return resource
            if fails is not None and fails(resource):
                raise ClusterError(f"{kind}/{name} failed: {explain(resource)}")
        if time.monotonic() > deadline:
            raise ClusterError(f"{kind}/{name} was not done after {seconds} s: {explain(resource)}")
        time.sleep(1)


def explain(resource: Resource) -> str:
    """Puts the conditions into a line."""
    found = resource.get("status", {}).get("conditions", [])
    return "; ".join(f"{c['type']}={c['status']} {c['reason']}: {c['message']}" for c in found) or "no conditions"


@contextmanager
def forwarded(target: str, namespace: str, port: int) -> Iterator[int]:
    """Makes a port of the cluster answer on a loopback port, and gives that port."""
    process = subprocess.Popen(
        ["kubectl", "port-forward", "--address", "127.0.0.1", "-n", namespace, target, f":{port}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = process.stdout.readline() if process.stdout else ""
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise ClusterError(f"kubectl port-forward to {target} in {namespace} did not start")
        yield int(found.group(1))
    finally:
        process.terminate()
        process.wait()
        if process.stdout:
            process.stdout.close()


def read_store_secret(namespace: str) -> dict[str, str]:
    """Reads a namespace's store Secret, to put files into the bucket as the namespace's owner would."""
    data = get("secret", "attune-store", namespace)["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


@contextmanager
def store_on_loopback(namespace: str) -> Iterator[None]:
    """Puts the store's address (as a loopback port) and keys into this process's environment."""
    secret = read_store_secret(namespace)
    with forwarded("service/s3", "storage", 9000) as port:
        os.environ.update(
            ATTUNE_STORE_ENDPOINT=f"http://127.0.0.1:{port}",
            ATTUNE_STORE_BUCKET=secret["bucket"],
            ATTUNE_STORE_REGION=secret["region"],
            ATTUNE_STORE_ACCESS_KEY=secret["accessKey"],
            ATTUNE_STORE_SECRET_KEY=secret["secretKey"],
        )
        yield


def install_operator(values: Path) -> None:
    """Installs the chart, or brings an installed one up to date.

    The images of a development cluster keep their tag, so an annotation tells that the code behind it has changed.
    """
    sources = RECIPES["operator"].digest()[:12]
    run(
        "helm", "upgrade", "--install", "attune", str(REPOSITORY / "helm" / "attune"),
        "--namespace", "attune-system", "--create-namespace", "--values", str(values), "--wait", "--timeout", "3m",
        "--set-string", f"podAnnotations.attune\\.dev/sources={sources}",
    )  # fmt: skip
    say("helm: operator installed")
