"""The processes of a run: one, or as many as torchrun has started."""

import os

import torch
import torch.distributed as dist

from errors import BadInput
from seeds import mixed_seed


def choose_device(name: str) -> torch.device:
    """auto takes CUDA, then Apple's MPS, then the CPU. Raises BadInput for a device that isn't there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if name not in available:
        raise BadInput(f"device is '{name}', expected auto, cuda, mps or cpu")
    if not available[name]:
        raise BadInput(f"device {name} was asked for, but this PyTorch finds none; use auto or cpu")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: float32 products at eight times the speed
    return torch.device(name)


def join_processes(device_name: str) -> torch.device:
    """This process's device. A single process is a group of one, so that one code path trains on any number.

    Raises BadInput for a device that is not there and for processes that cannot find each other.
    """
    device = choose_device(device_name)
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ  # torchrun sets both
    if not launched and os.environ.get("WORLD_SIZE", "1") != "1":
        raise BadInput(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but RANK or MASTER_ADDR is not set; start several processes "
            "with `torchrun --nproc_per_node=N train.py ...`, or unset RANK and WORLD_SIZE to train in one"
        )
    if device.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0)) if launched else 0
        if local_rank >= torch.cuda.device_count():
            raise BadInput(
                f"process {local_rank} has no GPU: --nproc_per_node exceeds {torch.cuda.device_count()} GPU(s)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not launched:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return device
    rank, world_size = os.environ["RANK"], os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise BadInput(f"RANK is {rank} and WORLD_SIZE {world_size or 'not set'}, expected 0 <= RANK < WORLD_SIZE")
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as problem:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '(MASTER_PORT is not set)')}"
        first_line, *_ = str(problem).splitlines()
        raise BadInput(f"process {os.environ['RANK']} cannot join the others at {where} ({first_line})") from None
    return device


def is_first_rank() -> bool:
    return dist.get_rank() == 0


def report(line: str) -> None:
    if is_first_rank():
        print(line, flush=True)


def seed_noise(seed: int, *of_what: int | str) -> None:
    """Noise is drawn anew from here: another on every rank, in every epoch and with every seed, the same in a resumed
    run."""
    torch.manual_seed(mixed_seed(seed, *of_what, dist.get_rank()))
