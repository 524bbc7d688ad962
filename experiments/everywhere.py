"""How often a policy succeeds, wherever this project measures it: one evaluation after the other, and one table.

    python -m experiments.everywhere --checkpoint checkpoints/pretrained/libero_object_looks
    python -m experiments.everywhere --checkpoint FILE --scenes init_states,swap
    python -m experiments.everywhere --checkpoint FILE --blind        beside it, what policies get that do not look

Episodes are those of run_libero_eval.py, in LIBERO's own pictures. An interrupted evaluation goes on where it stopped,
episodes that crashed are played again, and no others are; those of other weights or another simulator are refused. All
of it takes about an hour of two cores, and the blind ones half as long. The table and every episode are written to
--output_dir as everywhere.json.
"""

import json
import sys

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
BLIND = ("zero", "replay")  # standing still, and a training demonstration of the same words played again
BLIND_TRIALS = 10  # of each task at most
CRASHED = 1  # run_libero_eval.py's exit code where an episode has crashed; the same command tries it again
NO_REPLAY = ("lan", "task")  # no demonstration has the words of the one, those with the other's are of several scenes


def main() -> None:
    flags = arguments(
        __doc__,
        checkpoint={"required": True, "help": "the policy: a file or a folder of export_policy.py"},
        scenes={"default": ",".join(SCENES), "help": "comma-separated (default: %(default)s)"},
        output_dir={"default": "results/everywhere", "help": "of the evaluations (default: %(default)s)"},
        blind={
            "action": "store_true",
            "help": f"plays {BLIND_TRIALS} episodes of each task standing still and with a demonstration replayed, "
            "too, for which those that the policy was trained on have to be there",
        },
        num_workers={"help": "simulators side by side (default: as run_libero_eval.py)"},
    )
    names = flags.scenes.split(",")
    if unknown := [name for name in names if name not in SCENES]:
        sys.exit(f"error: --scenes {unknown[0]}: no such scenes; known are {', '.join(SCENES)}")
    folder = (REPO / flags.output_dir / ("quick" if flags.quick else "")).resolve()
    workers = ("--num_workers", flags.num_workers) if flags.num_workers else ()

    def play(name: str, policy: str = "checkpoint") -> dict:
        """The results of one evaluation, whose episodes were played now or before."""
        start, trials, *further = SCENES[name]
        if policy in BLIND:
            trials = min(trials, BLIND_TRIALS)
        if flags.quick:  # one, and not to its end
            trials, further = 1, [*further, "--tasks", 0, "--max_steps", 20]
        evaluation = folder / (f"{name}_{policy}" if policy in BLIND else name)
        ended = script(
            "run_libero_eval.py", "--checkpoint", flags.checkpoint, "--policy", policy, *OWN_PICTURES,
            start, trials, *further, *workers, "--output_dir", evaluation, may_end_with=(0, CRASHED),
        )  # fmt: skip
        results = evaluation / "results.json"
        played = json.loads(results.read_text()) if results.exists() else {"overall": {"crashed": 0}}
        if ended == CRASHED and not played["overall"]["crashed"]:
            sys.exit(f"error: {evaluation}: was not evaluated")
        return played

    played = {name: play(name) for name in names}
    blind: dict[str, dict[str, dict]] = {name: {} for name in names}
    if flags.blind:
        for policy in BLIND:
            for name in names:
                if not (policy == "replay" and name in NO_REPLAY):
                    blind[name][policy] = play(name, policy)
    show(played, blind)
    with written_whole(folder / "everywhere.json") as stream:
        found = {"machine": machine(), "scenes": played, "blind": blind}
        stream.write((json.dumps(found, indent=1) + "\n").encode())


def show(played: dict[str, dict], blind: dict[str, dict[str, dict]]) -> None:
    """A line for each of the scenes."""
    lines = []
    for cell, results in played.items():
        overall = results["overall"]
        lifted = overall["lifted_in_failures"]
        another = sum(lifted.values()) - lifted.get(NOTHING, 0) - lifted.get(ASKED_FOR, 0)
        over_tasks, fallen = overall.get("interval_over_tasks"), overall.get("fallen_in_failures")
        lines.append(
            [
                cell,
                count(overall),
                percent(overall["interval"]),
                percent(over_tasks) if over_tasks else "-",
                lifted.get(NOTHING, 0),
                "-" if fallen is None else fallen,
                lifted.get(ASKED_FOR, 0),
                another,
                *(count(blind[cell][policy]["overall"]) if policy in blind[cell] else "-" for policy in BLIND),
            ]
        )
    failures = ["lifted nothing", "target fell", "lost what was asked", "took another"]
    heads = ["scenes", "successes", "95%", "over tasks", *failures, "standing still", "replay"]
    print_table("LIBERO's own pictures", heads, lines)


def count(overall: dict) -> str:
    crashed = f", {overall['crashed']} more crashed" if overall["crashed"] else ""
    return f"{overall['successes']} of {overall['trials']}{crashed}"


def percent(interval: list[float]) -> str:
    low, high = interval
    return f"{100 * low:.0f} to {100 * high:.0f}%"


if __name__ == "__main__":
    main()
