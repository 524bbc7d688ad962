"""Rows of demonstrations -> batches on the device, for both phases.

A row is one step of one demo (demos/hdf5.py numbers them), and a sample one that was drawn. `RowOrder` says which rows
each batch of this process has, `PictureReader` reads their frames ahead while the model works, and `Batches` puts
pictures, robot state, language and actions together. Pictures stay uint8 until they are on the device, where
jepa/tokenizer.py resizes them, for demonstrations and simulator alike.

Letters: N rows, B batch, K prediction gap, H actions per chunk, D state_dim, S pixels, F frames of foresight.
"""

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from demos.frames import DeviceFrames, Frames
from demos.hdf5 import Demo, drawn_rows
from demos.language import LanguageTable
from demos.scenes import Scenes
from errors import BadInput
from jepa.tokenizer import robot_state_vector
from observation import CAMERAS
from seeds import mixed_seed


def transition_rows(demos: Sequence[Demo], reach: int) -> Tensor:
    """Phase 1's samples: every drawn row whose demo still has the row `reach` (K) later; drawn, too, where
    `between_pictures` finds nothing."""
    return drawn_rows(demos, [len(demo) - reach for demo in demos])


def chunk_rows(demos: Sequence[Demo], chunk_length: int) -> Tensor:
    """Phase 2's samples: every drawn row that `chunk_length` (H) actions of its demo follow."""
    return drawn_rows(demos, [len(demo) - demo.lag - chunk_length + 1 for demo in demos])


class LowDimensional:
    """What fits in memory of all demos, by row and on the device: actions, robot state, language."""

    def __init__(self, demos: Sequence[Demo], language: LanguageTable, device: torch.device):
        instructions = {demo.path: demo.task for demo in demos}
        number = {path: index for index, path in enumerate(instructions)}
        task = torch.cat([torch.full((len(demo),), number[demo.path]) for demo in demos])
        self.device = device
        self.lag = torch.cat([torch.full((len(demo),), demo.lag) for demo in demos]).to(device)  # (N,)
        self.actions = torch.cat([demo.actions for demo in demos]).to(device)  # (N, 7)
        self.robot_state = {  # name -> (N, width)
            name: torch.cat([demo.robot_state[name] for demo in demos]).to(device) for name in demos[0].robot_state
        }
        self.task = task.to(device)  # (N,) of each row's file
        last_rows = [torch.full((len(demo),), demo.first_row + len(demo) - 1) for demo in demos]
        self.last_row = torch.cat(last_rows).to(device)  # (N,) of each row's demo
        self.language = torch.stack([language[task] for task in instructions.values()]).to(device)  # (tasks, D)

    def obs(self, rows: Tensor) -> dict[str, Tensor]:
        """The observations but for their pictures."""
        return {key: v[rows] for key, v in self.robot_state.items()} | {"language": self.language[self.task[rows]]}

    def robot_ahead(self, rows: Tensor, frames: Sequence[int]) -> Tensor:
        """The robot state `frames` after each row, at most at the demo's end: (B, frames, 9 or 8) in the units in which
        a model reads it."""
        later = rows[:, None] + torch.tensor(frames, device=self.device)
        later = torch.minimum(later, self.last_row[rows][:, None])
        return robot_state_vector({name: values[later] for name, values in self.robot_state.items()}, self.robot_state)

    def actions_from(self, rows: Tensor, count: int) -> Tensor:
        """The `count` actions that follow each row: (B, count, 7)."""
        first = rows + self.lag[rows]
        return self.actions[first[:, None] + torch.arange(count, device=self.device)]


class RowOrder:
    """The rows of this rank's batches, epoch after epoch.

    With a `seed` every epoch is a permutation, and batch i of all W ranks together is rows [i * W * B, (i + 1) * W * B)
    of it, so that W ranks train on what one process with the joint batch would; what fills no batch is left out. An
    epoch that was begun, by any number of ranks, goes on after its `done` first rows. Without a seed, this rank's
    contiguous share comes in order and whole; `rows_of_all_ranks` joins the results.

    Raises BadInput if there is no row, or, with a `seed`, if not one batch fits.
    """

    def __init__(self, rows: Tensor, batch_size: int, seed: int | None = None):
        self.rows, self.batch_size, self.seed, self.epoch, self.done = rows, batch_size, seed, 0, 0
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if not len(rows):
            raise BadInput("the demos are too short for a single sample, or there are none; expected at least one")
        if seed is not None and not len(self):
            raise BadInput(
                f"training.batch_size is {batch_size} on {self.ranks} process(es), but there are only {len(rows)} "
                f"training samples; use --batch_size {max(len(rows) // self.ranks, 1)} or less, or more demos"
            )

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        if self.seed is not None:
            return len(self.rows) // (self.ranks * self.batch_size)
        return -(-len(self._share()) // self.batch_size)

    def batches(self) -> Sequence[Tensor]:
        """The rows (B,) of each batch of this epoch."""
        if self.seed is None:
            return self._share().split(self.batch_size) if len(self) else ()
        count = max(len(self.rows) - self.done, 0) // (self.ranks * self.batch_size)
        order = self._permutation()[self.done :][: count * self.batch_size * self.ranks]
        return self.rows[order.view(count, self.batch_size, self.ranks)[:, :, self.rank]].unbind()

    def joint_rows(self, first: int, count: int) -> Tensor:
        """The rows of this epoch's samples `first` to `first + count`, whichever rank has them."""
        return self.rows[self._permutation()[first : first + count]]

    def _permutation(self) -> Tensor:
        assert self.seed is not None  # without one there is no order to draw
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        return torch.randperm(len(self.rows), generator=generator)

    def _share(self) -> Tensor:
        first, end = (len(self.rows) * rank // self.ranks for rank in (self.rank, self.rank + 1))
        return self.rows[first:end]


class PictureReader:
    """The frames of a sequence of batches, read ahead by a thread into (pinned) buffers that are made once.

    The pictures of a batch are valid until the next one is asked for. `waited` counts the seconds that the model waited
    for them.
    """

    BUFFERS = 3  # one with the model, one ready, one being filled

    def __init__(self, frames: Frames | DeviceFrames, offsets: Sequence[int], batch_size: int, device: torch.device):
        """offsets: how many rows after each row of a batch its pictures are, 0 for its own."""
        self.frames, self.offsets, self.batch_size, self.device = frames, offsets, batch_size, device
        self.buffers: list[Tensor] = []
        self.waited = 0.0

    def read(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """rows (B,) of each batch -> those rows, and pictures (offsets, B, 2, S, S, 3) uint8 on the device."""
        if isinstance(self.frames, DeviceFrames):
            for rows in batches:
                at = torch.stack([rows + offset for offset in self.offsets]).to(self.device)
                yield rows, self.frames.at(at)
        else:
            yield from self._read_ahead(self.frames, batches)

    def _read_ahead(self, frames: Frames, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        on_gpu = self.device.type == "cuda"
        if not self.buffers:
            shape = (len(self.offsets), self.batch_size, *frames.frame_shape)
            self.buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(self.BUFFERS)]
        free: queue.SimpleQueue = queue.SimpleQueue()
        ready: queue.SimpleQueue = queue.SimpleQueue()
        for buffer in self.buffers:
            free.put((buffer, None))  # and the event after which it may be filled
        thread = threading.Thread(target=self._fill, args=(frames, batches, free, ready), daemon=True)
        thread.start()
        try:
            for _ in batches:
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
                yield rows, pictures
                if not on_gpu:  # the pictures may be the buffer itself
                    free.put((buffer, None))
        finally:
            free.put(None)  # an epoch that is left early ends its thread
            thread.join()

    def _fill(
        self, frames: Frames, batches: Sequence[Tensor], free: queue.SimpleQueue, ready: queue.SimpleQueue
    ) -> None:
        try:
            for rows in batches:
                if (slot := free.get()) is None:
                    return
                buffer, copied = slot
                if copied is not None:
                    copied.synchronize()
                for pictures, offset in zip(buffer.numpy(), self.offsets, strict=True):
                    frames.read((rows + offset).numpy(), pictures[: len(rows)])
                ready.put((rows, buffer))
        except Exception as problem:  # raised where the batch is awaited
            ready.put((problem, None))


class Batches:
    """The batches of one rank, epoch after epoch, on the device: `for batch in batches`.

    Beside `actions` (B, num_actions, 7), the ones that follow each of its rows, a batch holds
    with `frames`: `obs`, equal to observation.from_simulator's; with a `gap` also `next_obs`, as many rows later, and
    with `ahead` the robot's state so many frames after each row, `robot_ahead` (B, F, 9 or 8); with `labels`,
    name -> (N, ...) by row, those of each row; with `scenes` half as many of those as the batch has samples;
    with `states` (N, D), a frozen encoder's z by row: `z_t` (B, D).

    Raises BadInput as `RowOrder`.
    """

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
        labels: Mapping[str, Tensor] | None = None,
        scenes: Scenes | None = None,
        seed: int | None = None,
    ):
        self.order = RowOrder(rows, batch_size, seed)
        self.low_dimensional, self.num_actions, self.ahead = low_dimensional, num_actions, ahead
        self.device = low_dimensional.device
        self.offsets = (0, gap) if gap else (0,)
        self.reader = None if frames is None else PictureReader(frames, self.offsets, batch_size, self.device)
        self.states = None if states is None else states.to(self.device)
        self.labels = {name: values.to(self.device) for name, values in (labels or {}).items()}
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Chooses the permutation of the next pass, and how many of its samples have been trained on before."""
        self.order.epoch, self.order.done = epoch, done

    @property
    def waited(self) -> float:
        """Seconds that the model has waited for pictures so far."""
        return self.reader.waited if self.reader else 0.0

    def __iter__(self) -> Iterator[dict]:
        return self._of(self.order.batches())

    def of_first_row(self) -> Iterator[dict]:
        """One batch, of the first row alone, whichever rank has it."""
        return self._of([self.order.rows[:1]])

    def _of(self, batches: Sequence[Tensor]) -> Iterator[dict]:
        if self.reader is not None:
            for rows, pictures in self.reader.read(batches):
                yield self._low_dimensional(rows) | self._observations(rows, pictures)
        else:
            for rows in batches:
                of_encoder = {} if self.states is None else {"z_t": self.states[rows.to(self.device)]}
                yield self._low_dimensional(rows) | of_encoder

    def _low_dimensional(self, rows: Tensor) -> dict:
        rows = rows.to(self.device)
        batch: dict = {"actions": self.low_dimensional.actions_from(rows, self.num_actions)}
        if self.ahead:
            batch["robot_ahead"] = self.low_dimensional.robot_ahead(rows, self.ahead)
        batch |= {name: values[rows] for name, values in self.labels.items()}
        if self.scenes is not None:
            batch["scenes"] = self.scenes.draw(-(-len(rows) // 2), self.device)
        return batch

    def _observations(self, rows: Tensor, pictures: Tensor) -> dict[str, dict[str, Tensor]]:
        """pictures (offsets, B, 2, S, S, 3) on the device."""
        observations = {}
        for name, offset, both_cameras in zip(("obs", "next_obs"), self.offsets, pictures, strict=False):
            cameras = dict(zip(CAMERAS, both_cameras.unbind(1), strict=True))  # (B, S, S, 3) each
            observations[name] = cameras | self.low_dimensional.obs(rows.to(self.device) + offset)
        return observations


def every_frame(
    demos: Sequence[Demo], low_dimensional: LowDimensional, frames: Frames | DeviceFrames, batch_size: int
) -> Batches:
    """All frames of the demos in order, without actions: what z of every frame is computed from."""
    return Batches(drawn_rows(demos), low_dimensional, 0, batch_size, frames=frames)


def grouped(batches: Iterable[dict], count: int) -> Iterator[list[dict]]:
    """`count` batches at a time, which all stay valid until the next ones are asked for; what fills no group is left
    out."""
    group: list[dict] = []
    for batch in batches:
        group.append(copied(batch) if count > 1 else batch)
        if len(group) == count:
            yield group
            group = []


def copied(batch):
    """A batch, a dict of tensors and dicts, in memory of its own."""
    return {key: copied(value) for key, value in batch.items()} if isinstance(batch, dict) else batch.clone()


def to_device(batch, device: torch.device):
    """A batch, a dict of tensors and dicts, on another device."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=device.type == "cuda")  # elsewhere it may be read before it has arrived


def shift_pictures(batch: dict, pixels: int, image_size: int) -> dict:
    """Moves the pictures of every sample by up to `pixels` in both directions, edges repeated (Kostrikov et al. 2021).

    The pixels are those of the model, `image_size` a side, whatever the size of the pictures here. Both cameras move
    alike, and so do both frames of a sample: what happens between them is untouched. What is said to be on the pictures
    moves with them.
    """
    shift = torch.randint(-pixels, pixels + 1, (2, len(batch["actions"]), 1), device=batch["actions"].device)
    moved = dict(batch)
    for name in ("obs", "next_obs"):
        if name in batch:
            moved[name], by = _shifted(batch[name], shift, image_size)
    if "target_at" in batch:
        moved["target_at"] = batch["target_at"] + by
    if "scenes" in batch:
        scenes = batch["scenes"]
        shift = torch.randint(-pixels, pixels + 1, (2, len(scenes["language"]), 1), device=shift.device)
        pictures, by = _shifted(scenes, shift, image_size)
        moved["scenes"] = pictures | {"target_at": scenes["target_at"] + by}
    return moved


def _shifted(obs: dict, shift: Tensor, image_size: int) -> tuple[dict, Tensor]:
    """shift (2, B, 1): how many of the model's pixels down and left of it what each picture then shows has been. -> the
    observation so moved, and by how much things on its pictures have moved (B, 1, 2), right and up, their half side
    being 1."""
    size = obs[CAMERAS[0]].shape[1]
    shift = (shift * size / image_size).round().long()
    rows, columns = (torch.arange(size, device=shift.device) + shift).clamp(0, size - 1)  # (B, S) each
    sample = torch.arange(shift.shape[1], device=shift.device)[:, None, None]
    pictures = {key: obs[key][sample, rows[:, :, None], columns[:, None, :]] for key in CAMERAS}
    return obs | pictures, -shift.flip(0).permute(1, 2, 0) * 2 / size
