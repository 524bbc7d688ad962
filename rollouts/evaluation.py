"""What run_libero_eval.py is asked to evaluate: its flags as one value, from which others are made with `replace`."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demos.instructions import canonical_instruction
from errors import BadInput
from rollouts.episodes import Episode, episode_seed, reset_seed
from simulator.suites import instruction_of, make_suite, numbers_text, parse_numbers

LARGEST_SHIFT = 0.2  # metres
LONGEST_EPISODE = 100_000  # steps, more than an hour
MOST_TRIALS = 50  # episodes a task without --num_trials
SAMPLE_STEPS = 4  # Euler steps of the flow, unless a flag says otherwise
EPISODE_TIMEOUT = 900  # seconds of a worker's own work, likewise
DECISION_TIMEOUT = 60  # seconds that a server has for one decision, likewise
AUTO = "auto"  # the decision delay that is measured at the start


@dataclass(frozen=True)
class Evaluation:
    """One policy in one suite. Raises BadInput for flags that contradict each other and for numbers out of range."""

    policy: str  # who acts: checkpoint, server, replay (of a demonstration) or zero (stands still)
    checkpoint: str | None  # file of phase 2; a baseline takes its picture settings and training demos from it
    overrides: tuple[str, ...]  # KEY=VALUE of --set, for the checkpoint's config
    task_suite: str  # in lower case
    tasks: str | None  # ids such as "0,3" or "2-5"; None: all of the suite
    num_trials: int | None  # episodes a task, each from its own init state; None: all, at most MOST_TRIALS
    init_states: str | None  # numbers of the init states such as "10-49"; None: the first num_trials
    random_resets: int | None  # episodes a task from objects placed at random, instead of the suite's init states
    max_steps: int  # step limit of an episode
    demo: str | None  # FILE or FILE:demo_<number> that a replay plays; None: a training demo of each task
    execute_steps: int | None  # actions executed of each chunk; None: the whole chunk
    sample_steps: int  # Euler steps of the flow
    flow_start: str | None  # noise or zero; None: the checkpoint's phase2.flow_start
    precision: str  # fp32 or bf16, of the policy's matrix products
    shift_target: float  # metres by which the target object is moved at most in x and y
    visual_mesh_ratio: float | None  # share of the visual meshes' triangles drawn; None: as the demos were drawn
    seed: int  # of the flow's noise and of the scene
    shard: str | None  # I/N, the part of the episodes that is played; None: all
    output_dir: Path | None  # None: a new results/<suite>_<number>
    beside: tuple[Path, ...]  # folders of finished evaluations that stand in this one's table
    save_video: str  # all, failures or none
    num_workers: int | None  # simulators side by side; None: one a core, as memory allows
    episode_timeout: float  # seconds of a worker's own work, after which its episode counts as hung
    server: str | None = None  # ws:// or wss:// address of a policy that is a server
    decision_timeout: float = DECISION_TIMEOUT  # seconds, after which a server counts as hung
    layouts: str = "libero"  # of the random resets: libero, or one of simulator.layouts.LAYOUTS
    decision_delay_steps: int | str = 0  # with the chunk before; AUTO: as long as a decision takes

    def __post_init__(self) -> None:
        if self.policy == "checkpoint" and not self.checkpoint:
            raise BadInput("--checkpoint is missing; `python train.py --phase 2` writes checkpoint_best.pt")
        if self.policy == "server":
            self._check_server()
        if self.policy == "replay" and not (self.checkpoint or self.demo):
            raise BadInput("--policy replay needs --demo FILE, or --checkpoint, whose training demos it then replays")
        if self.demo and self.policy != "replay":
            raise BadInput("--demo belongs to --policy replay")
        if self.seed < 0:
            raise BadInput(f"--seed {self.seed}: expected 0 or more")
        if not 0 <= self.shift_target <= LARGEST_SHIFT:
            raise BadInput(f"--shift_target {self.shift_target:g}: expected 0 to {LARGEST_SHIFT} metres")
        if self.visual_mesh_ratio is not None and not 0 < self.visual_mesh_ratio <= 1:
            raise BadInput(f"--visual_mesh_ratio {self.visual_mesh_ratio:g}: expected more than 0 and at most 1")
        for name in ("episode_timeout", "decision_timeout"):
            if not getattr(self, name) > 0:
                raise BadInput(f"--{name} {getattr(self, name):g}: expected more than 0 seconds")
        if self.decision_delay_steps != AUTO and int(self.decision_delay_steps) < 0:
            raise BadInput(f"--decision_delay_steps {self.decision_delay_steps}: expected 0 or more, or {AUTO}")
        if self.decision_delay_steps and self.policy in ("replay", "zero"):
            raise BadInput(f"--decision_delay_steps belongs to a policy that decides; --policy {self.policy} does not")
        chosen = {"num_trials": self.num_trials, "init_states": self.init_states, "random_resets": self.random_resets}
        given = [f"--{name}" for name, value in chosen.items() if value is not None]
        if len(given) > 1:
            raise BadInput(f"{' and '.join(given)}: each says which episodes are played; give one of them")
        if self.random_resets is not None:
            check_range("random_resets", self.random_resets)
        self._check_layouts()
        check_range("max_steps", self.max_steps, LONGEST_EPISODE)
        check_range("sample_steps", self.sample_steps)
        if self.num_workers is not None:
            check_range("num_workers", self.num_workers)

    def _check_layouts(self) -> None:
        if self.layouts == "libero":
            return
        if self.random_resets is None:
            raise BadInput(f"--layouts {self.layouts} needs --random_resets: init states have LIBERO's own layouts")
        if self.task_suite != "libero_object":
            raise BadInput(f"--layouts {self.layouts}: only the scenes of libero_object, not of {self.task_suite}")
        if self.shift_target:
            raise BadInput(f"--shift_target: --layouts {self.layouts} moves every object already")

    def _check_server(self) -> None:
        if self.checkpoint:
            raise BadInput(f"--checkpoint and --policy {self.server} both say who acts; give one of them")
        of_checkpoints = {"sample_steps": SAMPLE_STEPS, "flow_start": None, "precision": "fp32"}
        for name, usual in of_checkpoints.items():
            if getattr(self, name) != usual:
                raise BadInput(f"--{name} belongs to a checkpoint; the server at {self.server} has chosen its own")

    def trials(self, num_init_states: int) -> Sequence[int]:
        """Of each task: the numbers of its init states, or of its random resets. Raises BadInput for one that isn't."""
        if self.random_resets is not None:
            return range(self.random_resets)
        if self.init_states is not None:
            return parse_numbers(self.init_states, num_init_states, "--init_states", "init state")
        if self.num_trials is not None:
            check_range("num_trials", self.num_trials, num_init_states)
        return range(self.num_trials or min(num_init_states, MOST_TRIALS))

    def init_states_played(self, num_init_states: int) -> str | None:
        """The numbers of --init_states in one spelling; None where they are the first, as without the flag."""
        trials = list(self.trials(num_init_states))
        is_usual = self.init_states is None or trials == list(range(len(trials)))
        return None if is_usual else numbers_text(trials)

    def episodes(self, task_ids: Sequence[int], trials: Sequence[int]) -> list[Episode]:
        """Every trial of every task, in the order of the tasks, without regard to the shard."""
        purpose = "evaluation" if self.layouts == "libero" else f"evaluation, {self.layouts}"
        seed_of = episode_seed if self.random_resets is None else functools.partial(reset_seed, purpose)
        return [
            Episode(self.task_suite, task_id, trial, seed_of(self.task_suite, task_id, trial, self.seed))
            for task_id in task_ids
            for trial in trials
        ]


def check_range(name: str, value: int, limit: float = math.inf) -> None:
    """Raises BadInput unless 1 <= value <= limit; name is the flag's."""
    if not 1 <= value <= limit:
        bounds = f"between 1 and {limit}" if limit < math.inf else "at least 1"
        raise BadInput(f"--{name} {value}: expected {bounds}")


def tasks_of(suite_name: str, instructions: Sequence[str]) -> dict[int, str]:
    """Task id -> instruction of the suite's tasks whose instruction is one of these. Raises BadInput where none is."""
    suite_name = suite_name.lower()
    suite = make_suite(suite_name)
    told = {task: canonical_instruction(instruction_of(suite, suite_name, task)) for task in range(suite.n_tasks)}
    tasks = {task: instruction for task, instruction in told.items() if instruction in instructions}
    if not tasks:
        raise BadInput(
            f"none of {suite_name}'s tasks is in the demonstrations, whose first is '{min(instructions)}'; "
            "training.phase2.rollout_suite names another, and rollout_interval 0 plays nothing while training"
        )
    return tasks
