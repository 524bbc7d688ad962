"""Every program, killed (SIGKILL, with all that it has started) at random moments and started again with the same
command until it is done. What it leaves has to equal what an undisturbed run leaves.

    python benchmarks/crash_soak.py --kills 200 --minutes 90
    python benchmarks/crash_soak.py --programs phase1 phase2 embed        without a simulator

Programs take turns. A training saves after every step, so that many kills fall into a save. Results go to
benchmarks/results/crash_soak.json.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from measure import REPO, arguments, print_table, write_results
from synthetic_demos import write_demos

SMALL = {
    "model.image_size": 64, "model.embed_dim": 32, "model.state_dim": 32, "model.encoder_depth": 1,
    "model.policy_layers": 1, "model.policy_embed_dim": 32, "training.phase1.temporal_predictor_hidden_dim": 32,
    "training.phase1.num_epochs": 3, "training.phase2.num_epochs": 3, "training.batch_size": 16,
    "training.log_interval": 3, "training.save_minutes": 1e-9, "training.device": "cpu",
    "training.phase2.weight_average": 0.9,
}  # fmt: skip
DRAWN = ("--tasks", "6", "--image_size", "64", "--visual_mesh_ratio", "0.2")


@dataclass
class Program:
    """`command` gives the words for a run that works in a folder; `result` reads what the run left there."""

    command: Callable[[Path], list[object]]
    result: Callable[[Path], object]


def tensors(value: object) -> object:
    """What a checkpoint holds, to be compared with ==."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: tensors(part) for key, part in value.items()}
    return [tensors(part) for part in value] if isinstance(value, list | tuple) else repr(value)


def checkpoints(folder: Path) -> object:
    found = {}
    for path in folder.glob("*/checkpoint_*.pt"):
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["config"]  # which names the folder
        found[path.name] = tensors(checkpoint)
    lines = [json.loads(line) for line in next(folder.glob("*/metrics.jsonl")).read_text().splitlines()]
    clocks = ("samples_per_s", "waiting_for_data")
    last = {(line["split"], line["step"]): {k: repr(v) for k, v in line.items() if k not in clocks} for line in lines}
    return found, last


def arrays(path: Path) -> object:
    with np.load(path) as archive:
        return {name: archive[name].tobytes() for name in archive.files}


def demonstrations(folder: Path) -> object:
    found = {}
    for path in folder.glob("*.hdf5"):
        with h5py.File(path) as file:

            def keep(name: str, item: object, of: str = path.name) -> None:
                if isinstance(item, h5py.Dataset):
                    found[of, name] = item[()].tobytes()

            file.visititems(keep)
    return found


def episodes(folder: Path) -> object:
    lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    return {line["trial"]: line["fingerprint"] for line in lines}


def programs(work: Path) -> dict[str, Program]:
    """All of them work on what `prepare` has made."""
    data, trained = work / "data", work / "trained"
    phase1 = trained / "phase1_temporal_jepa/checkpoint_latest.pt"
    phase2 = trained / "phase2_flow_matching/checkpoint_latest.pt"
    return {
        "phase1": Program(lambda folder: training(1, data, folder), checkpoints),
        "phase2": Program(lambda folder: training(2, data, folder, phase1), checkpoints),
        "embed": Program(
            lambda folder: ["embed_language.py", "--data_directory", data, "--encoder", "offline", "--output",
                            folder / "embeddings.npz"],
            lambda folder: arrays(folder / "embeddings.npz"),
        ),
        "collect": Program(
            lambda folder: ["collect_demos.py", "--data_directory", folder, "--demos_per_task", 2, *DRAWN],
            demonstrations,
        ),
        "evaluate": Program(
            lambda folder: ["run_libero_eval.py", "--checkpoint", phase2, "--tasks", 6, "--num_trials", 2,
                            "--max_steps", 40, "--visual_mesh_ratio", 0.2, "--output_dir", folder],
            episodes,
        ),
    }  # fmt: skip


def training(phase: int, data: Path, folder: Path, encoder: Path | None = None) -> list[object]:
    changes = SMALL | {"data.data_directory": data, "training.checkpoint_directory": folder}
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    return ["train.py", "--phase", phase, "--resume", *(["--phase1_checkpoint", encoder] if encoder else []), *words]


def start(command: list[object], said: Path) -> subprocess.Popen:
    with said.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip


def whole(program: Program, folder: Path) -> tuple[object, float]:
    """The result of a run that nobody disturbs, and how long it took."""
    folder.mkdir(parents=True)
    said, began = folder.with_suffix(".log"), time.perf_counter()
    if code := start(program.command(folder), said).wait():
        sys.exit(f"error: {program.command(folder)[0]} ended with {code}: {said.read_text()[-2000:]}")
    return program.result(folder), time.perf_counter() - began


def disturbed(program: Program, folder: Path, seconds: float, drawn: random.Random, most: int) -> tuple[object, int]:
    """The result of one that is killed up to `most` times, and how often it was."""
    folder.mkdir(parents=True)
    said, kills = folder.with_suffix(".log"), 0
    while True:
        running = start(program.command(folder), said)
        try:
            code = running.wait(drawn.uniform(0, 0.9 * seconds) if kills < most else None)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            kills += 1
            continue
        if code:
            sys.exit(f"error: after {kills} kills it ended with {code}: {said.read_text()[-2000:]}")
        return program.result(folder), kills


def main() -> None:
    options = arguments(
        __doc__, kills={"type": int, "default": 200}, minutes={"type": float, "default": 90.0},
        programs={"nargs": "+", "default": ["phase1", "phase2", "embed", "collect", "evaluate"]},
        seed={"type": int, "default": 0},
    )  # fmt: skip
    wanted, kills = options.programs, options.kills
    if options.quick:
        wanted, kills = ["phase1", "embed"], 3
    drawn, until = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_demos(work / "data", tasks=2, demos=3, steps=40, image_size=64)
        known = programs(work)
        for name in ("phase1", "phase2") if set(wanted) & {"phase2", "evaluate"} else ():
            encoder = work / "trained/phase1_temporal_jepa/checkpoint_latest.pt" if name == "phase2" else None
            start(training(int(name[-1]), work / "data", work / "trained", encoder), work / "trained.log").wait()
        expected = {name: whole(known[name], work / f"{name}_whole") for name in wanted}
        counts = {name: {"program": name, "killed": 0, "finished": 0, "equal": 0} for name in wanted}
        while sum(row["killed"] for row in counts.values()) < kills and time.monotonic() < until:
            for name in wanted:
                folder = work / f"{name}_killed"
                found, times = disturbed(known[name], folder, expected[name][1], drawn, most=5)
                row = counts[name]
                row["killed"] += times
                row["finished"] += 1
                row["equal"] += found == expected[name][0] and not list(folder.rglob("*.part"))
                shutil.rmtree(folder)
        rows = list(counts.values())
        write_results("crash_soak", rows, [], options.quick)
        print_table("killed and started again", list(rows[0]), [list(row.values()) for row in rows])
        if any(row["equal"] < row["finished"] for row in rows):
            sys.exit("error: a run that was killed and went on is not the undisturbed one")


if __name__ == "__main__":
    main()
