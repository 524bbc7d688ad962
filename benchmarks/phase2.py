"""What do 1,000 epochs of phase 2 cost with the frozen states stored, and with every frame encoded in every epoch?

    python benchmarks/phase2.py

The encoder is frozen, so z_t of a frame never changes. Three things are measured on a slice: a training step from
stored states, the same step from pictures, and the encoding of a frame. The two steps alternate with the same noise,
and their losses have to agree. The cost of all epochs follows by counting steps and encoder passes. The model has the
guide's size; the demos are made up.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from measure import REPO, arguments, compared, interleaved, print_table, ratio_text, write_results
from synthetic_demos import write_demos

from config import load_config
from dataloader import Batches, LowDimensional, chunk_rows, every_frame
from demos.frames import open_frames
from demos.hdf5 import load_demos
from demos.language import load_languages
from demos.states import by_row, encode_drawn
from jepa.mamba import choose_mamba_backend
from statevla_model import build_trainer
from training.optimizer import make_optimizer
from training.processes import choose_device

EPOCHS, SAMPLES, FRAMES = 1000, 70_000, 74_500  # the guide's epochs and data set


def main() -> None:
    settings = arguments(__doc__)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(Path(folder), settings.quick)
    by_name = {row["what"]: row["seconds"]["median"] for row in rows}
    stored, again, encoding = by_name["step, stored states"], by_name["step, encoding"], by_name["encoding a batch"]
    batch_size = rows[0]["batch"]

    steps = EPOCHS * SAMPLES / batch_size
    totals = [
        {"what": "all epochs, stored states", "encoder_passes": FRAMES,
         "total_seconds": FRAMES / batch_size * encoding + steps * stored},
        {"what": "all epochs, encoding", "encoder_passes": EPOCHS * SAMPLES, "total_seconds": steps * again},
    ]  # fmt: skip
    gain = totals[1]["total_seconds"] / totals[0]["total_seconds"]
    ratio = ratio_text(rows[1]["ratio"])
    print_table(
        f"{EPOCHS:,} epochs of {SAMPLES:,} samples, extrapolated from the steps measured",
        ["what", "encoder passes", "relative time"],
        [[t["what"], f"{t['encoder_passes']:,}", t["total_seconds"] / totals[0]["total_seconds"]] for t in totals],
    )
    print(f"\none step with encoding takes {ratio} times as long as from stored states; all epochs {gain:.3g} times")
    print(f"largest relative difference of the losses: {rows[0]['loss_difference']:.1e}")
    notes = [f"extrapolated to {EPOCHS} epochs of {SAMPLES} samples and {FRAMES} frames from steps of {batch_size}"]
    totals[1]["gain"] = gain
    write_results("phase2", rows + totals, notes, settings.quick)


def measured(folder: Path, quick: bool) -> list[dict]:
    """A slice: as many frames as a few batches, the guide's model, the real loader, optimizer and losses."""
    batch_size = 4 if quick else 32
    tiny = ["model.encoder_depth=1", "model.image_size=32"] if quick else []
    config = load_config(REPO / "conf/config.yaml", [f"data.data_directory={folder}", *tiny])
    write_demos(folder, demos=2, steps=20 if quick else 40, image_size=32 if quick else 128)
    device = choose_device("auto")
    choose_mamba_backend("auto", device)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    demos, _ = load_demos(config.data, config.model.action_seq_len)
    language = load_languages(config.data, demos, config.model.lang_emb_dim)
    low_dimensional = LowDimensional(demos, language, device)
    frames = open_frames(demos, config.data, config.model.image_size, device)
    trainer = build_trainer(config, phase=2).to(device)
    optimizer = make_optimizer(trainer, 5e-5, 0.05)

    batches = every_frame(demos, low_dimensional, frames, batch_size)
    states = by_row(encode_drawn(trainer.model, demos, batches), demos)
    trainer.model.state_scaling.fit(states)
    trainer.model.policy.normalizer.fit(torch.cat([demo.actions[:, :6] for demo in demos]))
    options = {"low_dimensional": low_dimensional, "num_actions": config.model.action_seq_len, "seed": 0}
    rows = chunk_rows(demos, config.model.action_seq_len)
    batch_of = {
        "step, stored states": next(iter(Batches(rows, batch_size=batch_size, states=states, **options))),
        "step, encoding": next(iter(Batches(rows, batch_size=batch_size, frames=frames, **options))),
    }

    @torch.no_grad()
    def encode(obs):
        trainer.model.encode(obs)

    def loss(batch):
        torch.manual_seed(1)  # the same noise and sigma on both sides
        return trainer(batch)["loss"]

    def step(batch):
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    stored, again = (loss(batch).item() for batch in batch_of.values())
    difference = abs(stored - again) / abs(again)
    if not difference < 1e-4:
        raise SystemExit(f"the losses differ: {stored} from stored states, {again} when encoding")
    sides = {what: (lambda b=batch: step(b)) for what, batch in batch_of.items()}
    sides["encoding a batch"] = lambda: encode(batch_of["step, encoding"]["obs"])
    times = interleaved(sides, rounds=2 if quick else 5)
    return [
        {"what": what, "batch": batch_size, "loss_difference": difference, **of_side}
        for what, of_side in compared(times, "step, stored states").items()
    ]


if __name__ == "__main__":
    main()
