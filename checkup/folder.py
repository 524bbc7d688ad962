"""A data directory examined: every file is read as training reads it, and what is wrong with it collected."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from checkup.oddities import Gripper, clipped, gripper_convention, no_ops, oddities
from checkup.recording import Recording, read_recording
from config import Config, DataConfig
from demos.frames import common_size
from demos.hdf5 import (
    FILES_AGREE,
    FOLDERS_AGREE,
    MAY_DIFFER,
    Demo,
    between_pictures,
    copies,
    demos_of,
    disagreements,
    find_task_files,
    first_few,
    read_task_file,
    split_demos,
)
from demos.hdf5_errors import number_attribute, object_in, open_hdf5, text_attribute
from demos.language import embeddings_files, load_language, load_languages
from demos.problems import Reader, all_found, attempted, read_on
from observation import CAMERAS, ORIENTATION


@dataclass(eq=False)
class FileReport:
    """What was found in one file. Training refuses its `errors`; `warnings` are what its user should know."""

    path: Path
    demos: list[Demo]  # that training reads
    task: str  # "" where none of them is read
    orientation: str
    alignment: str  # "unknown" where it could not be found out
    lengths: list[int]  # of all demos that can be opened, in steps
    image_sizes: list[int]  # without repetitions
    drawn_every: list[int]  # steps from one picture to the next, likewise
    gripper: Gripper
    no_ops: float  # share of the actions
    clipped: float  # share of the steps
    num_bad_pictures: int  # of one colour, or frozen
    actions: np.ndarray | None  # (2, 7), the least and the largest of each dimension
    films: dict[str, np.ndarray]  # camera -> first, middle and last picture (3, h, w, 3) of one demo
    errors: list[str]
    warnings: list[str]
    has_language: bool = False


@dataclass(eq=False)
class FolderReport:
    """The files of a data directory, and what concerns more than one of them."""

    directory: Path
    files: list[FileReport]
    description: dict  # of the observations; {} where training reads none
    errors: list[str]
    warnings: list[str]

    def all_errors(self) -> list[str]:
        return [sentence for report in self.files for sentence in report.errors] + self.errors

    def all_warnings(self) -> list[str]:
        return [sentence for report in self.files for sentence in report.warnings] + self.warnings

    def num_copies(self, report: FileReport) -> int:
        """How many of a file's demos are there twice."""
        return sum(error.startswith(f"{report.path}: ") and " is a copy of " in error for error in self.errors)


def examine(config: Config) -> FolderReport:
    """Reads all of config.data.data_directory, one folder. Raises BadInput where that holds no file of demonstrations.

    Pictures are read once, one film at a time. Of a file three pictures of each camera are kept, and all numbers.
    """
    (directory,) = config.data.folders
    paths = find_task_files(directory)
    files, descriptions = [], {}
    for number, path in enumerate(paths, start=1):
        report, description = _examine_file(path, config, f"{number} of {len(paths)}")
        files.append(report)
        if description:
            descriptions[path] = description
    problems = all_found(disagreements(descriptions, (), FILES_AGREE))[1] if descriptions else []
    problems += all_found(copies([demo for report in files for demo in report.demos]))[1]
    errors = [str(problem) for problem in problems] + _language_errors(files, config)
    description = next(iter(descriptions.values()), {})
    return FolderReport(directory, files, description, errors, list(_unread_files(directory)))


def refused_together(folders: Sequence[FolderReport], config: Config) -> list[str]:
    """Why folders that are listed in one data.data_directory could not be trained on, beside what is wrong with each:
    demos that are copies of another folder's, pictures of another orientation or size, embeddings of another encoder.
    config: its data.data_directory lists the folders."""
    within = {error for folder in folders for error in folder.errors}
    demos = [demo for folder in folders for report in folder.files for demo in report.demos]
    problems = all_found(copies(demos))[1]
    descriptions = {folder.directory: folder.description for folder in folders if folder.description}
    if descriptions:
        problems += all_found(disagreements(descriptions, MAY_DIFFER, FOLDERS_AGREE))[1]
    directory = folders[0].directory
    if demos:
        problems += all_found(attempted(directory, "", common_size, demos, config.model.image_size))[1]
    if not any(folder.errors for folder in folders):  # such as embeddings that are not there
        language = attempted(directory, "", load_languages, config.data, demos, config.model.lang_emb_dim)
        problems += all_found(language)[1]
    return [str(problem) for problem in problems if str(problem) not in within]


def _examine_file(path: Path, config: Config, progress: str) -> tuple[FileReport, dict]:
    """What is found in a file, and the description of its observations, {} without any."""
    min_actions = max(config.model.action_seq_len, config.model.prediction_gap)
    read, problems = all_found(read_task_file(path, config.data, min_actions, num_pictures=0))
    demos, description = read or ([], {})
    recordings: list[Recording] = []
    warnings: list[str] = []
    problems += all_found(_recordings(path, config.data, progress, recordings, warnings))[1]
    if demos and len(demos) == len(recordings):
        split = attempted(path, "", split_demos, demos, config.data.train_split, config.data.split_seed)
        problems += all_found(split)[1]
    problems += all_found(between_pictures(demos, config.model.prediction_gap))[1]
    warnings += oddities(path, recordings)
    actions = [one.actions for one in recordings if one.actions is not None]
    together = np.concatenate(actions) if actions else None
    films = [one.films for one in recordings]
    report = FileReport(
        path=path,
        demos=demos,
        task=demos[0].task if demos else "",
        orientation=description.get("image_orientation", ORIENTATION),
        alignment=description.get("obs_alignment") or "unknown",
        lengths=[len(of_demo) for of_demo in actions],
        image_sizes=sorted({film.samples.shape[1] for of_demo in films for film in of_demo.values()}),
        drawn_every=sorted({demo.draw_every for demo in demos}),
        gripper=gripper_convention(recordings),
        no_ops=float(np.concatenate([no_ops(of_demo) for of_demo in actions]).mean()) if actions else 0.0,
        clipped=0.0 if together is None else float(clipped(together).mean()),
        num_bad_pictures=sum(film.num_bad for of_demo in films for film in of_demo.values()),
        actions=None if together is None else np.stack([together.min(axis=0), together.max(axis=0)]),
        films=next(
            (
                {camera: of_demo[camera].samples for camera in CAMERAS}
                for of_demo in films
                if len(of_demo) == 2 and len({film.samples.shape for film in of_demo.values()}) == 1
            ),
            {},
        ),
        errors=list(dict.fromkeys(map(str, problems))),  # a file that cannot be opened says so each time
        warnings=warnings,
    )
    return report, description


def _recordings(
    path: Path, config: DataConfig, progress: str, recordings: list[Recording], warnings: list[str]
) -> Reader[None]:
    """Fills in the recordings of a file, and what is odd about the file beside them."""
    with open_hdf5(path) as file:
        data, keys = demos_of(path, file)
        read = keys[: config.demos_per_task]
        warnings += _of_file(path, data, keys, len(read))
        for key in tqdm(read, desc=f"{progress}: {path.name}", unit="demo", leave=False):
            demo, _ = all_found(attempted(path, key, object_in, path, key, data, key, h5py.Group))
            if demo is not None:
                recording = yield from read_on(path, key, read_recording(path, key, demo, config.robot_state))
                if recording is not None:
                    recordings.append(recording)


def _of_file(path: Path, data: h5py.Group, keys: list[str], num_read: int) -> Iterator[str]:
    others = [str(key) for key in data if key not in keys]
    if others:
        yield f"{path}: data holds {first_few(others)}, which is not read, expected demo_<number>"
    if num_read < len(keys):
        yield f"{path}: holds {len(keys)} demos, of which data.demos_per_task reads {num_read}"
    told, _ = all_found(attempted(path, "", number_attribute, data.attrs, "num_demos", path))
    if "num_demos" in data.attrs and told != len(keys):
        found = "no number" if told is None else f"{told:g}"
        yield f"{path}: attribute num_demos is {found}, but there are {len(keys)} demos; were some deleted?"
    orientation, _ = all_found(attempted(path, "", text_attribute, data.attrs, "macros_image_convention", path))
    if orientation not in ("", None, ORIENTATION):
        yield (
            f"{path}: attribute macros_image_convention is {orientation!r}, expected {ORIENTATION}; training reads "
            "such pictures, but the simulator shows a policy none"
        )


def _language_errors(files: Sequence[FileReport], config: Config) -> list[str]:
    """What keeps training from the embeddings of the instructions; notes which files have theirs."""
    (path,), width = embeddings_files(config.data), config.model.lang_emb_dim
    problems = all_found(attempted(path, "", load_language, path, [], width))[1]
    for report in files if not problems else ():
        if report.task:
            missing = all_found(attempted(path, "", load_language, path, [report.task], width))[1]
            report.has_language = not missing
            problems += missing
    return list(dict.fromkeys(map(str, problems)))


def _unread_files(directory: Path) -> Iterator[str]:
    """Files that look like demonstrations and are none to the loader."""
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    alike = [name for name in names if re.search(r"\.hdf5|\.(h5|hdf)$", name, re.I) and not name.endswith(".hdf5")]
    if alike:
        yield f"{directory}: {first_few(alike)} is not read, expected names that end with .hdf5"
