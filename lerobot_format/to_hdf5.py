"""A LeRobot dataset -> LIBERO's HDF5 layout, a file a task, as our loader reads it.

Every episode becomes a small file as soon as it is read; they are put together when all are there. A run that was
interrupted goes on with the first episode that is missing.

Letters: N frames of an episode, H, W picture height and width.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from demos.hdf5_errors import open_hdf5
from demos.hdf5_writing import new_hdf5
from demos.instructions import canonical_instruction
from errors import BadInput
from lerobot_format.dataset import EpisodePlace, LeRobotDataset
from lerobot_format.gripper import GripperConvention
from lerobot_format.keys import sources_of
from lerobot_format.layout import FPS, INFO, KEPT_ATTRIBUTES, OWN
from lerobot_format.pictures import turned
from lerobot_format.unfinished import RESULT, becomes_whole
from observation import CAMERAS, ORIENTATION

LARGEST_DELTA = 1 + 1e-6  # of a pose; what is larger is in other units


class Import:
    """What becomes of a dataset, and how it is written."""

    def __init__(
        self, root: Path, preset: str | None, keys: Sequence[str], orientation: str | None, closes: str | None
    ):
        """`orientation` is "turned" or "raw", `closes` "high" or "low"; None leaves it to the dataset. Raises BadInput
        as `LeRobotDataset` and `sources_of` do, and where the gripper's convention cannot be found out."""
        self.dataset = LeRobotDataset(root)
        self.preset, self.sources = sources_of(self.dataset, preset, keys)
        self.own = self.dataset.info.get(OWN) if self.preset == OWN else None
        self.is_turned = orientation != "raw"
        self.image_size = self._image_size()
        self.gripper = self._look_at_grippers()
        self.closing_is_high = self.gripper.closing_is_high(root, closes or ("high" if self.own else None))
        self.files = self._task_files()

    def plan(self) -> dict[str, Any]:
        """All that decides the files; a conversion goes on only where it has not changed."""
        return {
            "dataset": str(self.dataset.root.resolve()),
            "info": self.dataset.info,
            "sources": {key: str(source) for key, source in self.sources.items()},
            "orientation": "turned" if self.is_turned else "raw",
            "closes": "high" if self.closing_is_high else "low",
            "episodes": [[episode.number, episode.length] for episode in self.dataset.episodes],
        }

    def told(self) -> list[str]:
        """What was found out and what is missing, a sentence each."""
        dataset, gripper = self.dataset, self.gripper
        sources = ", ".join(f"{key} from {source}" for key, source in self.sources.items())
        closing = gripper.high if self.closing_is_high else gripper.low
        found = "as our own export has it" if self.own else f"fingers agree to {abs(gripper.agreement):.0%}"
        lines = [
            f"LeRobot {dataset.version}, keys by preset {self.preset}: {sources}",
            f"gripper commands {gripper.low:g} to {gripper.high:g}, {closing:g} closes ({found}); written as -1 to "
            "open and 1 to close",
            "pictures turned back by 180 degrees" if self.is_turned else "pictures taken as they are",
        ]
        if gripper.between:
            lines.append(f"{gripper.between} gripper commands lay between the two ends and became the nearer one")
        if dataset.fps != FPS:
            lines.append(
                f"the dataset says {dataset.fps:g} frames a second, LIBERO has {FPS}: frames are taken as they are"
            )
        several = sum(len(episode.tasks) > 1 for episode in dataset.episodes)
        if several:
            lines.append(f"{several} episodes have several tasks, of which the first was taken")
        missing = [] if "joint_states" in self.sources else ["joint angles (train with data.robot_state end_effector)"]
        missing += [] if "ee_states" in self.sources else ["the end effector's pose"]
        lines.append(f"missing: {', '.join([*missing, 'simulator states'])}")
        return lines

    def write_episode(self, episode: EpisodePlace, path: Path) -> None:
        """Writes one episode as the group `demo` of an HDF5 file of its own."""
        steps, vectors = episode.length, self._vectors(episode, list(self.sources))
        with new_hdf5(path, path.parent) as file:
            demo = file.create_group("demo")
            demo["actions"] = vectors.pop("actions").astype(np.float64)
            demo["rewards"] = demo["dones"] = (np.arange(steps) == steps - 1).astype(np.uint8)
            for key, values in vectors.items():
                demo[f"obs/{key}"] = values.astype(np.float64)
            if "ee_states" in vectors:
                demo["obs/ee_pos"], demo["obs/ee_ori"] = (
                    demo["obs/ee_states"][:, part] for part in (np.s_[:3], np.s_[3:])
                )
            for camera in CAMERAS:
                self._write_film(episode, camera, demo)
            demo.attrs["num_samples"] = steps

    def write_task_file(self, path: Path, episodes: Sequence[EpisodePlace], parts: Path) -> None:
        """Puts the episodes of one task together, demo_0 first."""
        task = canonical_instruction(episodes[0].tasks[0])
        with new_hdf5(path, path.parent) as file:
            data = file.create_group("data")
            for number, episode in enumerate(episodes):
                with open_hdf5(part_of(parts, episode)) as part:
                    part.copy("demo", data, name=f"demo_{number}")
            data.attrs["problem_info"] = json.dumps({"language_instruction": task})
            data.attrs["macros_image_convention"] = ORIENTATION
            data.attrs["obs_alignment"] = "before"
            data.attrs["num_demos"] = len(episodes)
            data.attrs["total"] = sum(episode.length for episode in episodes)
            data.attrs["converted_from"] = f"LeRobot {self.dataset.version}, {self.dataset.root.name}"
            for name, value in self._own_attributes(path.name).items():
                data.attrs[name] = value

    # ------------------------------------------------------------------------------------------------- what it is of

    def _image_size(self) -> int:
        sizes = {camera: self.dataset.size_of_pictures(self.sources[camera].feature) for camera in CAMERAS}
        if len(set(sizes.values())) > 1:
            raise BadInput(f"{self.dataset.root}: pictures are {sizes} px, expected one size for both cameras")
        return next(iter(sizes.values()))

    def _look_at_grippers(self) -> GripperConvention:
        convention = GripperConvention()
        with tqdm(self.dataset.episodes, unit="episode", desc="looking at grippers", leave=False) as episodes:
            for episode in episodes:
                vectors = self._vectors(episode, ["actions", "gripper_states"], as_stored=True)
                convention.add(vectors["actions"][:, 6], vectors["gripper_states"])
        return convention

    def _task_files(self) -> dict[str, list[EpisodePlace]]:
        """Name of each file, and the episodes in it."""
        files: dict[str, list[EpisodePlace]] = {}
        own_names = self._own_names()
        for place, episode in enumerate(self.dataset.episodes):
            name = own_names[place] if own_names else file_name(episode.tasks[0])
            files.setdefault(name, []).append(episode)
        for name, episodes in files.items():
            tasks = Counter(canonical_instruction(episode.tasks[0]) for episode in episodes)
            if len(tasks) > 1:
                raise BadInput(f"{self.dataset.root}: the tasks {' and '.join(map(repr, tasks))} would both be {name}")
        return files

    def _own_names(self) -> list[str]:
        """Of our own export: each episode's file, none where the dataset was changed since."""
        files: Any = self.own.get("files") if isinstance(self.own, dict) else None
        count, names = len(self.dataset.episodes), []
        try:
            ends = [of_file["first_episode"] for of_file in files[1:]] + [count]
            for of_file, end in zip(files, ends, strict=True):
                names += [of_file["name"]] * (min(end, count) - max(of_file["first_episode"], 0))
        except (TypeError, KeyError, IndexError):
            return []
        is_sound = len(names) == count and all(re.fullmatch(r"[\w-][\w.-]*\.hdf5", str(name)) for name in names)
        return names if is_sound else []

    def _own_attributes(self, name: str) -> dict[str, str | float]:
        """Of our own export: what LIBERO's attributes of this file were."""
        if not isinstance(self.own, dict):
            return {}
        attributes: dict[str, str | float] = {}
        if isinstance(self.own.get("visual_mesh_ratio"), float | int):
            attributes["visual_mesh_ratio"] = float(self.own["visual_mesh_ratio"])
        for of_file in self.own["files"] if self._own_names() else ():
            if of_file["name"] == name and isinstance(of_file.get("attributes"), dict):
                kept = {key: of_file["attributes"].get(key) for key in KEPT_ATTRIBUTES}
                attributes |= {key: value for key, value in kept.items() if isinstance(value, str)}
        return attributes

    # ------------------------------------------------------------------------------------------------------ episodes

    def _vectors(self, episode: EpisodePlace, keys: Sequence[str], as_stored: bool = False) -> dict[str, np.ndarray]:
        """The episode's values (N, D) float32 of these keys but for the pictures, checked; actions in LIBERO's
        convention unless `as_stored`."""
        sources = {key: self.sources[key] for key in keys if key not in CAMERAS}
        stored = self.dataset.vectors(episode, sorted({source.feature for source in sources.values()}))
        vectors = {key: stored[source.feature][:, source.part] for key, source in sources.items()}
        where = f"{episode.data}: episode {episode.number}"
        if episode.length < 2:
            raise BadInput(f"{where} has {episode.length} frame, expected at least 2")
        largest = float(np.abs(vectors["actions"][:, :6]).max())
        if largest > LARGEST_DELTA:
            raise BadInput(f"{where} has a pose delta of size {largest:.3g}, expected values in [-1, 1]")
        if not as_stored:
            actions = vectors["actions"].copy()
            actions[:, 6] = self.gripper.as_libero(actions[:, 6], self.closing_is_high)
            vectors["actions"] = actions
        return vectors

    def _write_film(self, episode: EpisodePlace, camera: str, demo: h5py.Group) -> None:
        feature, picture = self.sources[camera].feature, (self.image_size, self.image_size, 3)
        film = demo.create_dataset(
            f"obs/{camera}", (episode.length, *picture), np.uint8, chunks=(1, *picture), compression="gzip",
            compression_opts=1,
        )  # fmt: skip
        t = -1
        for t, stored in enumerate(self.dataset.pictures(episode, feature)):
            if stored.shape != picture:
                raise BadInput(
                    f"{self.dataset.root}: episode {episode.number}: {feature} of frame {t} is {stored.shape}, but "
                    f"{INFO} says {picture}"
                )
            film[t] = turned(stored) if self.is_turned else stored
        if t + 1 != episode.length:
            raise BadInput(
                f"{self.dataset.root}: episode {episode.number}: {feature} has {t + 1} pictures, expected "
                f"{episode.length}"
            )


def file_name(task: str) -> str:
    """LIBERO's name for a task's file. The loader reads the instruction from a name that ends in _demo, so one that
    cannot spell the instruction does not end so."""
    instruction = canonical_instruction(task)
    name = re.sub(r"[^a-z0-9]+", "_", instruction).strip("_")[:200] or "task"
    return f"{name}_demo.hdf5" if name.replace("_", " ") == instruction else f"{name}.hdf5"


def part_of(parts: Path, episode: EpisodePlace) -> Path:
    return parts / f"episode_{episode.number:06d}.hdf5"


def convert(work: Import, out: Path) -> None:
    """Writes the folder `out`. Raises BadInput as `becomes_whole` does, and for an episode that cannot be read."""
    file_of = {episode.number: name for name, of_task in work.files.items() for episode in of_task}
    with becomes_whole(out, work.plan()) as folder:
        parts, result = folder / "episodes", folder / RESULT
        parts.mkdir(exist_ok=True)
        with tqdm(work.dataset.episodes, unit="episode", desc="importing") as episodes:
            for episode in episodes:
                if not part_of(parts, episode).exists() and not (result / file_of[episode.number]).exists():
                    work.write_episode(episode, part_of(parts, episode))
        with tqdm(work.files.items(), unit="file", desc="putting together") as files:
            for name, of_task in files:
                if not (result / name).exists():
                    work.write_task_file(result / name, of_task, parts)
                for episode in of_task:
                    part_of(parts, episode).unlink(missing_ok=True)
