"""Shuffled layouts of libero_object's scenes, and those that no training demonstration shows.

A scene of libero_object has a basket and six objects, each at its own place on the floor; the six places are the same
in all ten scenes. In a shuffled layout the objects exchange their places. Each is then moved by itself by up to
MOVED_BY in x and in y, and so is the basket. Any of the six may be the one that is asked for.

Two kinds of layout are kept for evaluation and are never drawn for training:

- An exchange: the six objects of every scene form three withheld pairs (WITHHELD_PAIRS). No training layout has one of
  a pair at the place of the other. The first pair of each scene is the one that LIBERO-PRO's suite libero_object_swap
  exchanges, so neither its layouts nor half of one are part of the training data.
- A place: of the square around each of the six places in which objects are moved, one ninth is withheld
  (WITHHELD_CELLS). No training layout has an object in it.

LIBERO's own layouts (--layouts libero) with --shift_target know nothing of the withheld places.

`run_libero_eval.py --layouts` plays what LAYOUTS names.

Lengths are in metres. An object's position is that of its body, as its joint has it.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from errors import BadInput
from simulator.env import LiberoEnv, SimulatorError
from simulator.scripted_expert import REACH
from simulator.suites import bddl_path

Pair = tuple[str, str]
Place = tuple[float, float]  # x, y
Layout = dict[str, np.ndarray]  # object or basket -> x and y (2,)

MOVED_BY = 0.05
CLEARANCE = 0.02  # between the collision geometries of two objects, beyond LIBERO's own radii: room for a finger
SETTLES_WITHIN = 0.005  # of where it is put
TRIES = 2000  # layouts and moves drawn before a scene counts as one that has no room

# Scene (the object that LIBERO itself asks for in it) -> three pairs. The first is LIBERO-PRO's. Of the three ways to
# pair the other four, the one whose text has the smallest SHA-256 is taken (`paired_by_rule`).
WITHHELD_PAIRS: dict[str, tuple[Pair, ...]] = {
    "alphabet_soup": (("alphabet_soup", "butter"), ("cream_cheese", "salad_dressing"), ("milk", "tomato_sauce")),
    "cream_cheese": (("alphabet_soup", "cream_cheese"), ("butter", "tomato_sauce"), ("milk", "orange_juice")),
    "salad_dressing": (("salad_dressing", "tomato_sauce"), ("alphabet_soup", "ketchup"), ("cream_cheese", "milk")),
    "bbq_sauce": (("bbq_sauce", "chocolate_pudding"), ("alphabet_soup", "salad_dressing"), ("cream_cheese", "ketchup")),
    "ketchup": (("cream_cheese", "ketchup"), ("alphabet_soup", "bbq_sauce"), ("milk", "salad_dressing")),
    "tomato_sauce": (("milk", "tomato_sauce"), ("bbq_sauce", "orange_juice"), ("butter", "chocolate_pudding")),
    "butter": (("butter", "tomato_sauce"), ("bbq_sauce", "chocolate_pudding"), ("ketchup", "orange_juice")),
    "milk": (("cream_cheese", "milk"), ("butter", "tomato_sauce"), ("chocolate_pudding", "orange_juice")),
    "chocolate_pudding": (
        ("chocolate_pudding", "ketchup"),
        ("alphabet_soup", "orange_juice"),
        ("bbq_sauce", "salad_dressing"),
    ),
    "orange_juice": (("chocolate_pudding", "orange_juice"), ("bbq_sauce", "ketchup"), ("butter", "salad_dressing")),
}
# Place (x, y) -> column and row of its withheld cell in a grid of 3 by 3 over the square that objects are moved in; the
# middle one is (0, 0). Of the eight others the one whose text has the smallest SHA-256 is taken (`cell_by_rule`).
WITHHELD_CELLS: dict[Place, tuple[int, int]] = {
    (-0.2, -0.08): (-1, 0),
    (-0.15, 0.06): (-1, 1),
    (-0.12, -0.24): (1, -1),
    (0.05, -0.1): (0, -1),
    (0.1, -0.2): (0, -1),
    (0.15, 0.03): (-1, -1),
}


def paired_by_rule(scene: str, objects: Iterable[str], first: Pair) -> tuple[Pair, ...]:
    """The withheld pairs of a scene of six objects, of which `first` is one. Names are without their numbers."""
    a, *others = sorted(set(objects) - set(first))
    ways = [((a, partner), _in_order(*(set(others) - {partner}))) for partner in others]
    return _in_order(*first), *min(ways, key=lambda way: _digest(f"{scene}: {tuple(sorted(way))}"))


def _in_order(one: str, other: str) -> Pair:
    return min(one, other), max(one, other)


def cell_by_rule(place: Place) -> tuple[int, int]:
    cells = [(column, row) for column in (-1, 0, 1) for row in (-1, 0, 1) if (column, row) != (0, 0)]
    return min(cells, key=lambda cell: _digest(f"{place}: {cell}"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------ drawing layouts


def training_layout(env: LiberoEnv, rng: np.random.Generator) -> Layout:
    """A layout that training data may show. Call it after `env.reset()`, whose heights and rotations the objects keep;
    `env.place_objects` takes what it returns.

    Raises SimulatorError where no layout is found that leaves every object its clearance.
    """
    return _moved(env, rng, lambda: _exchanged(env, rng))


def layout_with_withheld_exchange(env: LiberoEnv, rng: np.random.Generator, target: str) -> Layout:
    """A layout for evaluation: `target` and its partner in WITHHELD_PAIRS have exchanged their places, the others stand
    at their own. All are moved as in training. Use it, and see errors, as `training_layout`."""
    places = places_of(env)
    partner = withheld_partner(env, target)
    return _moved(env, rng, lambda: places | {target: places[partner], partner: places[target]})


def layout_with_withheld_place(env: LiberoEnv, rng: np.random.Generator, target: str) -> Layout:
    """A layout for evaluation: exchanged and moved as in training, but `target` stands in the withheld cell beside its
    place. Use it, and see errors, as `training_layout`."""
    return _moved(env, rng, lambda: _exchanged(env, rng), to_withheld_cell=target)


LAYOUTS: dict[str, Callable[[LiberoEnv, np.random.Generator, str], Layout]] = {
    "shuffled": lambda env, rng, _target: training_layout(env, rng),
    "withheld_exchange": layout_with_withheld_exchange,
    "withheld_place": layout_with_withheld_place,
}  # of random resets, beside LIBERO's own


def withheld_partner(env: LiberoEnv, target: str) -> str:
    """The object that `target` never exchanges its place with in training."""
    for pair in WITHHELD_PAIRS[scene_of(env)]:
        if without_number(target) in pair:
            return next(name for name in graspable(env) if name != target and without_number(name) in pair)
    raise BadInput(f"{target} is no object that can be asked for in the scene of {env.bddl_file.stem}")


def in_withheld_cell(place: Place, xy: np.ndarray) -> bool:
    """Whether position xy (2,) of an object that was moved from `place` is in the cell that is kept for evaluation."""
    low, high = withheld_cell(place)
    return bool(((low <= xy) & (xy <= high)).all())


def withheld_cell(place: Place) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest x and y, (2,) each."""
    side = 2 * MOVED_BY / 3
    middle = np.array(place) + side * np.array(WITHHELD_CELLS[place])
    return middle - side / 2, middle + side / 2


def _exchanged(env: LiberoEnv, rng: np.random.Generator) -> dict[str, Place]:
    """The objects at each other's places, no one at its withheld partner's; the basket at its own."""
    places, objects = places_of(env), graspable(env)
    forbidden = {name: places[withheld_partner(env, name)] for name in objects}
    while True:
        new = {name: places[objects[i]] for name, i in zip(objects, rng.permutation(len(objects)), strict=True)}
        if all(new[name] != forbidden[name] for name in objects):
            return places | new


def _moved(
    env: LiberoEnv, rng: np.random.Generator, draw_places: Callable[[], dict[str, Place]], to_withheld_cell: str = ""
) -> Layout:
    """Moves everything from its place by up to MOVED_BY, uniformly among what leaves all their clearance: the object
    named into its withheld cell, the others outside of theirs."""
    footprints = {name: _footprint(env, name) for name in env.domain.objects_dict}
    base = env.domain.robots[0].base_pos[:2]
    for _ in range(TRIES):
        layout: Layout = {}
        for name, place in draw_places().items():
            xy = _position(rng, place, base, name == to_withheld_cell)
            if not all(_are_clear(footprints[name], xy, footprints[other], at) for other, at in layout.items()):
                break
            layout[name] = xy
        else:
            return layout
    raise SimulatorError(f"the scene of {env.bddl_file.stem} has no layout that leaves every object its clearance")


def _position(rng: np.random.Generator, place: Place, base: np.ndarray, withheld: bool) -> np.ndarray:
    """(2,), in the withheld cell of a place or in the rest of its square, within reach of the arm's base (2,)."""
    while True:
        xy = rng.uniform(*withheld_cell(place)) if withheld else place + rng.uniform(-MOVED_BY, MOVED_BY, 2)
        if place not in WITHHELD_CELLS:  # the basket's
            return xy
        if in_withheld_cell(place, xy) == withheld and np.linalg.norm(xy - base) < REACH - SETTLES_WITHIN:
            return xy


@dataclass(frozen=True)
class Footprint:
    """What an object takes of the floor, from its position: lowest and highest x and y of its collision geometry, (2,)
    each, and the radius that LIBERO's own placement counts with."""

    low: np.ndarray
    high: np.ndarray
    radius: float


def _footprint(env: LiberoEnv, name: str) -> Footprint:
    corners = env.collision_boxes(name).reshape(-1, 3)[:, :2] - env.sim.data.body_xpos[env.domain.obj_body_id[name]][:2]
    return Footprint(corners.min(axis=0), corners.max(axis=0), env.domain.objects_dict[name].horizontal_radius)


def _are_clear(first: Footprint, at: np.ndarray, second: Footprint, second_at: np.ndarray) -> bool:
    """LIBERO's radii are smaller than the objects (the basket's is a third of it), so the geometry counts, too."""
    gap = np.maximum(at + first.low - second_at - second.high, second_at + second.low - at - first.high)  # (2,)
    return bool(gap.max() > CLEARANCE and np.linalg.norm(at - second_at) > first.radius + second.radius)


# ----------------------------------------------------------------------------------------------- scenes and their files


def scene_of(env: LiberoEnv) -> str:
    """The scene's name in WITHHELD_PAIRS, known by its objects. Raises BadInput for a scene that is none of them."""
    held = {without_number(name) for name in graspable(env)}
    for scene, pairs in WITHHELD_PAIRS.items():
        if held == {name for pair in pairs for name in pair}:
            return scene
    raise BadInput(f"the scene of {env.bddl_file.stem} is none of libero_object's, whose layouts can be shuffled")


def places_of(env: LiberoEnv) -> dict[str, Place]:
    """Object or basket -> where LIBERO has it, the middle of its region."""
    problem, places = env.domain.parsed_problem, {}
    for _, name, region in problem["initial_state"]:
        x_low, y_low, x_high, y_high = problem["regions"][region]["ranges"][0]
        places[name] = round((x_low + x_high) / 2, 3), round((y_low + y_high) / 2, 3)
    return places


def graspable(env: LiberoEnv) -> list[str]:
    """The objects that can be asked for: all but the basket."""
    basket = env.domain.obj_of_interest[1]
    return [name for name in env.domain.objects_dict if name != basket]


def without_number(name: str) -> str:
    """milk_1 -> milk"""
    return re.sub(r"_\d+$", "", name)


def shuffled_tasks(suite, task_ids: Sequence[int]) -> list["ShuffledTask"]:
    """What these tasks ask for, in every scene that holds it; the scenes in the suite's order, each with all that is
    asked for in it."""
    texts = [bddl_path(suite, scene).read_text() for scene in range(suite.n_tasks)]
    tasks = []
    for task_id in task_ids:
        target, _ = _objects_of_interest(texts[task_id])
        holding = [scene for scene, text in enumerate(texts) if re.search(rf"^\s*{target}\s+-\s", text, re.M)]
        first = holding.index(task_id)
        for rank, scene in enumerate(holding[first:] + holding[:first]):
            own_target, _ = _objects_of_interest(texts[scene])
            words = suite.get_task(scene).name.replace(without_number(own_target), without_number(target))
            tasks.append(ShuffledTask(scene, target, f"OBJECT_SCENE{scene + 1}_{words}", rank, len(holding)))
    return sorted(tasks, key=lambda task: task.scene)


@dataclass(frozen=True)
class ShuffledTask:
    """One object asked for in one scene. Its demonstrations make a file of their own."""

    scene: int  # the task id of the scene's own task
    target: str  # such as milk_1
    name: str  # of the file, with the scene's number as LIBERO counts, from 1
    rank: int  # of the scene among those that hold the object; 0 is the one whose own task asks for it
    scenes: int  # that hold the object

    @property
    def instruction(self) -> str:
        """What the robot is told, in the words of LIBERO's own file names."""
        _, _, words = self.name.split("_", 2)
        return words.replace("_", " ")

    def share_of(self, demos: int) -> int:
        """How many of an instruction's demonstrations come from this scene: equally many from each, as long as that is
        two at least, since the loader needs one to train on and one to hold out."""
        used = min(self.scenes, max(demos // 2, 1))
        return demos // used + (self.rank < demos % used) if self.rank < used else 0


def problem_text(text: str, target: str) -> str:
    """A scene's BDDL file with another object asked for: its instruction, objects of interest and goal."""
    own, _ = _objects_of_interest(text)

    def changed(section: re.Match) -> str:
        names = re.sub(rf"\b{own}\b", target, section.group())
        return names.replace(without_number(own).replace("_", " "), without_number(target).replace("_", " "))

    return re.sub(r"\(:(language|obj_of_interest|goal)\b[^:]*", changed, text)


def _objects_of_interest(text: str) -> list[str]:
    (section,) = re.findall(r"\(:obj_of_interest\s([^)]*)\)", text)
    return section.split()
