"""Trainings that are interrupted, killed, hung or fed with what is not finite, alone and as two processes with gloo."""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import h5py
import pytest
import torch
import torch.distributed
from helpers import batches_of, data_config, fitted, phase1_batch, refused, run, small_config, train_here
from small_trainings import (
    EPOCHS,
    FORK,
    STEPS,
    assert_same_run,
    free_port,
    lines_of,
    ranks_of,
    send,
    small,
    small_data,
    trained,
)
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

import check_demos
import convert_lerobot
import embed_language
import train
import training.interruption
import training.processes
from demos.hdf5 import load_demos
from errors import BadInput
from jepa.temporal_predictor import FORESIGHT
from statevla_model import StateVLATrainer, build_trainer
from training.checkpoint import read_checkpoint
from training.interruption import Interruption
from training.processes import join_processes
from training.run_log import PHASE_DIRECTORIES
from training.saving import LATEST, check_disk_space
from training.validation import validate


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_data(tmp_path_factory.mktemp("demos"))


@pytest.fixture(scope="module")
def encoder(data, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    run("train.py", "--phase", 1, *small(1, data, directory), "--set", "training.phase1.num_epochs=0")
    return directory / PHASE_DIRECTORIES[1] / "checkpoint_latest.pt"


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
    stops = [(2, signal.SIGTERM, 3), (1, signal.SIGINT, 5), (5, signal.SIGTERM, 10)]
    for stop, (at, number, done) in enumerate(stops):  # by the step after that in which it came
        hurt = {ranks - 1: (at, send(number))}
        ends = ranks_of(ranks, tmp_path / f"{stop + 1}", trained, parts, hurt)
        assert [code for code, _ in ends] == [128 + number] * ranks, ends
        said = ends[0][1]
        assert f"{signal.Signals(number).name}: saved after step {done}; the same command goes on" in said, said
        assert "Traceback" not in "".join(said for _, said in ends)
        checkpoint = read_checkpoint(tmp_path / "parts" / folder / "checkpoint_latest.pt")
        within = stop < 2
        assert (checkpoint["step"], checkpoint["epoch"]) == (done, (done - within) // STEPS)
        assert math.isnan(checkpoint["loss"]) == within
    assert [code for code, _ in ranks_of(ranks, tmp_path / "4", trained, parts, {})] == [0] * ranks
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


def test_the_speed_of_a_resumed_run_counts_the_time_before_the_interruption(data, tmp_path, monkeypatch):
    """Its first line is of steps on both sides of it."""
    command = ["--phase", 1, "--resume", *small(1, data, tmp_path, training__log_interval=STEPS)]
    clip, steps, seconds = train.clip_grad_norm_, iter(range(1, 10**6)), 0.1

    def clip_slowly(*words):
        time.sleep(seconds)
        if next(steps) == 3:
            send(signal.SIGINT)()
        return clip(*words)

    monkeypatch.setattr(train, "clip_grad_norm_", clip_slowly)
    with pytest.raises(SystemExit, match="130"):
        train_here(monkeypatch, *command)
    train_here(monkeypatch, *command)
    lines = [json.loads(line) for line in (tmp_path / PHASE_DIRECTORIES[1] / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["split"] == "train")
    assert first["step"] == STEPS
    assert 0 < first["samples_per_s"] <= 16 / seconds and 0 <= first["waiting_for_data"] < 1


def test_a_checkpoint_after_an_epoch_counts_no_validation_as_training(data, tmp_path, monkeypatch):
    validate_soon, seconds = train.validate, 2.0
    monkeypatch.setattr(train, "validate", lambda *words: (time.sleep(seconds), validate_soon(*words))[1])
    train_here(monkeypatch, "--phase", 1, *small(1, data, tmp_path, training__phase1__num_epochs=1))
    latest = read_checkpoint(tmp_path / PHASE_DIRECTORIES[1] / "checkpoint_latest.pt")
    assert 0 <= latest["progress"]["log_clocks"][0] < seconds


def test_another_batch_goes_on_within_the_epoch_with_noise_of_its_own(data, tmp_path, monkeypatch):
    """Batches of 8 draw other noise than those of 16 that the epoch was begun with, so it starts anew."""
    folder = tmp_path / PHASE_DIRECTORIES[1]
    clip, steps = train.clip_grad_norm_, iter(range(1, 10**6))
    interrupt = lambda *words: (send(signal.SIGINT)() if next(steps) == 2 else None, clip(*words))[1]  # noqa: E731
    monkeypatch.setattr(train, "clip_grad_norm_", interrupt)
    with pytest.raises(SystemExit, match="130"):
        train_here(monkeypatch, "--phase", 1, *small(1, data, tmp_path))
    taken = []
    monkeypatch.setattr("training.progress.set_noise_state", lambda *state: taken.append(state))
    latest = folder / "checkpoint_latest.pt"
    for batch_size, accumulate, times in ((8, 1, 0), (8, 2, 0), (16, 1, 1)):
        saved = latest.read_bytes()
        smaller = small(1, data, tmp_path, training__batch_size=batch_size, training__accumulate=accumulate)
        train_here(monkeypatch, "--phase", 1, *smaller, "--checkpoint", latest)
        assert len(taken) == times
        latest.write_bytes(saved)


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


@pytest.mark.parametrize(
    "main, words, number",
    [
        (train.main, ["--phase", "1", "--config", "conf/quickstart.yaml"], signal.SIGTERM),
        (train.main, ["--phase", "1", "--config", "conf/quickstart.yaml"], signal.SIGINT),
        (embed_language.main, ["--output", "OUT/embeddings.npz"], signal.SIGTERM),
        (check_demos.main, ["DATA"], signal.SIGTERM),
        (convert_lerobot.main, ["export", "DATA", "OUT/set"], signal.SIGTERM),
        (convert_lerobot.main, ["export", "DATA", "OUT/set"], signal.SIGINT),
    ],
)
def test_a_signal_while_files_are_read_is_one_sentence_and_the_number_of_the_signal(
    data, tmp_path, monkeypatch, capsys, main, words, number
):
    class Opened(h5py.File):  # the first file is opened, and the signal comes
        def __init__(self, *place, **options):
            super().__init__(*place, **options)
            monkeypatch.setattr(h5py, "File", file)
            send(number)()

    file = h5py.File
    monkeypatch.setattr(h5py, "File", Opened)
    words = [word.replace("OUT", str(tmp_path)).replace("DATA", str(data)) for word in words]
    here = [] if main is convert_lerobot.main else ["--set", f"data.data_directory={data}"]
    here += ["--set", f"training.checkpoint_directory={tmp_path}"] if main is train.main else []
    monkeypatch.setattr(sys, "argv", [main.__module__, *words, *here])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 128 + number
    printed = capsys.readouterr()
    last = [line for line in (printed.out + printed.err).splitlines() if line][-1]
    if main is convert_lerobot.main:
        assert last == f"Stopped. What is done is kept in {tmp_path}/set.part; the same command continues."
    else:
        assert last == f"{number.name}: stopped; no file is left half written, and the same command starts again"
    assert not list(tmp_path.glob("**/*.pt")) and not list(tmp_path.glob("**/*.npz"))
    assert not list(tmp_path.glob(".*.lock"))


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
    arguments = (tmp_path / "runs/phase1", trainer, trained, config, range(1000))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=13.5 * size))
    check_disk_space(*arguments)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12.5 * size))
    with pytest.raises(BadInput, match=r"runs/phase1 has 0\.0 GB free, but this run writes 13 checkpoints of .* 10 of"):
        check_disk_space(*arguments)
    torch.save(torch.zeros(1), tmp_path / "checkpoint_latest.pt")
    check_disk_space(tmp_path, *arguments[1:4], range(1, 1000))  # one of them is there already


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
    assert {int(state["step"]) for state in states} == {EPOCHS * STEPS - 3}
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

    def kill() -> None:
        while not over.wait(0.2):
            children = FORK.active_children()
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


def killed_the_first_time(command: list[str]) -> None:
    """A training that torchrun has started, the second of which is killed after its first epoch."""
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    trained(int(os.environ["RANK"]), command, {1: (STEPS + 2, send(signal.SIGKILL))} if is_first else {})


def machine(number: int, port: int, command: list[str]) -> None:
    """torchrun's agent on one of two machines, the second of which comes later. It forks what it starts."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    time.sleep(number)
    agent = LaunchConfig(
        min_nodes=2, max_nodes=2, nproc_per_node=1, run_id="two machines", rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}", local_addr="127.0.0.1", max_restarts=1, monitor_interval=0.2,
        start_method="fork",
    )  # fmt: skip
    elastic_launch(agent, killed_the_first_time)(command)


@pytest.mark.slow
def test_two_machines_start_again_after_a_training_was_killed_and_go_on_from_what_was_saved(data, tmp_path):
    command = ["--phase", "1", "--resume", *small(1, data, tmp_path, 2, training__save_minutes=1e-9)]
    ends = ranks_of(2, tmp_path / "said", machine, free_port(), command)
    assert [code for code, _ in ends] == [0, 0], ends
    said = "".join(said for _, said in ends)
    assert said.count("samples, 5 steps an epoch on 2 process(es)") == 2, said
    folder = tmp_path / PHASE_DIRECTORIES[1]
    assert read_checkpoint(folder / LATEST)["epoch"] == EPOCHS and not list(tmp_path.glob("*_earlier_*"))
    steps = [line["step"] for line in lines_of(folder).values() if line["split"] == "validation"]
    assert steps == [STEPS * epoch for epoch in range(1, EPOCHS + 1)]


# ----------------------------------------------------------------------------------------------- uneven held-out rows


def validated(rank: int, data: Path, results: Path) -> None:
    """Both phases on three held-out samples in batches of two, and on as few as there may be."""
    join_processes("cpu", 1)
    demos = load_demos(data_config(data), 10)[0]
    found = {}
    for phase, rows in ((1, 2), (1, 3), (2, 1), (2, 3)):
        torch.manual_seed(0)
        trainer = build_trainer(small_config("training.phase1.foresight_weight=1.0"), phase)
        fitted(trainer.model)
        trainer.model.policy.loss = lambda z, actions: (z[:, :1, None] - actions).mean(dim=(1, 2))  # draws no noise
        if phase == 1:
            trainer.robot_normalizer.fit(torch.randn(100, 9))
        options = {"gap": 2, "ahead": FORESIGHT} if phase == 1 else {}
        batches = batches_of(demos, torch.arange(rows), 2 if phase == 1 else 10, 2, **options)
        found[f"{phase} on {rows}"] = validate(trainer, batches)
    torch.save(found, results / f"{torch.distributed.get_world_size()}_{rank}.pt")


@pytest.mark.slow
def test_losses_are_those_of_one_process_where_a_rank_has_fewer_held_out_samples_or_none(data, tmp_path):
    for ranks in (1, 4):
        ends = ranks_of(ranks, tmp_path / str(ranks), validated, data, tmp_path)
        assert [code for code, _ in ends] == [0] * ranks, ends
    alone, *others = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "4_0", "4_1", "4_2", "4_3"))
    for found in others:
        for run_name, losses in alone.items():
            assert found[run_name] == pytest.approx(losses, rel=1e-4), run_name


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
