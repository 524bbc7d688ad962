"""What a GPU does with this code; benchmarks/gpu.sh runs all of it. Without a GPU every part runs small, on the CPU.

    python benchmarks/gpu.py kernels      every backend's outputs and gradients against the recurrence in float64
    python benchmarks/gpu.py memory       peak of a phase-1 step at batch 32 to 256, with and without checkpointing
    python benchmarks/gpu.py throughput   samples a second of phase 1, of encoding frames, and of phase 2, by batch size
    python benchmarks/gpu.py training DIR what train.py logged in DIR: speed, waiting, losses

The guide's own figures for memory stand in GUIDE_GB: what a batch of its model takes on the authors' GPU.
"""

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from flops import count
from measure import NO_FORESIGHT, REPO, peak_memory_gb, print_table, seconds, spread, write_results
from torch import Tensor

from config import Config, load_config
from errors import BadInput
from jepa import mamba
from observation import CAMERAS
from statevla_model import StateVLA, StateVLATrainer, build_trainer
from training.optimizer import make_optimizer
from training.processes import choose_device

GUIDE_GB = {32: 10, 64: 16, 128: 24, 256: 40}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, from the data sheets
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["kernels", "memory", "throughput", "training"])
    parser.add_argument("directory", nargs="?", type=Path, help="training: the checkpoint directory of the run")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    settings = parser.parse_args()
    torch.manual_seed(0)
    if GPU:
        choose_device("cuda")  # sets what train.py sets, TF32 among it
    notes = (
        []
        if GPU
        else ["no GPU here: small sizes on the CPU, and the rows of CUDA kernels, graphs and bf16 are missing"]
    )
    parts = {"kernels": kernels, "memory": memory, "throughput": throughput}
    found = training(settings.directory) if settings.part == "training" else parts[settings.part](settings.quick)
    rows = []
    for row in found:  # written after every row: a limit on the time then costs the rest, not all
        rows.append(row)
        print(row, flush=True)
        write_results(f"gpu_{settings.part}", rows, notes, settings.quick, announce=False)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print_table(f"{settings.part} on {DEVICE}", columns, [[row.get(column, "") for column in columns] for row in rows])
    write_results(f"gpu_{settings.part}", rows, notes, settings.quick)
    for note in notes:
        print(note)
    if any(row.get("right") is False for row in rows):
        sys.exit("some kernels are wrong, see the table")


def guide(quick: bool, *changes: str) -> Config:
    tiny = ["model.encoder_depth=2", "model.image_size=32", "model.embed_dim=64", "model.state_dim=64"] if quick else []
    return load_config(REPO / "conf/config.yaml", [*tiny, NO_FORESIGHT, *changes])


def backends() -> list[str]:
    """Those that run here, the plain scan first."""
    working = ["torch"]
    for name in ("cuda",) if GPU else ("cpp",):
        try:
            working.append(mamba.choose_mamba_backend(name, DEVICE))
        except BadInput as problem:
            print(problem)
    return working


def autocast(bfloat16: bool) -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=bfloat16)


# Kernels


def kernels(quick: bool) -> Iterator[dict]:
    """A two-layer stack with the encoder's shapes and with the policy's: output, gradients, milliseconds.

    float32 is float32 here, no TF32, so that only a kernel's own errors show."""
    shapes = {"encoder": (4 if GPU else 1, 395, 256, True), "policy": (64, 12, 256, False)}
    if quick:
        shapes = {"encoder": (2, 35, 32, True)}
    for name, (batch, tokens, width, with_mlp) in shapes.items():
        stack = mamba.MambaStack(2, width, 16, 4, 2, with_mlp).to(DEVICE)
        x = torch.randn(batch, tokens, width, device=DEVICE)
        expected = {last: exactly(stack, x, last) for last in (None, 1)}
        for backend in backends():
            mamba.choose_mamba_backend(backend, DEVICE)
            for last in (None, 1):
                for bfloat16 in (False, True):
                    torch.set_float32_matmul_precision("highest")
                    with autocast(bfloat16):
                        found = output_and_gradients(stack, x, last)
                    errors = [relative_error(f, e) for f, e in zip(found, expected[last], strict=True)]
                    if GPU:
                        torch.set_float32_matmul_precision("high")
                    yield {
                        "shape": f"{name}{'' if last is None else ', last token'}",
                        "backend": backend,
                        "precision": "bf16" if bfloat16 else "fp32",
                        "output_error": errors[0],
                        "largest_gradient_error": max(errors[1:]),
                        "right": max(errors) < (0.1 if bfloat16 else 1e-3),
                        "training_ms": timed(lambda s=stack, v=x, n=last, b=bfloat16: trains(s, v, n, b), quick),
                    }


def exactly(stack: mamba.MambaStack, x: Tensor, last: int | None) -> list[Tensor]:
    """In float64, with the recurrence of the paper token by token."""
    mamba.choose_mamba_backend("torch", DEVICE)
    fast, mamba.selective_scan = mamba.selective_scan, mamba.selective_scan_reference
    try:
        return output_and_gradients(copy.deepcopy(stack).double(), x.double(), last)
    finally:
        mamba.selective_scan = fast


def output_and_gradients(stack: mamba.MambaStack, x: Tensor, last: int | None) -> list[Tensor]:
    y = stack(x, last=last)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), list(stack.parameters()))]


def trains(stack: mamba.MambaStack, x: Tensor, last: int | None, bfloat16: bool) -> None:
    with autocast(bfloat16):
        y = stack(x, last=last)
    torch.autograd.grad(y.float().square().mean(), list(stack.parameters()))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def timed(work, quick: bool, rounds: int = 20) -> float:
    """Milliseconds, the median of some calls after a warm-up."""
    rounds = 1 if quick else rounds if GPU else 3
    for _ in range(1 if quick else 3):
        work()
    return spread([seconds(work) for _ in range(rounds)])["median"] * 1e3


# The whole model


def phase1_batch(config: Config, batch: int, pixels: int = 128) -> dict:
    """As the loader gives it: LIBERO's 128-pixel pictures, uint8, on the device."""
    obs, next_obs = (made_up(config, batch, pixels) for _ in range(2))
    actions = torch.rand(batch, config.model.prediction_gap, config.model.action_dim, device=DEVICE)
    return {"obs": obs, "actions": actions, "next_obs": next_obs}


def made_up(config: Config, batch: int, pixels: int) -> dict[str, Tensor]:
    shape = (batch, pixels, pixels, 3)
    obs = {camera: torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE) for camera in CAMERAS}
    obs["joint_states"] = torch.randn(batch, 7, device=DEVICE)
    obs["gripper_states"] = torch.rand(batch, 2, device=DEVICE) / 25
    return obs | {"language": F.normalize(torch.randn(batch, config.model.lang_emb_dim, device=DEVICE), dim=-1)}


def step_of(trainer: StateVLATrainer, batch: dict, bfloat16: bool):
    """One training step as train.py does it: losses, backward, clipping, AdamW and, in phase 1, the target."""
    optimizer = make_optimizer(trainer, 1e-4, 0.05)
    trainable = [parameter for parameter in trainer.parameters() if parameter.requires_grad]

    def step():
        with autocast(bfloat16):
            losses = trainer(batch)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if trainer.phase == 1:
            trainer.update_target(0.996)

    return step


def memory(quick: bool) -> Iterator[dict]:
    """On CUDA the allocator's peak over two steps, the optimizer's state included; on a CPU the process's peak so far,
    which only grows, so the rows come in that order."""
    backend = backends()[-1]
    for batch in GUIDE_GB if GPU and not quick else (2, 4):
        for checkpointing in (True, False):
            for precision in ("bf16", "fp32") if GPU else ("fp32",):
                row = {"batch": batch, "checkpointing": checkpointing, "precision": precision, "backend": backend}
                config = guide(quick or not GPU, f"training.activation_checkpointing={str(checkpointing).lower()}")
                row |= peak_of_a_step(config, batch, precision == "bf16")
                if batch in GUIDE_GB and "peak_gb" in row:
                    row |= {"guide_gb": GUIDE_GB[batch], "share_of_guide": row["peak_gb"] / GUIDE_GB[batch]}
                yield row


def peak_of_a_step(config: Config, batch: int, bfloat16: bool) -> dict:
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer = build_trainer(config, phase=1).to(DEVICE)
        step = step_of(trainer, phase1_batch(config, batch), bfloat16)
        for _ in range(2):
            step()
    except torch.cuda.OutOfMemoryError:
        return {"missing": "out of memory"}
    if not GPU:
        return {"peak_gb": peak_memory_gb()}
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9, "reserved_gb": torch.cuda.max_memory_reserved() / 1e9}


def throughput(quick: bool) -> Iterator[dict]:
    """Data already on the device: what the model alone can take. `share_of_peak` counts the matrix products and the
    scan, of what data sheets give for bf16. The plain scan is there for comparison, at one batch size."""
    config = guide(quick or not GPU)
    mamba.choose_mamba_backend("torch", torch.device("cpu"))
    per_sample = count(build_trainer(config, phase=1), config, 128)["one phase-1 sample"]
    peak = next((flops for name, flops in PEAK_FLOPS.items() if GPU and name in torch.cuda.get_device_name()), None)
    trainers = {phase: build_trainer(config, phase).to(DEVICE) for phase in (1, 2)}
    batches = {"phase 1": (2, 4), "encoding frames": (2,), "phase 2, stored states": (8,)}
    if GPU and not quick:
        batches = {
            "phase 1": (64, 32, 128, 256, 512),
            "encoding frames": (64, 512),
            "phase 2, stored states": (64, 256, 1024, 4096),
        }
    for backend in reversed(backends()):
        mamba.choose_mamba_backend(backend, DEVICE)
        for precision in ("bf16", "fp32") if GPU else ("fp32",):
            for what, sizes in batches.items():
                for batch in sizes[:1] if backend == "torch" else sizes:
                    row = {"what": what, "backend": backend, "precision": precision, "batch": batch}
                    row |= rate(what, trainers, config, batch, precision == "bf16", quick)
                    if peak and what == "phase 1" and "samples_per_s" in row:
                        row["share_of_peak"] = row["samples_per_s"] * per_sample / peak
                    yield row


def rate(what: str, trainers: dict, config: Config, batch: int, bfloat16: bool, quick: bool) -> dict:
    try:
        if what == "phase 1":
            work = step_of(trainers[1], phase1_batch(config, batch), bfloat16)
        elif what == "encoding frames":
            work = encoding(trainers[2].model, made_up(config, batch, 128), bfloat16)
        else:
            work = step_of(trainers[2], phase2_batch(trainers[2], config, batch), bfloat16)
        milliseconds = timed(work, quick, rounds=10)
    except torch.cuda.OutOfMemoryError:
        return {"missing": "out of memory"}
    return {"ms": milliseconds, "samples_per_s": batch / milliseconds * 1e3}


def encoding(model: StateVLA, obs: dict, bfloat16: bool):
    def encode():
        with torch.no_grad(), autocast(bfloat16):
            model.encode(obs)

    return encode


def phase2_batch(trainer: StateVLATrainer, config: Config, batch: int) -> dict:
    z_t = torch.randn(batch, config.model.state_dim, device=DEVICE)
    actions = torch.rand(batch, config.model.action_seq_len, 7, device=DEVICE).mul(2).sub(1)
    actions[..., 6] = actions[..., 6].sign()
    trainer.model.state_scaling.fit(z_t)
    trainer.model.policy.normalizer.fit(actions[..., :6].flatten(0, 1))
    return {"z_t": z_t, "actions": actions}


# A run of train.py


def training(directory: Path) -> Iterator[dict]:
    for log in sorted(directory.glob("phase*/metrics.jsonl")):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        steps = [line for line in lines if line["split"] == "train"]
        steps = steps[1:] or steps  # the first line warms up
        validated = [line for line in lines if line["split"] == "validation"]
        yield {
            "run": log.parent.name,
            "steps": steps[-1]["step"],
            "samples_per_s": spread([line["samples_per_s"] for line in steps])["median"],
            "waiting_for_data": spread([line["waiting_for_data"] for line in steps])["median"],
            "first_validation_loss": validated[0]["loss"],
            "last_validation_loss": validated[-1]["loss"],
        }


if __name__ == "__main__":
    main()
