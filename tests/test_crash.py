"""Programs that are killed (SIGKILL) at moments of every kind, above all while they save, and started again: nothing
that they left is trusted wrongly, and the result is that of an undisturbed run. Collecting and evaluating are killed in
test_collect_demos.py and test_libero_eval.py, all programs at random in benchmarks/crash_soak.py."""

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_trainings import assert_same_run, at_step, ranks_of, send, small, small_data, trained

import demos.language
import embed_language
from training.run_log import PHASE_DIRECTORIES


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_data(tmp_path_factory.mktemp("demos"))


def killed_while_saving(moment: str, count: int) -> None:
    """This process ends while it writes its file number `count`, the first being 1: in the middle of it, when it is
    whole and has no name yet, or as soon as it has one."""
    replace, save, files, kill = os.replace, torch.save, iter(range(1, 10**6)), send(signal.SIGKILL)

    def replace_and_kill(*names) -> None:
        number = next(files)
        if (number, moment) == (count, "before it has its name"):
            kill()
        replace(*names)
        if (number, moment) == (count, "after"):
            kill()

    def save_and_kill(content, stream) -> None:
        if moment == "in the middle" and next(files) == count:
            stream.write(b"PK" + bytes(1000))
            stream.flush()
            kill()
        save(content, stream)

    os.replace = replace_and_kill
    if moment == "in the middle":
        os.replace, torch.save = replace, save_and_kill


def trained_and_killed(_rank: int, command: list[str], moment: str, count: int) -> None:
    if moment == "in a step":
        at_step(count, send(signal.SIGKILL))
    else:
        killed_while_saving(moment, count)
    trained(0, command, {})


MOMENTS = ("in a step", "in the middle", "before it has its name", "after")


@pytest.mark.slow
@pytest.mark.parametrize("phase", [1, 2])
def test_a_training_that_is_killed_again_and_again_is_the_run_that_it_would_have_been(data, tmp_path, phase):
    """Saved after every step, and killed while it converts frames, stores states, and saves the best and the latest."""
    if phase == 2:
        first = ["--phase", "1", *small(1, data, tmp_path), "--set", "training.phase1.num_epochs=0"]
        assert ranks_of(1, tmp_path / "first", trained, first, {})[0][0] == 0
    encoder = tmp_path / PHASE_DIRECTORIES[1] / "checkpoint_latest.pt"
    start = ["--phase", str(phase), "--resume", *(["--phase1_checkpoint", str(encoder)] if phase == 2 else [])]
    whole, parts = ([*start, *small(phase, data, tmp_path / name, training__save_minutes=1e-9)] for name in "ab")
    assert ranks_of(1, tmp_path / "whole", trained, whole, {})[0][0] == 0

    for path in (data / "frame_cache").glob("*"):
        path.unlink()
    drawn, ends = random.Random(phase), []
    for attempt in range(6):
        moment = MOMENTS[attempt % len(MOMENTS)]
        hurt = (moment, drawn.randint(1, 6))
        [(code, said)] = ranks_of(1, tmp_path / f"attempt_{attempt}", trained_and_killed, parts, *hurt)
        assert code in (-signal.SIGKILL, 0), said
        ends.append(code)
        if code == 0:
            break
    assert ends.count(-signal.SIGKILL) >= 3
    assert ranks_of(1, tmp_path / "last", trained, parts, {})[0][0] == 0
    folder = PHASE_DIRECTORIES[phase]
    assert_same_run(tmp_path / "b" / folder, tmp_path / "a" / folder)
    assert not list(tmp_path.glob("b/**/*.part")) and not list(data.glob("**/*.part"))


def embedded_and_killed(_rank: int, words: list[str], moment: str) -> None:
    sys.argv = ["embed_language.py", *words]
    demos.language.embed = lambda texts, _: ("test encoder", np.full((1, 512), 512**-0.5, dtype=np.float32))
    if moment:
        killed_while_saving(moment, 1)
    embed_language.main()


def test_embeddings_of_a_killed_process_are_whole_or_not_there(data, tmp_path):
    target, whole = tmp_path / "embeddings.npz", data / "language_embeddings.npz"
    words = ["--data_directory", str(data), "--output", str(target)]
    for moment, is_there in (("before it has its name", False), ("after", True), ("", True)):
        [(code, said)] = ranks_of(1, tmp_path / "said", embedded_and_killed, words, moment)
        assert code == (-signal.SIGKILL if moment else 0), said
        assert target.exists() == is_there
    with np.load(target) as found, np.load(whole) as expected:
        assert found.files == expected.files
        assert all(np.array_equal(found[name], expected[name]) for name in expected.files)
    assert not list(tmp_path.glob("*.part"))
