"""fp32 or bf16: what matrix products are computed in. `choose_precision` decides once, at start-up, after
jepa.mamba.choose_mamba_backend; `in_precision` runs a block of code in one of the two.

In bf16 the scan, the norms, the losses, the optimizer and the weights stay float32. On a CPU with the C++ kernel it is
the products of Mamba's blocks and of the pictures' patches (jepa/bf16.py), elsewhere all that torch.autocast makes
bfloat16.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from errors import BadInput
from jepa import bf16, cpu_kernel
from jepa.mamba import MambaStack, backend

# Of the largest value: bfloat16 has 8 bits, and its rounding adds up to 0.015 here; a wrong result is far beyond that.
TOLERANCE = 0.05


@contextmanager
def in_precision(precision: str, device: torch.device, packed: dict[nn.Module, Any] | None = None) -> Iterator[None]:
    """Runs the block in "fp32" or "bf16". A backward pass may come after it.

    `packed`, empty at first, keeps weights in the kernels' order from one call to the next. It is for weights that
    stay as they are, and None for others."""
    kernels = device.type == "cpu" and backend.name == "cpp"
    before = backend.bfloat16, backend.packed
    backend.bfloat16, backend.packed = kernels and precision == "bf16", packed
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and not kernels):
            yield
    finally:
        backend.bfloat16, backend.packed = before


@contextmanager
def blocks_in_bfloat16(wanted: bool) -> Iterator[None]:
    """Runs the block as `in_precision` had it where `backend.bfloat16` was this: what is computed once more in a
    backward pass has to be what it was. Autocast is torch's own to bring back."""
    before, backend.bfloat16 = backend.bfloat16, wanted
    try:
        yield
    finally:
        backend.bfloat16 = before


def choose_precision(precision: str, device: torch.device) -> str:
    """With auto, bf16 or fp32: says which runs from then on and why, and returns it, bf16 or fp32.

    auto takes bf16 where the device multiplies bfloat16 itself: on CUDA where PyTorch says so, on a CPU with AMX or
    AVX512-BF16 where the C++ kernel runs and a trial agrees with float32 within TOLERANCE. Raises BadInput where bf16
    is set and its kernels on the CPU do not agree.
    """
    chosen, reason = precision, "as set"
    if precision == "auto":
        chosen, reason = _best(device)
    elif (
        precision == "bf16"
        and device.type == "cpu"
        and backend.name == "cpp"
        and not cpu_kernel.has_bfloat16_products()
    ):
        reason = "as set, although this CPU does not multiply bfloat16 itself, so that it is slow"
    elif precision == "bf16" and device.type == "cpu" and backend.name == "cpp" and (problem := _disagreement()):
        raise BadInput(f"precision bf16 was asked for, but {problem}; use fp32, or --set training.mamba_backend=torch")
    if os.environ.get("RANK", "0") == "0":
        print(f"precision: {chosen} ({reason})")
    return chosen


def _best(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        there = torch.cuda.is_bf16_supported()
        return ("bf16", "the GPU multiplies bfloat16") if there else ("fp32", "the GPU does not multiply bfloat16")
    if device.type != "cpu":
        return "fp32", f"the device is {device.type}"
    if backend.name != "cpp":
        return "fp32", "bf16 needs the C++ kernel"
    if not cpu_kernel.has_bfloat16_products():
        return "fp32", "this CPU does not multiply bfloat16, as AMX and AVX512-BF16 do"
    if problem := _disagreement():
        return "fp32", problem
    return "bf16", "this CPU multiplies bfloat16, and the kernels agree with float32"


def _disagreement() -> str | None:
    """Holds blocks and patches in bf16 against float32, with gradients and without: what is wrong, None if nothing."""
    cpu = torch.device("cpu")
    with torch.random.fork_rng(), torch.enable_grad():  # the trial leaves the run's random numbers as they were
        stack = MambaStack(2, 64, d_state=16, d_conv=4, expand=2, with_mlp=True)
        patchify, positions = nn.Conv2d(3, 64, 16, 16), nn.Parameter(torch.randn(4, 64))
        pictures = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
        tokens = torch.randn(2, 21, 64)

    def patches(of_pictures: Tensor) -> Tensor:
        if backend.bfloat16:
            return bf16.patch_tokens(of_pictures, patchify, positions, packed=None)
        return patchify(of_pictures.permute(0, 3, 1, 2) / 127.5 - 1).flatten(2).mT + positions

    results = []
    for precision in ("fp32", "bf16"):
        with torch.enable_grad(), in_precision(precision, cpu):
            outputs = [stack(tokens, last=3), patches(pictures)]
            weights = [*stack.parameters(), *patchify.parameters(), positions]
            gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), weights)
        with torch.no_grad(), in_precision(precision, cpu):
            inferred = [stack(tokens, last=3), patches(pictures)]
        results.append([*outputs, *gradients, *inferred])
    differences = [(f - e).abs().max() / e.abs().max() for e, f in zip(*results, strict=True)]
    difference = torch.stack(differences).max()  # NaN where one is
    if difference < TOLERANCE:
        return None
    return f"its products differ from float32 by {difference:.1e} of the largest value"
