"""z_t of every frame, computed once: phase 2's encoder is frozen, so its epochs need no picture.

The file is named after everything that z depends on, encoder weights, demos, picture size and language, so that one
that fits nothing any more is never read: `<checkpoint_directory>/frozen_states/<key>.npy`, 72 MB for 70,000 frames of
256 numbers. Such files may be deleted at any time.

Letters: N frames of all demos, D state_dim.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dataloader import Batches, Demo, LowDimensional, frame_rows
from errors import BadInput
from files import written_whole
from frame_cache import LAYOUT, DeviceFrames, Frames, source_of
from jepa.all_ranks import rows_of_all_ranks
from statevla_model import StateVLA


def frozen_states(
    model: StateVLA,
    demos: Sequence[Demo],
    low_dimensional: LowDimensional,
    frames: Callable[[], Frames | DeviceFrames],
    batch_size: int,
    directory: Path,
) -> Tensor:
    """z of all rows (N, D) float32, on the CPU: read from `directory`, or computed by all ranks together and stored.

    `frames` opens the pictures and is only called where they are needed. Raises BadInput if the file can't be written.
    """
    path = directory / f"{states_key(model, demos, low_dimensional)}.npy"
    is_first_rank = dist.get_rank() == 0
    found = _read(path, (sum(len(demo) for demo in demos), model.config.state_dim)) if is_first_rank else None
    if dist.get_world_size() > 1:  # a rank on another machine may not see the file
        answer = [found]
        dist.broadcast_object_list(answer, 0)
        found = answer[0]
    if found is not None:
        if is_first_rank:
            print(f"states: z of {len(found):,} frames read from {path}", flush=True)
        return found
    states = encode_all(model, demos, low_dimensional, frames(), batch_size)
    if is_first_rank:
        _write(path, states.numpy())
    return states


@torch.no_grad()
def encode_all(
    model: StateVLA,
    demos: Sequence[Demo],
    low_dimensional: LowDimensional,
    frames: Frames | DeviceFrames,
    batch_size: int,
) -> Tensor:
    """z of all rows (N, D), on the CPU; each rank encodes its share of the frames.

    Raises BadInput where a z is not finite: nothing can be fitted on it or concluded from it.
    """
    batches = Batches(frame_rows(demos), low_dimensional, 0, batch_size, frames=frames)
    rows = len(batches.rows)
    progress = tqdm(batches, desc=f"encoding {rows:,} frames", unit="batch", disable=batches.rank != 0)
    states = [model.encode(batch["obs"]) for batch in progress]
    own = torch.cat(states) if states else torch.empty(0, model.config.state_dim, device=low_dimensional.device)
    z = rows_of_all_ranks(own.float()).cpu()
    broken = (~z.isfinite().all(dim=1)).nonzero().flatten()
    if len(broken):
        demo = next(demo for demo in reversed(demos) if demo.first_row <= broken[0])
        raise BadInput(
            f"the encoder's z is not finite for {len(broken):,} of {rows:,} frames, the first {demo.name} step "
            f"{int(broken[0]) - demo.first_row}; the demos' own numbers are finite, so the encoder's weights are broken"
        )
    return z


def states_key(model: StateVLA, demos: Sequence[Demo], low_dimensional: LowDimensional) -> str:
    """A hash of all that z depends on: a file of demos, and those it links to, by path, size and time of change."""
    digest = hashlib.sha256()
    encoder = model.state_encoder
    for module in (encoder.tokenizer, encoder.encoder):
        for name, value in module.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    sources = [
        source_of(path, [demo for demo in demos if demo.path == path])
        for path in dict.fromkeys(demo.path for demo in demos)
    ]
    rows = [(demo.path.name, demo.key, len(demo)) for demo in demos]
    digest.update(json.dumps([LAYOUT, model.config.image_size, model.config.patch_size, sources, rows]).encode())
    digest.update(low_dimensional.language.cpu().numpy().tobytes())
    return digest.hexdigest()[:24]


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    try:
        states = np.load(path)
    except (OSError, ValueError, EOFError):  # not there, or cut off by something else than this program
        return None
    is_whole = states.shape == shape and states.dtype == np.float32 and np.isfinite(states).all()
    return torch.from_numpy(states) if is_whole else None


def _write(path: Path, states: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as stream:
            np.save(stream, states)
    except OSError as problem:
        raise BadInput(
            f"{path}: cannot be written ({problem.strerror}); set training.phase2.store_states to false"
        ) from None
