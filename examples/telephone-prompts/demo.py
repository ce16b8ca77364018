"""The main job, from a bare machine to a promoted model and a bad one rolled back.

Every stage uses what a person would: kubectl, helm, the manifests beside this file. It ends with a table and exits
non-zero when an ending differs from what it should be.

python examples/telephone-prompts/demo.py [--skip-up] [--values FILE] [--record FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from devcluster.client import (  # noqa: E402 (the repository must be on the path first)
    REPOSITORY,
    Resource,
    apply,
    condition,
    forwarded,
    get,
    install_operator,
    is_current,
    kubectl,
    load_cluster_environment,
    say,
    store_on_loopback,
    wait,
)
from devcluster.errors import ClusterError  # noqa: E402

NAMESPACE = "speech"
MANIFESTS = HERE / "manifests"
HOSTNAME = "asr.example.com"
DATA_PREFIX = "sources/telephone-prompts"
BASE_PREFIX = "models/whisper-tiny.en"
BAD_PREFIX = "models/whisper-tiny.en-bad"
GATEWAY_SERVICE = "service/public"


@dataclass
class Stage:
    """A row of the table at the end."""

    name: str
    seconds: float = 0.0
    wer: str = ""
    verdict: str = ""
    resources: str = ""  # what kubectl get shows at its end


@dataclass
class Record:
    """All that a run saw; the pictures of the README are drawn from it."""

    stages: list[Stage] = field(default_factory=list)
    rollouts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    traffic: dict[str, Any] = field(default_factory=dict)
    story: str = ""  # kubectl describe of the Canary at the end

    @contextmanager
    def stage(self, name: str, *, shows: bool = True) -> Iterator[Stage]:
        """Times a stage, and shows the resources at its end where `shows`."""
        row = Stage(name)
        say(f"=== {name}")
        began = time.monotonic()
        try:
            yield row
        finally:
            row.seconds = time.monotonic() - began
            self.stages.append(row)
            say(f"=== {name}: {row.seconds:.0f} s")
        if shows:
            row.resources = kubectl("get", "ads,aft,aev,acn", "-n", NAMESPACE)
            print(row.resources, flush=True)


def percent(value: str | None) -> str:
    """Writes a fraction as a percentage."""
    return "?" if value is None else f"{100 * float(value):.1f} %"


def with_interval(row: Resource) -> str:
    """Writes a leaderboard row's WER with its interval."""
    return f"{percent(row['wer'])} [{percent(row['werLow'])}, {percent(row['werHigh'])}]"


def describe_phase(resource: Resource) -> str:
    """Says how far a resource is."""
    status = resource.get("status", {})
    text = str(status.get("phase", "not seen yet"))
    progress = status.get("progress")
    if progress and text != "Succeeded":
        text += f", {progress['stage']} {progress['percent']} %"
        if progress.get("estimatedRemainingSeconds") is not None:
            text += f", {progress['estimatedRemainingSeconds']} s to go"
    return text


def is_stalled(resource: Resource) -> bool:
    """Tells whether only a person can help."""
    return condition(resource, "Stalled").get("status") == "True"


def is_true(kind: str) -> Any:
    """Makes a test of a condition."""
    return lambda resource: condition(resource, kind).get("status") == "True"


def start_assets() -> tuple[threading.Thread, dict[str, Any]]:
    """Fetches data and model in the background, while the cluster starts."""
    made: dict[str, Any] = {}

    def work() -> None:
        try:
            for script in ("make_data.py", "get_model.py"):
                done = subprocess.run(
                    [sys.executable, str(HERE / script)], capture_output=True, text=True, check=False, cwd=REPOSITORY
                )
                if done.returncode != 0:
                    raise ClusterError(f"{script} failed: {done.stderr.strip()[-2000:]}")  # noqa: TRY301
                made[script] = Path(done.stdout.strip().splitlines()[-1])
        except (ClusterError, OSError, IndexError) as error:
            made["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, made


def upload(script: str, prefix: str, *arguments: str) -> None:
    """Runs one of the scripts beside this file with the store's credentials in its environment."""
    command = [sys.executable, str(HERE / script), *arguments, "--upload", prefix]
    # Waiting threads that spin would take the cores from the pods.
    done = subprocess.run(command, check=False, cwd=REPOSITORY, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    if done.returncode != 0:
        raise ClusterError(f"{script} failed with exit status {done.returncode}")


def evaluate(record: Record, name: str, title: str, manifest: str, expected: str) -> None:
    """Applies an Evaluation and checks its verdict."""
    with record.stage(title) as row:
        apply(MANIFESTS / manifest)
        done = wait(
            "evaluation",
            name,
            NAMESPACE,
            until=is_true("Succeeded"),
            fails=is_stalled,
            describe=describe_phase,
            seconds=900,
        )
        board = done["status"]["leaderboard"]
        row.wer = "; ".join(f"{each['candidate']} {with_interval(each)}" for each in board)
        row.verdict = done["status"]["verdict"]["decision"]
        say(f"verdict {row.verdict}: {done['status']['verdict']['reason']}")
        if row.verdict != expected:
            raise ClusterError(f"{name}: the verdict is {row.verdict}, expected {expected}")


def describe_rollout(resource: Resource) -> str:
    """Says where a rollout is."""
    status = resource.get("status", {})
    text = f"{status.get('phase', 'not seen yet')}, canary weight {status.get('canary', {}).get('weight', 0)}"
    analysis = status.get("analysis")
    if analysis and analysis.get("canaryWer") is not None:
        text += (
            f", {analysis['verdict']} after {analysis['utterances']} utterances: "
            f"stable {percent(analysis['stableWer'])}, canary {percent(analysis['canaryWer'])}"
        )
    return text


def remove_canary() -> None:
    """Removes the Canary of an earlier run: it serves the tuned model, and the story begins with the base."""
    if not kubectl("get", "canary", "prod-voice", "-n", NAMESPACE, "--ignore-not-found", "-o", "name"):
        return
    say("removing the Canary of an earlier run")
    kubectl("delete", "canary", "prod-voice", "-n", NAMESPACE)
    # What it owned goes after it, and the new one needs the names.
    arms = [f"{kind}/prod-voice-{track}" for kind in ("deployment", "service") for track in ("stable", "canary")]
    kubectl("wait", "--for=delete", "--timeout=120s", "-n", NAMESPACE, "httproute/prod-voice", *arms)


def roll_out(record: Record, title: str, model: dict[str, Any], *, outcome: str) -> None:
    """Changes spec.model and follows the rollout to its end."""
    with record.stage(title) as row:
        before = get("canary", "prod-voice", NAMESPACE)
        known = {entry["id"] for entry in before["status"].get("history", [])}
        samples = record.rollouts.setdefault(title, [])
        began = time.monotonic()

        def sample(resource: Resource) -> None:
            status = resource.get("status", {})
            samples.append(
                {
                    "seconds": round(time.monotonic() - began, 1),
                    "phase": status.get("phase"),
                    "weight": status.get("canary", {}).get("weight", 0),
                    # Until the operator has seen the change, the status tells of the rollout before.
                    "analysis": status.get("analysis") if is_current(resource) else None,
                }
            )

        def ended(resource: Resource) -> bool:
            return any(entry["id"] not in known for entry in resource["status"].get("history", [])) and resource[
                "status"
            ].get("phase") in {"Healthy", "Degraded"}

        patch = [{"op": "replace", "path": "/spec/model", "value": model}]
        kubectl("patch", "canary", "prod-voice", "-n", NAMESPACE, "--type=json", "-p", json.dumps(patch))
        done = wait(
            "canary", "prod-voice", NAMESPACE, until=ended, describe=describe_rollout, seconds=1500, each=sample
        )
        entry = done["status"]["history"][0]
        row.wer = f"stable {percent(entry.get('stableWer'))}, canary {percent(entry.get('canaryWer'))}"
        row.verdict = entry["outcome"]
        say(f"{entry['outcome']}: {entry['message']}")
        if entry["outcome"] != outcome:
            raise ClusterError(f"the rollout ended as {entry['outcome']} ({entry['message']}), expected {outcome}")


def check_state(*, phase: str, ready: str, canary_weight: int) -> None:
    """Checks that the Canary and its route say the same, and that stable serves."""
    canary = get("canary", "prod-voice", NAMESPACE)
    route = get("httproute", "prod-voice", NAMESPACE)
    weights = {each["name"]: each["weight"] for each in route["spec"]["rules"][0]["backendRefs"]}
    if canary["status"]["phase"] != phase or condition(canary, "Ready").get("status") != ready:
        raise ClusterError(f"prod-voice is {canary['status']['phase']}, Ready={condition(canary, 'Ready')}")
    if weights != {"prod-voice-stable": 100 - canary_weight, "prod-voice-canary": canary_weight}:
        raise ClusterError(f"the route's weights are {weights}")


@contextmanager
def ordinary_traffic(record: Record, audio: Path, report: Path) -> Iterator[None]:
    """Lets an ordinary client speak through the Gateway, and counts what fails."""
    with forwarded(GATEWAY_SERVICE, "gateway", 80) as port:
        client = subprocess.Popen(
            [
                sys.executable, str(HERE / "traffic.py"), "--url", f"http://127.0.0.1:{port}", "--host", HOSTNAME,
                "--audio", str(audio), "--per-minute", "30", "--seconds", "2400", "--report", str(report),
            ]
        )  # fmt: skip
        try:
            yield
        finally:
            client.terminate()
            client.wait(timeout=60)
            record.traffic = json.loads(report.read_text()) if report.exists() else {}


def show(record: Record) -> None:
    """Prints the table."""
    table = Table(title="Attune: telephone prompts, whisper-tiny.en")
    table.add_column("stage")
    table.add_column("time", justify="right")
    table.add_column("WER (95 % interval)")
    table.add_column("verdict")
    for row in record.stages:
        table.add_row(row.name, f"{row.seconds:.0f} s", row.wer, row.verdict)
    table.add_row("total", f"{sum(row.seconds for row in record.stages):.0f} s")
    Console(width=130).print(table)
    if record.traffic:
        print(f"ordinary traffic: {record.traffic['requests']} requests, {record.traffic['failures']} failed")


def play(record: Record, options: argparse.Namespace) -> None:
    """Runs all the stages."""
    thread, assets = start_assets()
    with record.stage("cluster, platform, images", shows=False):
        if not options.skip_up:
            done = subprocess.run([sys.executable, "-m", "devcluster", "up"], cwd=REPOSITORY, check=False)
            if done.returncode != 0:
                raise ClusterError("the cluster did not come up; see above")
        load_cluster_environment()
    with record.stage("operator", shows=False):
        install_operator(options.values.resolve())
    with record.stage("data and base model", shows=False), ExitStack() as stack:
        thread.join()
        if "error" in assets:
            raise assets["error"]
        apply(MANIFESTS / "00-namespace.yaml")
        remove_canary()
        stack.enter_context(store_on_loopback(NAMESPACE))
        upload("make_data.py", DATA_PREFIX)
        upload("get_model.py", BASE_PREFIX)
    with record.stage("Dataset") as row:
        apply(MANIFESTS / "10-dataset.yaml")
        # The recogniser in production starts with the base model while the data is prepared.
        apply(MANIFESTS / "50-canary.yaml")
        data = wait(
            "dataset",
            "telephone-prompts",
            NAMESPACE,
            until=is_true("Ready"),
            fails=is_stalled,
            describe=describe_phase,
            seconds=600,
        )
        row.verdict = f"{data['status']['stats']['utterances']} utterances, {data['status']['stats']['hours']} h"
    evaluate(record, "telephone-prompts-base", "Evaluation of the base", "20-evaluation-base.yaml", "FineTune")
    with record.stage("FineTune") as row:
        apply(MANIFESTS / "30-finetune.yaml")
        tuned = wait(
            "finetune",
            "telephone-prompts-lora",
            NAMESPACE,
            until=is_true("Succeeded"),
            fails=is_stalled,
            describe=describe_phase,
            seconds=1800,
        )
        metrics = tuned["status"]["metrics"]
        row.wer = f"validation {percent(metrics['baselineWer'])} -> {percent(metrics['wer'])}"
        row.verdict = tuned["status"]["modelId"]
    evaluate(record, "telephone-prompts-tuned", "Evaluation base : tuned", "40-evaluation-tuned.yaml", "Promote")
    with record.stage("Canary serves base"):
        wait("canary", "prod-voice", NAMESPACE, until=is_true("Ready"), describe=describe_rollout, seconds=300)
    with ordinary_traffic(record, assets["make_data.py"] / "audio", options.record.with_suffix(".traffic.json")):
        roll_out(
            record,
            "rollout of the tuned model",
            {"fineTuneRef": {"name": "telephone-prompts-lora"}},
            outcome="Promoted",
        )
        check_state(phase="Healthy", ready="True", canary_weight=0)
        with record.stage("making a bad model", shows=False), store_on_loopback(NAMESPACE):
            upload("make_bad_model.py", BAD_PREFIX, "--tuned", tuned["status"]["model"]["uri"])
        roll_out(record, "rollout of a bad model", {"uri": f"s3://attune/{BAD_PREFIX}"}, outcome="RolledBack")
        check_state(phase="Degraded", ready="False", canary_weight=0)
    record.story = kubectl("describe", "canary", "prod-voice", "-n", NAMESPACE)
    if record.traffic.get("requests", 0) == 0 or record.traffic.get("failures", 1) != 0:
        raise ClusterError(f"ordinary traffic was to run without a failure; it counted {record.traffic}")


def main() -> int:
    """Plays the story and says how it ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-up", action="store_true", help="the cluster, its platform and the images are there")
    parser.add_argument(
        "--values", type=Path, default=HERE / "operator-values.yaml", help="the chart's values, with the images' names"
    )
    parser.add_argument(
        "--record", type=Path, default=REPOSITORY / ".state" / "demo.json", help="where to write what was seen"
    )
    options = parser.parse_args()
    options.record.parent.mkdir(parents=True, exist_ok=True)
    record = Record()
    try:
        play(record, options)
    except ClusterError as error:
        show(record)
        print(f"\nThe demo did not end as it should: {error}", file=sys.stderr)
        return 1
    finally:
        options.record.write_text(json.dumps(asdict(record), indent=1))
    show(record)
    print(record.story[record.story.rfind("Events:") :])
    print("The tuned model was promoted, the bad one rolled back.")
    print('To look around: eval "$(python3 -m devcluster env)"; kubectl get ads,aft,aev,acn -n speech')
    return 0


if __name__ == "__main__":
    sys.exit(main())
