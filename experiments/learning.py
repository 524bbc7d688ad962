"""What makes a frozen encoder useful? Trains every row of the tables in docs/learning.md on the same demonstrations
with the same number of steps, and measures each in the same way.

    python -m experiments.learning                           all rows; what is there already is not computed again
    python -m experiments.learning --rows best,plain --seeds 0
    python -m experiments.learning --quick                   a few steps of each: shows that it runs, measures nothing

Claims (every seed, rollouts in both scenes) compare where z comes from; the best recipe is conf/quickstart.yaml.
Ingredients (first seed, rollouts with shifted targets) are that recipe without shifted pictures and with one more
thing changed. Demonstrations, runs and figures of every row stay under --directory; the tables, of all that is there,
are written to experiments/results/learning.json.

All rows take some five hours of one core. Two cores are used best by two processes of one thread: run, with
OMP_NUM_THREADS=1, `--rows plain,random,end_to_end` beside `--rows unshifted,fine_tuned`, and share the others out.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import REPO, arguments, machine, print_table, script

CONFIG = "conf/quickstart.yaml"
TASK = 2  # of libero_object, the salad dressing: a demonstration replayed blindly fails when the target has moved
SHIFT = 0.05  # metres that the target is moved by at most, in the demonstrations and in half of the rollouts
DEMOS = 40
SCENES = {"init_states": (0.0, 15), "shifted": (SHIFT, 30)}  # metres, episodes
PHASES = {1: "phase1_temporal_jepa", 2: "phase2_flow_matching"}
BASELINES = ("replay", "zero")


@dataclass(frozen=True)
class Row:
    """One line of a table: what differs from conf/quickstart.yaml."""

    description: str
    phase1: tuple[str, ...] = ()  # --set arguments of phase 1
    phase2: tuple[str, ...] = ()  # further ones of phase 2
    encoder_of: str | None = None  # a row whose phase 1 is taken over
    claim: bool = False
    flow_starts: tuple[str, ...] = ("noise",)  # of the rollouts


def recipe(**values: object) -> tuple[str, ...]:
    return tuple(f"training.phase1.{key}={value}" for key, value in values.items())


UNSHIFTED = recipe(image_shift=0)
PLAIN = (
    "model.prediction_gap=1",
    *UNSHIFTED,
    *recipe(
        vicreg_on="both", variance_weight=1.0, covariance_weight=0.04, inverse_dynamics_weight=0, foresight_weight=0,
        proprioception_masking=0,
    ),
)  # fmt: skip
TRAIN_ALL = ("training.phase2.freeze_encoder=false",)
SHIFT_ALL = ("training.phase2.image_shift=2",)


def ingredient(description: str, *changes: str, phase2: tuple[str, ...] = ()) -> Row:
    """The recipe with one thing changed. Pictures are not shifted: that was the last ingredient to be found."""
    return Row(description, (*UNSHIFTED, *changes), phase2, encoder_of="unshifted" if phase2 else None)


ROWS = {
    "random": Row("frozen, untrained", recipe(num_epochs=0), claim=True),
    "plain": Row("frozen, the guide's plain recipe", PLAIN, claim=True),
    "unshifted": Row("frozen, pictures not shifted", UNSHIFTED, claim=True, flow_starts=("noise", "zero")),
    "best": Row("frozen, the best recipe", claim=True),
    "end_to_end": Row("trained by the policy's loss alone", phase2=TRAIN_ALL, encoder_of="random", claim=True),
    "end_to_end_shifted": Row(
        "the same, pictures shifted", phase2=(*TRAIN_ALL, *SHIFT_ALL), encoder_of="random", claim=True
    ),
    "fine_tuned": Row("pictures not shifted, then trained on", phase2=TRAIN_ALL, encoder_of="unshifted", claim=True),
    "gap_1": ingredient("predicts 1 frame ahead, not 5", "model.prediction_gap=1"),
    "vicreg_on_both": ingredient("VICReg on prediction and z_t", *recipe(vicreg_on="both")),
    "guide_weights": ingredient("VICReg 1.0 and 0.04", *recipe(variance_weight=1.0, covariance_weight=0.04)),
    "no_inverse": ingredient("no inverse dynamics", *recipe(inverse_dynamics_weight=0)),
    "no_foresight": ingredient("no foresight", *recipe(foresight_weight=0)),
    "no_masking": ingredient("proprioception never masked", *recipe(proprioception_masking=0)),
    "constant_rate": ingredient(
        "no warm-up, constant rate", "training.warmup_steps=0", "training.learning_rate_schedule=constant"
    ),
    "slow_target": ingredient("EMA from 0.996, not 0.98", "training.ema_momentum=0.996"),
    "no_state_noise": ingredient("no noise on z", phase2=("training.phase2.state_noise=0",)),
    "unscaled": ingredient("z as it is", phase2=("training.phase2.state_scaling=none",)),
}


def main() -> None:
    settings = arguments(
        __doc__,
        rows={"help": "comma-separated names of rows (default: all)"},
        seeds={"default": "0,1,2", "help": "of the claims; ingredients take the first (default: %(default)s)"},
        directory={"default": "runs/learning", "help": "demonstrations and runs (default: %(default)s)"},
    )
    directory = (REPO / settings.directory / ("quick" if settings.quick else "")).resolve()
    names = settings.rows.split(",") if settings.rows else list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        sys.exit(f"error: --rows {unknown[0]}: no such row; known are {', '.join(ROWS)}")
    seeds = [int(seed) for seed in settings.seeds.split(",")]
    collect(directory / "data", settings.quick)
    for seed in seeds:  # a whole table early, its repetitions later
        for name in names:
            if ROWS[name].claim or seed == seeds[0]:
                print(f"== {name}, seed {seed}", flush=True)
                Run(name, seed, directory, settings.quick).measure()
    if "best" in names:
        baselines(directory, settings.quick)
    results = {"machine": machine(), "task": TASK, "demos": DEMOS, "scenes": SCENES}
    results |= {"rows": {name: summary(name, directory, settings.quick) for name in ROWS}}
    results["baselines"] = {policy: {scene: rollouts(directory / "baselines" / f"{policy}_{scene}") for scene in SCENES}
                            for policy in BASELINES}  # fmt: skip
    show(results)
    if not settings.quick:
        (REPO / "experiments/results/learning.json").write_text(json.dumps(results, indent=1) + "\n")


def collect(data: Path, quick: bool) -> None:
    """The demonstrations that every row trains on, with shifted targets."""
    demos = 2 if quick else DEMOS
    script(
        "collect_demos.py", "--config", CONFIG, "--data_directory", data, "--tasks", TASK,
        "--demos_per_task", demos, "--image_size", 64, "--visual_mesh_ratio", 0.2, "--shift_target", SHIFT,
    )  # fmt: skip
    script("embed_language.py", "--config", CONFIG, "--data_directory", data, "--encoder", "offline")


@dataclass(frozen=True)
class Run:
    """One row with one seed, in a folder of its own. What has left its file is not done again."""

    name: str
    seed: int
    directory: Path
    quick: bool

    @property
    def folder(self) -> Path:
        return self.directory / f"{self.name}_seed{self.seed}"

    @property
    def trains_encoder(self) -> bool:
        """In phase 2, too."""
        return set(TRAIN_ALL) <= set(ROWS[self.name].phase2)

    @property
    def representation(self) -> Path:
        """The report on the encoder as the policy uses it."""
        if self.trains_encoder:
            return self.folder / "representation.json"
        return self.encoder.folder / "phase1.json"

    @property
    def encoder(self) -> "Run":
        """The run whose phase 1 this one starts from."""
        return Run(ROWS[self.name].encoder_of or self.name, self.seed, self.directory, self.quick)

    def measure(self) -> None:
        """Phase 1, its report, phase 2, its offline error and rollouts."""
        row = ROWS[self.name]
        self.encoder.train(1)
        checkpoint = self.encoder.folder / PHASES[1] / "checkpoint_latest.pt"
        self.train(2, "--phase1_checkpoint", checkpoint)
        if self.trains_encoder and not self.representation.exists():
            trained = self.folder / PHASES[2] / "checkpoint_latest.pt"
            script("eval.py", "--checkpoint", trained, "--representation", "--output", self.representation)
        for flow_start in row.flow_starts:
            for scene in SCENES if row.claim else ("shifted",):
                roll_out(
                    self.folder / f"{flow_start}_{scene}", self.quick, scene,
                    "--checkpoint", self.folder / PHASES[2] / "checkpoint_latest.pt", "--flow_start", flow_start,
                )  # fmt: skip

    def train(self, phase: int, *start: object) -> None:
        """Trains a phase and evaluates it offline."""
        report = self.folder / f"phase{phase}.json"
        if report.exists():
            return
        began = time.perf_counter()
        script("train.py", "--config", CONFIG, "--phase", phase, *start, *self.changes(phase))
        minutes = (time.perf_counter() - began) / 60
        script("eval.py", "--checkpoint", self.folder / PHASES[phase] / "checkpoint_latest.pt", "--output", report)
        report.write_text(json.dumps(json.loads(report.read_text()) | {"training_minutes": minutes}))

    def changes(self, phase: int) -> list[str]:
        row, encoder_row = ROWS[self.name], ROWS[self.encoder.name]
        changes = [
            f"data.data_directory={self.directory / 'data'}",
            f"data.demos_per_task={DEMOS}",
            f"training.checkpoint_directory={self.folder}",
            f"training.seed={self.seed}",
            "training.precision=fp32",  # on every machine alike
            *encoder_row.phase1,
            *(row.phase2 if phase == 2 else ()),
        ]
        if self.quick:
            changes += ["training.batch_size=8", "training.phase2.num_epochs=1", "model.embed_dim=16"]
            changes += ["model.state_dim=16", "model.encoder_depth=1", "model.policy_embed_dim=16"]
            changes += [] if "training.phase1.num_epochs=0" in changes else ["training.phase1.num_epochs=1"]
        return [text for change in changes for text in ("--set", change)]


def baselines(directory: Path, quick: bool) -> None:
    """What blind policies get in the same episodes."""
    checkpoint = directory / "best_seed0" / PHASES[2] / "checkpoint_latest.pt"
    if checkpoint.exists():  # it says which demonstrations may be replayed
        for policy in BASELINES:
            for scene in SCENES:
                folder = directory / "baselines" / f"{policy}_{scene}"
                roll_out(folder, quick, scene, "--checkpoint", checkpoint, "--policy", policy)


def roll_out(folder: Path, quick: bool, scene: str, *flags: object) -> None:
    """One evaluation; an interrupted one goes on where it stopped."""
    if rollouts(folder) is None:
        shift, trials = SCENES[scene]
        number = ["--num_trials", 1, "--max_steps", 20] if quick else ["--num_trials", trials]
        script(
            "run_libero_eval.py", "--tasks", TASK, *number, "--shift_target", shift, "--output_dir", folder, *flags
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- figures


def summary(name: str, directory: Path, quick: bool) -> dict:
    """The figures of a row with every seed that has been run, now or before."""
    seeds: dict[int, dict] = {}
    for seed in sorted(int(folder.name.rpartition("_seed")[2]) for folder in directory.glob(f"{name}_seed*")):
        run = Run(name, seed, directory, quick)
        reports = run.encoder.folder / "phase1.json", run.folder / "phase2.json", run.representation
        if not all(path.exists() for path in reports):
            continue
        phase1, actions, z = (json.loads(path.read_text()) for path in reports)
        seeds[seed] = {
            "effective_rank": z["effective_rank"],
            "z_std": z["z_std"],
            "prediction": {} if run.trains_encoder else z["prediction"],  # the predictor has not followed
            "probes": z["probes"],
            "pose_mse": actions["mse_pose_mean"],
            "gripper_accuracy": actions["gripper_accuracy"],
            "minutes": [phase1["training_minutes"], actions["training_minutes"]],
            "rollouts": {
                f"{start}_{scene}": rollouts(run.folder / f"{start}_{scene}")
                for start in ("noise", "zero")
                for scene in SCENES
            },
        }
    return {"description": ROWS[name].description, "claim": ROWS[name].claim, "seeds": seeds}


def rollouts(folder: Path) -> list[int] | None:
    """[successes, trials]."""
    path = folder / "results.json"
    if not path.exists():
        return None
    overall = json.loads(path.read_text())["overall"]
    return [overall["successes"], overall["trials"]]


def show(results: dict) -> None:
    heads = ["row", "rank", "target mm", "hand mm", "20 ahead", "pose MSE", "gripper"]
    starts = [f"{start}_{scene}" for start in ("noise", "zero") for scene in SCENES]
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
        lines.append(line + [_counts([run["rollouts"][start] for run in runs]) for start in starts])
    for policy, scenes in results["baselines"].items():
        counts = [_counts([scenes[start.split("_", 1)[1]]]) for start in starts]
        lines.append([{"replay": "one demo, replayed blindly", "zero": "standing still"}[policy], *[""] * 6, *counts])
    print_table("means over the seeds; successes of all seeds", heads + starts, lines)


def _mean(values: list[float], spec: str) -> str:
    return format(statistics.fmean(values), spec) if values else "-"


def _counts(counts: list[list[int] | None]) -> str:
    played = [count for count in counts if count]
    return f"{sum(count[0] for count in played)}/{sum(count[1] for count in played)}" if played else "-"


if __name__ == "__main__":
    main()
