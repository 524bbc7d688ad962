"""Do two processes do the work of one: at what speed, with which weights, and what does the synchronising cost?

    python benchmarks/processes.py

train.py runs the same training twice: phase 1 of the quick start's model on made-up demonstrations, with one global
batch. One run is one process. The other is `torchrun` with two processes that take half of every batch each (gloo, with
half the threads each). The runs alternate. Speed is what train.py logs, and the weights of both runs are compared at
the end. They can only differ by the order of float32 sums.

A second pair of processes tells what parts of a step cost: it runs the same step with and without each of them, in
turn. They are the all-reduce of the gradients, what the processes agree on (training.processes.Processes.largest), and
the look at whether the gradient is finite.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from measure import NO_FORESIGHT, REPO, arguments, compared, interleaved, print_table, ratio_text, spread, write_results
from synthetic_demos import write_demos
from torch.nn.parallel import DistributedDataParallel

from config import load_config
from jepa.mamba import choose_mamba_backend
from observation import CAMERAS
from statevla_model import build_trainer
from training.optimizer import trained_by
from training.processes import Processes

QUICK_START = "conf/quickstart.yaml"


def main() -> None:
    settings = arguments(__doc__, worker={"action": "store_true", "help": "one of the processes that time all-reduce"})
    if settings.worker:
        time_all_reduce(settings.quick)
        return
    rounds = 1 if settings.quick else 3
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        write_demos(Path(folder) / "data", demos=4, steps=24 if settings.quick else 134, image_size=64)
        for number in range(rounds):
            for processes in (1, 2) if number % 2 == 0 else (2, 1):
                rates[processes].append(trained(Path(folder), processes, number, settings.quick))
        one, two = (weights(Path(folder) / f"runs_{processes}_0") for processes in (1, 2))
        steps = logged(Path(folder) / "runs_1_0")[-1]["step"]
    difference = max((one[name] - two[name]).abs().max().item() for name in one)
    largest = max(value.abs().max().item() for value in one.values())
    ratio = spread([two / one for one, two in zip(rates[1], rates[2], strict=True)])
    reduce = in_two_processes([__file__, "--worker"] + (["--quick"] if settings.quick else []))
    parts = json.loads(reduce.splitlines()[-1])
    ratios = parts["ratios"]

    print_table(
        "Two processes against one, the same global batch",
        ["what", "value"],
        [
            ["samples a second, as a multiple of one process", ratio_text(ratio)],
            [
                f"largest difference of any weight after {steps} steps",
                f"{difference:.1e} (largest weight {largest:.1f})",
            ],
            ["share of a step that the gradients' all-reduce takes", f"{1 - ratios['no all-reduce']['median']:.1%}"],
            ["a step with the processes' agreement, against one without", ratio_text(ratios["agreement"])],
            [
                "a step that looks whether its gradient is finite, against one that does not",
                ratio_text(ratios["finite"]),
            ],
        ],
    )
    rows = [
        {"what": "throughput", "ratio": ratio, "samples_per_s": {str(k): spread(v) for k, v in rates.items()}},
        {"what": "weights", "largest_difference": difference, "largest_weight": largest, "steps": steps},
        {
            "what": "all-reduce",
            "share": 1 - ratios["no all-reduce"]["median"],
            "without_over_with": ratios["no all-reduce"],
            "bytes": parts["bytes"],
        },
        {"what": "agreement", "with_over_without": ratios["agreement"]},
        {"what": "finite", "with_over_without": ratios["finite"]},
    ]
    notes = [
        "both runs share the same cores: a ratio near 1 says that a second process costs nothing, not that it gains"
    ]
    write_results("processes", rows, notes, settings.quick)


def trained(folder: Path, processes: int, number: int, quick: bool) -> float:
    """One epoch of phase 1 with train.py; -> its samples a second, the first lines, which warm up, left out."""
    batch_size = 16 if quick else 64
    changes = {
        "data.data_directory": folder / "data",
        "training.checkpoint_directory": folder / f"runs_{processes}_{number}",
        "training.device": "cpu",
        "training.phase1.num_epochs": 1 if quick else 3,
        "training.log_interval": 1 if quick else 2,
        "training.batch_size": batch_size // processes,
        "training.learning_rate_schedule": "constant",
    } | ({"model.encoder_depth": 1} if quick else {})
    command = ["train.py", "--config", QUICK_START, "--phase", "1"]
    for key, value in changes.items():
        command += ["--set", f"{key}={value}"]
    if processes == 1:
        subprocess.run([sys.executable, *command], cwd=REPO, check=True, capture_output=True)
    else:
        in_two_processes(command)
    return spread([line["samples_per_s"] for line in logged(folder / f"runs_{processes}_{number}")][1:])["median"]


def logged(run: Path) -> list[dict]:
    (log,) = run.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def in_two_processes(command: list[str]) -> str:
    """torchrun on this machine, each process with half of the threads; -> what the processes print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // 2))}
    return subprocess.run(launch, cwd=REPO, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob("*/checkpoint_latest.pt")
    state = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
    return {name: value for name, value in state.items() if value.isfinite().all()}  # phase 2's statistics are NaN yet


def time_all_reduce(quick: bool) -> None:
    """A step of phase 1 with DDP's all-reduce and, inside no_sync, without."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = load_config(REPO / QUICK_START, [*(["model.encoder_depth=1"] if quick else []), NO_FORESIGHT])
    choose_mamba_backend("auto", torch.device("cpu"))
    trainer = build_trainer(config, phase=1)
    ddp_trainer = DistributedDataParallel(trainer, gradient_as_bucket_view=True)
    batch_size, model = 8 if quick else 32, config.model
    shape = (batch_size, model.image_size, model.image_size, 3)
    obs = {camera: torch.randint(0, 256, shape, dtype=torch.uint8) for camera in CAMERAS}
    obs |= {"joint_states": torch.randn(batch_size, 7), "gripper_states": torch.rand(batch_size, 2) / 25}
    obs["language"] = torch.randn(batch_size, model.lang_emb_dim)
    actions = torch.rand(batch_size, model.prediction_gap, model.action_dim)

    def step():
        ddp_trainer({"obs": obs, "actions": actions, "next_obs": obs})["loss"].backward()
        trainer.zero_grad(set_to_none=False)

    def step_alone():
        with ddp_trainer.no_sync():
            step()

    agreeing = Processes(torch.device("cpu"), dist.HashStore(), timedelta(minutes=1))
    trained = trained_by(trainer)

    def step_agreed():
        told = agreeing.largest(0, False)
        step()
        told()

    def step_looked_at():
        """Whether a norm, here that of the first gradient, is finite: clipping brings the true one in any case."""
        ddp_trainer({"obs": obs, "actions": actions, "next_obs": obs})["loss"].backward()
        assert trained[0].grad is not None and trained[0].grad.norm().isfinite()
        trainer.zero_grad(set_to_none=False)

    # interleaved draws its orders from one seed, so both processes always run the same side
    sides = {"step": step, "no all-reduce": step_alone, "agreement": step_agreed, "finite": step_looked_at}
    times = interleaved(sides, rounds=2 if quick else 60)
    found = {name: row["ratio"] for name, row in compared(times, "step").items()}
    if dist.get_rank() == 0:
        trained_bytes = 4 * sum(parameter.numel() for parameter in trained)
        print(json.dumps({"ratios": found, "bytes": trained_bytes}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
