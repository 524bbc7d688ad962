"""How every benchmark here measures: the sides of a comparison alternate on the same work, in the same process.

A machine's speed drifts, so a round runs every side once, in random order, and a ratio is taken within each round; what
is reported is the median over the rounds with its quartiles. On a CPU only such ratios are claims: the seconds in
benchmarks/results/*.json are there to check them, and say something about one machine at one time.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("OUT", REPO / "benchmarks/results"))
NO_FORESIGHT = "training.phase1.foresight_weight=0"  # made-up batches hold no future; the head's cost is nil
PACKAGES = ("numpy", "h5py", "transformers", "mambapy", "mamba-ssm", "causal-conv1d")
sys.path.insert(0, str(REPO))  # the benchmarks are run as `python benchmarks/NAME.py` and measure the code next door


def arguments(docstring: str, **options: dict) -> argparse.Namespace:
    """The command line of a benchmark: its docstring as help, --quick, and what `options` adds."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows in seconds that it runs, measures nothing"
    )
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args()


def script(name: str, *flags: object, may_end_with: tuple[int, ...] = (0,)) -> int:
    """Runs one of the project's own scripts, as a reader would. Another exit code than these ends this one, too."""
    command = [sys.executable, name, *map(str, flags)]
    ended = subprocess.run(command, cwd=REPO).returncode
    if ended not in may_end_with:
        sys.exit(f"error: {' '.join(command)} failed")
    return ended


def machine() -> dict:
    """What the figures depend on: processor, threads, GPU, versions."""
    described = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = None
    return described


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def interleaved(sides: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every side in every round; the order within a round is drawn anew."""
    for _ in range(warm_up):
        for work in sides.values():
            work()
    order, draw = list(sides), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            times[name].append(seconds(sides[name]))
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "q1": q1, "q3": q3}


def compared(times: dict[str, list[float]], baseline: str) -> dict[str, dict]:
    """Per side: its seconds, and how many times as long as the baseline it takes, each ratio from one round."""
    return {
        name: {
            "seconds": spread(of_side),
            "ratio": spread([one / base for one, base in zip(of_side, times[baseline], strict=True)]),
            "rounds": len(of_side),
        }
        for name, of_side in times.items()
    }


def peak_memory_gb() -> float:
    """The largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # not ru_maxrss: on Linux that starts at what the parent process had
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # macOS counts bytes, Linux kilobytes


def ratio_text(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3g} ({ratio['q1']:.3g} to {ratio['q3']:.3g})"


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    texts = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [columns, *texts]) for i in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, ["-" * width for width in widths], *texts]:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    sys.stdout.flush()


def write_results(name: str, rows: list[dict], notes: list[str], quick: bool, announce: bool = True) -> None:
    """benchmarks/results/<name>.json, or <name>.quick.json, which no picture and no document reads."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}{'.quick' if quick else ''}.json"
    found = {"benchmark": name, "quick": quick, "machine": machine(), "notes": notes, "rows": rows}
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    if announce:
        print(f"\nwritten to {path.relative_to(REPO) if path.is_relative_to(REPO) else path}", flush=True)
