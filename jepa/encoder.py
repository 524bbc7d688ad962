"""The context encoder reads the tokens with Mamba; the target encoder is its slow copy (EMA).

Letters: B batch, L tokens, D token width.
"""

import copy

import torch
from torch import Tensor, nn

from jepa.mamba import MambaStack


class ContextEncoder(nn.Module):
    """Mamba over the token sequence; z_t is read at CLS, the last position: (B, L, D) -> (B, state_dim).

    With gaze it is read at the two tokens before CLS, too: what an eye says then reaches z_t without passing through
    the memory of the sequence, which learns demonstrations by heart.

    There is no norm after the last block: VICReg's variance term must see the scale that the encoder itself gives z_t.
    """

    def __init__(
        self, depth: int, embed_dim: int, state_dim: int, d_state: int, d_conv: int, expand: int, tokens_read: int = 1
    ):
        super().__init__()
        self.tokens_read = tokens_read
        self.mamba = MambaStack(depth, embed_dim, d_state, d_conv, expand, with_mlp=True)
        read_dim = tokens_read * embed_dim
        to_state = [] if state_dim == read_dim else [nn.Linear(read_dim, state_dim)]
        self.to_state = nn.Sequential(*to_state)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.to_state(self.mamba(tokens, last=self.tokens_read).flatten(1))


class TargetEncoder(nn.Module):
    """EMA copy of tokenizer and context encoder (BYOL, Grill et al. 2020; I-JEPA, Assran et al. 2023).

    It is never trained by gradients: theta_target <- m theta_target + (1 - m) theta_online, for every parameter on the
    way from pixels to z, so that online and target read the same observation in the same way.
    """

    def __init__(self, tokenizer: nn.Module, encoder: nn.Module):
        super().__init__()
        self.tokenizer = copy.deepcopy(tokenizer)
        self.encoder = copy.deepcopy(encoder)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        return self.encoder(self.tokenizer(obs))  # (B, state_dim)

    @torch.no_grad()
    def update(self, tokenizer: nn.Module, encoder: nn.Module, momentum: float) -> None:
        """One EMA step. momentum 1 leaves the target as it is, 0 makes it the online encoder."""
        targets: list[Tensor] = [*self.tokenizer.parameters(), *self.encoder.parameters()]
        online: list[Tensor] = [*tokenizer.parameters(), *encoder.parameters()]
        torch._foreach_lerp_(targets, online, 1 - momentum)
