"""How many seconds does an episode of a simulator evaluation take, beside the loop that everybody writes?

    python benchmarks/eval_speed.py

The standard loop is one process with LIBERO's own environment as it comes: both cameras drawn at every step, a hard
reset before every episode. Ours is run_libero_eval.py's workers with the same task, init states, pictures (128 px,
full meshes) and policy: an untrained model of the quick start's size, which never succeeds, so that every episode has
all 280 steps. Seconds an episode are counted while all workers are busy; what is built once a task is a column of its
own.
"""

import tempfile
import time
from pathlib import Path

import torch
from measure import REPO, arguments, compared, print_table, ratio_text, write_results

from config import load_config
from jepa.mamba import choose_mamba_backend
from machine import affordable_processes
from observation import from_simulator
from rollouts.episodes import STAND_STILL, STEP_LIMITS, WAIT_STEPS, Episode, Rollouts
from rollouts.policies import CheckpointPolicy
from rollouts.pool import GB_PER_ENVIRONMENT, play_all
from simulator.libero import import_libero
from simulator.suites import bddl_path, make_suite, task_init_states
from statevla_model import StateVLA

SUITE, TASK, SIZE = "libero_object", 6, 128
STANDARD, OURS, THINNED = "standard loop", "run_libero_eval.py", "run_libero_eval.py, meshes thinned to 0.2"


def main() -> None:
    flags = arguments(__doc__, num_workers={"type": int, "help": "(default: one a core)"})
    num_workers = flags.num_workers or affordable_processes(GB_PER_ENVIRONMENT)
    rounds, max_steps = (1, 20) if flags.quick else (3, STEP_LIMITS[SUITE])
    suite = make_suite(SUITE)
    init_states = task_init_states(suite, TASK)
    policy = untrained_policy()

    start = time.perf_counter()
    standard = import_libero().OffScreenRenderEnv(
        bddl_file_name=str(bddl_path(suite, TASK)), camera_heights=SIZE, camera_widths=SIZE
    )
    construction = {STANDARD: [time.perf_counter() - start], OURS: [], THINNED: []}
    times = {name: [] for name in construction}
    for trial in range(rounds):
        order = list(times)[trial:] + list(times)[:trial]
        for name in order:
            if name == STANDARD:
                times[name].append(standard_episode(standard, init_states[trial], policy, max_steps))
            else:
                ratio = 0.2 if name == THINNED else 1.0
                per_episode, built = our_episodes(init_states, ratio, policy, max_steps, num_workers)
                times[name].append(per_episode)
                construction[name].append(built)
    standard.close()

    found = compared(times, OURS)
    rows = [
        {
            "how": name,
            "workers": 1 if name == STANDARD else num_workers,
            "seconds_per_episode": row["seconds"],
            "ratio": row["ratio"],
            "rounds": row["rounds"],
            "construction_seconds": sorted(construction[name])[len(construction[name]) // 2],
            "steps": max_steps,
            "policy_rows": policy.rows,
        }
        for name, row in found.items()
    ]
    print_table(
        f"Seconds an episode of {max_steps} steps, {SIZE} px, median (quartiles) of {rounds} rounds",
        ["how", "workers", "seconds", "times ours", "built once a task, s"],
        [
            [row["how"], row["workers"], row["seconds_per_episode"]["median"], ratio_text(row["ratio"]),
             row["construction_seconds"]]
            for row in rows
        ],
    )  # fmt: skip
    notes = [
        "one policy for all, an untrained model of the quick start's size: no episode succeeds, all are of one length",
        "each ratio is from one round, in which the sides take turns; start-up and construction are not in the seconds",
    ]
    write_results("eval_speed", rows, notes, flags.quick)


def untrained_policy() -> CheckpointPolicy:
    torch.manual_seed(0)
    device = torch.device("cpu")
    choose_mamba_backend("auto", device)
    model = StateVLA(load_config(REPO / "conf/quickstart.yaml").model).eval()
    model.state_scaling.fit(torch.randn(64, model.config.state_dim))
    model.policy.normalizer.fit(torch.rand(64, 6) * 2 - 1)
    language = {TASK: torch.randn(model.config.lang_emb_dim)}
    return CheckpointPolicy(model, language, device, model.config.action_seq_len, 4, "noise")


def standard_episode(env, init_state, policy: CheckpointPolicy, max_steps: int) -> float:
    """Seconds of one episode as LIBERO's own evaluation loop plays it."""
    generator = torch.Generator().manual_seed(0)
    env.seed(0)
    start = time.perf_counter()
    env.sim._render_context_offscreen.gl_ctx.make_current()
    env.reset()
    env_obs = env.set_init_state(init_state)
    for _ in range(WAIT_STEPS):
        env_obs, *_ = env.step(STAND_STILL)
    steps = 0
    while steps < max_steps:
        [chunk] = policy.act([from_simulator(env_obs)], [Episode(SUITE, TASK, 0, 0)], [generator])
        for action in chunk[: max_steps - steps]:
            env_obs, *_ = env.step(action)
            steps += 1
    return time.perf_counter() - start


def our_episodes(
    init_states, visual_mesh_ratio: float, policy: CheckpointPolicy, max_steps: int, num_workers: int
) -> tuple[float, float]:
    """Seconds an episode while all workers are busy (two episodes each), and seconds that an environment took."""
    with tempfile.TemporaryDirectory() as pictures:
        rollouts = Rollouts(SUITE, SIZE, visual_mesh_ratio, max_steps, 0.0, True, "none", Path(pictures))
        episodes = [Episode(SUITE, TASK, trial, trial) for trial in range(2 * num_workers)]
        records = list(play_all(episodes, lambda e: init_states[e.trial], policy, rollouts, num_workers, 900))
    assert not any(record["crashed"] or record["success"] for record in records), records
    built = max(record["construction_seconds"] for record in records)
    return sum(record["seconds"] for record in records) / len(records) / num_workers, built


if __name__ == "__main__":
    main()
