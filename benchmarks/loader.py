"""How many samples a second does the loader give, and does a training step ever wait for it?

    python benchmarks/loader.py

A sample is two cameras at t and t + K: four frames. Our loader reads converted frames (data.cache disk and ram) and
HDF5 as it is (none). It is compared with what is usually written: a torch Dataset that opens the HDF5 file and reads by
index, in a DataLoader with 0 and 2 workers. Both read the same made-up demonstrations, at LIBERO's 128 pixels and at
224, stored with gzip or uncompressed. They read in random order, warm from the operating system's cache. Every side
delivers batches for a while, in turn; the rate is from its first batch to its last.

Then train.py itself runs the quick start's model on such demonstrations and logs what share of a step it waited.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import torch
from measure import REPO, arguments, print_table, ratio_text, spread, write_results
from synthetic_demos import CAMERAS, write_demos
from torch.utils.data import DataLoader, Dataset

from config import load_config
from dataloader import Batches, LowDimensional, transition_rows
from demos.frames import open_frames
from demos.hdf5 import load_demos
from demos.language import load_languages

BATCH = 32


class UsualDataset(Dataset):
    """What a first version looks like: one HDF5 file, opened in the worker that reads it."""

    def __init__(self, path: Path):
        self.path, self.file = path, None
        with h5py.File(path, "r") as file:
            demos = [(name, len(demo["actions"])) for name, demo in file["data"].items()]
        self.samples = [(name, t) for name, steps in demos for t in range(steps - 1)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        self.file = self.file or h5py.File(self.path, "r")
        name, t = self.samples[index]
        demo = self.file["data"][name]
        frames = {camera: torch.from_numpy(demo["obs"][camera][t : t + 2]) for camera in CAMERAS}
        robot = {key: torch.from_numpy(demo["obs"][key][t : t + 2]) for key in ("joint_states", "gripper_states")}
        return frames | robot | {"actions": torch.from_numpy(demo["actions"][t])}


def main() -> None:
    settings = arguments(__doc__)
    lasts, rounds = (0.2, 1) if settings.quick else (1.0, 5)
    rows = []
    for size in (32,) if settings.quick else (128, 224):
        with tempfile.TemporaryDirectory() as folder:
            steps = 40 if settings.quick else 120
            sides = sides_at(Path(folder), size, steps)
            baseline = "DataLoader, gzip, 0 workers"
            rates = delivered(sides, lasts, rounds)
        for side, of_side in rates.items():
            row = {
                "pixels": size,
                "side": side,
                "samples_per_s": spread(of_side),
                "ratio": over(of_side, rates[baseline]),
            }
            for stored in ("gzip", "uncompressed"):
                usual = [rates[name] for name in rates if name.startswith(f"DataLoader, {stored}")]
                row[f"ratio_to_best_{stored}"] = over(of_side, [max(of_round) for of_round in zip(*usual, strict=True)])
            rows.append(row)
    waiting = share_of_waiting(settings.quick)
    print_table(
        "Samples a second, as a multiple of a plain DataLoader over gzip HDF5 without workers",
        ["pixels", "side", "multiple, median (quartiles)"],
        [[row["pixels"], row["side"], ratio_text(row["ratio"])] for row in rows],
    )
    print(f"\nquick-start training waited for data {waiting:.2%} of its time")
    rows.append({"side": "train.py, conf/quickstart.yaml", "waiting_for_data": waiting})
    notes = [
        "ratio: samples a second of the side over those of the DataLoader on gzip HDF5 without workers",
        "ratio_to_best: over those of the DataLoader with the better number of workers, on such files, in that round",
    ]
    write_results("loader", rows, notes, settings.quick)


def over(rates: list[float], baseline: list[float]) -> dict[str, float]:
    return spread([rate / base for rate, base in zip(rates, baseline, strict=True)])


def sides_at(folder: Path, size: int, steps: int) -> dict[str, Iterable]:
    """Every way to read the same demonstrations, by name."""
    sides = {}
    for stored, compression in (("gzip", "gzip"), ("uncompressed", None)):
        write_demos(folder / stored, demos=4, steps=steps, image_size=size, compression=compression)
        (path,) = (folder / stored).glob("*.hdf5")
        for cache in ("disk", "ram", "none") if stored == "gzip" else ("none",):
            sides[f"ours, {cache}" + (f", {stored}" if cache == "none" else "")] = ours(folder / stored, size, cache)
        for workers in (0, 2):
            sides[f"DataLoader, {stored}, {workers} workers"] = DataLoader(
                UsualDataset(path),
                BATCH,
                shuffle=True,
                drop_last=True,
                num_workers=workers,
                persistent_workers=workers > 0,
            )
    return sides


def ours(directory: Path, size: int, cache: str) -> Batches:
    config = load_config(
        REPO / "conf/config.yaml",
        [f"data.data_directory={directory}", f"data.cache={cache}", f"model.image_size={size}"],
    )
    demos, _ = load_demos(config.data, 1)
    language = load_languages(config.data, demos, config.model.lang_emb_dim)
    frames = open_frames(demos, config.data, size, torch.device("cpu"))
    low_dimensional = LowDimensional(demos, language, torch.device("cpu"))
    return Batches(transition_rows(demos, 1), low_dimensional, 1, BATCH, frames=frames, gap=1, seed=0)


def delivered(sides: dict[str, Iterable], lasts: float, rounds: int) -> dict[str, list[float]]:
    """Samples a second of every side in every round, in a new order each round."""
    order, draw = list(sides), random.Random(0)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            rates[name].append(rate(sides[name], lasts))
    return rates


def rate(batches: Iterable, lasts: float) -> float:
    """From the first batch, which starts threads and workers, until `lasts` seconds later and at least four more."""
    stream = epochs(batches)
    next(stream)
    start, count = time.perf_counter(), 0
    while count < 4 or time.perf_counter() - start < lasts:
        next(stream)
        count += 1
    elapsed = time.perf_counter() - start
    stream.close()
    return count * BATCH / elapsed


def epochs(batches: Iterable) -> Iterator[dict]:
    while True:
        yield from batches


def share_of_waiting(quick: bool) -> float:
    """train.py with the quick start's settings, one epoch; its own log says what it waited."""
    with tempfile.TemporaryDirectory() as folder:
        write_demos(Path(folder) / "data", demos=6, steps=30 if quick else 120, image_size=64)
        changes = [
            f"data.data_directory={folder}/data", f"training.checkpoint_directory={folder}/runs", "training.device=cpu",
            "training.phase1.num_epochs=1", "training.log_interval=2",
        ]  # fmt: skip
        if quick:
            changes += ["training.batch_size=16", "model.encoder_depth=1"]
        command = [sys.executable, "train.py", "--config", "conf/quickstart.yaml", "--phase", "1"]
        for change in changes:
            command += ["--set", change]
        subprocess.run(command, cwd=REPO, check=True, capture_output=True)
        (log,) = (Path(folder) / "runs").glob("*/metrics.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    found = [line["waiting_for_data"] for line in lines if line["split"] == "train"][1:]  # the first warms up
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
