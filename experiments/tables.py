"""The tables that experiments/learning.py makes: on which demonstrations, of which rows, in which episodes.

one_task: where z comes from, and what each ingredient of conf/quickstart.yaml does. Claims (every seed, rollouts in
both scenes) compare where z comes from. Ingredients (first seed, rollouts with shifted targets) are the recipe without
shifted pictures and with one more thing changed.

ten_tasks: where z comes from with all ten instructions, demonstrations and recipe of `make libero-object-cpu` in fewer
epochs. The best row has every seed, the others the first.
"""

from dataclasses import dataclass, replace

SHIFT = 0.05  # metres that the target is moved by at most, in the demonstrations and in half of the rollouts


@dataclass(frozen=True)
class Row:
    """One line of a table: what differs from the table's recipe."""

    description: str
    configs: tuple[str, ...] = ()  # --config of both phases, after the table's
    phase1: tuple[str, ...] = ()  # --set arguments of both phases
    phase2: tuple[str, ...] = ()  # further ones of phase 2
    encoder_of: str | None = None  # a row whose phase 1 is taken over, with its configs
    claim: bool = False
    flow_starts: tuple[str, ...] = ("noise",)  # of the rollouts


@dataclass(frozen=True)
class Table:
    """Rows that are trained on the same demonstrations with the same recipe, and roll out in the same episodes."""

    configs: tuple[str, ...]  # --config of every row
    tasks: tuple[int, ...]  # of libero_object
    demos: int  # of each task
    collection: tuple[object, ...]  # further flags of collect_demos.py
    precision: str  # of training; rollouts are in fp32
    scenes: dict[str, tuple[float, int]]  # name -> metres that the target is moved by at most, episodes of each task
    rows: dict[str, Row]
    repeated: tuple[str, ...]  # rows that every seed trains; the others have the first seed
    directory: str  # of the runs
    data_directory: str | None  # of the demonstrations; None: data in the directory of the runs
    results: str
    baselines_in: str | None = None  # results of blind policies in the same episodes; None: they are played here, too
    seeds: tuple[int, ...] = (0, 1, 2)
    max_steps: int | None = None  # of an episode; None: the suite's
    changes: tuple[str, ...] = ()  # to the recipe: --set arguments of every row, before its own

    def settings(self, name: str, phase: int) -> tuple[list[str], list[str]]:
        """All that makes a row what it is, as the arguments of --config and of --set."""
        row = self.rows[name]
        encoder = self.rows[row.encoder_of or name]
        changes = [f"data.demos_per_task={self.demos}", f"training.precision={self.precision}", *self.changes]
        return [*self.configs, *encoder.configs], [*changes, *encoder.phase1, *(row.phase2 if phase == 2 else ())]

    def quick(self) -> "Table":
        """Two tasks at most and a few steps of everything: shows that it runs."""
        small = ("batch_size=8", "phase1.num_epochs=1", "phase2.num_epochs=1")
        smaller = ("embed_dim=16", "state_dim=16", "encoder_depth=1", "policy_embed_dim=16")
        return replace(
            self,
            tasks=self.tasks[:2],
            demos=2,
            scenes={name: (metres, 1) for name, (metres, _) in self.scenes.items()},
            data_directory=None,
            max_steps=20,
            changes=(*(f"training.{change}" for change in small), *(f"model.{change}" for change in smaller)),
        )


def recipe(**values: object) -> tuple[str, ...]:
    return tuple(f"training.phase1.{key}={value}" for key, value in values.items())


UNTRAINED = recipe(num_epochs=0)
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
SHIFT_ALL = ("training.phase2.image_shift=2",)  # as the recipes of both tables have it in phase 1


def ingredient(description: str, *changes: str, phase2: tuple[str, ...] = ()) -> Row:
    """The recipe with one thing changed. Pictures are not shifted: that was the last ingredient to be found."""
    return Row(description, phase1=(*UNSHIFTED, *changes), phase2=phase2, encoder_of="unshifted" if phase2 else None)


ONE_TASK_ROWS = {
    "random": Row("frozen, untrained", phase1=UNTRAINED, claim=True),
    "plain": Row("frozen, the guide's plain recipe", phase1=PLAIN, claim=True),
    "unshifted": Row("frozen, pictures not shifted", phase1=UNSHIFTED, claim=True, flow_starts=("noise", "zero")),
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

# How both frames were moved could be predicted without knowing anything about the scene.
DYNAMICS = (*UNSHIFTED, *recipe(foresight_weight=0))

TEN_TASKS_ROWS = {
    "best": Row("frozen, the best recipe", claim=True),
    "random": Row("frozen, untrained", phase1=UNTRAINED, claim=True),
    "plain": Row("frozen, the guide's objective", configs=("conf/plain.yaml",), claim=True),
    "guide": Row(
        "frozen, the guide's objective, rates and EMA", configs=("conf/plain.yaml", "conf/guide.yaml"), claim=True
    ),
    "end_to_end": Row(
        "trained by the policy's loss alone", phase2=(*TRAIN_ALL, *SHIFT_ALL), encoder_of="random", claim=True
    ),
    "fine_tuned": Row(
        "the best recipe, then trained on", phase2=(*TRAIN_ALL, *SHIFT_ALL), encoder_of="best", claim=True
    ),
    "dynamics": Row("frozen, dynamics alone", phase1=DYNAMICS),
}

TABLES = {
    "one_task": Table(
        configs=("conf/quickstart.yaml",),
        tasks=(2,),  # the salad dressing: a demonstration replayed blindly fails when the target has moved
        demos=40,
        collection=("--image_size", 64, "--shift_target", SHIFT, "--visual_mesh_ratio", 0.2),
        precision="fp32",  # on every machine alike
        scenes={"init_states": (0.0, 15), "shifted": (SHIFT, 30)},
        rows=ONE_TASK_ROWS,
        repeated=tuple(name for name, row in ONE_TASK_ROWS.items() if row.claim),
        directory="runs/learning",
        data_directory=None,
        results="experiments/results/learning.json",
    ),
    "ten_tasks": Table(
        configs=("conf/libero_object_cpu.yaml",),
        tasks=tuple(range(10)),
        demos=20,
        collection=(
            "--image_size", 128, "--shift_target", SHIFT, "--missed_grasps", 0.4, "--visual_mesh_ratio", 0.2,
        ),
        precision="auto",  # so many rows take long; the results say what it was
        scenes={"init_states": (0.0, 10), "shifted": (SHIFT, 10)},
        rows=TEN_TASKS_ROWS,
        repeated=("best",),
        directory="runs/learning_ten_tasks",
        data_directory="data/libero_object_cpu",  # where `make libero-object-cpu` collects the same ones
        results="experiments/results/learning_ten_tasks.json",
        baselines_in="experiments/results/libero_object_cpu.json",
        changes=("training.phase1.num_epochs=7", "training.phase2.num_epochs=12"),  # of 24 and 20: nine trainings
    ),
}  # fmt: skip
