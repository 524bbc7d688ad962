"""JEPAStateEncoder: observation -> tokens -> Mamba -> z_t, with phase 1's temporal predictor and EMA target."""

from collections.abc import Sequence

from torch import Tensor, nn

from config import ModelConfig
from jepa.encoder import ContextEncoder, TargetEncoder
from jepa.gaze import Look
from jepa.temporal_predictor import TemporalPredictor
from jepa.tokenizer import Tokenizer


class JEPAStateEncoder(nn.Module):
    """forward(obs) is z_t (B, state_dim); `target(obs)` is the EMA copy's; `predictor(z_t, actions)` looks ahead."""

    def __init__(self, config: ModelConfig, predictor_hidden_dim: int):
        super().__init__()
        self.tokenizer = Tokenizer(
            config.image_size, config.patch_size, config.embed_dim, config.lang_emb_dim, config.robot_state_dim,
            config.gaze,
        )  # fmt: skip
        self.encoder = ContextEncoder(
            config.encoder_depth, config.embed_dim, config.state_dim, config.d_state, config.d_conv, config.expand,
            tokens_read=1 + len(self.tokenizer.eyes),
        )  # fmt: skip
        self.target = TargetEncoder(self.tokenizer, self.encoder)
        self.predictor = TemporalPredictor(
            config.state_dim, config.prediction_gap * config.action_dim, predictor_hidden_dim
        )

    def forward(
        self, obs: dict[str, Tensor], masked: Tensor | None = None, looks: Sequence[Look] | None = None
    ) -> Tensor:
        """masked (B,) bool: samples whose robot state is hidden. looks: `tokenizer.looks(obs)`, where it is known."""
        return self.encoder(self.tokenizer(obs, masked, looks))

    def update_target(self, momentum: float) -> None:
        self.target.update(self.tokenizer, self.encoder, momentum)
