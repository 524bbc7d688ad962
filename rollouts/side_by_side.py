"""A success rate says little alone. A table puts it beside what blind policies get, and beside changed scenes.

Rows: the policy with its flow started from noise and from zero, a demonstration replayed blindly, standing still; and
below them, where they were played, policies behind servers. Who decides with a delay has a row for each delay.
Columns: the suite's init states, and the target shifted. The table holds the evaluations that it is told, no other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from errors import BadInput
from rollouts.episodes import start_name
from rollouts.evaluation import AUTO, LARGEST_SHIFT, Evaluation
from rollouts.folder import check_same
from rollouts.statistics import describe, read_results, server_name

ROWS = {
    ("checkpoint", "noise"): "policy, flow from noise",
    ("checkpoint", "zero"): "policy, flow from zero",
    ("replay", None): "one demo, replayed blindly",
    ("zero", None): "standing still",
}
# All evaluations of a table agree in these settings, and in those of `world`.
SCENES = (
    "task_suite",
    "instructions",
    "num_trials",
    "init_states_played",
    "random_resets",
    "layouts",
    "max_steps",
    "seed",
    "shard",
)
# Those of a checkpoint, rather than of a blind policy, agree in these as well, and so do those of a server of one name.
POLICY = ("weights_sha256", "server", "precision", "execute_steps", "sample_steps", "image_size", "visual_mesh_ratio")
OF_A_CELL = ("policy", "flow_start", "shift_target")
DELAYED = ", steps of delay: "
FIGURES = ("successes", "trials", "crashed", "interval")
OWN = "this evaluation"

Table = dict[str, dict[str, dict]]  # row -> column -> FIGURES


def conditions(evaluation: Evaluation, shift: float) -> dict[str, Evaluation]:
    """One evaluation for each cell of the table, by a name for its folder. shift in metres.

    Raises BadInput where the evaluation has already chosen what differs between the cells.
    """
    if not 0 < shift <= LARGEST_SHIFT:
        raise BadInput(f"--side_by_side {shift:g}: expected 0 to {LARGEST_SHIFT} metres, not 0")
    chosen = evaluation.policy != "checkpoint" or evaluation.shift_target or evaluation.flow_start or evaluation.demo
    if not evaluation.checkpoint or chosen:
        raise BadInput("--side_by_side needs --checkpoint, and chooses policy, flow start and shift itself")
    if evaluation.layouts != "libero":
        raise BadInput(f"--side_by_side shifts targets, which --layouts {evaluation.layouts} moves already")
    if evaluation.beside:
        raise BadInput("--side_by_side makes the table of its own eight evaluations; --beside belongs to a single one")
    if evaluation.decision_delay_steps == AUTO:
        raise BadInput(f"--side_by_side needs a number for --decision_delay_steps: {AUTO} may differ between its cells")
    cells = {}
    for policy, flow_start in ROWS:
        starts = "init_states" if evaluation.random_resets is None else "random_resets"
        for scene, shift_target in ((starts, 0.0), ("shifted", shift)):
            name = f"policy_from_{flow_start}" if flow_start else policy
            cells[f"{name}_{scene}"] = replace(
                evaluation,
                policy=policy,
                flow_start=flow_start,
                shift_target=shift_target,
                decision_delay_steps=evaluation.decision_delay_steps if flow_start else 0,
            )
    return cells


def side_by_side(evaluations: Mapping[str, dict]) -> Table:
    """The table of these evaluations, name -> results. One without a finished episode has no figures and no cell.

    Raises BadInput where two of them do not belong into one table.
    """
    check_comparable({name: results["settings"] for name, results in evaluations.items()})
    table: Table = {}
    for name, results in evaluations.items():
        row, column = cell_of(results["settings"], name)
        if results["overall"]["trials"]:
            table.setdefault(row, {})[column] = {key: results["overall"][key] for key in FIGURES}
    return table


def results_of_all(evaluations: Mapping[str, dict]) -> dict:
    """What --side_by_side writes of its evaluations, folder -> results: title, table, and the settings of them all.

    folders has row -> column -> folder, for cells without a figure as well.
    """
    folders: dict[str, dict[str, str]] = {}
    for name, results in evaluations.items():
        row, column = cell_of(results["settings"], name)
        folders.setdefault(row, {})[column] = name
    policy = next(results for results in evaluations.values() if results["settings"]["policy"] == "checkpoint")
    settings = {name: value for name, value in policy["settings"].items() if name not in OF_A_CELL}
    return {
        "title": f"{describe(settings, len(policy['episodes']))}, beside blind policies and shifted targets",
        "checkpoint": policy["checkpoint"],
        "settings": settings,
        "side_by_side": side_by_side(evaluations),
        "folders": folders,
    }


def check_comparable(evaluations: Mapping[str, dict]) -> None:
    """evaluations: name -> settings. Raises BadInput that names the first setting in which one has other scenes,
    another simulator or another checkpoint than those before it, or the two that are of the same cell."""
    of_checkpoint = [name for name, settings in evaluations.items() if settings["policy"] == "checkpoint"]
    of_server: dict[str, list[str]] = {}
    for name, settings in evaluations.items():
        if settings["policy"] == "server":
            of_server.setdefault(server_name(settings), []).append(name)
    groups = [(_scenes_and_world, list(evaluations)), (_weights, of_checkpoint)]
    groups += [(_weights, names) for names in of_server.values()]
    for which, names in groups:
        for name in names[1:]:
            reference = names[0]
            where = f"{name} and {reference} cannot stand side by side: {name}"
            check_same(which(evaluations[name]), which(evaluations[reference]), where)
    cells: dict[tuple[str, str], str] = {}
    for name, settings in evaluations.items():
        row, column = cell = cell_of(settings, name)
        if cell in cells:
            raise BadInput(f"{name} and {cells[cell]} cannot stand side by side: both are '{row}', {column}")
        cells[cell] = name


def cell_of(settings: dict, name: str) -> tuple[str, str]:
    """Row and column of an evaluation with these settings. Raises BadInput where the table has no such row."""
    policy = settings["policy"]
    flow_start = settings.get("flow_start", "noise") if policy == "checkpoint" else None  # the first versions had noise
    if policy != "server" and (policy, flow_start) not in ROWS:
        raise BadInput(f"{name}: key policy is {policy}, flow_start {flow_start}; the table has no such row")
    row = server_name(settings) if policy == "server" else ROWS[policy, flow_start]
    if delay := settings.get("decision_delay_steps"):
        row += f"{DELAYED}{delay}"
    shift = 1000 * settings["shift_target"]
    return row, f"target shifted by up to {shift:g} mm" if shift else f"{start_name(settings)}s"


def _scenes_and_world(settings: dict) -> dict:
    return {key: settings.get(key) for key in SCENES} | world(settings)


def _weights(settings: dict) -> dict:
    return {key: settings.get(key) for key in POLICY}


def world(settings: dict) -> dict:
    """What the simulator is, as far as the settings say it."""
    is_of_simulator = {name: name.startswith("version of ") and name != "version of torch" for name in settings}
    return {name: value for name, value in settings.items() if value and (is_of_simulator[name] or name == "simulator")}


def read_beside(directories: Sequence[Path], own_settings: dict) -> dict[str, dict]:
    """Folder -> results of the finished evaluations that --beside names, checked against this one's settings.

    Raises BadInput for a folder that holds none, or one that cannot stand beside this evaluation.
    """
    found = {str(directory): _finished(directory) for directory in directories}
    check_comparable({OWN: own_settings} | {name: results["settings"] for name, results in found.items()})
    return found


def _finished(directory: Path) -> dict:
    path = directory / "results.json"
    results = read_results(path)
    try:
        is_whole = {"policy", "shift_target", *SCENES} - {"init_states_played", "random_resets", "layouts"} <= results[
            "settings"
        ].keys()
        is_whole = is_whole and {*FIGURES} <= results["overall"].keys()
    except (KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise BadInput(f"{path}: not a results.json of run_libero_eval.py")
    if not results["overall"]["trials"]:
        raise BadInput(f"{path}: has no finished episode to stand beside another evaluation's")
    return results


def num_cells(table: Table) -> int:
    return sum(len(columns) for columns in table.values())


def columns_of(table: Table) -> list[str]:
    """Init states (or random resets) first, then shifts by size; at least two, the second of which nobody may have
    played."""
    found = {column for row in table.values() for column in row}
    found |= set() if "random resets" in found else {"init states"}
    columns = sorted(found, key=lambda column: (len(column), column))
    return columns if len(columns) > 1 else [*columns, "target shifted"]


def rows_of(table: Table) -> list[str]:
    """All ROWS, below each those of the same policy with a delay, by its size; servers last."""
    usual = list(ROWS.values())

    def place(row: str) -> tuple:
        policy, _, delay = row.partition(DELAYED)
        return usual.index(policy) if policy in usual else len(usual), policy, int(delay or 0)

    return sorted({*usual, *table}, key=place)


def table_text(table: Table) -> str:
    """The table for the terminal; what nobody has played is a dash."""
    rows, columns = rows_of(table), columns_of(table)
    width = max(30, *(len(row) + 2 for row in rows))
    lines = [f"{'successes (95% interval)':<{width}}" + "".join(f"{column:>36}" for column in columns)]
    for row in rows:
        cells = [cell_text(table.get(row, {}).get(column)) for column in columns]
        lines.append(f"{row:<{width}}" + "".join(f"{cell:>36}" for cell in cells))
    return "\n".join(lines)


def cell_text(figures: dict | None) -> str:
    if figures is None:
        return "-"
    low, high = figures["interval"]
    crashed = f", {figures['crashed']} crashed" if figures["crashed"] else ""
    return f"{figures['successes']} of {figures['trials']} ({100 * low:.0f} to {100 * high:.0f}%){crashed}"
