"""Runs every benchmark, each in a fresh process, then draws docs/speed.png.

    python benchmarks/run_all.py             about half an hour on two CPU cores, benchmarks/results/*.json
    python benchmarks/run_all.py --quick     a minute or two: only shows that they run

Leave the machine alone meanwhile. A peer that isn't installed (benchmarks/requirements.txt) is a row that says so.
"""

import subprocess
import sys
import time

from measure import REPO, arguments, print_table

SCRIPTS = ("flops", "encoder", "loader", "phase2", "precision", "latency", "wire", "processes", "eval_speed")
LIMIT = 900  # seconds that one may take


def main() -> None:
    settings = arguments(__doc__)
    outcomes, start = [], time.perf_counter()
    for name in SCRIPTS:
        path = REPO / "benchmarks" / f"{name}.py"
        if not path.is_file():
            continue
        print(f"\n=== {name}", flush=True)
        began = time.perf_counter()
        command = [sys.executable, str(path), *(["--quick"] if settings.quick else [])]
        try:
            failed = subprocess.run(command, cwd=REPO, timeout=LIMIT).returncode
            outcome = f"failed with exit {failed}" if failed else "ok"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {LIMIT} s"
        outcomes.append([name, f"{(time.perf_counter() - began) / 60:.1f} min", outcome])
    if not settings.quick:
        subprocess.run([sys.executable, str(REPO / "benchmarks/picture.py")], cwd=REPO, check=True)
    print_table(f"{(time.perf_counter() - start) / 60:.1f} minutes", ["benchmark", "time", "outcome"], outcomes)
    if any(outcome != "ok" for *_, outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
