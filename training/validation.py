"""How good the model is after an epoch: its losses on held-out demos and, where that is asked for, a few rollouts."""

from collections.abc import Sequence
from pathlib import Path

import torch

from config import Config
from dataloader import Batches
from demos.language import LanguageTable
from jepa.all_ranks import rows_of_all_ranks
from rollouts.while_training import success_rate
from statevla_model import StateVLATrainer


@torch.no_grad()
def validate(trainer: StateVLATrainer, batches: Batches) -> dict[str, float]:
    """The losses over all held-out demos, whatever the batch size and the number of processes.

    Phase 1 adds what tells whether it works: `jepa_copy_mse`, the error of predicting that nothing changes (jepa_mse
    has to stay below it), and the mean std and effective rank of z (both near 0 where the representation collapses).
    """
    trainer.eval()
    counted = len(batches) > 0  # a rank that has no row computes one of another's and leaves it out
    own = batches if counted else batches.of_first_row()
    if trainer.phase == 1:
        metrics = trainer.phase1_losses(own, counted)
    else:
        of_batches = [trainer.phase2_losses(batch, per_sample=True) for batch in own]
        losses = {name: torch.cat([losses[name] for losses in of_batches]) for name in of_batches[0]}
        metrics = {name: rows_of_all_ranks(v if counted else v[:0]).mean() for name, v in losses.items()}
    trainer.train()
    return {name: float(value) for name, value in metrics.items()}


def play_rollouts(
    trainer: StateVLATrainer,
    language: LanguageTable,
    instructions: Sequence[str],
    observation: dict,
    config: Config,
    pictures: Path,
) -> float:
    """The share of a few episodes that the policy solves as it is now; below 0 where all of them crashed."""
    recipe = config.training.phase2
    trainer.eval()
    success = success_rate(
        trainer.model, language, instructions, observation, recipe.rollout_suite, recipe.rollouts_per_task,
        recipe.flow_start, config.training.seed, pictures,
    )  # fmt: skip
    trainer.train()
    return success
