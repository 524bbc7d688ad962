"""Scenes without a demonstration, as `collect_demos.py --scenes` draws them: pictures of random layouts, the arm, and
where everything appears on them. Phase 1 teaches gaze and place on them, beside the demonstrations.

They are few bytes at the model's picture size (150 MB for 6,000 of 64 px) and are held in memory.

Letters: N scenes, K objects that can be asked for, B batch, S pixels, D language's width.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from demos.hdf5_errors import hdf5_problems_named, open_dataset, open_hdf5, text_attribute
from demos.instructions import canonical_instruction
from demos.language import LanguageTable
from demos.simulator_truth import Kinematics, objects_of_interest
from errors import BadInput
from jepa.gaze import in_view
from jepa.tokenizer import resize_images
from observation import CAMERAS, STATE_WIDTHS

PATTERN = "*_scenes.hdf5"
FARTHEST = 1e6  # in seconds, metres and rad; no simulator that is sound leaves it
AT_ONCE = 500  # scenes whose pictures are read and made smaller together


@dataclass(frozen=True)
class Scenes:
    """pictures of each camera (N, S, S, 3) uint8 and every part of the robot state (N, width); of each object that can
    be asked for, NaN where a scene does not have it, `at` (N, 2, K, 2), right and up from the pictures' middles, and
    `places` (N, K, 3) in metres; `goals` (N, 3), to which objects are to be brought; the K instructions that ask for
    them, and language (K, D) of these."""

    pictures: dict[str, Tensor]
    robot_state: dict[str, Tensor]
    at: Tensor
    places: Tensor
    goals: Tensor
    language: Tensor
    instructions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.at)

    def draw(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """Scenes at random, in each of which one of the objects that the first camera sees is asked for: pictures,
        robot state, language, target_at (B, 2, 2), target_place, goal_place and end_effector_place (B, 3)."""
        chosen = torch.randint(len(self), (count,))
        asked = torch.multinomial(in_view(self.at[chosen, 0]).float(), 1).squeeze(1)
        batch = {name: values[chosen] for name, values in (self.pictures | self.robot_state).items()}
        batch |= {"language": self.language[asked], "target_at": self.at[chosen, :, asked]}
        batch |= {"target_place": self.places[chosen, asked], "goal_place": self.goals[chosen]}
        batch["end_effector_place"] = batch["ee_pos"]
        return {name: values.to(device) for name, values in batch.items()}


def instructions_in(folder: Path) -> set[str]:
    """All that a folder's scenes can ask for, none where there are no scenes. Raises BadInput as `load_scenes`."""
    found: set[str] = set()
    for path in folder.glob(PATTERN):
        with open_hdf5(path) as file, hdf5_problems_named(path):
            found |= {*_instructions(path, file).values()}
    return found


def load_scenes(folder: Path, image_size: int, language: LanguageTable) -> Scenes:
    """All scenes of a folder, their pictures at the size of the model's (or their own, where that is smaller).

    Raises BadInput where there is none, a file lacks something, or an instruction has no embedding."""
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        raise BadInput(f"data.scenes: no {PATTERN} in {folder}; `python collect_demos.py --scenes` makes them")
    files = [_read(path, image_size) for path in paths]
    sizes = {path.name: file.pictures[CAMERAS[0]].shape[1] for path, file in zip(paths, files, strict=True)}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} has {size} px" for name, size in sizes.items())
        raise BadInput(f"data.scenes: pictures of several sizes in {folder}, some smaller than the model's: {told}")
    texts = list(dict.fromkeys(text for file in files for text in file.objects))
    for text in texts:
        if text not in language.embeddings:
            raise BadInput(f"data.scenes: {folder} asks to '{text}', which has no embedding; see embed_language.py")
    known = [[file.objects.get(text) or file.lacking() for text in texts] for file in files]
    scenes = Scenes(
        {camera: torch.cat([file.pictures[camera] for file in files]) for camera in CAMERAS},
        {part: torch.cat([file.robot_state[part] for file in files]) for part in STATE_WIDTHS},
        torch.cat([torch.stack([one.at for one in objects], dim=2) for objects in known]),
        torch.cat([torch.stack([one.places for one in objects], dim=1) for objects in known]),
        torch.cat([file.goals for file in files]),
        torch.stack([language[text] for text in texts]),
        tuple(texts),
    )
    if not (seen := in_view(scenes.at[:, 0]).any(dim=1)).all():
        raise BadInput(f"data.scenes: {folder} has {int((~seen).sum())} scenes without any object in {CAMERAS[0]}")
    return scenes


@dataclass(frozen=True)
class _Object:
    """Of one that a file's scenes can ask for: at (N, 2, 2), places (N, 3)."""

    at: Tensor
    places: Tensor


@dataclass(frozen=True)
class _File:
    """pictures of each camera (N, S, S, 3), parts of the robot state (N, width), goals (N, 3), NaN where that is no
    object, and by instruction the object that it asks for."""

    pictures: dict[str, Tensor]
    robot_state: dict[str, Tensor]
    goals: Tensor
    objects: dict[str, _Object]

    def lacking(self) -> _Object:
        """Of an object that its scenes do not have."""
        nan, count = torch.nan, len(self.goals)
        return _Object(torch.full((count, len(CAMERAS), 2), nan), torch.full((count, 3), nan))


def _read(path: Path, image_size: int) -> _File:
    with open_hdf5(path) as file, hdf5_problems_named(path):
        states = open_dataset(path, "", file, "states")[()].astype(np.float64)
        if states.ndim != 2 or not len(states) or not (np.abs(states) < FARTHEST).all():
            raise BadInput(f"{path}: key states is {states.shape}, expected (N, S) within {FARTHEST:g}")
        asked = _instructions(path, file)
        kinematics = Kinematics(text_attribute(file.attrs, "model_file", path), str(path), "scenes need it")
        if unknown := [name for name in asked if name not in kinematics.bodies]:
            raise BadInput(f"{path}: attribute instructions names {unknown[0]}, which the scene does not have")
        at = torch.from_numpy(kinematics.on_pictures(states, list(asked)))  # (N, 2, K, 2)
        datasets = {camera: open_dataset(path, "", file, camera) for camera in CAMERAS}
        for camera, stored in datasets.items():
            side = stored.shape[1] if stored.ndim == 4 else 0
            if stored.shape != (len(states), side, side, 3) or not side or stored.dtype != np.uint8:
                expected = f"({len(states)}, h, h, 3) uint8"
                raise BadInput(f"{path}: key {camera} is {stored.shape} {stored.dtype}, expected {expected}")
        size = min(image_size, *(stored.shape[1] for stored in datasets.values()))
        pictures = {camera: _smaller(stored, size) for camera, stored in datasets.items()}
        places = [torch.from_numpy(kinematics.positions(states, name)).float() for name in asked]
        goal = _goal(path, file, kinematics)
        goals = np.full((len(states), 3), np.nan) if goal is None else kinematics.positions(states, goal)
        robot_state = {part: torch.from_numpy(of) for part, of in kinematics.robot_state(states).items()}
    objects = {text: _Object(at[:, :, k], places[k]) for k, text in enumerate(asked.values())}
    return _File(pictures, robot_state, torch.from_numpy(goals).float(), objects)


def _goal(path: Path, file: h5py.File, kinematics: Kinematics) -> str | None:
    """What the scene's task brings things to, as its BDDL file names it; None where that is no object, or not said."""
    try:
        _, *others = objects_of_interest(text_attribute(file.attrs, "bddl_file_content", path), path, "goals need it")
    except BadInput:
        return None
    return others[0] if others and others[0] in kinematics.bodies else None


def _instructions(path: Path, file: h5py.File) -> dict[str, str]:
    """Object -> what asks for it, as `canonical_instruction` writes it."""
    try:
        told = json.loads(text_attribute(file.attrs, "instructions", path))
        asked = {name: canonical_instruction(text) for name, text in told.items()}
    except (TypeError, ValueError, AttributeError):
        asked = {}
    if not asked:
        raise BadInput(f"{path}: attribute instructions is no JSON of object -> instruction")
    return asked


def _smaller(stored: h5py.Dataset, size: int) -> Tensor:
    """Pictures (N, h, h, 3) -> (N, S, S, 3), few at a time."""
    parts = (torch.from_numpy(stored[first : first + AT_ONCE]) for first in range(0, len(stored), AT_ONCE))
    return torch.cat([resize_images(part, size).permute(0, 2, 3, 1) for part in parts])
