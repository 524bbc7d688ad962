"""What this process may use of the machine, which is seldom all of it: a job has its cores, a container its memory."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that this process may run on, at most as many as its control group has time for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _core_quotas())]))


def available_gigabytes() -> float:
    """Memory in 10^9 bytes that Linux says is available, or elsewhere half of what is built in; at most what the
    control group leaves."""
    return max(0.0, min([_free_gigabytes(), *_memory_left()]))


def affordable_processes(gigabytes_each: float) -> int:
    """One a core, as far as memory goes, but at least one."""
    return max(1, min(available_cores(), int(available_gigabytes() / gigabytes_each)))


def _free_gigabytes() -> float:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 / 1e9
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2e9


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
        for limit_names, used_name, cached in (
            (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
            (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
        ):
            limits = [limit for name in limit_names for limit in _numbers(group / name)]
            used = _numbers(group / used_name)
            if limits and used and min(limits) < 2**60:  # version 1 says nearly 2^63 for none
                yield (min(limits) - used[0] + _bytes_of(cached, group / "memory.stat")) / 1e9


def _bytes_of(names: Sequence[str], path: Path) -> float:
    """The sum of these lines of a group's memory.stat. Files that are kept in memory count as used, and are given up
    where the memory is needed."""
    try:
        found = dict(line.split() for line in path.read_text().splitlines())
        return sum(float(found.get(name, 0)) for name in names)
    except (OSError, ValueError):
        return 0.0
