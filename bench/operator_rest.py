"""The operator at rest: what it writes in ten minutes, and how much memory it takes.

Needs the cluster with the finished demo in it (`make demo`). Every object that the operator owns or reports on is
compared by resourceVersion before and after, Events included; its Lease is the one thing that it renews.
"""

import json
import re
import sys
import time

from bench.report import Row, report
from devcluster import client

SECONDS = 600
MEMORY_MEGABYTES = 120
KINDS = "ads,aft,aev,acn,jobs,configmaps,deployments.apps,services,httproutes,events"


def read_versions() -> dict[str, str]:
    """Maps every object in the namespaces that hold custom resources to its resourceVersion."""
    owners = json.loads(client.kubectl("get", "ads,aft,aev,acn", "-A", "-o", "json"))["items"]
    if not owners:
        sys.exit("there is nothing to be at rest over: run `make demo` first")
    versions = {}
    for namespace in sorted({each["metadata"]["namespace"] for each in owners}):
        for each in json.loads(client.kubectl("get", KINDS, "-n", namespace, "-o", "json"))["items"]:
            meta = each["metadata"]
            versions[f"{namespace}/{each['kind']}/{meta['name']}"] = meta["resourceVersion"]
    return versions


def read_memory_megabytes() -> float:
    """Reads the operator's resident memory from its own metrics."""
    with client.forwarded("deployment/attune", "attune-system", 8080) as port:
        text = client.run("curl", "-s", f"http://127.0.0.1:{port}/metrics")
    found = re.search(r"^process_resident_memory_bytes (\S+)$", text, flags=re.MULTILINE)
    if found is None:
        sys.exit("the operator's metrics do not tell its memory")
    return float(found.group(1)) / 1e6


def main() -> None:
    """Looks twice, ten minutes apart."""
    client.load_cluster_environment()
    before = read_versions()
    memory = [read_memory_megabytes()]
    for minute in range(SECONDS // 60):
        time.sleep(60)
        memory.append(read_memory_megabytes())
        client.say(f"{minute + 1} of {SECONDS // 60} minutes, {memory[-1]:.0f} MB")
    after = read_versions()
    # An Event that reaches the end of its life disappears without anybody's writing.
    written = [key for key, version in after.items() if before.get(key) != version]
    for key in written:
        print(f"written: {key}")
    report(
        "operator-rest",
        [
            Row("objects written in 10 minutes", len(written), "", "0", holds=not written),
            Row("resident memory, highest", max(memory), "MB", "under 120 MB", holds=max(memory) < MEMORY_MEGABYTES),
            Row("objects watched over", len(after), ""),
        ],
    )


if __name__ == "__main__":
    main()
