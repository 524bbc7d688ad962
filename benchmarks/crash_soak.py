"""Every program, killed (SIGKILL, with all that it has started) at random moments and started again with the same
command until it is done. What it leaves has to equal what an undisturbed run leaves.

    python benchmarks/crash_soak.py --kills 200 --minutes 40
    python benchmarks/crash_soak.py --programs phase1 phase2 embed        without a simulator

Each program gets the same share of the kills, as far as the time allows, in runs that are killed up to three times, at
moments that are drawn evenly over the time that a run takes. They are forked from this process, where what they import
is loaded: a kill meets a program at work, not Python at its imports. A training saves after every step, so that many
kills fall into a save. After --minutes none is killed any more. Results go to benchmarks/results/crash_soak.json.
"""

import contextlib
import io
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads add up in another order every time, and do not outlive a fork

import h5py
import numpy as np
import torch
from measure import REPO, arguments, print_table, write_results
from synthetic_demos import write_demos

FORK = get_context("fork")
SMALL = {
    "model.image_size": 32, "model.embed_dim": 32, "model.state_dim": 32, "model.encoder_depth": 1,
    "model.policy_layers": 1, "model.policy_embed_dim": 32, "training.phase1.temporal_predictor_hidden_dim": 32,
    "training.phase1.num_epochs": 2, "training.phase2.num_epochs": 2, "training.batch_size": 16,
    "training.log_interval": 3, "training.save_minutes": 1e-9, "training.device": "cpu",
    "training.mamba_backend": "torch", "training.precision": "fp32",
}  # fmt: skip
SCRIPTS = {
    "embed": "embed_language.py", "export": "convert_lerobot.py", "import": "convert_lerobot.py",
    "collect": "collect_demos.py", "evaluate": "run_libero_eval.py",
}  # fmt: skip
KILLS_OF_A_RUN = 3
PATIENCE = 900.0  # seconds after which a run that nobody kills any more hangs
DRAWN = ("--tasks", 6, "--image_size", 64, "--visual_mesh_ratio", 0.2)
LATEST = {phase: Path(folder, "checkpoint_latest.pt") for phase, folder in
          ((1, "phase1_temporal_jepa"), (2, "phase2_flow_matching"))}  # fmt: skip


@dataclass
class Program:
    """`command` gives the words for a run that works in a folder; `result` reads what the run left there. One that
    `keeps` what is there already says so: it was killed when all was done."""

    command: Callable[[Path], list[object]]
    result: Callable[[Path], object]
    keeps: bool = False


@dataclass
class Tally:
    """What has become of one program's runs."""

    killed: int = 0
    finished: int = 0
    equal: int = 0
    minutes: float = 0.0  # of all these runs together
    wrong: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------- what a run has left


def tensors(value: object) -> object:
    """What a checkpoint holds, to be compared with ==."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: tensors(part) for key, part in value.items()}
    return [tensors(part) for part in value] if isinstance(value, list | tuple) else repr(value)


def checkpoints(folder: Path) -> object:
    """All of them, the states of phase 2 that are stored beside them, and the last line of every step of the log."""
    found: dict[object, object] = {}
    for path in folder.glob("*/checkpoint_*.pt"):
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["config"]  # which names the folder
        found[path.name] = tensors(checkpoint)
    for path in folder.glob("frozen_states/*.npy"):
        found[path.name] = np.load(path).tobytes()
    clocks = ("samples_per_s", "waiting_for_data")
    for line in map(json.loads, next(folder.glob("*/metrics.jsonl")).read_text().splitlines()):
        found[line["split"], line["step"]] = {key: repr(value) for key, value in line.items() if key not in clocks}
    return found


def arrays(folder: Path) -> object:
    with np.load(folder / "embeddings.npz") as archive:
        return {name: archive[name].tobytes() for name in archive.files}


def demonstrations(folder: Path) -> object:
    """Every array and every attribute of every file."""
    found = {}
    for path in folder.rglob("*.hdf5"):
        with h5py.File(path) as file:

            def keep(name: str, item: h5py.HLObject, of: str = path.name) -> None:
                attributes = {key: str(value) for key, value in item.attrs.items()}
                found[of, name] = attributes, item[()].tobytes() if isinstance(item, h5py.Dataset) else None

            file.visititems(keep)
    return found


def files(folder: Path) -> object:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def episodes(folder: Path) -> object:
    """Where robot and objects went in each of them, and what is made of all of them."""
    lines = map(json.loads, (folder / "episodes.jsonl").read_text().splitlines())
    results = json.loads((folder / "results.json").read_text())
    return {line["trial"]: (line["fingerprint"], line["success"]) for line in lines}, results["overall"]["trials"]


# ---------------------------------------------------------------------------------------------------- the programs


def programs(work: Path) -> dict[str, Program]:
    """All of them work on what `prepared` has made."""
    data, trained = work / "data", work / "trained"
    return {
        "phase1": Program(lambda folder: training(1, own_data(data, folder), folder), checkpoints),
        "phase2": Program(lambda folder: training(2, data, folder, trained / LATEST[1]), checkpoints),
        "embed": Program(
            lambda folder: [SCRIPTS["embed"], "--data_directory", data, "--encoder", "offline", "--output",
                            folder / "embeddings.npz"],
            arrays,
        ),
        "export": Program(lambda folder: ["convert_lerobot.py", "export", data, folder / "out"], files, keeps=True),
        "import": Program(
            lambda folder: ["convert_lerobot.py", "import", work / "lerobot", folder / "out", "--closes", "high"],
            demonstrations,
            keeps=True,
        ),
        "collect": Program(
            lambda folder: [SCRIPTS["collect"], "--data_directory", folder, "--demos_per_task", 2, *DRAWN],
            demonstrations,
        ),
        "evaluate": Program(
            lambda folder: [SCRIPTS["evaluate"], "--checkpoint", trained / LATEST[2], "--tasks", 6, "--num_trials", 2,
                            "--max_steps", 40, "--visual_mesh_ratio", 0.2, "--output_dir", folder],
            episodes,
        ),
    }  # fmt: skip


def training(phase: int, data: Path, folder: Path, encoder: Path | None = None) -> list[object]:
    changes = SMALL | {"data.data_directory": data, "training.checkpoint_directory": folder}
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    return ["train.py", "--phase", phase, "--resume", *(["--phase1_checkpoint", encoder] if encoder else []), *words]


def own_data(data: Path, folder: Path) -> Path:
    """The same demonstrations in a folder of the run's own, where it converts their pictures itself."""
    own = folder / "data"
    own.mkdir(exist_ok=True)
    for path in data.glob("*.*"):
        if not (own / path.name).exists():
            (own / path.name).symlink_to(path)
    return own


def prepared(work: Path, wanted: set[str]) -> None:
    """What programs go on from. Trainings run in this process, so that the forked ones find all that torch imports on
    first use."""
    write_demos(work / "data", tasks=2, demos=3, steps=24, image_size=32)
    for path in (work / "data").glob("*.hdf5"):
        with h5py.File(path, "a") as file:
            for obs in (demo["obs"] for demo in file["data"].values()):
                obs["ee_pos"], obs["ee_ori"] = obs["joint_states"][:, :3], obs["joint_states"][:, 3:6]
    for name in sorted(wanted & SCRIPTS.keys()):
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            here([SCRIPTS[name], "--help"])
    if wanted & {"phase1", "phase2", "evaluate"}:
        here(training(1, work / "data", work / "trained"))
    if wanted & {"phase2", "evaluate"}:
        here(training(2, work / "data", work / "trained", work / "trained" / LATEST[1]))
    if "import" in wanted:  # pyarrow's threads would not outlive a fork
        made = FORK.Process(target=here, args=(["convert_lerobot.py", "export", work / "data", work / "lerobot"],))
        made.start()
        made.join()


def here(command: list[object]) -> None:
    """A program of the repo, as if it were this one. Raises SystemExit with its code, which 0 or None is success."""
    sys.argv = [str(word) for word in command]
    runpy.run_path(str(REPO / sys.argv[0]), run_name="__main__")


# --------------------------------------------------------------------------------------------------- runs and kills


def forked(command: list[object], said: Path) -> None:
    os.setsid()
    os.chdir(REPO)
    with said.open("a") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    here(command)


def killed(process) -> None:
    """With all that it has started, which is of its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no session of its own yet
        process.kill()
    process.join()


def run(program: Program, folder: Path, pauses: Iterable[float] = ()) -> tuple[int, str]:
    """Starts it until it ends by itself, and kills it after so many seconds of each start, those after the last pause
    excepted. -> how often it was killed, and what it said where it has failed."""
    folder.mkdir(parents=True)
    said, kills, pauses = folder.with_suffix(".log"), 0, iter(pauses)
    while True:
        said.unlink(missing_ok=True)
        process = FORK.Process(target=forked, args=(program.command(folder), said))
        process.start()
        pause = next(pauses, None)
        process.join(PATIENCE if pause is None else pause)
        if process.exitcode is None:
            killed(process)
            if pause is None:
                return kills, f"it hangs: {said.read_text()[-1000:]}"
            kills += 1
        elif process.exitcode and kills and program.keeps and "/out: is there already" in said.read_text():
            return kills, ""
        elif process.exitcode:
            return kills, f"exit code {process.exitcode}: {said.read_text()[-1000:]}"
        else:
            return kills, ""


def differing(found: object, expected: object) -> str:
    """The names of what is another, or lacks, in one of two results."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return "all of it"
    names = [str(name) for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    return ", ".join(sorted(names)[:8])


def disturb(program: Program, folder: Path, tally: Tally, expected: object, pauses: Iterable[float]) -> None:
    """One run, killed after each of the pauses, and what is to be said of what it has left."""
    began = time.monotonic()
    kills, failure = run(program, folder, pauses)
    found = None if failure else program.result(folder)
    tally.killed, tally.finished = tally.killed + kills, tally.finished + (not failure)
    if failure:
        tally.wrong.append(f"after {kills} kills: {failure}")
    elif found != expected:
        tally.wrong.append(f"after {kills} kills another result: {differing(found, expected)}")
    elif parts := [path.name for path in folder.rglob("*.part")]:
        tally.wrong.append(f"after {kills} kills there is still {', '.join(parts)}")
    else:
        tally.equal += 1
    shutil.rmtree(folder)
    tally.minutes += (time.monotonic() - began) / 60


def main() -> None:
    options = arguments(
        __doc__, kills={"type": int, "default": 200}, minutes={"type": float, "default": 40.0},
        programs={"nargs": "+", "default": ["phase1", "phase2", "embed", "export", "import", "collect", "evaluate"]},
        seed={"type": int, "default": 0},
    )  # fmt: skip
    wanted, most = (["phase1", "import"], 3) if options.quick else (options.programs, options.kills)
    drawn, until = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    tallies = {name: Tally() for name in wanted}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        prepared(work, set(wanted))
        known = {name: programs(work)[name] for name in wanted}
        expected, seconds = {}, {}
        for name, program in known.items():
            began = time.perf_counter()
            if failure := run(program, work / name)[1]:
                sys.exit(f"error: {name} ends with {failure}")
            expected[name], seconds[name] = program.result(work / name), time.perf_counter() - began
            print(f"{name}: {seconds[name]:.1f} s undisturbed", flush=True)

        def left(name: str) -> int:
            return -(-most // len(known)) - tallies[name].killed if time.monotonic() < until else 0

        def pauses(name: str) -> Iterator[float]:
            for _ in range(min(KILLS_OF_A_RUN, left(name))):
                if time.monotonic() < until:
                    yield drawn.uniform(0, seconds[name])

        while names := [name for name in known if left(name) > 0]:
            name = min(names, key=lambda one: tallies[one].minutes)
            disturb(known[name], work / f"{name}_killed", tallies[name], expected[name], pauses(name))
            print(", ".join(f"{name} {tally.killed}" for name, tally in tallies.items()), flush=True)
    rows = [{"program": name, "seconds": seconds[name], **vars(tally)} for name, tally in tallies.items()]
    write_results("crash_soak", rows, [f"{options.seed} is the seed of the moments"], options.quick)
    columns = ["program", "killed", "finished", "equal"]
    print_table("killed and started again", columns, [[row[column] for column in columns] for row in rows])
    if wrong := [f"{row['program']} {sentence}" for row in rows for sentence in row["wrong"]]:
        sys.exit("error: " + "\n".join(wrong))


if __name__ == "__main__":
    main()
