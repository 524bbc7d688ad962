"""Files that are whole or not there, locks between real processes, and what a script says of its user's and its
machine's faults."""

import errno
import fcntl
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

from errors import BadInput, exits_on_bad_input, is_out_of_memory, out_of_memory_named
from files import Lock, expanded, private_temporary_folder, replaced_whole, written_whole


def start(script: str, *arguments) -> subprocess.Popen:
    """A Python process with this repo's modules, whose input and output are pipes of text."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


# Whole files


def test_a_machine_without_a_temporary_folder_has_no_private_one(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is looked for anew
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # no folder keeps a file
    try:
        assert private_temporary_folder("cache") is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with written_whole(path) as stream:
        stream.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_writer_leaves_what_was_there_before(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as stream:
        stream.write(b"half")
        stream.flush()
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_at_once_do_not_mix(tmp_path):
    path = tmp_path / "table"
    contents = [bytes([65 + number]) * 300_000 for number in range(4)]

    def write(content):
        for _ in range(10):
            with written_whole(path) as stream:
                for piece in range(0, len(content), 50_000):
                    stream.write(content[piece : piece + 50_000])
                    stream.flush()

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            seen.add(path.read_bytes())
    assert seen and seen <= set(contents)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_killed_writers_part_is_in_no_ones_way(tmp_path):
    writer = start(
        "import sys, files, pathlib\n"
        "with files.written_whole(pathlib.Path(sys.argv[1])) as stream:\n"
        "    stream.write(b'half'), stream.flush(), print('writing', flush=True), sys.stdin.read()",
        tmp_path / "table",
    )
    assert writer.stdout.readline() == "writing\n"
    writer.kill()
    writer.communicate()
    (part,) = tmp_path.iterdir()
    assert re.fullmatch(r"table\.\d+_[0-9a-f]+\.part", part.name)
    with written_whole(tmp_path / "table") as stream:
        stream.write(b"whole")
    assert (tmp_path / "table").read_bytes() == b"whole"


def test_a_file_may_be_written_in_another_folder_first(tmp_path):
    (tmp_path / "scratch").mkdir()
    with replaced_whole(tmp_path / "table", tmp_path / "scratch") as part:
        assert part.parent == tmp_path / "scratch"
        part.write_text("whole")
    assert (tmp_path / "table").read_text() == "whole"
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_a_full_disk_is_the_operating_systems_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "table"
    path.write_bytes(b"old")
    with pytest.raises(OSError) as caught, replaced_whole(path) as part:
        part.symlink_to("/dev/full")
        part.write_bytes(b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# Locks

HOLDER = (
    "import sys, files, pathlib\n"
    "with files.Lock(pathlib.Path(sys.argv[1]), 'busy'):\n"
    "    print('held', flush=True), sys.stdin.read()"
)


@pytest.mark.slow
def test_a_second_process_is_told_who_holds_the_lock(tmp_path):
    holder = start(HOLDER, tmp_path / "lock")
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BadInput, match=rf"^another run is at it \(process {holder.pid} on .+\)$"):
        Lock(tmp_path / "lock", "another run is at it")
    holder.communicate()
    assert list(tmp_path.iterdir()) == []
    Lock(tmp_path / "lock", "busy").release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_holder_holds_nothing(tmp_path):
    holder = start(HOLDER, tmp_path / "lock")
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    assert (tmp_path / "lock").exists()
    with Lock(tmp_path / "lock", "busy"):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_process_may_wait_for_the_lock(tmp_path):
    waiting = (
        "import sys, files, pathlib\nwith files.Lock(pathlib.Path(sys.argv[1]), 'busy', wait=True):\n    print('got')"
    )
    with Lock(tmp_path / "lock", "busy"):
        waiter = start(waiting, tmp_path / "lock")
        assert re.fullmatch(rf"busy \(process {os.getpid()} on .*\): waiting for it\n", waiter.stdout.readline())
    assert waiter.communicate(timeout=20)[0].endswith("got\n")
    assert waiter.returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_lock_that_is_released_while_others_ask_for_it_is_never_held_twice(tmp_path):
    """Its file is deleted at every release: whoever opened it just before must not take that one for the lock."""
    asking = (
        "import sys, files, pathlib, os\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for _ in range(300):\n"
        "    with files.Lock(folder / 'lock', 'busy', wait=True):\n"
        "        os.close(os.open(folder / 'inside', os.O_CREAT | os.O_EXCL))\n"  # fails where somebody else is inside
        "        os.unlink(folder / 'inside')"
    )
    processes = [start(asking, tmp_path) for _ in range(3)]
    for process in processes:
        _, complaint = process.communicate(timeout=60)
        assert process.returncode == 0, complaint
    assert list(tmp_path.iterdir()) == []


def test_who_holds_the_lock_clears_away_what_killed_writers_left(tmp_path):
    left, others = tmp_path / "a.pt.123_abcdef.part", tmp_path / "b.pt.123_abcdef.part"
    for part in (left, others):
        part.write_bytes(b"half")
    with Lock(tmp_path / "lock", "busy") as lock:
        lock.forget_parts(tmp_path, "a.pt")
    assert list(tmp_path.iterdir()) == [others]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_file_system_cannot_lock_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = (Lock(tmp_path / "lock", "busy") for _ in range(2))  # said once for a folder
    assert capsys.readouterr().out.count(f"note: {tmp_path} cannot lock files ({os.strerror(number)}") == 1
    second.release()
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_made_is_an_oserror_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such_folder/lock"):
        Lock(tmp_path / "no_such_folder/lock", "busy")


def test_a_lock_that_cannot_be_signed_is_not_held(tmp_path, monkeypatch):
    def refuse(lock):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(Lock, "_sign", refuse)
        Lock(tmp_path / "lock", "busy")
    Lock(tmp_path / "lock", "busy").release()


# Paths


def test_a_home_folder_is_found_wherever_the_path_comes_from(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expanded("~/data") == "/home/somebody/data"
    assert expanded("~") == "/home/somebody"
    assert expanded("data/~") == "data/~"
    assert expanded("./~") == "./~"


def test_a_home_that_nobody_has_is_refused_instead_of_made():
    with pytest.raises(BadInput, match=r"^~nobody_here/data: no home folder of ~nobody_here is known; \./~nobody_here"):
        expanded("~nobody_here/data")


# Memory


@pytest.mark.parametrize(
    "ask",
    [
        lambda: np.empty(10**15),
        lambda: torch.empty(10**15),
        lambda: torch.empty(2**62),
        lambda: bytearray(10**15),
        lambda: torch.zeros(10**15, dtype=torch.uint8).share_memory_(),
    ],
)
def test_asking_for_more_memory_than_there_is_is_one_sentence(ask):
    with pytest.raises(BadInput, match="take a smaller batch_size"), out_of_memory_named("take a smaller batch_size"):
        ask()


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "MPS backend out of memory (MPS allocated: 5.05 GB)",
        "std::bad_alloc",
    ],
)
def test_the_wordings_of_torch_are_known(words):
    assert is_out_of_memory(RuntimeError(words))


def test_other_errors_pass_as_they_are():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(FileNotFoundError(errno.ENOENT, "No such file or directory", "out of memory.txt"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(OSError("Can't write data (memory allocation failed for filter buffer)"))
    with pytest.raises(ZeroDivisionError), out_of_memory_named("take less"):
        _ = 1 / 0


# What a script says


def said_by(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        exits_on_bad_input(main)()
    printed = capsys.readouterr()
    assert printed.out == ""
    return ended.value.code, printed.err


def test_the_users_fault_is_one_sentence(capsys):
    def main():
        raise BadInput("conf.yaml: no such file")

    assert said_by(main, capsys) == (2, "error: conf.yaml: no such file\n")


def test_running_out_of_memory_anywhere_is_one_sentence(capsys):
    code, text = said_by(lambda: np.empty(10**15), capsys)
    assert (code, text.count("\n")) == (2, 1) and text.startswith("error: out of memory")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_a_full_disk_is_one_sentence(capsys, tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    assert said_by(lambda: (tmp_path / "full").write_text("x"), capsys) == (2, "error: No space left on device\n")


def test_what_may_not_be_touched_is_one_sentence_with_its_name(capsys):
    refusal = PermissionError(errno.EACCES, "Permission denied", "data/demo.hdf5")
    assert said_by(lambda: raised(refusal), capsys) == (2, "error: data/demo.hdf5: Permission denied\n")


def test_a_mistake_in_the_program_keeps_its_traceback():
    for mistake in (KeyError("z"), FileNotFoundError(errno.ENOENT, "No such file", "x"), RuntimeError("shapes")):
        with pytest.raises(type(mistake)):
            exits_on_bad_input(lambda mistake=mistake: raised(mistake))()


def raised(problem):
    raise problem


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_the_shells_number_and_one_sentence(number, capsys):
    before = signal.getsignal(number)
    sentence = f"\n{number.name}: stopped; no file is left half written, and the same command starts again\n"
    assert said_by(lambda: os.kill(os.getpid(), number), capsys) == (128 + number, sentence)
    assert signal.getsignal(number) == before
