"""What does bf16 gain on this CPU, against fp32?

    python benchmarks/precision.py

A whole step of phase 1 (losses, backward, clipping, AdamW, target) and a decision at batch 1 (a simulator's pictures
in, ten actions out, 4 Euler steps), of the small model and of the guide's, on made-up observations. The two precisions
alternate, each as the project uses it: a step as train.py makes it, a decision as RecordedDecision makes it. Before
anything is timed, losses and actions of the two are compared.
"""

import torch
from encoder import made_up_observation
from measure import REPO, arguments, compared, interleaved, print_table, ratio_text, write_results
from torch.nn.utils import clip_grad_norm_

from config import Config, load_config
from jepa.mamba import choose_mamba_backend
from jepa.precision import choose_precision, in_precision
from jepa.temporal_predictor import FORESIGHT
from statevla_model import RecordedDecision, StateVLATrainer, build_trainer
from training.optimizer import make_optimizer, trained_by

CPU = torch.device("cpu")
PRECISIONS = ("fp32", "bf16")
# model, its settings, batch of a step, rounds of steps, rounds of decisions
MODELS = [("small", "conf/libero_object_cpu.yaml", 64, 15, 60), ("guide's", "conf/config.yaml", 4, 7, 20)]
CAMERA = 128  # pixels a side that LIBERO renders


def main() -> None:
    settings = arguments(__doc__)
    choose_mamba_backend("auto", CPU)
    of_auto = choose_precision("auto", CPU)
    rows = []
    for name, file, batch, steps, decisions in MODELS:
        quick = ["model.encoder_depth=1", "model.image_size=32"] if settings.quick else []
        config = load_config(REPO / file, quick)
        if settings.quick:
            batch, steps, decisions = 4, 1, 2
        trainer = made_up_trainer(config)
        for what, made, rounds in (
            (f"phase-1 step, batch {batch}", steps_of(trainer, config, batch), steps),
            ("decision", decisions_of(trainer, config), decisions),
        ):
            works, difference = made
            times = interleaved(works, rounds, warm_up=1 if settings.quick else 2)
            for precision, found in compared(times, "fp32").items():
                case = {"model": name, "what": what, "precision": precision, "difference": difference}
                rows.append(case | found)
    print_table(
        "Time over fp32's, within a round: median (quartiles)",
        ["model", "what", "precision", "ratio", "ms", "difference"],
        [
            [
                r["model"],
                r["what"],
                r["precision"],
                ratio_text(r["ratio"]),
                r["seconds"]["median"] * 1e3,
                r["difference"],
            ]
            for r in rows
        ],
    )
    notes = [f"auto takes {of_auto} here"]
    notes.append("difference: of the losses, relative, or of the pose deltas, absolute, between the precisions")
    write_results("precision", rows, notes, settings.quick)


def made_up_trainer(config: Config) -> StateVLATrainer:
    torch.manual_seed(0)
    trainer = build_trainer(config, phase=1)
    trainer.robot_normalizer.fit(torch.randn(64, config.model.robot_state_dim))
    trainer.model.state_scaling.fit(torch.randn(64, config.model.state_dim))
    trainer.model.policy.normalizer.fit(torch.rand(64, 6) * 2 - 1)
    return trainer


def steps_of(trainer: StateVLATrainer, config: Config, batch: int) -> tuple[dict, float]:
    """A step in each precision, and how much their losses differ."""
    size = min(CAMERA, config.model.image_size)  # as the frames are kept
    obs, next_obs = (made_up_observation(batch, size, config.model.lang_emb_dim) for _ in range(2))
    samples = {
        "obs": obs,
        "next_obs": next_obs,
        "actions": torch.rand(batch, config.model.prediction_gap, config.model.action_dim) * 2 - 1,
        "robot_ahead": torch.randn(batch, len(FORESIGHT), config.model.robot_state_dim),
    }
    trained = trained_by(trainer)
    optimizer = make_optimizer(trainer, 1e-5, 0.05)

    def loss(precision: str) -> torch.Tensor:
        with in_precision(precision, CPU):
            return trainer(samples)["loss"]

    def step(precision: str) -> None:
        loss(precision).backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trainer.update_target(0.996)

    losses = []
    for precision in PRECISIONS:
        torch.manual_seed(1)  # the same arms are hidden
        losses.append(loss(precision).item())
    return {precision: (lambda p=precision: step(p)) for precision in PRECISIONS}, abs(losses[1] / losses[0] - 1)


def decisions_of(trainer: StateVLATrainer, config: Config) -> tuple[dict, float]:
    """A decision in each precision, and how much their pose deltas differ at most."""
    model = trainer.model.eval()
    obs, x_1 = made_up_observation(1, CAMERA, config.model.lang_emb_dim), model.start_of_flow(1, "zero")
    decide = {precision: RecordedDecision(model, obs, 4, precision) for precision in PRECISIONS}
    actions = [decide[precision](obs, x_1)[..., :6] for precision in PRECISIONS]
    works = {precision: (lambda p=precision: decide[p](obs, x_1)) for precision in PRECISIONS}
    return works, (actions[0] - actions[1]).abs().max().item()


if __name__ == "__main__":
    main()
