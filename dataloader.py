"""LIBERO demonstrations on disk -> samples of phase 1 and phase 2.

A folder holds one `<task>_demo.hdf5` a task (LIBERO's official files or OpenVLA's regenerated ones) and
`language_embeddings.npz`. Low-dimensional data is read once and checked; frames stay on disk (frame_cache.py) and are
read by a background thread while the model works. They stay uint8 until they reach the device, where jepa/tokenizer.py
resizes them, for demonstrations and simulator alike.

A row is one frame: `Demos` numbers the frames of all demos of a directory from 0 to N - 1.

LIBERO stores obs[t] as recorded AFTER actions[t]; OpenVLA's files store it BEFORE. With `lag` 1 or 0, the action that
leads from obs[t] to obs[t+1] is actions[t + lag], and so the chunk to predict at obs[t] starts at actions[t + lag].

A task is a file: libero_90 has 28 tasks, in different scenes, that share 12 instructions.

Letters: T steps of a demo, N rows, B batch, K prediction gap, H actions per chunk, D state_dim.
"""

import functools
import hashlib
import math
import os
import queue
import re
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from config import DataConfig
from errors import BadInput
from frame_cache import DeviceFrames, Frames, check_pictures
from hdf5_files import HDF5_ERRORS, hdf5_problem, hdf5_problems_named, linked_files, open_hdf5
from jepa.tokenizer import CAMERAS, FINGER_TRAVEL
from seeds import mixed_seed

STATE_KEYS = {"joint_states": 7, "gripper_states": 2}  # HDF5 name -> width; together the 9-D robot state
OBS_KEYS = (*CAMERAS, *STATE_KEYS)
EMBEDDINGS_FILE = "language_embeddings.npz"
# Goes up when the same files would be split otherwise. 1: one seed for all files, so that the demos held out had the
# same numbers in every task; 2: a seed for each.
SPLIT_RULE = 2
# What LIBERO's own file names and BDDL files differ in: "pick up the black bowl in the top drawer of the cabinet" is
# "Pick the akita black bowl in the top layer of the drawer".
UNTOLD = {"the", "a", "an", "it", "them", "and", "of", "on", "in", "at", "to", "up", "inside", "akita", "compartment"}
SAME_WORD = {"layer": "drawer", "cabinet": "drawer", "cookies": "cookie"}
LIBERO_CONTRADICTS_ITSELF = (  # the name and the BDDL file of three of its tasks
    {"open the top drawer and put the bowl inside", "open the top layer of the drawer and put the bowl inside"},
    {"put the middle black bowl on the plate", "put the black bowl in the middle on the plate"},
    {
        "stack the middle black bowl on the back black bowl",
        "stack the black bowl in the middle on the black bowl at the front",
    },
)


@dataclass(frozen=True, eq=False)
class Demo:
    """One demonstration: what fits in memory, and where its frames are."""

    path: Path
    key: str  # demo_0, demo_1, ...
    parts: tuple[Path, ...]  # other files that its data is read from, through links
    task: str  # instruction as `canonical_instruction` writes it
    actions: Tensor  # (T, 7) float32 in robot units, as stored
    joint_states: Tensor  # (T, 7) float32
    gripper_states: Tensor  # (T, 2) float32
    lag: int  # actions[t + lag] leads from obs[t] to obs[t + 1]
    image_size: int
    first_row: int  # obs[t] is row first_row + t

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def name(self) -> str:
        return f"{self.path.name}/{self.key}"


@dataclass(frozen=True)
class LanguageTable:
    """Instruction embeddings and the name of the text encoder that made them."""

    encoder: str
    embeddings: dict[str, Tensor]  # canonical instruction -> (lang_emb_dim,) float32, L2-normalised

    def __getitem__(self, task: str) -> Tensor:
        if task not in self.embeddings:
            raise BadInput(
                f"no language embedding for the task '{task}' (encoder {self.encoder}); known: "
                f"{'; '.join(self.embeddings)}. Run `python embed_language.py` on data that has this task"
            )
        return self.embeddings[task]


# ------------------------------------------------------------------------------------------------ rows and batches


def transition_rows(demos: Sequence[Demo], reach: int) -> Tensor:
    """Phase 1's samples: every row whose demo still has the row `reach` (K) later."""
    return torch.cat([torch.arange(len(demo) - reach) + demo.first_row for demo in demos])


def chunk_rows(demos: Sequence[Demo], chunk_length: int) -> Tensor:
    """Phase 2's samples: every row that `chunk_length` (H) actions of its demo follow."""
    return torch.cat([torch.arange(len(demo) - demo.lag - chunk_length + 1) + demo.first_row for demo in demos])


def frame_rows(demos: Sequence[Demo]) -> Tensor:
    """Every row of the demos."""
    return torch.cat([torch.arange(len(demo)) + demo.first_row for demo in demos])


def numbered_alone(demos: Sequence[Demo]) -> list[Demo]:
    """Some of a directory's demos as if they were all of it: rows count from 0."""
    first_rows = np.cumsum([0] + [len(demo) for demo in demos]).tolist()
    return [replace(demo, first_row=first_row) for demo, first_row in zip(demos, first_rows, strict=False)]


class LowDimensional:
    """What fits in memory of all demos, by row and on the device: actions, robot state, language."""

    def __init__(self, demos: Sequence[Demo], language: LanguageTable, device: torch.device):
        instructions = {demo.path: demo.task for demo in demos}
        number = {path: index for index, path in enumerate(instructions)}
        task = torch.cat([torch.full((len(demo),), number[demo.path]) for demo in demos])
        self.device, self.lag = device, demos[0].lag  # load_demos has made sure that all agree
        self.actions = torch.cat([demo.actions for demo in demos]).to(device)  # (N, 7)
        self.robot_state = {key: torch.cat([getattr(demo, key) for demo in demos]).to(device) for key in STATE_KEYS}
        self.task = task.to(device)  # (N,) of each row's file
        last_rows = [torch.full((len(demo),), demo.first_row + len(demo) - 1) for demo in demos]
        self.last_row = torch.cat(last_rows).to(device)  # (N,) of each row's demo
        self.language = torch.stack([language[task] for task in instructions.values()]).to(device)  # (tasks, D)

    def obs(self, rows: Tensor) -> dict[str, Tensor]:
        """The observations but for their pictures."""
        return {key: v[rows] for key, v in self.robot_state.items()} | {"language": self.language[self.task[rows]]}

    def robot_ahead(self, rows: Tensor, frames: Sequence[int]) -> Tensor:
        """The robot state `frames` after each row, at most at the demo's end: (B, frames, 9) in rad and shares of the
        fingers' travel."""
        later = rows[:, None] + torch.tensor(frames, device=self.device)
        later = torch.minimum(later, self.last_row[rows][:, None])
        fingers = self.robot_state["gripper_states"][later] / FINGER_TRAVEL
        return torch.cat([self.robot_state["joint_states"][later], fingers], dim=-1)

    def actions_from(self, rows: Tensor, count: int) -> Tensor:
        """The `count` actions that follow each row: (B, count, 7)."""
        return self.actions[rows[:, None] + self.lag + torch.arange(count, device=self.device)]


class Batches:
    """The batches of one rank, epoch after epoch, on the device: `for batch in batches`.

    Beside `actions` (B, num_actions, 7), the ones that follow each of its rows, a batch holds
    with `frames`: `obs`, equal to libero_sim.from_simulator's; with a `gap` also `next_obs`, as many rows later, and
    with `ahead` the robot's state so many frames after each row, `robot_ahead` (B, F, 9);
    with `states` (N, D), a frozen encoder's z by row: `z_t` (B, D).

    With a `seed` every epoch is a permutation, and batch i of all W ranks together is rows [i * W * B, (i + 1) * W * B)
    of it, so that W ranks train on what one process with the joint batch would; what fills no batch is left out.
    Without one, this rank's contiguous share comes in order and whole; `rows_of_all_ranks` joins the results.

    Frames are read ahead by a thread, into (pinned) buffers that are made once: the pictures of a batch are valid until
    the next one is asked for. `waited` counts the seconds that the model waited for them.

    Raises BadInput if there is no row, or, with a `seed`, if not one batch fits.
    """

    BUFFERS = 3  # one with the model, one ready, one being filled

    def __init__(
        self,
        rows: Tensor,
        low_dimensional: LowDimensional,
        num_actions: int,
        batch_size: int,
        *,
        frames: Frames | DeviceFrames | None = None,
        gap: int = 0,
        ahead: Sequence[int] = (),
        states: Tensor | None = None,
        seed: int | None = None,
    ):
        self.rows, self.low_dimensional, self.num_actions = rows, low_dimensional, num_actions
        self.batch_size, self.seed, self.device = batch_size, seed, low_dimensional.device
        self.frames, self.offsets = frames, (0, gap) if gap else (0,)
        self.ahead = ahead
        self.states = None if states is None else states.to(self.device)
        self.epoch, self.waited = 0, 0.0
        self.buffers: list[Tensor] = []
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if not len(rows):
            raise BadInput("the demos are too short for a single sample, or there are none; expected at least one")
        if seed is not None and not len(self):
            raise BadInput(
                f"training.batch_size is {batch_size} on {self.ranks} process(es), but there are only {len(rows)} "
                f"training samples; use --batch_size {max(len(rows) // self.ranks, 1)} or less, or more demos"
            )

    def __len__(self) -> int:
        if self.seed is not None:
            return len(self.rows) // (self.ranks * self.batch_size)
        return -(-len(self._share()) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict]:
        if self.states is not None:
            return (self._batch(rows) | {"z_t": self.states[rows.to(self.device)]} for rows in self._rows_of_batches())
        if isinstance(self.frames, DeviceFrames):
            return (self._batch(rows, self._frames_on_device(rows)) for rows in self._rows_of_batches())
        return self._read_ahead()

    def _share(self) -> Tensor:
        first, end = (len(self.rows) * rank // self.ranks for rank in (self.rank, self.rank + 1))
        return self.rows[first:end]

    def _rows_of_batches(self) -> Sequence[Tensor]:
        if self.seed is None:
            return self._share().split(self.batch_size) if len(self) else ()
        order = torch.randperm(
            len(self.rows), generator=torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        )
        order = order[: len(self) * self.batch_size * self.ranks].view(len(self), self.batch_size, self.ranks)
        return self.rows[order[:, :, self.rank]].unbind()

    def _batch(self, rows: Tensor, pictures: Tensor | None = None) -> dict:
        """pictures (offsets, B, 2, S, S, 3) on the device, or none."""
        rows = rows.to(self.device)
        batch = {"actions": self.low_dimensional.actions_from(rows, self.num_actions)}
        if pictures is not None:
            for name, offset, both_cameras in zip(("obs", "next_obs"), self.offsets, pictures, strict=False):
                cameras = dict(zip(CAMERAS, both_cameras.unbind(1), strict=True))  # (B, S, S, 3) each
                batch[name] = cameras | self.low_dimensional.obs(rows + offset)
            if self.ahead:
                batch["robot_ahead"] = self.low_dimensional.robot_ahead(rows, self.ahead)
        return batch

    def _frames_on_device(self, rows: Tensor) -> Tensor:
        return self.frames.tensor[torch.stack([rows + offset for offset in self.offsets]).to(self.device)]

    def _read_ahead(self) -> Iterator[dict]:
        on_gpu = self.device.type == "cuda"
        if not self.buffers:
            shape = (len(self.offsets), self.batch_size, *self.frames.frame_shape)
            self.buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(self.BUFFERS)]
        free, ready = queue.SimpleQueue(), queue.SimpleQueue()
        for buffer in self.buffers:
            free.put((buffer, None))  # and the event after which it may be filled
        reader = threading.Thread(target=self._read, args=(self._rows_of_batches(), free, ready), daemon=True)
        reader.start()
        try:
            for _ in range(len(self)):
                asked = time.perf_counter()
                rows, buffer = ready.get()
                self.waited += time.perf_counter() - asked
                if isinstance(rows, Exception):
                    raise rows
                pictures = buffer[:, : len(rows)].to(self.device, non_blocking=on_gpu)
                if on_gpu:
                    copied = torch.cuda.Event()
                    copied.record()
                    free.put((buffer, copied))
                yield self._batch(rows, pictures)
                if not on_gpu:  # the pictures may be the buffer itself
                    free.put((buffer, None))
        finally:
            free.put(None)  # an epoch that is left early ends its thread
            reader.join()

    def _read(self, rows_of_batches: Sequence[Tensor], free: queue.SimpleQueue, ready: queue.SimpleQueue) -> None:
        try:
            for rows in rows_of_batches:
                if (slot := free.get()) is None:
                    return
                buffer, copied = slot
                if copied is not None:
                    copied.synchronize()
                for pictures, offset in zip(buffer.numpy(), self.offsets, strict=True):
                    self.frames.read((rows + offset).numpy(), pictures[: len(rows)])
                ready.put((rows, buffer))
        except Exception as problem:  # raised where the batch is awaited
            ready.put((problem, None))


def to_device(batch, device: torch.device):
    """A batch, a dict of tensors and dicts, on another device."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=device.type == "cuda")  # elsewhere it may be read before it has arrived


def shift_pictures(batch: dict, pixels: int, image_size: int) -> dict:
    """Moves the pictures of every sample by up to `pixels` in both directions, edges repeated (Kostrikov et al. 2021).

    The pixels are those of the model, `image_size` a side, whatever the size of the pictures here. Both cameras move
    alike, and so do both frames of a sample: what happens between them is untouched.
    """
    B, size, device = len(batch["actions"]), batch["obs"][CAMERAS[0]].shape[1], batch["actions"].device
    shift = torch.randint(-pixels, pixels + 1, (2, B, 1), device=device)
    shift = (shift * size / image_size).round().long()
    rows, columns = (torch.arange(size, device=device) + shift).clamp(0, size - 1)  # (B, S) each
    sample = torch.arange(B, device=device)[:, None, None]
    shifted = dict(batch)
    for name in ("obs", "next_obs"):
        if name in batch:
            pictures = {key: batch[name][key][sample, rows[:, :, None], columns[:, None, :]] for key in CAMERAS}
            shifted[name] = batch[name] | pictures
    return shifted


# --------------------------------------------------------------------------------------------- reading and checking


def load_demos(config: DataConfig, min_actions: int) -> tuple[list[Demo], dict]:
    """Reads and checks every demo of a folder.

    Returns the demos and the description of their observations, which a checkpoint keeps so that an evaluation can
    reproduce it. Raises BadInput naming file, demo, key, what was found and what was expected. `min_actions` is how
    many actions must follow a demo's first observation for one sample: the chunk, or the prediction gap.
    """
    demos, descriptions, rows = [], {}, 0
    for path in find_task_files(config.data_directory):
        found, descriptions[path] = _read_task_file(path, config, min_actions, rows)
        demos += found
        rows += sum(len(demo) for demo in found)
    first = next(iter(descriptions))
    for path, description in descriptions.items():
        for key, value in description.items():
            if value != descriptions[first][key]:
                raise BadInput(
                    f"{path}: {key} is {value}, but {first.name} has {descriptions[first][key]}; "
                    "all files of a data directory must agree"
                )
    _refuse_copies(demos)
    return demos, descriptions[first]


def _refuse_copies(demos: Sequence[Demo]) -> None:
    """A demo that is there twice would be trained on and held out."""
    seen: dict[bytes, Demo] = {}
    for demo in demos:
        motion = torch.cat([demo.actions, demo.joint_states, demo.gripper_states], dim=1)
        digest = hashlib.sha256(motion.numpy().tobytes()).digest()
        if digest in seen:
            raise BadInput(
                f"{demo.path}: {demo.key} is a copy of {seen[digest].key} in {seen[digest].path.name}, it has the same "
                "actions and joints; a demo must not be there twice, since one of the two may be held out: delete one"
            )
        seen[digest] = demo


def find_task_files(data_directory: str | Path) -> list[Path]:
    """The folder's *.hdf5 files but for hidden ones: macOS leaves a ._NAME beside each file that it copies."""
    directory = Path(data_directory)
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        raise BadInput(
            f"data.data_directory: no such directory {directory}; set it in the config or with "
            "--set data.data_directory=DIR (collect_demos.py can fill one)"
        ) from None
    except OSError as problem:
        raise BadInput(f"data.data_directory: {directory} cannot be read ({problem.strerror})") from None
    paths = [directory / name for name in names if name.endswith(".hdf5") and not name.startswith(".")]
    if not paths:
        raise BadInput(f"{directory}: holds no *.hdf5 file, expected LIBERO's <task>_demo.hdf5")
    return paths


# -------------------------------------------------------------------------------------------- which task a file is of


def canonical_instruction(text: str) -> str:
    """One spelling for one task: the benchmark says "pick up the X", BDDL files and HDF5 attributes "Pick the X"."""
    text = " ".join(text.lower().replace("_", " ").split()).rstrip(" .")
    return re.sub(r"^pick (?!up\b)", "pick up ", text)


def same_task(first: str, second: str) -> bool:
    """Whether two instructions say the same, LIBERO's own carelessness allowed for."""
    first, second = canonical_instruction(first), canonical_instruction(second)
    told = [[SAME_WORD.get(word, word) for word in text.split() if word not in UNTOLD] for text in (first, second)]
    return told[0] == told[1] or {first, second} in LIBERO_CONTRADICTS_ITSELF


def task_instruction(path: Path, data: h5py.Group) -> str:
    """A file's instruction: from its name as LIBERO does it (without the SCENE prefix of LIBERO-100), or, where the
    name isn't LIBERO's, from the attribute problem_info or the BDDL file's text. LIBERO-PRO's suites with other words
    (_lan) or other goals (_task) keep the names of the suite that they vary: there the BDDL file alone speaks.

    Raises BadInput where the file has none, or two that disagree by more than LIBERO's own do. The attribute
    problem_info alone is no match for a name that has the scene, too: both are named and the name is taken.
    """
    stem, bddl = path.stem, Path(text_attribute(data.attrs, "bddl_file_name", path).replace("\\", "/"))
    in_info = re.search(r'"language_instruction":\s*"([^"]+)"', text_attribute(data.attrs, "problem_info", path))
    in_bddl = re.search(r"\(:language\s+([^)]*)\)", text_attribute(data.attrs, "bddl_file_content", path))
    told = {}
    if stem.endswith("_demo"):
        told["its name"] = _without_scene(stem.removesuffix("_demo"))
    if bddl.parent.name.startswith("libero_"):  # LIBERO's own folders; anyone else's files are named as they like
        told["attribute bddl_file_name"] = _without_scene(bddl.stem)
    if bddl.parent.name.endswith(("_lan", "_task")):
        told = {}
    if in_info:
        told["attribute problem_info"] = in_info.group(1)
    if in_bddl:
        told["attribute bddl_file_content"] = in_bddl.group(1)
    told = {source: canonical_instruction(text) for source, text in told.items()}
    instruction = next(iter(told.values()), "")
    if not instruction:
        raise BadInput(f"{path}: no instruction; expected a file name <task>_demo.hdf5 or data attribute problem_info")
    scenes = {match.group() for name in (stem, bddl.stem) if (match := re.match(r"[A-Z_]*SCENE\d+(?=_)", name))}
    for source, text in told.items():
        if same_task(instruction, text):
            continue
        both = f"{path}: {next(iter(told))} says '{instruction}', but {source} '{text}'"
        if scenes and len(told) == 2 and source == "attribute problem_info":
            # A name with its scene is that of one task of LIBERO-100, whose own attributes are careless.
            _say(f"note: {both}; the name, which has the scene, is taken")
        else:
            raise BadInput(f"{both}; rename the file or correct the attribute, whichever is wrong")
    if len(scenes) > 1:
        raise BadInput(
            f"{path}: attribute bddl_file_name is {bddl.name}, which is of another scene than the file's name"
        )
    return instruction


@functools.cache
def _say(sentence: str) -> None:
    """Once in a process, however often a file is read."""
    print(sentence, flush=True)


def _without_scene(name: str) -> str:
    return re.sub(r"^[A-Z_]*SCENE\d+_", "", name)


def demos_of(path: Path, file: h5py.File) -> tuple[h5py.Group, list[str]]:
    """The group `data` of a file and the names of the demos in it, in the order of their numbers."""
    data = _object(path, "data", file, "data", h5py.Group) if "data" in file else {}
    keys = [key for key in data if re.fullmatch(r"demo_\d+", key)]
    if not keys:
        raise BadInput(f"{path}: holds no group data/demo_0, expected LIBERO's HDF5 layout")
    return data, sorted(keys, key=lambda key: int(key[5:]))


# ---------------------------------------------------------------------------------------------------- one file's demos


def _read_task_file(path: Path, config: DataConfig, min_actions: int, first_row: int) -> tuple[list[Demo], dict]:
    with open_hdf5(path) as file:
        data, keys = demos_of(path, file)
        task, has_attributes = task_instruction(path, data), bool(len(data.attrs))
        keys = keys[: config.demos_per_task]
        groups = {key: _object(path, key, data, key, h5py.Group) for key in keys}
        for key, group in groups.items():
            with hdf5_problems_named(path, key):
                _check_demo(path, key, group, has_attributes, config.max_len_data, config.cache == "none")
        alignment = config.obs_alignment
        if alignment == "auto":
            alignment = _detect_alignment(path, groups)
        lag = {"before": 0, "after": 1}[alignment]
        demos = []
        for key, group in groups.items():
            with hdf5_problems_named(path, key):
                demos.append(_read_demo(path, key, task, group, lag, min_actions, first_row))
            first_row += len(demos[-1])
        orientation = text_attribute(data.attrs, "macros_image_convention", path) or "opengl"
        mesh_ratio = _number(data.attrs, "visual_mesh_ratio", path) if "visual_mesh_ratio" in data.attrs else 1.0
    for demo in demos:
        if demo.image_size != demos[0].image_size:
            raise BadInput(
                f"{path}: {demo.key}: images are {demo.image_size} px, those of {demos[0].key} {demos[0].image_size} px"
            )
    description = {
        "cameras": list(CAMERAS),
        "robot_state": list(STATE_KEYS),
        "image_orientation": orientation,
        "image_size": demos[0].image_size,
        "visual_mesh_ratio": mesh_ratio,
        "obs_alignment": alignment,
    }
    return demos, description


def _object(path: Path, within: str, group: h5py.Group, name: str, kind: type):
    """What a group holds as `name`, an h5py.Group or h5py.Dataset. Raises BadInput where it is missing, of the other
    kind, or a link that leads nowhere."""
    if name not in group:
        raise BadInput(f"{path}: {within} is missing")
    try:
        found = group[name]
    except HDF5_ERRORS as problem:
        link = group.get(name, getlink=True)
        target = f", a link to {link.filename}" if isinstance(link, h5py.ExternalLink) else ""
        raise hdf5_problem(path, problem, within + target) from None
    if not isinstance(found, kind):
        raise BadInput(f"{path}: {within} is a {type(found).__name__.lower()}, expected a {kind.__name__.lower()}")
    return found


def open_dataset(path: Path, key: str, demo: h5py.Group, name: str) -> h5py.Dataset:
    """A demo's dataset of numbers, all of whose parts are there."""
    within = f"{key}: key {name}"
    *folders, last = name.split("/")
    for folder in folders:
        demo = _object(path, within, demo, folder, h5py.Group)
    dataset = _object(path, within, demo, last, h5py.Dataset)
    try:
        kind = dataset.dtype.kind
    except TypeError:  # HDF5 has types that numpy lacks
        kind = "?"
    if kind not in "fiub" or dataset.shape is None:
        raise BadInput(f"{path}: {within} holds no array of numbers")
    linked_files(dataset)
    return dataset


def text_attribute(attributes: h5py.AttributeManager, name: str, path: Path) -> str:
    """An attribute as text, "" where it is missing; files of other programs have bytes."""
    if name not in attributes:
        return ""
    try:
        value = attributes[name]
    except (TypeError, ValueError, OSError) as problem:
        raise BadInput(f"{path}: attribute {name} cannot be read ({problem})") from None
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _number(attributes: h5py.AttributeManager, name: str, where: str | Path) -> float:
    """An attribute that is a number; LIBERO's own files were seen to have it as text."""
    text = text_attribute(attributes, name, where).strip("[]")  # an array of one number is one, too
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadInput(f"{where}: attribute {name} is {text!r}, expected a number")
    return number


def _read_demo(path: Path, key: str, task: str, demo: h5py.Group, lag: int, min_actions: int, first_row: int) -> Demo:
    actions = torch.from_numpy(demo["actions"][()].astype(np.float32))
    if len(actions) < min_actions + lag:
        raise BadInput(
            f"{path}: {key}: has {len(actions)} steps, expected at least {min_actions + lag} "
            "(model.action_seq_len or model.prediction_gap, and what the alignment takes)"
        )
    robot_state = {name: torch.from_numpy(demo["obs"][name][()].astype(np.float32)) for name in STATE_KEYS}
    image_size = demo["obs"][CAMERAS[0]].shape[1]
    groups = {Path(group.file.filename) for group in (demo, demo["obs"])}
    files = groups.union(*(linked_files(demo[name]) for name in ("actions", *(f"obs/{name}" for name in OBS_KEYS))))
    parts = tuple(sorted({file.resolve() for file in files} - {path.resolve()}))
    return Demo(path, key, parts, task, actions, **robot_state, lag=lag, image_size=image_size, first_row=first_row)


def _check_demo(
    path: Path, key: str, demo: h5py.Group, has_data_attributes: bool, max_len: int, looks_at_pictures: bool
) -> None:
    """Every way in which files were seen broken, one sentence each. Of the pictures it looks at the first, or, where
    they are not going to be converted, which looks at all of them, at three."""
    where = f"{path}: {key}"
    actions = open_dataset(path, key, demo, "actions")
    if actions.ndim != 2 or actions.shape[1] != 7:
        raise BadInput(f"{where}: key actions has shape {actions.shape}, expected (T, 7)")
    steps = len(actions)
    if steps < 2:
        raise BadInput(f"{where}: has {steps} steps, expected at least 2")
    if steps > max_len:
        raise BadInput(f"{where}: has {steps} steps, data.max_len_data allows {max_len}; raise it if the demo is right")
    # OpenVLA's regenerated files carry no attributes at all; a file that has LIBERO's must have this one too.
    if "num_samples" in demo.attrs:
        num_samples = _number(demo.attrs, "num_samples", where)
        if num_samples != steps:
            raise BadInput(f"{where}: num_samples is {num_samples:g}, but actions has {steps} steps")
    elif has_data_attributes:
        raise BadInput(f"{where}: attribute num_samples is missing, expected {steps}")
    robot_state = {name: open_dataset(path, key, demo, f"obs/{name}") for name in STATE_KEYS}
    for name, width in STATE_KEYS.items():
        if robot_state[name].shape != (steps, width):
            raise BadInput(f"{where}: key obs/{name} has shape {robot_state[name].shape}, expected {(steps, width)}")
    for name, values in {"actions": actions, **{f"obs/{name}": values for name, values in robot_state.items()}}.items():
        if not (np.abs(values[()]) <= np.finfo(np.float32).max).all():
            raise BadInput(f"{where}: key {name} holds NaN or values that are infinite as float32, expected numbers")
    gripper = np.unique(actions[:, 6])
    if not np.isin(gripper, (-1, 1)).all():
        raise BadInput(
            f"{where}: key actions has gripper values {gripper[:4].tolist()}, expected -1 (open) or 1 (close)"
        )
    largest = float(np.abs(actions[:, :6]).max())
    if largest > 1 + 1e-6:
        raise BadInput(f"{where}: key actions has a pose delta of size {largest:.3g}, expected values in [-1, 1]")
    cameras = {camera: open_dataset(path, key, demo, f"obs/{camera}") for camera in CAMERAS}
    shape = cameras[CAMERAS[0]].shape
    for camera, images in cameras.items():
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] != steps or images.shape[3] != 3:
            raise BadInput(
                f"{where}: key obs/{camera} is {images.dtype} {images.shape}, expected uint8 ({steps}, h, w, 3)"
            )
        if images.shape != shape or images.shape[1] != images.shape[2] or not images.shape[1]:
            raise BadInput(
                f"{where}: key obs/{camera} has shape {images.shape}, expected square images of one size "
                f"({CAMERAS[0]}: {shape})"
            )
        looked_at = sorted({0, steps // 2, steps - 1}) if looks_at_pictures else [0]
        pictures = np.stack([images[step] for step in looked_at])
        check_pictures(where, camera, pictures, looked_at, robot_state["joint_states"][looked_at])


def _detect_alignment(path: Path, demos: dict[str, h5py.Group]) -> str:
    """The alignment of all demos of a file, each looked at by itself."""
    found = {}
    for key, demo in demos.items():
        with hdf5_problems_named(path, key):
            found[key] = _alignment_of(path, key, demo)
    usual = Counter(found.values()).most_common(1)[0][0]
    others = [key for key, alignment in found.items() if alignment != usual]
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise BadInput(
            f"{path}: obs[t] was recorded {found[others[0]]} actions[t] in {shown}, but {usual} it in the other "
            f"{len(found) - len(others)} demos; all of a data directory must agree, give each kind a folder of its own"
        )
    return usual


def _alignment_of(path: Path, key: str, demo: h5py.Group) -> str:
    """joint_states[t] equals the simulator's states[t + 1, 1:8] if recorded after actions[t], states[t, 1:8] if before
    (states[:, 0] is the time)."""
    states = open_dataset(path, key, demo, "states") if "states" in demo else None
    if states is None or states.ndim != 2 or states.shape[1] < 8:
        raise BadInput(
            f"{path}: {key}: key states is {'missing' if states is None else states.shape}, so whether obs[t] was "
            "recorded before or after actions[t] cannot be found out; set data.obs_alignment to before or after"
        )
    simulated, observed = states[:, 1:8], demo["obs"]["joint_states"][()]
    if simulated.shape != observed.shape or not np.isfinite(simulated).all():
        raise BadInput(
            f"{path}: {key}: key states is {states.shape} or holds NaN, expected finite values of {len(observed)} steps"
        )
    gap = {
        "before": float(np.abs(observed - simulated).mean()),
        "after": float(np.abs(observed[:-1] - simulated[1:]).mean()),
    }
    best, other = sorted(gap, key=gap.get)
    if not gap[best] < 0.2 * gap[other]:
        raise BadInput(
            f"{path}: {key}: obs/joint_states fits states neither as recorded before (mean gap {gap['before']:.2g} "
            f"rad) nor after (mean gap {gap['after']:.2g} rad) actions[t]; set data.obs_alignment to before or after"
        )
    return best


# ----------------------------------------------------------------------------------------------- split and language


def split_demos(
    demos: Sequence[Demo], train_split: float, seed: int, held_out: Collection[str] = ()
) -> tuple[list[Demo], list[Demo]]:
    """Training demos and held-out demos, whole demos of each task by a draw that its file's name seeds too; at least
    one of each. Where `held_out`, a checkpoint's list of names, names demos of a file, exactly those are held out.

    Raises BadInput for a file that would have none to train on or none to hold out.
    """
    train, unseen, listed = [], [], set(held_out)
    for path in dict.fromkeys(demo.path for demo in demos):
        of_task = [demo for demo in demos if demo.path == path]
        if len(of_task) < 2:
            raise BadInput(f"{path}: has {len(of_task)} demo, expected at least 2 (one to train on, one to hold out)")
        chosen = {demo.name for demo in of_task} - listed
        if len(chosen) == len(of_task):
            count = min(max(round(train_split * len(of_task)), 1), len(of_task) - 1)
            order = np.random.default_rng(mixed_seed(seed, path.name)).permutation(len(of_task))
            chosen = {of_task[index].name for index in order[:count]}
        if not chosen:
            raise BadInput(
                f"{path}: the checkpoint holds out all {len(of_task)} demos, expected at least 1 to train on"
            )
        for demo in of_task:
            (train if demo.name in chosen else unseen).append(demo)
    return train, unseen


def embeddings_file(config: DataConfig) -> Path:
    """Where the embeddings of a data directory's instructions are."""
    return Path(config.language_embeddings or Path(config.data_directory) / EMBEDDINGS_FILE)


def load_language(path: Path, tasks: Sequence[str], lang_emb_dim: int) -> LanguageTable:
    """Reads a file of embed_language.py and checks that every task has its embedding."""
    beside = any(path.parent.glob("*.hdf5"))
    advice = f"run `python embed_language.py --data_directory {path.parent if beside else 'DIR'}`"
    advice = advice if beside and path.name == EMBEDDINGS_FILE else f"{advice[:-1]} --output {path}`"
    try:
        with np.load(path) as archive:
            texts, encoder = archive["texts"].astype(str).reshape(-1), archive["encoder"]
            vectors = archive["embeddings"].astype(np.float32)
    except FileNotFoundError:
        raise BadInput(f"{path}: no language embeddings; {advice}") from None
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read ({problem.strerror or problem})") from None
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, zlib.error, zipfile.BadZipFile) as problem:
        raise BadInput(f"{path}: not readable as language embeddings ({problem}); {advice}") from None
    if vectors.shape != (len(texts), lang_emb_dim):
        raise BadInput(f"{path}: embeddings are {vectors.shape}, expected ({len(texts)}, {lang_emb_dim})")
    if not np.isfinite(vectors).all() or not np.abs(vectors).max(axis=1, initial=0.0).all():
        raise BadInput(f"{path}: an embedding is zero or not finite; {advice}")
    vectors = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=-1)  # public files often aren't
    embeddings: dict[str, Tensor] = {}
    for text, vector in zip(map(canonical_instruction, texts.tolist()), vectors, strict=True):
        if not torch.allclose(embeddings.setdefault(text, vector), vector, atol=1e-3):
            raise BadInput(f"{path}: has two embeddings of '{text}', in two spellings, that differ; {advice}")
    table = LanguageTable(str(encoder), embeddings)
    for task in tasks:
        if task not in table.embeddings:
            raise BadInput(f"{path}: no embedding for the task '{task}'; {advice}")
    return table


def same_language(first: LanguageTable, second: LanguageTable, where: str) -> None:
    """Raises BadInput unless both tables give their common tasks the same vectors from the same encoder."""
    if first.encoder != second.encoder:
        raise BadInput(
            f"{where}: language encoder is '{first.encoder}', but the checkpoint was trained with '{second.encoder}'; "
            "run `python embed_language.py` with that encoder"
        )
    for task in first.embeddings.keys() & second.embeddings.keys():
        if not torch.allclose(first.embeddings[task], second.embeddings[task], atol=1e-3):
            raise BadInput(
                f"{where}: the embedding of '{task}' differs from the checkpoint's; embed with the same version"
            )
