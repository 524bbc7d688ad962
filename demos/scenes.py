"""Scenes without a demonstration, as `collect_demos.py --scenes` draws them: pictures of random layouts, and where
everything appears on them. Phase 1 teaches gaze on them, beside the demonstrations.

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
from observation import CAMERAS

PATTERN = "*_scenes.hdf5"
AT_ONCE = 500  # scenes whose pictures are read and made smaller together


@dataclass(frozen=True)
class Scenes:
    """pictures of each camera (N, S, S, 3) uint8; of each object that can be asked for, NaN where a scene does not have
    it, `at` (N, 2, K, 2), right and up from the pictures' middles, and `places` (N, K, 3) in metres; `goals` (N, 3), to
    which they are to be brought; language (K, D) of the instructions that ask for them."""

    pictures: dict[str, Tensor]
    at: Tensor
    places: Tensor
    goals: Tensor
    language: Tensor

    def __len__(self) -> int:
        return len(self.at)

    def draw(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """Scenes at random, in each of which one of the objects that the first camera sees is asked for: pictures,
        language, target_at (B, 2, 2), target_place and goal_place (B, 3)."""
        chosen = torch.randint(len(self), (count,))
        asked = torch.multinomial(in_view(self.at[chosen, 0]).float(), 1).squeeze(1)
        batch = {camera: pictures[chosen] for camera, pictures in self.pictures.items()}
        batch |= {"language": self.language[asked], "target_at": self.at[chosen, :, asked]}
        batch |= {"target_place": self.places[chosen, asked], "goal_place": self.goals[chosen]}
        return {name: values.to(device) for name, values in batch.items()}


def load_scenes(folder: Path, image_size: int, language: LanguageTable) -> Scenes:
    """All scenes of a folder, their pictures at the size of the model's (or their own, where that is smaller).

    Raises BadInput where there is none, a file lacks something, or an instruction has no embedding."""
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        raise BadInput(f"data.scenes: no {PATTERN} in {folder}; `python collect_demos.py --scenes` makes them")
    files = [_read(path, image_size) for path in paths]
    sizes = {path.name: pictures[CAMERAS[0]].shape[1] for path, (pictures, _, _) in zip(paths, files, strict=True)}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} has {size} px" for name, size in sizes.items())
        raise BadInput(f"data.scenes: pictures of several sizes in {folder}, some smaller than the model's: {told}")
    texts = list(dict.fromkeys(text for _, objects, _ in files for text in objects))
    for text in texts:
        if text not in language.embeddings:
            raise BadInput(f"data.scenes: {folder} asks to '{text}', which has no embedding; see embed_language.py")
    known = [[objects.get(text) or _nothing(pictures) for text in texts] for pictures, objects, _ in files]
    scenes = Scenes(
        {camera: torch.cat([pictures[camera] for pictures, _, _ in files]) for camera in CAMERAS},
        torch.cat([torch.stack([at for at, _ in objects], dim=2) for objects in known]),
        torch.cat([torch.stack([place for _, place in objects], dim=1) for objects in known]),
        torch.cat([goals for _, _, goals in files]),
        torch.stack([language[text] for text in texts]),
    )
    if not (seen := in_view(scenes.at[:, 0]).any(dim=1)).all():
        raise BadInput(f"data.scenes: {folder} has {int((~seen).sum())} scenes without any object in {CAMERAS[0]}")
    return scenes


def _nothing(pictures: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of an object that a file's scenes do not have."""
    count = len(pictures[CAMERAS[0]])
    return torch.full((count, len(CAMERAS), 2), torch.nan), torch.full((count, 3), torch.nan)


def _read(path: Path, image_size: int) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]], Tensor]:
    """-> pictures of each camera (N, S, S, 3), by instruction where its object appears (N, 2, 2) and is (N, 3), and
    where it is to be brought (N, 3), NaN where that is no object."""
    with open_hdf5(path) as file, hdf5_problems_named(path):
        states = open_dataset(path, "", file, "states")[()].astype(np.float64)
        if states.ndim != 2 or not len(states) or not np.isfinite(states).all():
            raise BadInput(f"{path}: key states is {states.shape}, expected finite (N, S)")
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
        places = {name: torch.from_numpy(kinematics.positions(states, name)).float() for name in asked}
        goal = _goal(path, file, kinematics)
        goals = np.full((len(states), 3), np.nan) if goal is None else kinematics.positions(states, goal)
    by_text = {text: (at[:, :, k], places[name]) for k, (name, text) in enumerate(asked.items())}
    return pictures, by_text, torch.from_numpy(goals).float()


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
