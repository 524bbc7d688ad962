"""What this process may use of the machine, which is seldom all of it: a job has its cores, a container its memory."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that this process may run on, at most as many as its control group has time for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _core_quotas())]))


def available_gigabytes() -> float:
    """Memory in 10^9 bytes that Linux says is available, at most what the control group leaves; elsewhere half of what
    is built in."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) / 1e6
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2e9
    return max(0.0, min([free, *_memory_left()]))


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of all above it: in version 2 one tree for all controllers, in
    version 1 a tree for each. Inside a container the group itself is often mounted as the root of its tree."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, group in lines:
        if not controllers:
            tree = CGROUPS
        elif controller in controllers.split(","):
            tree = CGROUPS / controller
        else:
            continue
        below = Path(group.lstrip("/"))
        yield from (tree / folder for folder in (below, *below.parents))


def _numbers(path: Path) -> list[float]:
    """The numbers of a one-line file, none where it is missing; "max", no limit, is infinite."""
    try:
        return [math.inf if word == "max" else float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []


def _core_quotas() -> Iterator[float]:
    for group in _groups("cpu"):
        limit = _numbers(group / "cpu.max") or [
            *_numbers(group / "cpu.cfs_quota_us"),
            *_numbers(group / "cpu.cfs_period_us"),
        ]
        if len(limit) == 2 and 0 < limit[0] < math.inf:  # version 1 says -1 for none
            yield limit[0] / limit[1]


def _memory_left() -> Iterator[float]:
    for group in _groups("memory"):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _numbers(group / limit_name), _numbers(group / used_name)
            if limit and used and limit[0] < 2**60:  # version 1 says nearly 2^63 for none
                yield (limit[0] - used[0] + _file_cache(group / "memory.stat", cache_name)) / 1e9


def _file_cache(path: Path, name: str) -> float:
    """Bytes of files kept in memory, which count as used and are given back when they are needed."""
    try:
        found = dict(line.split() for line in path.read_text().splitlines())
        return float(found.get(name, 0))
    except (OSError, ValueError):
        return 0.0
