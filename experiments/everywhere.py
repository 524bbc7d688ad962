"""How often a policy succeeds, wherever this project measures it: one evaluation after the other, and one table.

    python -m experiments.everywhere --checkpoint checkpoints/pretrained/libero_object_looks
    python -m experiments.everywhere --checkpoint FILE --scenes init_states,swap

Episodes are those of run_libero_eval.py, in LIBERO's own pictures. An interrupted evaluation goes on where it stopped,
and what is there is not played again. All of it takes about an hour of two cores. The table and every episode are
written to --output_dir as everywhere.json.
"""

import json
import sys
from pathlib import Path

from benchmarks.measure import REPO, arguments, machine, print_table, script
from files import written_whole
from rollouts.statistics import ASKED_FOR, NOTHING

SCENES = {  # name -> flags of run_libero_eval.py
    "init_states": ("--num_trials", 50),
    "shifted_5cm": ("--num_trials", 20, "--shift_target", 0.05),
    "shifted_10cm": ("--num_trials", 20, "--shift_target", 0.1),
    "withheld_exchange": ("--random_resets", 10, "--layouts", "withheld_exchange"),
    "withheld_place": ("--random_resets", 10, "--layouts", "withheld_place"),
    "swap": ("--num_trials", 10, "--task_suite", "libero_object_swap"),
    "task": ("--num_trials", 10, "--task_suite", "libero_object_task"),
    "lan": ("--num_trials", 10, "--task_suite", "libero_object_lan"),
    "object": ("--num_trials", 10, "--task_suite", "libero_object_object"),
}
OWN_PICTURES = ("--visual_mesh_ratio", 1)


def main() -> None:
    flags = arguments(
        __doc__,
        checkpoint={"required": True, "help": "the policy: a file or a folder of export_policy.py"},
        scenes={"default": ",".join(SCENES), "help": "comma-separated (default: %(default)s)"},
        output_dir={"default": "results/everywhere", "help": "of the evaluations (default: %(default)s)"},
        num_workers={"help": "simulators side by side (default: as run_libero_eval.py)"},
    )
    names = flags.scenes.split(",")
    if unknown := [name for name in names if name not in SCENES]:
        sys.exit(f"error: --scenes {unknown[0]}: no such scenes; known are {', '.join(SCENES)}")
    folder = (REPO / flags.output_dir / ("quick" if flags.quick else "")).resolve()
    workers = ("--num_workers", flags.num_workers) if flags.num_workers else ()
    played: dict[str, dict] = {}
    for name in names:
        episodes = SCENES[name]
        if flags.quick:  # one, and not to its end
            episodes = (*episodes, episodes[0], 1, "--tasks", 0, "--max_steps", 20)
        results = folder / name / "results.json"
        if not results.exists():
            script(
                "run_libero_eval.py", "--checkpoint", flags.checkpoint, *OWN_PICTURES, *episodes, *workers,
                "--output_dir", folder / name,
            )  # fmt: skip
        played[name] = json.loads(results.read_text())
        if (other := played[name]["checkpoint"]) != flags.checkpoint:
            sys.exit(f"error: {results} is of {other}, not of {flags.checkpoint}; choose another --output_dir")
    show(played)
    write(folder / "everywhere.json", played)


def show(played: dict[str, dict]) -> None:
    lines = []
    for cell, results in played.items():
        overall = results["overall"]
        lifted = overall["lifted_in_failures"]
        another = sum(lifted.values()) - lifted.get(NOTHING, 0) - lifted.get(ASKED_FOR, 0)
        over_tasks = overall.get("interval_over_tasks")
        lines.append(
            [
                cell,
                f"{overall['successes']} of {overall['trials']}",
                percent(overall["interval"]),
                percent(over_tasks) if over_tasks else "-",
                lifted.get(NOTHING, 0),
                lifted.get(ASKED_FOR, 0),
                another,
            ]
        )
    heads = ["scenes", "successes", "95%", "over tasks", "lifted nothing", "lost what was asked", "took another"]
    print_table("LIBERO's own pictures", heads, lines)


def percent(interval: list[float]) -> str:
    low, high = interval
    return f"{100 * low:.0f} to {100 * high:.0f}%"


def write(path: Path, played: dict[str, dict]) -> None:
    with written_whole(path) as stream:
        stream.write((json.dumps({"machine": machine(), "scenes": played}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
