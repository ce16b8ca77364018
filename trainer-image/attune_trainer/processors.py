"""Which processors this container may use; thread pools must not fight the CPU limit."""

import math
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def quota_processors(root: Path = _CGROUP_ROOT) -> float | None:
    """Reads the CPU limit of this container in processors, or None where there is none.

    Inside a container the limit is at the root of the mounted hierarchy: `cpu.max` under cgroup v2 ("150000 100000"
    -> 1.5), `cpu.cfs_quota_us` and `cpu.cfs_period_us` under v1 (-1 is no limit).
    """
    unified = _read(root / "cpu.max")
    if unified is not None:
        quota, _, period = unified.partition(" ")
        return None if quota == "max" else int(quota) / int(period or 100_000)
    for folder in (root / "cpu", root / "cpu,cpuacct"):
        quota_v1, period_v1 = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota_v1 is not None and period_v1 is not None:
            return int(quota_v1) / int(period_v1) if int(quota_v1) > 0 else None
    return None


def usable_processors(environment: Mapping[str, str], root: Path = _CGROUP_ROOT, available: int | None = None) -> int:
    """Counts the threads worth starting: OMP_NUM_THREADS where set, else the CPU limit, else all that are scheduled.

    A limit is rounded up ("1.5" -> 2, "0.5" -> 1): one thread too many is throttled now and then, one too few is
    never used.
    """
    asked = environment.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    scheduled = available if available is not None else len(os.sched_getaffinity(0))
    quota = quota_processors(root)
    return scheduled if quota is None else max(1, min(scheduled, math.ceil(quota)))


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def describe_processors() -> dict[str, str | int | list[str]]:
    """Says what a measured speed depends on: kind and number of processors, and the GPUs.

    -> {"processor": "...", "count": 2, "gpus": []}
    """
    import torch  # noqa: PLC0415 (takes seconds, and those who count threads must not import it before they have)

    described = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    return {
        "processor": described[1] if described else platform.machine(),
        "count": usable_processors(os.environ),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }
