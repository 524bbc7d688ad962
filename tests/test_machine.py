"""What a process may use of the machine, told by the real kernel where it can be and by a tree of files that looks like
the kernel's control groups where it cannot; and which code is running, told by real git repositories."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

import machine
import provenance
from seeds import mixed_seed

GB = 10**9


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """write(files) makes this process's control groups; `lines` are those of /proc/self/cgroup."""
    real_read_text = Path.read_text

    def write(lines: str, files: dict[str, object]) -> None:
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

        def read_text(path, *arguments, **options):
            return lines if str(path) == "/proc/self/cgroup" else real_read_text(path, *arguments, **options)

        monkeypatch.setattr(Path, "read_text", read_text)

    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(machine, "_free_gigabytes", lambda: 100.0)
    return write


@pytest.mark.skipif(shutil.which("taskset") is None, reason="Linux's taskset is not installed")
@pytest.mark.slow
def test_a_process_that_may_use_one_core_counts_one():
    allowed = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", allowed, sys.executable, "-c", "import machine; print(machine.available_cores())"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "1\n"


def test_this_machine_has_cores_and_memory():
    assert 1 <= machine.available_cores() <= os.cpu_count()
    built_in = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    assert 0.1 < machine.available_gigabytes() <= built_in
    assert machine.affordable_processes(1e6) == 1


def test_without_control_groups_the_machine_is_all_there_is(groups):
    groups("", {})
    assert machine.available_cores() == 16
    assert machine.available_gigabytes() == 100


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        ("0::/job", {"job/cpu.max": "400000 100000"}, 4),
        ("0::/job", {"job/cpu.max": "250000 100000"}, 3),  # two and a half
        ("0::/job", {"job/cpu.max": "20000 100000"}, 1),
        ("0::/job", {"job/cpu.max": "max 100000"}, 16),
        ("0::/job/step", {"job/cpu.max": "200000 100000", "job/step/cpu.max": "max 100000"}, 2),  # the one above
        ("0::/job", {"cpu.max": "200000 100000"}, 2),  # in a container the group is the root of what one sees
        ("5:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": 300000, "cpu/job/cpu.cfs_period_us": 100000}, 3),
        ("5:cpuacct,cpu:/docker/1", {"cpu/cpu.cfs_quota_us": 300000, "cpu/cpu.cfs_period_us": 100000}, 3),
        ("5:cpu:/job\n0::/", {"cpu/job/cpu.cfs_quota_us": -1, "cpu/job/cpu.cfs_period_us": 100000}, 16),
        ("5:cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": 300000, "cpu/job/cpu.cfs_period_us": 100000}, 16),
    ],
)
def test_the_control_groups_time_limits_the_cores(groups, lines, files, cores):
    groups(lines, files)
    assert machine.available_cores() == cores


@pytest.mark.parametrize(
    ("lines", "files", "gigabytes"),
    [
        ("0::/job", {"job/memory.max": 16 * GB, "job/memory.current": 6 * GB}, 10),
        ("0::/job", {"job/memory.max": "max", "job/memory.current": 6 * GB}, 100),
        ("0::/job", {"job/memory.max": "max", "job/memory.high": 8 * GB, "job/memory.current": 6 * GB}, 2),
        ("0::/job/step", {"job/memory.max": 16 * GB, "job/memory.current": GB, "job/step/memory.max": "max"}, 15),
        ("0::/job", {"job/memory.max": 4 * GB, "job/memory.current": 5 * GB}, 0),
        (
            "0::/job",
            {
                "job/memory.max": 16 * GB,
                "job/memory.current": 16 * GB,
                "job/memory.stat": f"anon 5\ninactive_file {3 * GB}\nactive_file {GB}",  # given up when it is needed
            },
            4,
        ),
        (
            "3:memory:/job",
            {
                "memory/job/memory.limit_in_bytes": 8 * GB,
                "memory/job/memory.usage_in_bytes": 7 * GB,
                "memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GB}",
                "memory/memory.limit_in_bytes": 9223372036854771712,  # none
                "memory/memory.usage_in_bytes": 60 * GB,
            },
            3,
        ),
    ],
)
def test_the_control_groups_memory_limits_the_memory(groups, lines, files, gigabytes):
    groups(lines, files)
    assert machine.available_gigabytes() == pytest.approx(gigabytes)


def test_processes_are_as_many_as_cores_and_memory_allow(groups):
    groups("0::/job", {"job/cpu.max": "800000 100000", "job/memory.max": 7 * GB, "job/memory.current": 0})
    assert machine.affordable_processes(0.5) == 8
    assert machine.affordable_processes(1.5) == 4
    assert machine.affordable_processes(10) == 1


# Which code


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A folder with one committed file, which counts as the place of the code."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "code")
    provenance.code_version.cache_clear()
    (tmp_path / "code").mkdir()
    (tmp_path / "code/train.py").write_text("pass\n")
    git(tmp_path / "code", "init")
    git(tmp_path / "code", "add", ".")
    git(tmp_path / "code", "commit", "-m", "first")
    yield tmp_path / "code"
    provenance.code_version.cache_clear()


def git(folder: Path, *arguments) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false", "-C", folder, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_code_is_named_by_its_commit_and_by_changes_to_it(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert len(commit) == 40
    assert provenance.code_version() == commit
    (repository / "data.hdf5").write_text("a file of the user's\n")
    provenance.code_version.cache_clear()
    assert provenance.code_version() == commit
    (repository / "train.py").write_text("changed\n")
    provenance.code_version.cache_clear()
    assert provenance.code_version() == f"{commit} + changes"


def test_asking_for_the_code_leaves_a_commit_in_progress_alone(repository):
    os.utime(repository / "train.py", (1, 1))  # git would write into its index that the file is unchanged
    index = repository / ".git/index"
    before = index.stat().st_mtime_ns, index.stat().st_ino
    assert provenance.code_version() == git(repository, "rev-parse", "HEAD")
    assert (index.stat().st_mtime_ns, index.stat().st_ino) == before


def test_a_git_hooks_variables_do_not_change_whose_code_it_is(repository, monkeypatch, tmp_path):
    commit = git(repository, "rev-parse", "HEAD")
    git(tmp_path, "init", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    assert provenance.code_version() == commit


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to give a file away")
def test_another_users_checkout_is_named_too(repository):
    commit = git(repository, "rev-parse", "HEAD")
    for folder, _, files in os.walk(repository):
        for name in (".", *files):
            os.chown(Path(folder, name), 65534, 65534)
    assert provenance.code_version() == commit


def test_code_outside_a_checkout_is_unknown(repository, monkeypatch, tmp_path):
    shutil.rmtree(repository / ".git")
    assert provenance.code_version() == "unknown"
    git(tmp_path, "init")  # now the code is a copy inside somebody else's repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "theirs")
    provenance.code_version.cache_clear()
    assert provenance.code_version() == "unknown"


def test_code_is_unknown_without_git_and_in_a_repository_without_a_commit(repository, monkeypatch):
    shutil.rmtree(repository / ".git")
    git(repository, "init")
    assert provenance.code_version() == "unknown"
    monkeypatch.setenv("PATH", "")
    provenance.code_version.cache_clear()
    assert provenance.code_version() == "unknown"


def test_a_repository_whose_changes_cannot_be_told_says_so(repository):
    commit = git(repository, "rev-parse", "HEAD")
    (repository / ".git/index").write_bytes(b"damaged")
    assert provenance.code_version() == f"{commit} + perhaps changes"


# Seeds


def test_mixed_seeds_differ_for_every_combination_and_stay_the_same_for_ever():
    combinations = [(seed, epoch) for seed in range(30) for epoch in range(30)]
    assert len({mixed_seed(*parts) for parts in combinations}) == len(combinations)
    assert mixed_seed("1", 2) != mixed_seed(1, 2) != mixed_seed(12)
    assert mixed_seed(0, "task") == 3124587336482588153


def test_mixed_seeds_do_not_depend_on_whose_integer_it_is():
    assert mixed_seed(np.int64(3), np.str_("task")) == mixed_seed(3, "task")
    assert mixed_seed(torch.tensor(3).item(), "task") == mixed_seed(3, "task")


def test_mixed_seeds_are_taken_by_every_generator_here():
    for seed in (mixed_seed(2**70, 10**30), mixed_seed(-1), mixed_seed("")):
        assert 0 <= seed < 2**63
        np.random.default_rng(seed)
        torch.Generator().manual_seed(seed)
