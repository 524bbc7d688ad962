"""Trainings that are interrupted, killed, hung or fed with what is not finite, alone and as two processes with gloo."""

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import fitted, phase1_batch, refused, run, settings, small_config, train_here
from libero_files import write_task_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import train
import training.interruption
import training.processes
from errors import BadInput
from jepa.temporal_predictor import FORESIGHT
from statevla_model import StateVLATrainer, build_trainer
from training.checkpoint import read_checkpoint
from training.interruption import Interruption
from training.processes import join_processes
from training.run_log import PHASE_DIRECTORIES
from training.saving import check_disk_space

EPOCHS, STEPS = 3, 5  # of every training here
FORK = multiprocessing.get_context("fork")  # torch is imported already


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demos")
    write_task_file(directory, demos=4, steps=29)  # 84 samples of phase 1 train, 57 of phase 2
    run("embed_language.py", "--data_directory", directory, "--encoder", "offline")
    return directory


@pytest.fixture(scope="module")
def encoder(data, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    run("train.py", "--phase", 1, *small(1, data, directory), "--set", "training.phase1.num_epochs=0")
    return directory / PHASE_DIRECTORIES[1] / "checkpoint_latest.pt"


def small(phase: int, data: Path, directory: Path, ranks: int = 1, **changes: object) -> list[str]:
    """With everything that draws noise, and log lines that span epochs."""
    batch_size = {1: 16, 2: 10}[phase] // ranks
    changes = {
        "data__data_directory": data, "training__checkpoint_directory": directory, "training__batch_size": batch_size,
        "training__phase1__image_shift": 2, "training__phase1__proprioception_masking": 0.5,
        "training__phase2__weight_average": 0.9, "training__log_interval": 3, "training__save_interval": 1000,
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
    with said.open("w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        work(rank, *arguments)


def ranks_of(number: int, folder: Path, work: Callable, *arguments: object) -> list[tuple[int, str]]:
    """work(rank, *arguments) in so many processes: the exit code of each, and what it said."""
    folder.mkdir(parents=True, exist_ok=True)
    port, said = free_port(), [folder / f"said_{rank}.txt" for rank in range(number)]
    processes = [
        FORK.Process(target=rank_of, args=(rank, number, port, said[rank], work, arguments)) for rank in range(number)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
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
            del checkpoint["config"], checkpoint["code"]
        assert_same(one, other, name)
    assert_same(lines_of(found), lines_of(expected))


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize("phase, ranks", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_interrupted_and_resumed_is_the_run_that_it_would_have_been(data, encoder, tmp_path, phase, ranks):
    """In the middle of an epoch, after its last step and after its validation, by a signal to one of the processes."""
    folder, start = PHASE_DIRECTORIES[phase], ["--phase1_checkpoint", str(encoder)] if phase == 2 else []
    command = ["--phase", str(phase), *start, "--resume"]
    whole = [*command, *small(phase, data, tmp_path / "whole", ranks)]
    assert [code for code, _ in ranks_of(ranks, tmp_path / "0", trained, whole, {})] == [0] * ranks
    parts = [*command, *small(phase, data, tmp_path / "parts", ranks)]
    stops = [(2, signal.SIGTERM, 3), (1, signal.SIGINT, 5), (3, signal.SIGTERM, 9), (1, signal.SIGTERM, 10)]
    for stop, (at, number, done) in enumerate(stops):  # by the step after that in which it came
        hurt = {ranks - 1: (at, send(number))}
        ends = ranks_of(ranks, tmp_path / f"{stop + 1}", trained, parts, hurt)
        assert [code for code, _ in ends] == [128 + number] * ranks, ends
        said = ends[0][1]
        assert f"{signal.Signals(number).name}: saved after step {done}; the same command goes on" in said, said
        assert "Traceback" not in "".join(said for _, said in ends)
        checkpoint = read_checkpoint(tmp_path / "parts" / folder / "checkpoint_latest.pt")
        within = stop < 3
        assert (checkpoint["step"], checkpoint["epoch"]) == (done, (done - within) // STEPS)
        assert math.isnan(checkpoint["loss"]) == within
    assert [code for code, _ in ranks_of(ranks, tmp_path / "5", trained, parts, {})] == [0] * ranks
    assert_same_run(tmp_path / "parts" / folder, tmp_path / "whole" / folder)
    assert not list((tmp_path / "parts").glob("**/*.part")) and not list((tmp_path / "parts").glob(".*.lock"))


@pytest.mark.slow
def test_another_number_of_processes_goes_on_within_the_epoch_and_says_that_it_is_another_run(data, tmp_path):
    two, one = (["--phase", "1", "--resume", *small(1, data, tmp_path, ranks)] for ranks in (2, 1))
    assert ranks_of(2, tmp_path / "two", trained, two, {0: (7, send(signal.SIGTERM))})[0][0] == 143
    code, said = ranks_of(1, tmp_path / "one", trained, one, {})[0]
    assert code == 0 and "note: it was trained on 2 process(es) so far and goes on on 1; from here" in said
    latest = read_checkpoint(tmp_path / PHASE_DIRECTORIES[1] / "checkpoint_latest.pt")
    assert (latest["epoch"], latest["step"]) == (EPOCHS, EPOCHS * STEPS)
    assert [step for split, step in lines_of(tmp_path / PHASE_DIRECTORIES[1]) if split == "validation"] == [5, 10, 15]


def test_the_command_to_go_on_with_is_named(data, tmp_path, monkeypatch, capsys):
    both = small(1, data, tmp_path)
    clip = train.clip_grad_norm_
    monkeypatch.setattr(train, "clip_grad_norm_", lambda *words: (send(signal.SIGINT)(), clip(*words))[1])
    with pytest.raises(SystemExit, match="130"):
        train_here(monkeypatch, "--phase", 1, *both)
    latest = tmp_path / PHASE_DIRECTORIES[1] / "checkpoint_latest.pt"
    said = capsys.readouterr().out
    assert f"SIGINT: saved after step 2; the same command with --checkpoint {latest} goes on" in said
    monkeypatch.setattr(train, "clip_grad_norm_", clip)
    train_here(monkeypatch, "--phase", 1, *both, "--checkpoint", latest)
    assert read_checkpoint(latest)["epoch"] == EPOCHS
    assert "give one of them" in refused(monkeypatch, capsys, "--phase", 1, *both, "--checkpoint", latest, "--resume")


def two_signals(_rank: int, pause: float) -> None:
    training.interruption.TWICE_BY_CHANCE = 0.05
    with Interruption() as interruption:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.number == signal.SIGTERM
            time.sleep(pause)
        sys.exit(7)


@pytest.mark.parametrize("pause, code", [(0.0, 7), (0.1, 143)])
def test_a_second_signal_ends_a_process_at_once_unless_it_is_the_first_one_twice(tmp_path, pause, code):
    """torchrun and srun may both pass on the signal that they get."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert ranks_of(1, tmp_path, two_signals, pause)[0][0] == code
    with Interruption():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# ---------------------------------------------------------------------------------------------------------- saving


def written(folder: Path) -> dict[str, int]:
    """The name of every checkpoint -> its step."""
    return {path.name: torch.load(path, weights_only=True)["step"] for path in folder.glob("*.pt")}


@pytest.mark.parametrize(
    "minutes, interval, latest, best",
    [
        (1e-9, 1000, [1, 2, 3, 4, 5, 6], 1),  # within the epoch, too
        (0, 1000, [5], 1),  # after every epoch
        (10, 1000, [], 0),  # not yet
        (10, 1, [5], 1),  # with every checkpoint_epoch_N.pt
    ],
)
def test_what_is_written_and_when_is_a_setting(data, tmp_path, monkeypatch, minutes, interval, latest, best):
    """Up to the second step of the second epoch."""
    names: list[tuple[str, int]] = []
    save = training.saving.save_checkpoint
    monkeypatch.setattr(
        "training.saving.save_checkpoint",
        lambda checkpoint, path: (names.append((path.name, checkpoint["step"])), save(checkpoint, path)),
    )
    clip, steps = train.clip_grad_norm_, iter(range(1, 100))

    def stops(*words: object) -> Tensor:
        if next(steps) == STEPS + 2:
            raise BadInput("stopped here")
        return clip(*words)

    monkeypatch.setattr(train, "clip_grad_norm_", stops)
    changes = {"training__save_minutes": minutes, "training__save_interval": interval}
    with pytest.raises(SystemExit, match="2"):
        train_here(monkeypatch, "--phase", 1, *small(1, data, tmp_path, **changes))
    assert sorted({step for name, step in names if name == "checkpoint_latest.pt"}) == latest
    assert [name for name, _ in names].count("checkpoint_best.pt") == best
    assert [name for name, _ in names].count("checkpoint_epoch_1.pt") == (interval == 1)


def test_a_disk_without_room_for_the_run_is_named_before_it_begins(tmp_path, monkeypatch):
    trainer = build_trainer(small_config(), 1)
    trained = [parameter for parameter in trainer.parameters() if parameter.requires_grad]
    config = small_config("training.save_interval=100").training
    size = sum(value.numel() * 4 for value in trainer.state_dict().values()) + 8 * sum(p.numel() for p in trained)
    arguments = (tmp_path / "runs/phase1", trainer, trained, False, config, range(1000))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=13.5 * size))
    check_disk_space(*arguments)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12.5 * size))
    with pytest.raises(BadInput, match=r"runs/phase1 has 0\.0 GB free, but this run writes 13 checkpoints of .* 10 of"):
        check_disk_space(*arguments)
    torch.save(torch.zeros(1), tmp_path / "checkpoint_latest.pt")
    check_disk_space(tmp_path, *arguments[1:5], range(1, 1000))  # one of them is there already


# ------------------------------------------------------------------------------------------------------- bad steps


def with_bad_losses(rank: int, command: list[str], bad: set[int], of_rank: int) -> None:
    """A training in which the loss of one process is infinite at the steps `bad`."""
    losses, steps = StateVLATrainer.phase2_losses, iter(range(1, 10**6))

    def infinite(self, batch, per_sample=False):
        found = losses(self, batch, per_sample)
        if self.training and next(steps) in bad and rank == of_rank:
            found["loss"] = found["loss"] + math.inf  # its gradient is finite
        return found

    StateVLATrainer.phase2_losses = infinite
    trained(rank, command, {})


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(data, encoder, tmp_path):
    """And the weights of all of them stay the same: a validation whose loss is that of both shows it."""
    command = ["--phase", "2", "--phase1_checkpoint", str(encoder), *small(2, data, tmp_path, 2)]
    ends = ranks_of(2, tmp_path / "said", with_bad_losses, command, {2, 3, 8}, 1)
    assert [code for code, _ in ends] == [0, 0], ends
    said = ends[0][1]
    for step, in_a_row, in_all in ((2, 1, 1), (3, 2, 2), (8, 1, 3)):
        assert f"step skipped ({in_a_row} in a row, {in_all} in all): gradient_norm at step {step} not finite" in said
    assert f"the step's samples are from {next(data.glob('*.hdf5')).name}/demo_" in said
    latest = read_checkpoint(tmp_path / PHASE_DIRECTORIES[2] / "checkpoint_latest.pt")
    assert latest["progress"]["bad_steps"] == {"in_all": 3, "in_a_row": 0}
    states = latest["optimizer_state_dict"]["state"].values()
    assert {int(state["step"]) for state in states} == {EPOCHS * STEPS - 3} == {latest["progress"]["average_updates"]}
    lines = lines_of(tmp_path / PHASE_DIRECTORIES[2])
    assert ("train", 3) in lines and all(math.isfinite(line["loss"]) for line in lines.values())


def test_too_many_bad_steps_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(data, encoder, tmp_path):
    command = ["--phase", "2", "--phase1_checkpoint", str(encoder), "--set", "training.max_bad_steps=3"]
    command += small(2, data, tmp_path, training__save_minutes=0)
    code, said = ranks_of(1, tmp_path / "said", with_bad_losses, command, {2, 3, 7, 8, 9}, 0)[0]
    assert code == 2 and "Traceback" not in said
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "training diverged: 3 step(s) in a row were skipped, loss, gradient_norm at step 9 not finite" in error
    assert "demo_" in error and "lower the learning rate" in error
    assert set(written(tmp_path / PHASE_DIRECTORIES[2]).values()) == {5}


# ---------------------------------------------------------------------------------------------- dead and hung ranks


def first_takes_its_time(rank: int) -> None:
    processes = join_processes("cpu", timeout_minutes=1 / 60)
    with processes.first_alone():
        if rank == 0:
            time.sleep(2)
    assert processes.largest(rank, -rank)() == [1, 0]
    assert processes.rows(torch.tensor([rank, 5])).tolist() == [[0, 5], [1, 5]]


@pytest.mark.slow
def test_processes_wait_for_the_first_ones_own_work_for_longer_than_for_a_hung_one(tmp_path):
    ends = ranks_of(2, tmp_path, first_takes_its_time)
    assert [code for code, _ in ends] == [0, 0], ends


def ends_early() -> None:
    raise BadInput("what went wrong here")


@pytest.mark.slow
@pytest.mark.parametrize("what, code", [(send(signal.SIGKILL), -9), (send(signal.SIGSTOP), -9), (ends_early, 2)])
def test_a_rank_that_died_or_hangs_ends_the_others_with_a_sentence_that_names_it(
    data, tmp_path, monkeypatch, what, code
):
    monkeypatch.setattr(training.processes, "ROLL_CALL_SECONDS", 1.0)
    command = ["--phase", "1", *small(1, data, tmp_path, 2, training__rank_timeout_minutes=2 / 60)]
    began = time.monotonic()
    with stopped_ones_killed(tmp_path / "said"):
        ends = ranks_of(2, tmp_path / "said", trained, command, {1: (3, what)})
    assert [end for end, _ in ends] == [2, code], ends
    errors = [line for line in ends[0][1].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(
        "error: process 1 of 0 to 1 has ended, or has stood still for 0.03"
    )
    assert "Traceback" not in ends[0][1]
    assert ("error: what went wrong here" in ends[1][1]) == (code == 2)
    assert time.monotonic() - began < 30


@contextlib.contextmanager
def stopped_ones_killed(folder: Path):
    """A process that does not go on would keep its test waiting: it is killed as soon as the other one has ended."""
    import threading

    def kill() -> None:
        while not over.wait(0.2):
            children = FORK.active_children() if hasattr(FORK, "active_children") else multiprocessing.active_children()
            if len(children) == 1 and "State:\tT" in Path(f"/proc/{children[0].pid}/status").read_text():
                children[0].kill()

    over = threading.Event()
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# ---------------------------------------------------------------------------------------------------- accumulation


def trainer_and_batches(phase: int, parts: int, ranks: int = 1, rank: int = 0) -> tuple[StateVLATrainer, list[dict]]:
    """Eight samples, in so many batches on each of so many processes."""
    torch.manual_seed(0)
    config = small_config("training.phase1.foresight_weight=1.0", "training.phase2.freeze_encoder=false")
    trainer = build_trainer(config, phase)
    fitted(trainer.model)
    if phase == 1:
        trainer.robot_normalizer.fit(torch.randn(100, 9))
    batch = phase1_batch(8) | {"actions": torch.rand(8, 2 if phase == 1 else 10, 7).double() * 2 - 1}
    batch |= {"robot_ahead": torch.randn(8, len(FORESIGHT), 9)}

    def of(value, index):
        return {key: of(v, index) for key, v in value.items()} if isinstance(value, dict) else value[index]

    shares = torch.arange(8).view(parts, ranks, -1)[:, rank]  # part i of all ranks together, then part i + 1
    return trainer.double(), [of(batch, share) for share in shares]


def gradients_of(trainer: StateVLATrainer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in trainer.named_parameters() if p.requires_grad}


def gradients(phase: int, parts: int, ranks: int = 1, rank: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    trainer, batches = trainer_and_batches(phase, parts, ranks, rank)
    model = DistributedDataParallel(trainer) if ranks > 1 else trainer
    losses = model(*batches)
    losses["loss"].backward()
    return losses, gradients_of(trainer)


def accumulated(rank: int, results: Path) -> None:
    join_processes("cpu", 1)
    torch.save(gradients(1, 2, 2, rank), results / f"{rank}.pt")


@pytest.mark.slow
def test_accumulated_batches_are_one_batch_on_any_number_of_processes(tmp_path):
    """VICReg's statistics, too, which no sum over batches would give."""
    losses, expected = gradients(1, 1)
    assert all(code == 0 for code, _ in ranks_of(2, tmp_path, accumulated, tmp_path))
    on_two = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found_losses, found in (gradients(1, 2), gradients(1, 4), *on_two):
        assert found_losses["jepa_variance"].item() == pytest.approx(losses["jepa_variance"].item(), rel=1e-9)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_phase_2_accumulates_the_mean_over_its_batches_with_the_noise_that_each_drew():
    trainer, batches = trainer_and_batches(2, 4)
    torch.manual_seed(1)
    trainer(*batches)["loss"].backward()
    found = {name: gradient.clone() for name, gradient in gradients_of(trainer).items()}
    trainer.zero_grad()
    torch.manual_seed(1)
    for batch in batches:
        (trainer(batch)["loss"] / len(batches)).backward()
    for name, expected in gradients_of(trainer).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12, msg=name)


def test_accumulated_batches_train_as_one_of_their_size(data, tmp_path, monkeypatch):
    """Up to the order of sums: no noise is drawn here."""
    still = {f"training__phase1__{key}": 0 for key in ("image_shift", "proprioception_masking")}
    still["training__phase1__num_epochs"] = 1
    for name, batch_size, accumulate in (("one", 16, 1), ("four", 4, 4)):
        sizes = {"training__batch_size": batch_size, "training__accumulate": accumulate}
        train_here(monkeypatch, "--phase", 1, *small(1, data, tmp_path / name, **sizes, **still))
    one, four = (lines_of(tmp_path / name / PHASE_DIRECTORIES[1]) for name in ("one", "four"))
    assert one.keys() == four.keys()
    for key, line in one.items():
        assert four[key]["loss"] == pytest.approx(line["loss"], rel=1e-3), key


def test_more_accumulated_samples_than_there_are_is_one_sentence(data, tmp_path, monkeypatch, capsys):
    both = small(1, data, tmp_path, training__accumulate=6)
    said = refused(monkeypatch, capsys, "--phase", 1, *both)
    assert "training.accumulate is 6: a step takes 96 samples on 1 process(es), but there are only 84" in said
