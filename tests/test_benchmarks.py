"""Every benchmark runs with --quick and writes its results; what they measure is not a test's business."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from small_trainings import ranks_of

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


def benchmark(_rank: int, command: str, output: Path) -> None:
    """As `python benchmarks/COMMAND --quick`, where what it imports is loaded."""
    script, *rest = command.split()
    os.environ["OUT"] = str(output)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    sys.argv = [script, *rest, "--quick"]
    runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")


@pytest.mark.parametrize("command, name", RESULTS.items())
def test_every_benchmark_runs_and_writes_its_results(command, name, tmp_path):
    [(code, said)] = ranks_of(1, tmp_path / "said", benchmark, command, tmp_path, patience=300)
    assert code == 0, said[-3000:]
    found = json.loads((tmp_path / f"{name}.quick.json").read_text())
    assert found["benchmark"] == name and found["quick"] and found["rows"] and found["machine"]["torch"]
