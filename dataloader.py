"""LIBERO demonstrations on disk -> samples of phase 1 and phase 2.

A folder holds one `<task>_demo.hdf5` a task (LIBERO's official files or OpenVLA's regenerated ones) and
`language_embeddings.npz`. Low-dimensional data is read once and checked; frames stay on disk (frame_cache.py) and are
read by a background thread while the model works. They stay uint8 until they reach the device, where jepa/tokenizer.py
resizes them, for demonstrations and simulator alike.

A row is one frame: `Demos` numbers the frames of all demos of a directory from 0 to N - 1.

LIBERO stores obs[t] as recorded AFTER actions[t]; OpenVLA's files store it BEFORE. With `lag` 1 or 0, the action that
leads from obs[t] to obs[t+1] is actions[t + lag], and so the chunk to predict at obs[t] starts at actions[t + lag].

Letters: T steps of a demo, N rows, B batch, K prediction gap, H actions per chunk, D state_dim.
"""

import queue
import re
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from config import DataConfig
from errors import BadInput
from frame_cache import DeviceFrames, Frames
from jepa.tokenizer import CAMERAS, FINGER_TRAVEL

STATE_KEYS = {"joint_states": 7, "gripper_states": 2}  # HDF5 name -> width; together the 9-D robot state
OBS_KEYS = (*CAMERAS, *STATE_KEYS)
EMBEDDINGS_FILE = "language_embeddings.npz"


@dataclass(frozen=True, eq=False)
class Demo:
    """One demonstration: what fits in memory, and where its frames are."""

    path: Path
    key: str  # demo_0, demo_1, ...
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
    """Phase 1's samples: every row whose demo still has the row `reach` later, R * K of a window of R predictions."""
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
        tasks = list(dict.fromkeys(demo.task for demo in demos))
        task = torch.cat([torch.full((len(demo),), tasks.index(demo.task)) for demo in demos])
        self.device, self.lag = device, demos[0].lag  # load_demos has made sure that all agree
        self.actions = torch.cat([demo.actions for demo in demos]).to(device)  # (N, 7)
        self.robot_state = {key: torch.cat([getattr(demo, key) for demo in demos]).to(device) for key in STATE_KEYS}
        self.task = task.to(device)  # (N,)
        last_rows = [torch.full((len(demo),), demo.first_row + len(demo) - 1) for demo in demos]
        self.last_row = torch.cat(last_rows).to(device)  # (N,) of each row's demo
        self.language = torch.stack([language[task] for task in tasks]).to(device)  # (tasks, lang_emb_dim)

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
    with `frames`: `obs`, equal to libero_sim.from_simulator's. With a `gap` a sample is a window of R + 1 frames, `gap`
    rows apart, R the rollout length: `obs` (R * B) is all but its last, `next_obs` all but its first, frame by frame,
    and `robot_ahead` the robot's state at and `ahead` of each frame in `obs`;
    with `states` (N, D), a frozen encoder's z by row: `z_t` (B, D).

    With a `seed` every epoch is a permutation, and batch i of all W ranks together is rows [i * W * B, (i + 1) * W * B)
    of it, so that W ranks train on what one process with the joint batch would; what fills no batch is left out.
    Without one, this rank's contiguous share comes in order and whole, and `gather_rows` joins the results.

    Frames are read ahead by a thread, into (pinned) buffers that are made once: the pictures of a batch are valid until
    the next one is asked for. `waited` counts the seconds that the model waited for them.

    Raises BadInput if not one batch fits.
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
        rollout_length: int = 1,
        ahead: Sequence[int] = (),
        states: Tensor | None = None,
        seed: int | None = None,
    ):
        self.rows, self.low_dimensional, self.num_actions = rows, low_dimensional, num_actions
        self.batch_size, self.seed, self.device = batch_size, seed, low_dimensional.device
        self.frames, self.offsets = frames, [gap * frame for frame in range(rollout_length + 1)] if gap else [0]
        self.ahead = ahead
        self.states = None if states is None else states.to(self.device)
        self.epoch, self.waited = 0, 0.0
        self.buffers: list[Tensor] = []
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
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
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        order = order[: len(self) * self.batch_size * self.ranks].view(len(self), self.batch_size, self.ranks)
        return self.rows[order[:, :, self.rank]].unbind()

    def _batch(self, rows: Tensor, pictures: Tensor | None = None) -> dict:
        """pictures (offsets, B, 2, S, S, 3) on the device, or none."""
        rows = rows.to(self.device)
        batch = {"actions": self.low_dimensional.actions_from(rows, self.num_actions)}
        if pictures is not None:
            last = max(len(self.offsets) - 1, 1)
            batch["obs"] = self._observations(rows, pictures[:last], self.offsets[:last])
            if len(self.offsets) > 1:
                batch["next_obs"] = self._observations(rows, pictures[1:], self.offsets[1:])
            if self.ahead:
                context_rows = torch.cat([rows + offset for offset in self.offsets[:last]])
                batch["robot_ahead"] = self.low_dimensional.robot_ahead(context_rows, self.ahead)
        return batch

    def _observations(self, rows: Tensor, pictures: Tensor, offsets: Sequence[int]) -> dict[str, Tensor]:
        cameras = pictures.flatten(0, 1).unbind(1)  # (offsets * B, S, S, 3) each
        rows = torch.cat([rows + offset for offset in offsets])
        return dict(zip(CAMERAS, cameras, strict=True)) | self.low_dimensional.obs(rows)

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


def gather_rows(rows: Tensor) -> Tensor:
    """Joins the rows of all ranks, in the order of the ranks; they may have different numbers of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = max(int(count) for count in counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(shares, padded)
    return torch.cat([share[: int(count)] for share, count in zip(shares, counts, strict=True)])


def to_device(batch, device: torch.device):
    """A batch, a dict of tensors and dicts, on another device."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=device.type == "cuda")  # elsewhere it may be read before it has arrived


def shift_pictures(batch: dict, pixels: int, image_size: int) -> dict:
    """Moves the pictures of every sample by up to `pixels` in both directions, edges repeated (Kostrikov et al. 2021).

    The pixels are those of the model, `image_size` a side, whatever the size of the pictures here. Both cameras move
    alike, and so do all frames of a sample: what happens between them is untouched.
    """
    pictures_of_one = batch["obs"][CAMERAS[0]]  # (R * B, h, w, 3), frame by frame
    size, count, device = pictures_of_one.shape[1], len(batch["actions"]), batch["actions"].device
    shift = torch.randint(-pixels, pixels + 1, (2, count, 1), device=device)
    shift = (shift * size / image_size).round().long().repeat(1, len(pictures_of_one) // count, 1)
    rows, columns = (torch.arange(size, device=device) + shift).clamp(0, size - 1)  # (R * B, S) each
    sample = torch.arange(len(pictures_of_one), device=device)[:, None, None]
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
    return demos, descriptions[first]


def find_task_files(data_directory: str | Path) -> list[Path]:
    directory = Path(data_directory)
    if not directory.is_dir():
        raise BadInput(
            f"data.data_directory: no such directory {directory}; set it in the config or with "
            "--set data.data_directory=DIR (collect_demos.py can fill one)"
        )
    paths = sorted(directory.glob("*.hdf5"))
    if not paths:
        raise BadInput(f"{directory}: holds no *.hdf5 file, expected LIBERO's <task>_demo.hdf5")
    return paths


def canonical_instruction(text: str) -> str:
    """One spelling for one task: the benchmark says "pick up the X", BDDL files and HDF5 attributes "Pick the X"."""
    text = " ".join(text.lower().replace("_", " ").split()).rstrip(" .")
    return re.sub(r"^pick (?!up\b)", "pick up ", text)


def task_instruction(path: Path, data: h5py.Group) -> str:
    """A file's instruction: from its name as LIBERO does it (without the SCENE prefix of LIBERO-100), or, where the
    name isn't LIBERO's, from the attribute problem_info."""
    stem = path.stem
    if stem.endswith("_demo"):
        return canonical_instruction(re.sub(r"^[A-Z_]*SCENE\d+_", "", stem.removesuffix("_demo")))
    match = re.search(r'"language_instruction":\s*"([^"]+)"', str(data.attrs.get("problem_info", "")))
    if not match:
        raise BadInput(f"{path}: no instruction; expected a file name <task>_demo.hdf5 or data attribute problem_info")
    return canonical_instruction(match.group(1))


def _read_task_file(path: Path, config: DataConfig, min_actions: int, first_row: int) -> tuple[list[Demo], dict]:
    try:
        with h5py.File(path, "r") as file:
            keys = [key for key in file.get("data", ()) if re.fullmatch(r"demo_\d+", key)]
            if not keys:
                raise BadInput(f"{path}: holds no group data/demo_0, expected LIBERO's HDF5 layout")
            data = file["data"]
            task = task_instruction(path, data)
            keys = sorted(keys, key=lambda key: int(key[5:]))[: config.demos_per_task]
            for key in keys:
                _check_demo(f"{path}: {key}", data[key], bool(len(data.attrs)), config.max_len_data)
            if config.obs_alignment == "auto":
                alignment = _detect_alignment(path, [data[key] for key in keys])
            else:
                alignment = config.obs_alignment
            lag = {"before": 0, "after": 1}[alignment]
            demos = []
            for key in keys:
                demos.append(_read_demo(path, key, task, data[key], lag, min_actions, first_row))
                first_row += len(demos[-1])
            orientation = str(data.attrs.get("macros_image_convention", "opengl"))
            mesh_ratio = float(data.attrs.get("visual_mesh_ratio", 1.0))
    except OSError as problem:
        raise BadInput(f"{path}: not readable as HDF5, is it truncated? ({problem})") from None
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


def _read_demo(path: Path, key: str, task: str, demo: h5py.Group, lag: int, min_actions: int, first_row: int) -> Demo:
    actions = torch.from_numpy(demo["actions"][()].astype(np.float32))
    if len(actions) < min_actions + lag:
        raise BadInput(
            f"{path}: {key}: has {len(actions)} steps, expected at least {min_actions + lag} "
            "(model.action_seq_len, or prediction_gap x rollout_length, and what the alignment takes)"
        )
    robot_state = {name: torch.from_numpy(demo["obs"][name][()].astype(np.float32)) for name in STATE_KEYS}
    image_size = demo["obs"][CAMERAS[0]].shape[1]
    return Demo(path, key, task, actions, **robot_state, lag=lag, image_size=image_size, first_row=first_row)


def _check_demo(where: str, demo: h5py.Group, has_data_attributes: bool, max_len: int) -> None:
    """Every way in which files were seen broken, one sentence each."""
    for key in ("actions", *(f"obs/{key}" for key in OBS_KEYS)):
        if key not in demo:
            raise BadInput(f"{where}: key {key} is missing")
    actions = demo["actions"]
    if actions.ndim != 2 or actions.shape[1] != 7:
        raise BadInput(f"{where}: key actions has shape {actions.shape}, expected (T, 7)")
    steps = len(actions)
    if steps < 2:
        raise BadInput(f"{where}: has {steps} steps, expected at least 2")
    if steps > max_len:
        raise BadInput(f"{where}: has {steps} steps, data.max_len_data allows {max_len}; raise it if the demo is right")
    # OpenVLA's regenerated files carry no attributes at all; a file that has LIBERO's must have this one too.
    if "num_samples" in demo.attrs:
        if int(demo.attrs["num_samples"]) != steps:
            raise BadInput(f"{where}: num_samples is {demo.attrs['num_samples']}, but actions has {steps} steps")
    elif has_data_attributes:
        raise BadInput(f"{where}: attribute num_samples is missing, expected {steps}")
    for key, width in STATE_KEYS.items():
        if demo["obs"][key].shape != (steps, width):
            raise BadInput(f"{where}: key obs/{key} has shape {demo['obs'][key].shape}, expected {(steps, width)}")
    for key in ("actions", *(f"obs/{key}" for key in STATE_KEYS)):
        if not np.isfinite(demo[key][()]).all():
            raise BadInput(f"{where}: key {key} holds NaN or infinite values, expected finite numbers")
    gripper = np.unique(actions[:, 6])
    if not np.isin(gripper, (-1, 1)).all():
        raise BadInput(
            f"{where}: key actions has gripper values {gripper[:4].tolist()}, expected -1 (open) or 1 (close)"
        )
    largest = float(np.abs(actions[:, :6]).max())
    if largest > 1 + 1e-6:
        raise BadInput(f"{where}: key actions has a pose delta of size {largest:.3g}, expected values in [-1, 1]")
    shape = demo["obs"][CAMERAS[0]].shape
    for camera in CAMERAS:
        images = demo["obs"][camera]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] != steps or images.shape[3] != 3:
            raise BadInput(
                f"{where}: key obs/{camera} is {images.dtype} {images.shape}, expected uint8 ({steps}, h, w, 3)"
            )
        if images.shape != shape or images.shape[1] != images.shape[2]:
            raise BadInput(
                f"{where}: key obs/{camera} has shape {images.shape}, expected square images of one size "
                f"({CAMERAS[0]}: {shape})"
            )
        if not images[0].any():
            raise BadInput(f"{where}: key obs/{camera} starts with an all-black frame; was the camera rendered?")


def _detect_alignment(path: Path, demos: list[h5py.Group]) -> str:
    """joint_states[t] equals the simulator's states[t + 1, 1:8] if recorded after actions[t], states[t, 1:8] if before
    (states[:, 0] is the time)."""
    errors = {"before": [], "after": []}
    for demo in demos:
        if "states" not in demo or demo["states"].ndim != 2 or demo["states"].shape[1] < 8:
            raise BadInput(
                f"{path}: {demo.name.split('/')[-1]}: key states is missing, so whether obs[t] was recorded before or "
                "after actions[t] cannot be found out; set data.obs_alignment to before or after"
            )
        simulated, observed = demo["states"][:, 1:8], demo["obs"]["joint_states"][()]
        if simulated.shape != observed.shape or not np.isfinite(simulated).all():
            raise BadInput(
                f"{path}: {demo.name.split('/')[-1]}: key states is {demo['states'].shape} or holds NaN, expected "
                f"finite values of {len(observed)} steps"
            )
        errors["before"].append(np.abs(observed - simulated).mean())
        errors["after"].append(np.abs(observed[:-1] - simulated[1:]).mean())
    mean = {alignment: float(np.mean(values)) for alignment, values in errors.items()}
    best, other = sorted(mean, key=mean.get)
    if not mean[best] < 0.2 * mean[other]:
        raise BadInput(
            f"{path}: obs/joint_states fits states neither as recorded before (mean gap {mean['before']:.2g} rad) nor "
            f"after (mean gap {mean['after']:.2g} rad) actions[t]; set data.obs_alignment to before or after"
        )
    return best


# ----------------------------------------------------------------------------------------------- split and language


def split_demos(demos: Sequence[Demo], train_split: float, seed: int) -> tuple[list[Demo], list[Demo]]:
    """Training demos and held-out demos, whole demos of each task by a seeded draw; at least one of each."""
    train, held_out = [], []
    for path in dict.fromkeys(demo.path for demo in demos):
        of_task = [demo for demo in demos if demo.path == path]
        if len(of_task) < 2:
            raise BadInput(f"{path}: has {len(of_task)} demo, expected at least 2 (one to train on, one to hold out)")
        count = min(max(round(train_split * len(of_task)), 1), len(of_task) - 1)
        chosen = set(np.random.default_rng(seed).permutation(len(of_task))[:count].tolist())
        for index, demo in enumerate(of_task):
            (train if index in chosen else held_out).append(demo)
    return train, held_out


def load_language(data_directory: str | Path, tasks: Sequence[str], lang_emb_dim: int) -> LanguageTable:
    """Reads language_embeddings.npz and checks that every task has its embedding."""
    path = Path(data_directory) / EMBEDDINGS_FILE
    advice = f"run `python embed_language.py --data_directory {data_directory}`"
    if not path.is_file():
        raise BadInput(f"{path}: no language embeddings; {advice}")
    try:
        with np.load(path) as archive:
            texts, vectors, encoder = archive["texts"], archive["embeddings"], archive["encoder"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as problem:
        raise BadInput(f"{path}: not readable as language embeddings ({problem}); {advice}") from None
    if vectors.shape != (len(texts), lang_emb_dim) or not np.isfinite(vectors).all():
        raise BadInput(f"{path}: embeddings are {vectors.shape}, expected finite ({len(texts)}, {lang_emb_dim})")
    vectors = torch.nn.functional.normalize(torch.from_numpy(vectors).float(), dim=-1)  # public files often aren't
    table = LanguageTable(str(encoder), {canonical_instruction(str(t)): v for t, v in zip(texts, vectors, strict=True)})
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
