"""Where on a picture is what the words ask for? A small convolutional eye for each camera, off unless model.gaze is on.

Patches of 16 pixels are too coarse for cans that are three pixels wide, and words that only stand before them in a
sequence are bound to pictures late. Here the words scale and shift the features of a fine grid (FiLM, Perez et al.
2018). A score for each cell, softmax over them, becomes a place: its mean is the spatial softmax of Levine et al. 2016.
What is seen there and where it is make one token, which the encoder reads before CLS.

The scores can be taught where the asked object appears (`gaze_loss`); without labels, foresight and prediction teach
them alone.

Letters: B batch, S image_size, G cells a side, C width of the features, D token width.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.mamba import backend

WIDTH = 64  # C
FIRST_WIDTH = 48  # of the first convolution, where the picture is still large
LEAST_GRID = 14  # cells a side, the guide's patches at 224 px; pictures are halved as long as so many are left
LABEL_STD = 0.07  # of the label's bump around the object's middle; the picture's half side is 1
FOUND_WITHIN = 0.12  # of the middle: 8 of 128 pixels, about the half of a can's height


class Look(NamedTuple):
    """What one camera's eye says of a batch."""

    token: Tensor  # (B, 1, D)
    scores: Tensor  # (B, G * G) of each cell, before softmax


def grid_of(image_size: int) -> tuple[int, int]:
    """-> how often pictures of S pixels are halved, and cells a side, G."""
    halvings = 0
    while image_size % 2 == 0 and image_size // 2 >= LEAST_GRID:
        image_size, halvings = image_size // 2, halvings + 1
    return halvings, image_size


class Gaze(nn.Module):
    """One camera's eye: pictures (B, 3, S, S) uint8 and language (B, lang_emb_dim) -> Look."""

    cells: Tensor

    def __init__(self, image_size: int, embed_dim: int, lang_emb_dim: int):
        super().__init__()
        halvings, G = grid_of(image_size)
        layers: list[nn.Module] = []
        channels = [3, *[FIRST_WIDTH, *[WIDTH] * (halvings - 1)][:halvings], WIDTH]
        for level, (before, after) in enumerate(pairwise(channels)):
            stride = 2 if level < halvings else 1
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(8, after), nn.GELU()]
        self.stem = nn.Sequential(*layers)
        self.modulation = nn.Linear(lang_emb_dim, 2 * WIDTH)
        self.mix = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GELU())
        self.score = nn.Linear(WIDTH, 1)  # of each cell
        self.token = nn.Sequential(nn.Linear(WIDTH + 6, embed_dim), nn.GELU(), nn.Linear(embed_dim, embed_dim))
        self.register_buffer("cells", cell_middles(G), persistent=False)

    def forward(self, pictures: Tensor, language: Tensor) -> Look:
        pictures = pictures.to(self.score.weight.dtype) / 127.5 - 1  # (B, 3, S, S) in [-1, 1]
        words = F.normalize(language, dim=1) * language.shape[1] ** 0.5  # (B, lang_emb_dim), each number about 1
        # The C++ kernels of bf16 are Mamba's; on the CPU these products are torch's own.
        with torch.autocast("cpu", torch.bfloat16) if backend.bfloat16 else nullcontext():
            features = self.stem(pictures.contiguous(memory_format=torch.channels_last))  # (B, C, G, G)
            scale, shift = self.modulation(words).unsqueeze(-1).unsqueeze(-1).chunk(2, dim=1)  # (B, C, 1, 1) each
            mixed = self.mix(features * (1 + scale) + shift).flatten(2).transpose(1, 2)  # (B, G * G, C)
            scores = self.score(mixed).squeeze(2)  # (B, G * G)
        scores, mixed = scores.float(), mixed.float()
        share = scores.softmax(dim=1)
        place = share @ self.cells  # (B, 2)
        spread = (share @ self.cells.square() - place.square()).clamp_min(0).sqrt()  # (B, 2) standard deviations
        surest = [share.amax(dim=1, keepdim=True), scores.logsumexp(dim=1, keepdim=True) / 10]  # (B, 1) each
        seen = torch.einsum("bn,bnc->bc", share, mixed)  # (B, C)
        told = torch.cat([seen, 3 * place, 3 * spread, *surest], dim=1)  # (B, C + 6), each number about 1
        return Look(self.token(told).unsqueeze(1), scores)


def cell_middles(G: int) -> Tensor:
    """(G * G, 2): right and up of the picture's middle, its edges being -1 and 1. Raw OpenGL pictures begin with their
    lowest row."""
    middles = (torch.arange(G) + 0.5) / G * 2 - 1
    return torch.stack([middles.repeat(G), middles.repeat_interleave(G)], dim=1)


def in_view(at: Tensor) -> Tensor:
    """Whether places (..., 2) are on the picture; NaN, a place that is not known, is not."""
    return (at.abs() < 1).all(dim=-1)


def gaze_loss(scores: Tensor, at: Tensor, cells: Tensor) -> Tensor:
    """scores (B, G * G), the object's place (B, 2) -> (B,): the Kullback-Leibler divergence from the softmax of the
    scores to a bump of LABEL_STD around the place, 0 where the object is not in view."""
    seen = in_view(at)
    distances = (torch.where(seen[:, None], at, 0.0)[:, None] - cells).square().sum(dim=-1)  # (B, G * G)
    bump = (-distances / (2 * LABEL_STD**2)).log_softmax(dim=1)
    divergence = F.kl_div(scores.log_softmax(dim=1), bump, reduction="none", log_target=True).sum(dim=1)
    return torch.where(seen, divergence, 0.0)


def found(scores: Tensor, at: Tensor, cells: Tensor) -> Tensor:
    """(B,) 1.0 where the highest cell is within FOUND_WITHIN of the object's place (B, 2), and 0.0 elsewhere."""
    return ((cells[scores.argmax(dim=1)] - at).norm(dim=1) < FOUND_WITHIN).float()


def losses_of_looks(eyes: Sequence[Gaze], looks: Sequence[Look], at: Tensor) -> dict[str, Tensor]:
    """Of both cameras (B, 2) each, the object's places being at (B, 2, 2): the loss, whether the object is in view, and
    whether it was found."""
    pairs = [
        (look.scores, at[:, camera], eye.cells) for camera, (eye, look) in enumerate(zip(eyes, looks, strict=True))
    ]
    return {
        "loss": torch.stack([gaze_loss(*pair) for pair in pairs], dim=1),
        "in_view": in_view(at).float(),
        "found": torch.stack([found(*pair) for pair in pairs], dim=1),
    }
