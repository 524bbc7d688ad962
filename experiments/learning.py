"""What makes a frozen encoder useful? Trains every row of a table in docs/learning.md on the same demonstrations with
the same number of steps, and measures each in the same way. experiments/tables.py says what the tables are made of.

    python -m experiments.learning                           one task: where z comes from, and what each ingredient does
    python -m experiments.learning --table ten_tasks         all ten tasks: where z comes from
    python -m experiments.learning --rows best,plain --seeds 0
    python -m experiments.learning --quick                   a few steps of each: shows that it runs, measures nothing

What is there already is not computed again, and what was interrupted goes on: collection, training, evaluation.
Demonstrations, runs and figures of every row stay under --directory; the table, of all that is there, is written to
experiments/results.

All rows of one task take some five hours of one core. Two cores are used best by two processes of one thread: run, with
OMP_NUM_THREADS=1, `--rows plain,random,end_to_end` beside `--rows unshifted,fine_tuned`, and share the others out; of
ten tasks `--rows best,fine_tuned` beside `--rows random,plain,guide,end_to_end`. One that needs what another is making
waits for it.
"""

import itertools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import REPO, arguments, machine, print_table, script
from demos.language import EMBEDDINGS_FILE
from experiments.tables import TABLES, TRAIN_ALL, Table
from files import Lock, written_whole
from training.checkpoint import read_checkpoint
from training.run_log import PHASE_DIRECTORIES

BASELINES = ("replay", "zero")


def main() -> None:
    settings = arguments(
        __doc__,
        table={"choices": list(TABLES), "default": "one_task", "help": "which one (default: %(default)s)"},
        rows={"help": "comma-separated names of rows (default: all)"},
        seeds={"help": "comma-separated; rows that are not repeated take the first (default: 0,1,2)"},
        directory={"help": "of the runs (default: runs/learning, of ten tasks runs/learning_ten_tasks)"},
        data_directory={"help": "of the demonstrations, which may be there already (default: data in --directory, of "
                        "ten tasks data/libero_object_cpu)"},
    )  # fmt: skip
    table = TABLES[settings.table].quick() if settings.quick else TABLES[settings.table]
    names = settings.rows.split(",") if settings.rows else list(table.rows)
    if unknown := [name for name in names if name not in table.rows]:
        sys.exit(f"error: --rows {unknown[0]}: no such row; known are {', '.join(table.rows)}")
    seeds = [int(seed) for seed in settings.seeds.split(",")] if settings.seeds else list(table.seeds)
    directory = (REPO / (settings.directory or table.directory) / ("quick" if settings.quick else "")).resolve()
    data = REPO / (settings.data_directory or table.data_directory or directory / "data")
    experiment = Experiment(table, directory, data.resolve())
    experiment.collect()
    for seed in seeds:  # a whole table early, its repetitions later
        for name in names:
            if name in table.repeated or seed == seeds[0]:
                print(f"== {name}, seed {seed}", flush=True)
                Run(experiment, name, seed).measure()
    if "best" in names and not table.baselines_in:
        experiment.play_baselines()
    results = experiment.results()
    show(results)
    if not settings.quick:
        with written_whole(REPO / table.results) as stream:
            stream.write((json.dumps(results, indent=1) + "\n").encode())


@dataclass(frozen=True)
class Experiment:
    """A table, and where what it is made of lies."""

    table: Table
    directory: Path  # of the runs
    data: Path  # the demonstrations that every row trains on

    def collect(self) -> None:
        """The demonstrations, checked where they are there already, and the embeddings of what they are told."""
        table = self.table
        configs = [flag for config in table.configs for flag in ("--config", config)]
        tasks = ",".join(map(str, table.tasks))
        self.directory.mkdir(parents=True, exist_ok=True)
        with Lock(self.directory / "data.lock", f"{self.data}: demonstrations are being collected", wait=True):
            script(
                "collect_demos.py", *configs, "--data_directory", self.data, "--tasks", tasks,
                "--demos_per_task", table.demos, *table.collection,
            )  # fmt: skip
            if not (self.data / EMBEDDINGS_FILE).exists():
                script("embed_language.py", *configs, "--data_directory", self.data, "--encoder", "offline")

    def play_baselines(self) -> None:
        """What blind policies get in the same episodes."""
        checkpoint = Run(self, "best", 0).checkpoint(2)
        if checkpoint.exists():  # it says which demonstrations may be replayed
            for policy, scene in itertools.product(BASELINES, self.table.scenes):
                roll_out(
                    self.baseline(policy, scene), self.table, scene, "--checkpoint", checkpoint, "--policy", policy
                )

    def baseline(self, policy: str, scene: str) -> Path:
        return self.directory / "baselines" / f"{policy}_{scene}"

    def results(self) -> dict:
        """The table of all that has been run, now or before."""
        table = self.table
        found = {"machine": machine(), "tasks": table.tasks, "demos": table.demos, "scenes": table.scenes}
        found |= {"rows": {name: self.summary(name) for name in table.rows}}
        if table.baselines_in:
            return found | {"baselines": {}, "baselines_in": table.baselines_in}
        return found | {
            "baselines": {
                policy: {scene: rollouts(self.baseline(policy, scene)) for scene in table.scenes}
                for policy in BASELINES
            }
        }

    def summary(self, name: str) -> dict:
        """The figures of a row with every seed."""
        row = self.table.rows[name]
        seeds = sorted(int(folder.name.rpartition("_seed")[2]) for folder in self.directory.glob(f"{name}_seed*"))
        runs = {seed: Run(self, name, seed) for seed in seeds}
        figures = {seed: run.figures() for seed, run in runs.items() if run.is_measured()}
        return {"description": row.description, "claim": row.claim, "seeds": figures}


@dataclass(frozen=True)
class Run:
    """One row with one seed, in a folder of its own. What has left its file is not done again."""

    experiment: Experiment
    name: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.experiment.directory / f"{self.name}_seed{self.seed}"

    def checkpoint(self, phase: int) -> Path:
        return self.folder / PHASE_DIRECTORIES[phase] / "checkpoint_latest.pt"

    @property
    def trains_encoder(self) -> bool:
        """In phase 2, too."""
        return set(TRAIN_ALL) <= set(self.experiment.table.rows[self.name].phase2)

    @property
    def representation(self) -> Path:
        """The report on the encoder as the policy uses it."""
        if self.trains_encoder:
            return self.folder / "representation.json"
        return self.encoder.folder / "phase1.json"

    @property
    def encoder(self) -> "Run":
        """The run whose phase 1 this one starts from."""
        return Run(self.experiment, self.experiment.table.rows[self.name].encoder_of or self.name, self.seed)

    def measure(self) -> None:
        """Phase 1, its report, phase 2, its offline error and rollouts."""
        table = self.experiment.table
        row, trained = table.rows[self.name], self.checkpoint(2)
        self.encoder.train(1)
        self.train(2, "--phase1_checkpoint", self.encoder.checkpoint(1))
        if self.trains_encoder and not self.representation.exists():
            script("eval.py", "--checkpoint", trained, "--representation", "--output", self.representation)
        for cell, (flow_start, scene) in self.cells().items():
            if flow_start in row.flow_starts and (row.claim or scene == "shifted"):
                flags = ("--checkpoint", trained, "--flow_start", flow_start)
                roll_out(self.folder / cell, table, scene, *flags)

    def cells(self) -> dict[str, tuple[str, str]]:
        """Folder of rollouts -> where the flow starts, scene."""
        pairs = itertools.product(("noise", "zero"), self.experiment.table.scenes)
        return {f"{flow_start}_{scene}": (flow_start, scene) for flow_start, scene in pairs}

    def train(self, phase: int, *start: object) -> None:
        """Trains a phase and evaluates it offline."""
        report = self.folder / f"phase{phase}.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        with Lock(self.folder / f"phase{phase}.lock", f"{self.folder}: phase {phase} is being trained", wait=True):
            if report.exists():
                return
            script("train.py", "--phase", phase, "--resume", *start, *self.settings(phase))
            evaluated = self.folder / f"phase{phase}_evaluated.json"
            script("eval.py", "--checkpoint", self.checkpoint(phase), "--output", evaluated)
            figures = json.loads(evaluated.read_text()) | self.of_training(phase)
            with written_whole(report) as stream:  # with all of it or not at all
                stream.write(json.dumps(figures).encode())
            evaluated.unlink()

    def settings(self, phase: int) -> list[str]:
        configs, changes = self.experiment.table.settings(self.name, phase)
        changes = [
            f"data.data_directory={self.experiment.data}",
            f"training.checkpoint_directory={self.folder}",
            f"training.seed={self.seed}",
            *changes,
        ]
        pairs = [*(("--config", config) for config in configs), *(("--set", change) for change in changes)]
        return [word for pair in pairs for word in pair]

    def of_training(self, phase: int) -> dict:
        """What its figures depend on and cost."""
        checkpoint = read_checkpoint(self.checkpoint(phase), phase)
        training = checkpoint["config"]["training"]
        log = self.checkpoint(phase).with_name("metrics.jsonl")
        minutes = training_minutes(log, training["batch_size"] * training["accumulate"])
        return {"precision": checkpoint["precision"], "training_minutes": minutes}

    def reports(self) -> list[Path]:
        return [self.encoder.folder / "phase1.json", self.folder / "phase2.json", self.representation]

    def is_measured(self) -> bool:
        """But for rollouts, which are reported as they are played."""
        return all(path.exists() for path in self.reports())

    def figures(self) -> dict:
        phase1, actions, z = (json.loads(path.read_text()) for path in self.reports())
        precision = self.experiment.table.precision
        return {
            "effective_rank": z["effective_rank"],
            "z_std": z["z_std"],
            "prediction": {} if self.trains_encoder else z["prediction"],  # the predictor has not followed
            "probes": z["probes"],
            "pose_mse": actions["mse_pose_mean"],
            "gripper_accuracy": actions["gripper_accuracy"],
            "minutes": [phase1["training_minutes"], actions["training_minutes"]],
            "precision": [report.get("precision", precision) for report in (phase1, actions)],
            "rollouts": {cell: rollouts(self.folder / cell) for cell in self.cells()},
            "episodes": {cell: episodes_by_task(self.folder / cell) for cell in self.cells()},
            "lifted_in_failures": {cell: lifted_in_failures(self.folder / cell) for cell in self.cells()},
        }


def training_minutes(log: Path, samples_per_step: int) -> float:
    """Of a run's steps, each counted once however often the run was interrupted; validation is not in it."""
    speeds: dict[int, float] = {}
    for line in log.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a run that was killed left half a line
            continue
        if record["split"] == "train":
            speeds[record["step"]] = record["samples_per_s"]
    spans = itertools.pairwise([0, *sorted(speeds)])
    return sum((step - before) * samples_per_step / speeds[step] for before, step in spans) / 60


def roll_out(folder: Path, table: Table, scene: str, *flags: object) -> None:
    """One evaluation; an interrupted one goes on where it stopped, and crashed episodes are played again."""
    played = played_in(folder)
    if played is None or played["overall"]["crashed"]:
        metres, trials = table.scenes[scene]
        tasks, limit = ",".join(map(str, table.tasks)), ("--max_steps", table.max_steps) if table.max_steps else ()
        script(
            "run_libero_eval.py", "--tasks", tasks, "--num_trials", trials, *limit, "--shift_target", metres,
            "--output_dir", folder, *flags,
        )  # fmt: skip


def played_in(folder: Path) -> dict | None:
    """What is in the results.json of an evaluation; None where it is not finished."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def rollouts(folder: Path) -> list[int] | None:
    """[successes, trials]."""
    played = played_in(folder)
    return [played["overall"]["successes"], played["overall"]["trials"]] if played else None


def episodes_by_task(folder: Path) -> dict[int, str] | None:
    """Task id -> a sign for each episode, 1 solved, 0 not, - crashed: what two rows are paired by."""
    played = played_in(folder)
    if played is None:
        return None
    signs: dict[int, str] = {}
    for episode in sorted(played["episodes"], key=lambda episode: (episode["task_id"], episode["trial"])):
        sign = "-" if episode["crashed"] else str(int(episode["success"]))
        signs[episode["task_id"]] = signs.get(episode["task_id"], "") + sign
    return signs


def lifted_in_failures(folder: Path) -> dict[str, int] | None:
    """What was lifted -> in how many failures; None where it was not looked at, as in earlier evaluations."""
    played = played_in(folder)
    return played["overall"].get("lifted_in_failures") if played else None


def show(results: dict) -> None:
    heads = ["row", "rank", "target mm", "hand mm", "20 ahead", "pose MSE", "gripper"]
    in_rows = [run["rollouts"] for row in results["rows"].values() for run in row["seeds"].values()]
    cells = list(dict.fromkeys(cell for played in in_rows for cell, count in played.items() if count))
    lines = []
    for row in results["rows"].values():
        runs = list(row["seeds"].values())
        if not runs:
            continue
        probes = [run["probes"].get("z", {}) for run in runs]
        line = [
            row["description"],
            _mean([run["effective_rank"] for run in runs], ".0f"),
            _mean([one["target before the grasp"]["mlp"]["mm"] for one in probes if one], ".0f"),
            _mean([one["end_effector"]["mlp"]["mm"] for one in probes if one], ".0f"),
            _mean([run["prediction"]["20"] for run in runs if "20" in run["prediction"]], ".2f"),
            _mean([run["pose_mse"] for run in runs], ".4f"),
            _mean([run["gripper_accuracy"] for run in runs], ".3f"),
        ]
        lines.append(line + [_counts([run["rollouts"][cell] for run in runs]) for cell in cells])
    for policy, scenes in results["baselines"].items():
        counts = [_counts([scenes[cell.split("_", 1)[1]]]) for cell in cells]
        lines.append([{"replay": "one demo, replayed blindly", "zero": "standing still"}[policy], *[""] * 6, *counts])
    print_table("means over the seeds; successes of all seeds, and of each", heads + cells, lines)
    if "baselines_in" in results:
        print(f"blind policies in the same episodes: {results['baselines_in']}")


def _mean(values: list[float], spec: str) -> str:
    return format(statistics.fmean(values), spec) if values else "-"


def _counts(counts: list[list[int] | None]) -> str:
    played = [count for count in counts if count]
    if not played:
        return "-"
    of_each = f": {', '.join(str(count[0]) for count in played)}" if len(played) > 1 else ""
    return f"{sum(count[0] for count in played)}/{sum(count[1] for count in played)}{of_each}"


if __name__ == "__main__":
    main()
