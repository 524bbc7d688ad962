"""A success rate says little alone: this puts it beside what blind policies get, and beside a scene that has changed.

Rows: the policy with its flow started from noise and from zero, a demonstration replayed blindly, standing still.
Columns: the suite's init states, and the target shifted. An evaluation's neighbours are the folders beside its own.
"""

import json
from collections.abc import Iterator
from pathlib import Path

ROWS = {
    ("checkpoint", "noise"): "policy, flow from noise",
    ("checkpoint", "zero"): "policy, flow from zero",
    ("replay", None): "one demo, replayed blindly",
    ("zero", None): "standing still",
}
SCENE = (
    "task_suite",
    "instructions",
    "num_trials",
    "max_steps",
    "seed",
    "shard",
)  # what two of them must have in common
POLICY = ("weights_sha256", "execute_steps", "sample_steps", "image_size", "visual_mesh_ratio")  # and two of a policy
FIGURES = {"successes", "trials", "crashed", "interval"}


def conditions(shift: float) -> Iterator[tuple[str, dict]]:
    """Name and flags of every cell of the table."""
    for policy, flow_start in ROWS:
        for scene, shift_target in (("init_states", 0.0), ("shifted", shift)):
            name = {"noise": "policy_from_noise", "zero": "policy_from_zero", None: policy}[flow_start]
            flags = {"policy": policy, "shift_target": shift_target}
            yield f"{name}_{scene}", flags | ({"flow_start": flow_start} if flow_start else {})


def side_by_side(directory: Path, own: dict) -> dict[str, dict[str, dict]]:
    """row -> column -> figures (successes, trials, crashed, interval) of the evaluation in `directory`, whose results
    are `own`, and of those beside it that met the same scenes in the same simulator with the same weights. Results that
    can't be read are left out."""
    weights = own["settings"] if own["settings"]["policy"] == "checkpoint" else None
    table: dict[str, dict[str, dict]] = {}
    for results in [own, *map(_results, _neighbours(directory.absolute()))]:
        settings = results and results["settings"]
        if not settings or any(settings.get(key) != own["settings"].get(key) for key in SCENE):
            continue
        if world(settings) != world(own["settings"]):
            continue
        if settings["policy"] == "checkpoint":
            weights = weights or settings
            if any(settings.get(key) != weights.get(key) for key in POLICY):
                continue
        row = ROWS.get((settings["policy"], settings.get("flow_start")))
        shift = 1000 * settings["shift_target"]
        column = f"target shifted by up to {shift:g} mm" if shift else "init states"
        if row and results["overall"]["trials"]:
            figures = {name: results["overall"][name] for name in FIGURES}
            table.setdefault(row, {}).setdefault(column, figures)
    return table


def _neighbours(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.parent.iterdir() if path != directory)
    except OSError:  # one may write into a folder without a right to list the one above
        return []


def _results(directory: Path) -> dict | None:
    """results.json of an evaluation, None where there is none or another program's."""
    try:
        results = json.loads((directory / "results.json").read_text())
        settings, overall = results["settings"], results["overall"]
        whole = {"policy", "shift_target", *SCENE} <= settings.keys() and overall.keys() >= FIGURES
        return results if whole else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def world(settings: dict) -> dict:
    """What the simulator is, as far as the settings say it."""
    is_of_simulator = {name: name.startswith("version of ") and name != "version of torch" for name in settings}
    return {name: value for name, value in settings.items() if value and (is_of_simulator[name] or name == "simulator")}


def table_text(table: dict[str, dict[str, dict]]) -> str:
    """The table for the terminal; what nobody has played yet is a dash."""
    columns = sorted(
        {column for row in table.values() for column in row} | {"init states"}, key=lambda column: (len(column), column)
    )
    if len(columns) == 1:
        columns.append("target shifted")
    lines = [f"{'successes (95% interval)':<30}" + "".join(f"{column:>36}" for column in columns)]
    for row in ROWS.values():
        cells = [_cell(table.get(row, {}).get(column)) for column in columns]
        lines.append(f"{row:<30}" + "".join(f"{cell:>36}" for cell in cells))
    return "\n".join(lines)


def _cell(figures: dict | None) -> str:
    if figures is None:
        return "-"
    low, high = figures["interval"]
    crashed = f", {figures['crashed']} crashed" if figures["crashed"] else ""
    return f"{figures['successes']} of {figures['trials']} ({100 * low:.0f} to {100 * high:.0f}%){crashed}"
