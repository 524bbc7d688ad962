"""What a list of finished episodes says: success rates with intervals, and whether two evaluations differ.

Letters: k successes of n trials of T tasks; z = 1.96, the normal distribution's 97.5% quantile.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import numpy as np

from errors import BadInput
from rollouts.episodes import start_name
from rollouts.folder import completed

Z = 1.959964
LEAST_TASKS = 5  # that say how much tasks differ
RESAMPLES = 10_000
NOT_RECORDED = "not recorded"
NOTHING, ASKED_FOR = "nothing", "the object asked for"  # what a failure has lifted
USUAL = {  # what the value None of a setting means
    "simulator": "LIBERO's own",
    "shard": "the whole",
    "init_states_played": "the first",
    "random_resets": "none",
    "layouts": "LIBERO's own",
}
NAMES_OF_LAYOUTS = {
    "shuffled": "shuffled layouts",
    "withheld_exchange": "the object asked for at the place of another, an exchange withheld from shuffled demos",
    "withheld_place": "shuffled layouts, the object asked for at a place withheld from shuffled demos",
}
ORIGINS = ("code", "renderer")  # what each episode says of the machine that played it
# What two results that are compared differ in by nature, or what only a policy that looks has.
COMPARED = {"weights_sha256", "demos", "actions_sha256", "server"}
OF_A_MODEL = {"new_instructions", "execute_steps", "sample_steps", "flow_start", "device", "mamba_backend", "precision"}


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a success rate (Wilson 1927). It stays inside [0, 1] and is sensible for 0 of n and n of n."""
    if trials == 0:
        return 0.0, 1.0
    rate, z2 = successes / trials, Z * Z
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def interval_over_tasks(episodes: Sequence[dict]) -> tuple[float, float] | None:
    """95% interval of a success rate where tasks are the sample, not their episodes: drawn again and again with
    replacement, each with all its episodes (the cluster bootstrap; Davison & Hinkley 1997, 3.8). Never narrower than
    Wilson's: tasks that are solved alike by chance would give no width at all. None for fewer than LEAST_TASKS tasks.

    Init states of one task of LIBERO's differ by a centimetre or two, so a policy tends to solve all of them or none,
    and `wilson_interval` is then too narrow for what other tasks or layouts would have given."""
    of_tasks: dict[tuple, list[bool]] = {}
    for episode in episodes:
        of_tasks.setdefault((episode["suite"], episode["task_id"]), []).append(episode["success"])
    if len(of_tasks) < LEAST_TASKS:
        return None
    solved, played = (np.array([count(task) for task in of_tasks.values()]) for count in (sum, len))
    drawn = np.random.default_rng(0).integers(len(played), size=(RESAMPLES, len(played)))  # (RESAMPLES, T)
    rates = solved[drawn].sum(axis=1) / played[drawn].sum(axis=1)
    low, high = np.quantile(rates, [0.025, 0.975])
    low_of_episodes, high_of_episodes = wilson_interval(int(solved.sum()), int(played.sum()))
    return min(float(low), low_of_episodes), max(float(high), high_of_episodes)


def exact_mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value that of the episodes solved by one policy alone, either is as likely to have solved them
    (McNemar 1947, exact binomial)."""
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def exact_sign_flips(differences: Sequence[int]) -> float:
    """Two-sided p-value that of each task's difference in successes, either sign is as likely (Fisher 1935; Pitman
    1937): tasks are the sample, as in `interval_over_tasks`."""
    sums = Counter({0: 1})  # of differences with signs -> in how many of the 2 ** T ways
    for difference in differences:
        one_more = Counter[int]()
        for total, ways in sums.items():
            one_more[total + difference] += ways
            one_more[total - difference] += ways
        sums = one_more
    as_far = sum(ways for total, ways in sums.items() if abs(total) >= abs(sum(differences)))
    return as_far / 2 ** len(differences)


def summarise(episodes: Sequence[dict]) -> dict:
    """Figures of some episodes. A crashed episode is no trial: it says nothing about the policy. One that the policy's
    own actions broke is a failure like any other."""
    finished = [episode for episode in episodes if not episode["crashed"]]
    solved = [episode for episode in finished if episode["success"]]
    decisions = [ms for episode in finished for ms in episode["decision_ms"]]
    return {
        "successes": len(solved),
        "trials": len(finished),
        "crashed": len(episodes) - len(finished),
        "broken_by_policy": sum(episode.get("broken_by_policy") is not None for episode in finished),
        "success_rate": len(solved) / len(finished) if finished else None,
        "interval": wilson_interval(len(solved), len(finished)),
        "interval_over_tasks": interval_over_tasks(finished),
        "mean_steps_to_success": fmean(episode["steps"] for episode in solved) if solved else None,
        "lifted_in_failures": lifted_in_failures(finished),
        "fallen_in_failures": fallen_in_failures(finished),
        "decision_ms_mean": fmean(decisions) if decisions else None,
        "decision_ms_median": median(decisions) if decisions else None,
    }


def lifted_in_failures(finished: Sequence[dict]) -> dict[str, int]:
    """What the failures lifted, and how many of each kind: NOTHING, ASKED_FOR (and did not bring it there), or another
    object's name. An episode of before this was recorded counts as none of them."""
    kinds = Counter(
        ASKED_FOR if {*episode["asked_for"]} & {*episode["lifted"]} else next(iter(episode["lifted"]), NOTHING)
        for episode in finished
        if not episode["success"] and "lifted" in episode
    )
    return dict(kinds.most_common())


def fallen_in_failures(finished: Sequence[dict]) -> int | None:
    """How many failures never lifted an object asked for, and left it lying; None where no failure recorded that."""
    failures = [episode for episode in finished if not episode["success"] and "fallen" in episode]
    return sum(bool({*episode["asked_for"]} & {*episode["fallen"]}) for episode in failures) if failures else None


def causes_text(summary: dict) -> str:
    """Of `summarise`, such as "3 nothing, 2 the object asked for, 3 another (2 x milk_1, butter_1); the object asked
    for fell over in 2", or ""."""
    lifted = summary["lifted_in_failures"]
    others = {name: count for name, count in lifted.items() if name not in (NOTHING, ASKED_FOR)}
    parts = [f"{lifted[kind]} {kind}" for kind in (NOTHING, ASKED_FOR) if kind in lifted]
    if others:
        which = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in others.items())
        parts.append(f"{sum(others.values())} another ({which})")
    fallen = summary.get("fallen_in_failures")  # it was not always recorded
    return ", ".join(parts) + (f"; {ASKED_FOR} fell over in {fallen}" if fallen else "")


def summarise_tasks(instructions: dict[int, str], episodes: Sequence[dict]) -> list[dict]:
    """One row a task, in the order of `instructions` (task id -> what the robot was told)."""
    return [
        {"task_id": task_id, "task": instruction}
        | summarise([episode for episode in episodes if episode["task_id"] == task_id])
        for task_id, instruction in instructions.items()
    ]


def figures_text(row: dict) -> str:
    """One line, such as "17/20 successes = 85.0%, 95% interval 64.0 to 94.8%, 142 steps to success, 1 crashed"."""
    text = f"{row['successes']}/{row['trials']} successes"
    if row["trials"]:
        low, high = row["interval"]
        text += f" = {row['success_rate']:.1%}, 95% interval {100 * low:.1f} to {high:.1%}{over_tasks(row)}"
    if row["mean_steps_to_success"] is not None:
        text += f", {row['mean_steps_to_success']:.0f} steps to success"
    return text + "".join(f", {part}" for part in troubles(row))


def over_tasks(row: dict, digits: int = 1) -> str:
    """Such as " (over tasks 38.0 to 81.0%)", or ""."""
    if not (interval := row.get("interval_over_tasks")):
        return ""
    low, high = (100 * bound for bound in interval)
    return f" (over tasks {low:.{digits}f} to {high:.{digits}f}%)"


def troubles(row: dict) -> list[str]:
    """What else there is to say of some episodes: failures of a kind of their own, and what is no trial."""
    broken, crashed = row["broken_by_policy"], row["crashed"]
    return [
        *([f"{broken} of the failures broken off by the policy's own actions"] if broken else []),
        *([f"{crashed} crashed"] if crashed else []),
    ]


def distinct(episodes: Sequence[dict], key: str) -> list[str]:
    """What the episodes say of where they come from, such as the code's commit; those of before it was kept, nothing"""
    return sorted({str(episode.get(key) or NOT_RECORDED) for episode in episodes})


def describe(settings: dict, num_episodes: int) -> str:
    """What this figure is a figure of; a subset or thinned meshes must not pass for the benchmark's own."""
    tasks, trials = len(settings["instructions"]), settings["num_trials"]
    who = {"replay": "one demonstration replayed blindly, ", "zero": "standing still, "}.get(
        settings.get("policy", ""), ""
    )
    if settings.get("policy") == "server":
        who = f"{server_name(settings)}, "
    which_tasks = f"all {tasks}" if tasks == settings["tasks_of_suite"] else f"{tasks} of {settings['tasks_of_suite']}"
    which_states = f"all {trials}" if trials == settings["init_states"] else f"{trials} of {settings['init_states']}"
    which_states += " init states" + (f" ({played})" if (played := settings.get("init_states_played")) else "")
    if settings.get("random_resets"):
        of_layouts = NAMES_OF_LAYOUTS.get(settings.get("layouts") or "", "not the suite's init states")
        which_states = f"{trials} random resets ({of_layouts})"
    title = f"{who}{settings['task_suite']}, {which_tasks} tasks x {which_states}"
    if settings.get("shift_target"):
        title += f", target shifted by up to {1000 * settings['shift_target']:g} mm"
    if delay := settings.get("decision_delay_steps"):
        title += f", {delay} steps of delay"
    if settings["shard"]:
        title += f", shard {settings['shard']}"
    if num_episodes < tasks * trials:
        title += f", only {num_episodes} of {tasks * trials} episodes"
    if settings["visual_mesh_ratio"] < 1:
        title += f", visual meshes thinned to {settings['visual_mesh_ratio']:g} (not LIBERO's own pictures)"
    if settings.get("simulator"):
        title += f", {settings['simulator']}"
    if new := settings.get("new_instructions"):
        title += f", instructions that the checkpoint was not trained on: {len(new)}"
    return title + (f", flow started from {settings['flow_start']}" if "flow_start" in settings else "")


def server_name(settings: dict) -> str:
    """Such as "server (StateVLA)": what its metadata calls itself."""
    name = (settings.get("server") or {}).get("name")
    return f"server ({name[:40]})" if isinstance(name, str) else "server"


# ----------------------------------------------------------------------------------------------------- comparison


def comparison_text(first: Path, second: Path) -> str:
    """Pairs two results.json by suite, task and init state. Raises BadInput where nothing can be paired."""
    results = [read_results(path) for path in (first, second)]
    outcomes = [_outcomes(each, path) for each, path in zip(results, (first, second), strict=True)]
    common = sorted(outcomes[0].keys() & outcomes[1].keys())
    if not common:
        raise BadInput(f"{first} and {second}: have no finished episode of the same suite, task and init state")
    counts = {(a, b): 0 for a in (True, False) for b in (True, False)}
    for key in common:
        counts[outcomes[0][key], outcomes[1][key]] += 1
    successes = [sum(outcome[key] for key in common) for outcome in outcomes]
    lines = [f"A  {first}: {results[0]['title']}", f"B  {second}: {results[1]['title']}"]
    lines += [f"note: {difference}" for difference in differences(*results)]
    for name, each in zip("AB", results, strict=True):
        if crashed := sum(episode["crashed"] for episode in each["episodes"]):
            lines.append(f"note: {crashed} crashed episodes of {name} are left out")
    left_out = sum(len(outcome) - len(common) for outcome in outcomes)
    if left_out:
        lines.append(f"note: {left_out} finished episodes have no partner and are left out")
    n = len(common)
    for name, k in zip("AB", successes, strict=True):
        low, high = wilson_interval(k, n)
        lines.append(f"{name}: {k}/{n} successes = {k / n:.1%}, 95% interval {100 * low:.1f} to {high:.1%}")
    only_a, only_b = counts[True, False], counts[False, True]
    of_tasks = Counter[tuple]()
    for key in common:
        of_tasks[key[1:3]] += outcomes[0][key] - outcomes[1][key]
    over = f", over {len(of_tasks)} tasks {exact_sign_flips([*of_tasks.values()]):.3g} (sign flips)"
    lines += [
        f"both {counts[True, True]}, only A {only_a}, only B {only_b}, neither {counts[False, False]}",
        f"A - B: {100 * (successes[0] - successes[1]) / n:+.1f} percentage points over {n} paired episodes,"
        f" exact McNemar p = {exact_mcnemar(only_a, only_b):.3g}{over if len(of_tasks) >= LEAST_TASKS else ''}",
    ]
    return "\n".join(lines)


def differences(a: dict, b: dict) -> list[str]:
    """Every setting and version in which two results differ, but for what they are compared in."""
    found = []
    by_nature = COMPARED | (OF_A_MODEL if a["settings"]["policy"] != b["settings"]["policy"] else set())
    for name in dict.fromkeys([*a["settings"], *b["settings"]]):
        if name in by_nature:
            continue
        in_a, in_b = (each["settings"].get(name, NOT_RECORDED) for each in (a, b))
        if isinstance(in_a, dict) and isinstance(in_b, dict):
            for key in in_a.keys() & in_b.keys():  # a task that one alone has has no partner
                if in_a[key] != in_b[key]:
                    found.append(f"{name} of {key} is {in_a[key]} in A and {in_b[key]} in B")
        elif in_a != in_b:
            usual = USUAL.get(name)
            found.append(f"{name} is {usual if in_a is None else in_a} in A and {usual if in_b is None else in_b} in B")
    for name in ORIGINS:
        in_a, in_b = (", ".join(distinct(each["episodes"], name)) for each in (a, b))
        if in_a != in_b:
            found.append(f"{name} is {in_a} in A and {in_b} in B")
    return found


def read_results(path: Path) -> dict:
    try:
        results = json.loads(path.read_text())
        results["title"], results["settings"]["policy"]
        for episode in results["episodes"]:
            episode["suite"], episode["task_id"], episode["trial"], episode["crashed"], episode["success"]
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read ({problem.strerror}); expected a results.json") from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path}: not a results.json of run_libero_eval.py") from None
    results["settings"] = completed(results["settings"])
    return results


def _outcomes(results: dict, path: Path) -> dict[tuple, bool]:
    outcomes = {}
    for episode in results["episodes"]:
        key = start_name(results["settings"]), episode["suite"], episode["task_id"], episode["trial"]
        if key in outcomes:
            raise BadInput(f"{path}: holds two episodes of {key[1]}, task {key[2]}, {key[0]} {key[3]}")
        outcomes[key] = None if episode["crashed"] else episode["success"]
    return {key: success for key, success in outcomes.items() if success is not None}
