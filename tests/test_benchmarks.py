"""Every benchmark runs with --quick and writes its results; what they measure is not a test's business."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers import ROOT

RESULTS = {
    "encoder.py": "encoder",
    "precision.py": "precision",
    "loader.py": "loader",
    "phase2.py": "phase2",
    "latency.py": "latency",
    "wire.py": "wire",
    "flops.py": "flops",
    "gpu.py kernels": "gpu_kernels",
}


def run(command: str, output: Path) -> subprocess.CompletedProcess:
    script, *rest = command.split()
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *rest, "--quick"],
        cwd=ROOT, env=os.environ | {"OUT": str(output), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


def test_every_benchmark_runs_and_writes_its_results(tmp_path):
    with ThreadPoolExecutor(2) as two_at_a_time:
        runs = two_at_a_time.map(lambda command: run(command, tmp_path), RESULTS)
        for command, finished in zip(RESULTS, runs, strict=True):
            assert finished.returncode == 0, f"{command}: {finished.stderr[-3000:]}"
    for name in RESULTS.values():
        found = json.loads((tmp_path / f"{name}.quick.json").read_text())
        assert found["benchmark"] == name and found["quick"] and found["rows"] and found["machine"]["torch"]
