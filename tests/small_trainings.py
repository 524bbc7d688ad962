"""Trainings of a second, forked from the tests' own process, where torch is imported: alone or as the ranks of a run,
hurt at a step of their own, and compared bit for bit."""

import contextlib
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from helpers import INSTRUCTION, run, settings
from libero_files import write_task_file
from torch import Tensor

import train

EPOCHS, STEPS = 3, 5  # of every training here
FORK = multiprocessing.get_context("fork")


def small_data(directory: Path) -> Path:
    write_task_file(directory, demos=4, steps=29)  # 84 samples of phase 1 train, 57 of phase 2
    vector = np.full((1, 512), 512**-0.5, dtype=np.float32)  # an encoder takes seconds to load
    np.savez(directory / "language_embeddings.npz", texts=[INSTRUCTION], embeddings=vector, encoder="test encoder")
    one_epoch = ("--set", "training.phase1.num_epochs=1")  # what torch imports on first use, the forked ones then have
    run("train.py", "--phase", 1, *small(1, directory, directory / "first"), *one_epoch)
    return directory


def small(phase: int, data: Path, directory: Path, ranks: int = 1, **changes: object) -> list[str]:
    """With everything that draws noise, and log lines that span epochs."""
    batch_size = {1: 16, 2: 10}[phase] // ranks
    changes = {
        "data__data_directory": data, "training__checkpoint_directory": directory, "training__batch_size": batch_size,
        "training__phase1__image_shift": 2, "training__phase1__proprioception_masking": 0.5,
        "training__log_interval": 3, "training__save_interval": 1000,
        "training__mamba_backend": "torch", "training__precision": "fp32", "model__encoder_depth": 1,
        "training__save_minutes": 10, "training__learning_rate_schedule": "cosine",
    } | changes  # fmt: skip
    return [str(word) for word in settings(**changes)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rank_of(rank: int, ranks: int, port: int, said: Path, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with said.open("a") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        for descriptor in (1, 2):  # what libraries and processes of its own say
            os.dup2(stream.fileno(), descriptor)
        work(rank, *arguments)


def ranks_of(
    number: int, folder: Path, work: Callable, *arguments: object, patience: float = 60
) -> list[tuple[int, str]]:
    """work(rank, *arguments) in so many processes: the exit code of each, and what it said."""
    folder.mkdir(parents=True, exist_ok=True)
    port, said = free_port(), [folder / f"said_{rank}.txt" for rank in range(number)]
    processes = [
        FORK.Process(target=rank_of, args=(rank, number, port, said[rank], work, arguments)) for rank in range(number)
    ]
    for path in said:
        path.unlink(missing_ok=True)
    for process in processes:
        process.start()
    for process in processes:
        process.join(patience)
        if process.is_alive():
            process.kill()
            process.join()
    return [(process.exitcode, path.read_text()) for process, path in zip(processes, said, strict=True)]


def at_step(number: int, what: Callable) -> None:
    """Calls it between the gradient and the optimizer of this process's step `number`, the first being 1."""
    clip, steps = train.clip_grad_norm_, iter(range(1, 10**6))

    def clip_and(*arguments: object) -> Tensor:
        if next(steps) == number:
            what()
        return clip(*arguments)

    train.clip_grad_norm_ = clip_and


def send(number: int) -> Callable:
    return lambda: os.kill(os.getpid(), number)


def trained(rank: int, command: list[str], hurt: dict[int, tuple[int, Callable]]) -> None:
    """train.py as one of its processes. `hurt`: rank -> step, what happens to it there."""
    sys.argv = ["train.py", *command]
    if rank in hurt:
        at_step(*hurt[rank])
    train.main()


def lines_of(folder: Path) -> dict[tuple[str, int], dict]:
    """The last line of every step, without what a clock says."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    clocks = {"samples_per_s", "waiting_for_data"}
    return {
        (line["split"], line["step"]): {key: value for key, value in line.items() if key not in clocks}
        for line in lines
    }


def assert_same(found: object, expected: object, where: str = "") -> None:
    """Bit for bit, whatever it consists of."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}[{index}]")
    else:
        assert found == expected or (found != found and expected != expected), where


def assert_same_run(found: Path, expected: Path) -> None:
    for name in ("checkpoint_latest.pt", "checkpoint_best.pt"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (found, expected))
        for checkpoint in (one, other):
            del checkpoint["config"], checkpoint["code"], checkpoint["progress"]["log_clocks"]
        assert_same(one, other, name)
    assert_same(lines_of(found), lines_of(expected))
