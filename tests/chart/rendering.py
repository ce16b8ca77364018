"""Runs helm and finds things in what it renders."""

import functools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "attune"
RELEASE, NAMESPACE = "attune", "attune-system"

Object = dict[str, Any]


class Rendered(list[Object]):
    """Rendered objects, in order."""

    def kinds(self) -> set[str]:
        return {obj["kind"] for obj in self}

    def all(self, kind: str) -> list[Object]:
        return [obj for obj in self if obj["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Object:
        found = [obj for obj in self.all(kind) if name is None or obj["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} {kind} {name or ''}"
        return found[0]


@dataclass(frozen=True)
class Helm:
    """The helm program."""

    program: Path

    def run(self, *arguments: str, stdin: str | None = None, kubeconfig: Path | None = None) -> str:
        """Runs helm and gives what it prints.

        Raises:
            AssertionError: with what it says when it fails.
        """
        # A machine's own repositories, plugins and cluster have no say here.
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "KUBECONFIG": "/dev/null"}
        if kubeconfig is not None:
            environment["KUBECONFIG"] = str(kubeconfig)
        done = subprocess.run(
            [str(self.program), *arguments],
            input=stdin,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def render(self, values: Object | None = None, *, tests: bool = False) -> Rendered:
        """Renders the chart with values on top of its own; the same values are rendered once."""
        return Rendered(obj for obj in yaml.safe_load_all(_render(self, json.dumps(values or {}), tests)) if obj)


@functools.cache
def _render(helm: Helm, values: str, tests: bool) -> str:  # noqa: FBT001 (the cache wants it plain)
    skip = () if tests else ("--skip-tests",)
    return helm.run(
        "template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", "-",
        *skip,
        stdin=values,
    )  # fmt: skip
