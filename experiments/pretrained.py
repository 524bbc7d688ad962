"""The figures of checkpoints/pretrained/libero_object_cpu in docs/learning.md, written to
experiments/results/libero_object_cpu.json: offline error, what z knows, and 100 episodes each of the policy (flow from
noise and from zero), of a demonstration replayed blindly and of standing still, on the suite's init states and with
the target shifted by up to 5 cm.

    python -m experiments.pretrained                     an interrupted one goes on where it stopped
    python -m experiments.pretrained --checkpoint FILE --output_dir DIR      another policy, its figures in the folder

It needs the demonstrations that the policy was trained on (`make libero-object-cpu` collects them).
"""

import json

from benchmarks.measure import REPO, arguments, machine, print_table, script
from files import written_whole

OURS = "checkpoints/pretrained/libero_object_cpu"
SHIFT = 0.05  # metres
SAME_IN_ALL = ("weights_sha256", "execute_steps", "sample_steps", "image_size", "visual_mesh_ratio", "seed")


def main() -> None:
    flags = arguments(
        __doc__,
        checkpoint={"default": OURS, "help": "default: %(default)s"},
        data_directory={"default": "data/libero_object_cpu", "help": "demonstrations (default: %(default)s)"},
        output_dir={"default": "results/libero_object_cpu", "help": "the evaluations (default: %(default)s)"},
    )
    folder = REPO / flags.output_dir / ("quick" if flags.quick else "")
    folder.mkdir(parents=True, exist_ok=True)
    policy = ("--checkpoint", flags.checkpoint, "--set", f"data.data_directory={flags.data_directory}")
    script("eval.py", *policy, "--output", folder / "offline.json")
    script("eval.py", *policy, "--representation", "--output", folder / "representation.json")
    episodes = ("--num_trials", 1, "--max_steps", 20) if flags.quick else ("--num_trials", 10)
    script("run_libero_eval.py", *policy, *episodes, "--side_by_side", SHIFT, "--output_dir", folder)
    folders = json.loads((folder / "side_by_side.json").read_text())["folders"]  # row -> column -> folder
    cells = [cell for columns in folders.values() for cell in columns.values()]
    played = {cell: json.loads((folder / cell / "results.json").read_text()) for cell in cells}
    results = {
        "machine": machine(),
        "shift": SHIFT,
        "settings": {key: played[cells[0]]["settings"].get(key) for key in SAME_IN_ALL},
        "offline": json.loads((folder / "offline.json").read_text()),
        "representation": json.loads((folder / "representation.json").read_text()),
        "rollouts": {cell: counts(one) for cell, one in played.items()},
    }
    show(results["rollouts"])
    if not flags.quick:
        is_ours = flags.checkpoint == OURS
        target = REPO / "experiments/results/libero_object_cpu.json" if is_ours else folder / "figures.json"
        with written_whole(target) as stream:
            stream.write((json.dumps(results, indent=1) + "\n").encode())


def counts(results: dict) -> dict:
    """Successes of all and of each task, and the steps of every episode (null where it failed)."""
    overall = {key: results["overall"][key] for key in ("successes", "trials", "crashed", "interval")}
    tasks: dict[int, list[int | None]] = {}
    for episode in results["episodes"]:
        tasks.setdefault(episode["task_id"], []).append(episode["steps"] if episode["success"] else None)
    return overall | {"steps_to_success": tasks}


def show(rollouts: dict[str, dict]) -> None:
    cells = list(rollouts)
    tasks = sorted(rollouts[cells[0]]["steps_to_success"])
    lines = []
    for task in tasks:
        steps = [rollouts[cell]["steps_to_success"].get(task, []) for cell in cells]
        lines.append([task, *(f"{sum(step is not None for step in one)}/{len(one)}" for one in steps)])
    lines.append(["all", *(f"{rollouts[cell]['successes']}/{rollouts[cell]['trials']}" for cell in cells)])
    print_table(f"targets shifted by up to {1000 * SHIFT:g} mm", ["task", *cells], lines)


if __name__ == "__main__":
    main()
