"""z_t of every frame, computed once: phase 2's encoder is frozen, so its epochs need no picture.

The file is named after everything that z depends on, encoder weights, demos, picture size and language, so that one
that fits nothing any more is never read: `<checkpoint_directory>/frozen_states/<key>.npy`, 72 MB for 70,000 frames of
256 numbers. Such files may be deleted at any time.

Letters: N steps of all demos, M of them drawn, B batch, D state_dim.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from config import ModelConfig
from demos.frames import LAYOUT, source_of
from demos.hdf5 import Demo, drawn_rows
from errors import BadInput
from files import unwritable_named, written_whole
from jepa.all_ranks import rows_of_all_ranks
from state_encoder import JEPAStateEncoder
from untrusted import npy_array


class Encodes(Protocol):
    """What of statevla_model.StateVLA is needed here."""

    config: ModelConfig
    state_encoder: JEPAStateEncoder

    def encode(self, obs: dict[str, Tensor]) -> Tensor: ...


def frozen_states(
    model: Encodes, demos: Sequence[Demo], language: Tensor, batches: Callable[[], Iterable[dict]], directory: Path
) -> Tensor:
    """z of all rows (N, D) float32, on the CPU, NaN where nothing was drawn: read from `directory`, or computed by all
    ranks together and stored.

    language: the instructions' embeddings, on which z depends. `batches` gives this rank's share of all frames, in
    order, and is only called where pictures are needed. Raises BadInput if the file can't be written.
    """
    path = directory / f"{states_key(model, demos, language)}.npy"
    is_first_rank = dist.get_rank() == 0
    found = _read(path, (sum(len(demo.drawn) for demo in demos), model.config.state_dim)) if is_first_rank else None
    if dist.get_world_size() > 1:  # a rank on another machine may not see the file
        answer = [found]
        dist.broadcast_object_list(answer, 0)
        found = answer[0]
    if found is not None:
        if is_first_rank:
            print(f"states: z of {len(found):,} frames read from {path}", flush=True)
        return by_row(found, demos)
    states = encode_drawn(model, demos, batches())
    if is_first_rank:
        advice = "; set training.phase2.store_states to false"
        with unwritable_named(path, advice):
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as stream:
                np.save(stream, states.numpy())
    return by_row(states, demos)


def by_row(states: Tensor, demos: Sequence[Demo]) -> Tensor:
    """z of what was drawn (M, D) -> of all rows (N, D), NaN where nothing was."""
    z = torch.full((sum(len(demo) for demo in demos), states.shape[1]), torch.nan)
    z[drawn_rows(demos)] = states
    return z


@torch.no_grad()
def encode_drawn(model: Encodes, demos: Sequence[Demo], batches: Iterable[dict]) -> Tensor:
    """z of all that was drawn (M, D), in the order of `drawn_rows`, on the CPU; each rank encodes its share of the
    frames, `batches`.

    Raises BadInput where a z is not finite: nothing can be fitted on it or concluded from it.
    """
    rows = sum(len(demo.drawn) for demo in demos)
    is_first_rank = not dist.is_initialized() or dist.get_rank() == 0
    progress = tqdm(batches, desc=f"encoding {rows:,} frames", unit="batch", disable=not is_first_rank)
    states = [model.encode(batch["obs"]) for batch in progress]
    device = next(model.state_encoder.parameters()).device
    own = torch.cat(states) if states else torch.empty(0, model.config.state_dim, device=device)
    z = rows_of_all_ranks(own.float()).cpu()
    broken = (~z.isfinite().all(dim=1)).nonzero().flatten()
    if len(broken):
        first = int(drawn_rows(demos)[broken[0]])
        demo = next(demo for demo in reversed(demos) if demo.first_row <= first)
        raise BadInput(
            f"the encoder's z is not finite for {len(broken):,} of {rows:,} frames, the first {demo.name} step "
            f"{first - demo.first_row}; the demos' own numbers are finite, so the encoder's weights are broken"
        )
    return z


def states_key(model: Encodes, demos: Sequence[Demo], language: Tensor) -> str:
    """A hash of all that z depends on: a file of demos, and those it links to, by path, size and time of change."""
    digest = hashlib.sha256()
    encoder = model.state_encoder
    modules: tuple[nn.Module, ...] = (encoder.tokenizer, encoder.encoder)
    for module in modules:
        for name, value in module.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    sources = [
        source_of(path, [demo for demo in demos if demo.path == path])
        for path in dict.fromkeys(demo.path for demo in demos)
    ]
    rows = [(demo.path.name, demo.key, len(demo.drawn)) for demo in demos]
    digest.update(json.dumps([LAYOUT, model.config.image_size, model.config.patch_size, sources, rows]).encode())
    digest.update(language.cpu().numpy().tobytes())
    return digest.hexdigest()[:24]


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    try:
        states = npy_array(path)
    except (OSError, ValueError, EOFError):  # not there, or cut off by something else than this program
        return None
    is_whole = states.shape == shape and states.dtype == np.float32 and np.isfinite(states).all()
    return torch.from_numpy(states) if is_whole else None
