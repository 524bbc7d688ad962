"""An observation becomes one causal sequence of tokens: [lang][robot][agentview P][eye-in-hand P][CLS].

Mamba reads from left to right, so the image patches are read in the light of the instruction and the arm's pose, and
CLS, the last token, has seen everything. With model.gaze two more tokens stand before CLS, one of each camera's eye
(jepa/gaze.py).

Letters: B batch, h x w source image, S image_size, P patches of one image (196 at 224 px), L = 2P + 3 tokens (2P + 5
with gaze), D width.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa import bf16
from jepa.gaze import Gaze, Look
from jepa.mamba import backend
from observation import CAMERAS, UNITS, state_of_width


def resize_images(images: Tensor, image_size: int) -> Tensor:
    """The one resize of the project, for demonstrations and simulator alike: antialiased bilinear.

    images (B, h, w, 3) uint8 -> (B, 3, S, S) uint8, as a channels-last view. On the CPU the uint8 kernel is used (many
    times faster); elsewhere it is computed in float and rounded, which differs by at most 1/255.
    """
    images = images.permute(0, 3, 1, 2)  # (B, 3, h, w), channels last in memory
    if images.shape[-2:] == (image_size, image_size):
        return images
    size = (image_size, image_size)
    if images.device.type == "cpu":
        return F.interpolate(images, size, mode="bilinear", antialias=True)
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255).to(torch.uint8)


class ImageTokenizer(nn.Module):
    """One camera's picture as patch tokens with learned positions: (B, h, w, 3) uint8 -> (B, P, D)."""

    def __init__(self, image_size: int, patch_size: int, embed_dim: int):
        super().__init__()
        self.image_size = image_size
        self.patchify = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.empty((image_size // patch_size) ** 2, embed_dim))  # (P, D)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        images = resize_images(images, self.image_size)  # (B, 3, S, S)
        if backend.bfloat16 and bf16.fits(self.positions):
            return bf16.patch_tokens(images.permute(0, 2, 3, 1), self.patchify, self.positions, backend.packed)
        images = images.to(self.positions.dtype) / 127.5 - 1  # in [-1, 1]
        return self.patchify(images).flatten(2).transpose(1, 2) + self.positions  # (B, P, D)


def robot_state_vector(obs: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """The parts (..., width) of the robot state that are named, each in its UNITS, as one vector (..., 9 or 8)."""
    parts = ((name, obs[name]) for name in names)
    return torch.cat([part / UNITS[name] if name in UNITS else part for name, part in parts], dim=-1)


class RobotStateTokenizer(nn.Module):
    """The robot state that is `robot_state_dim` wide -> one token (B, 1, D)."""

    def __init__(self, robot_state_dim: int, embed_dim: int):
        super().__init__()
        self.names = tuple(state_of_width(robot_state_dim))
        self.mlp = nn.Sequential(nn.Linear(robot_state_dim, embed_dim), nn.GELU(), nn.Linear(embed_dim, embed_dim))

    def forward(self, robot_state: Mapping[str, Tensor]) -> Tensor:
        """robot_state: its parts (B, width), by name."""
        return self.mlp(robot_state_vector(robot_state, self.names)).unsqueeze(1)


class Tokenizer(nn.Module):
    """Observation -> tokens (B, L, D) in the causal order of the guide.

    An observation is a dict: agentview_rgb and eye_in_hand_rgb (B, h, w, 3) uint8 in LIBERO's raw (OpenGL) orientation,
    the parts of the robot state (B, width), language (B, lang_emb_dim).
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        lang_emb_dim: int,
        robot_state_dim: int,
        gaze: bool = False,
    ):
        super().__init__()
        self.image_size = image_size
        self.language = nn.Linear(lang_emb_dim, embed_dim)
        self.robot_state = RobotStateTokenizer(robot_state_dim, embed_dim)
        self.agentview = ImageTokenizer(image_size, patch_size, embed_dim)
        self.eye_in_hand = ImageTokenizer(image_size, patch_size, embed_dim)
        eyes = [Gaze(image_size, embed_dim, lang_emb_dim) for _ in CAMERAS] if gaze else []
        self.eyes: Sequence[Gaze] = nn.ModuleList(eyes)  # type: ignore[assignment]  # of each camera
        self.cls = nn.Parameter(torch.empty(1, 1, embed_dim))
        nn.init.trunc_normal_(self.cls, std=0.02)

    def looks(self, obs: Mapping[str, Tensor]) -> list[Look]:
        """What the eye of each camera says, [] without gaze. Of an observation it needs pictures and language."""
        language = obs["language"].to(self.cls.dtype)
        pictures = (resize_images(obs[camera], self.image_size) for camera in CAMERAS)  # (B, 3, S, S) each
        return [eye(picture, language) for eye, picture in zip(self.eyes, pictures, strict=False)]

    def forward(
        self, obs: dict[str, Tensor], masked: Tensor | None = None, looks: Sequence[Look] | None = None
    ) -> Tensor:
        """masked (B,) bool: samples whose robot token is left at zero, so that the arm must be seen. looks: those of
        `obs`, where they are there already."""
        dtype = self.cls.dtype
        robot_state = self.robot_state({name: obs[name].to(dtype) for name in self.robot_state.names})  # (B, 1, D)
        if masked is not None:
            robot_state = robot_state.masked_fill(masked[:, None, None], 0.0)
        tokens = [
            self.language(obs["language"].to(dtype)).unsqueeze(1),  # (B, 1, D)
            robot_state,
            self.agentview(obs["agentview_rgb"]),  # (B, P, D)
            self.eye_in_hand(obs["eye_in_hand_rgb"]),  # (B, P, D)
            *[look.token for look in (self.looks(obs) if looks is None else looks)],  # (B, 1, D) each
            self.cls.expand(len(obs["language"]), -1, -1),  # (B, 1, D)
        ]
        return torch.cat(tokens, dim=1)
