"""What is wrong with an HDF5 file, said by its own error: each kind made for real."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from demos.hdf5_errors import hdf5_problem, open_hdf5
from errors import BadInput

WRITER = """
import sys, time, h5py
file = h5py.File(sys.argv[1], "w", libver="latest")
file["x"] = list(range(100))
file.flush()
print("written", flush=True)
time.sleep(60)
"""


def _written(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.arange(4000) % 7, chunks=(100,), compression="gzip")
    return path


def _sentence(path: Path, read=lambda file: file["x"][()]) -> str:
    with pytest.raises(BadInput) as found, open_hdf5(path) as file:
        read(file)
    sentence = str(found.value)
    assert sentence.startswith(f"{path}: ") and "\n" not in sentence
    return sentence.removeprefix(f"{path}: ")


@pytest.mark.slow
def test_a_file_that_another_process_writes_is_named_and_so_is_the_mark_of_one_that_died(tmp_path):
    path = tmp_path / "a.hdf5"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"written\n"
        assert "is open in another process" in _sentence(path)
    finally:
        writer.kill()
        writer.wait()
    assert "marked as open for write" in (sentence := _sentence(path)) and "h5clear" in sentence


def test_a_truncated_file_is_told_from_files_of_another_kind(tmp_path):
    path = _written(tmp_path / "a.hdf5")
    whole = path.stat().st_size
    os.truncate(path, whole // 2)
    assert _sentence(path) == f"it is truncated ({whole // 2:,} of {whole:,} bytes); copy or download it again"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git lfs pull" in _sentence(path)
    path.write_bytes(b"<!DOCTYPE html>")
    assert _sentence(path) == "is no HDF5 file, it begins with b'<!DOCTYPE html>'"
    path.write_bytes(b"")
    assert "is empty" in _sentence(path)


def test_what_the_operating_system_says_is_passed_on(tmp_path, monkeypatch):
    assert "No such file or directory" in _sentence(tmp_path / "gone.hdf5")
    (tmp_path / "folder.hdf5").mkdir()
    assert "Is a directory" in _sentence(tmp_path / "folder.hdf5")
    monkeypatch.chdir(tmp_path)  # other users may enter this folder, but none of those above it
    tmp_path.chmod(0o755)
    path = _written(Path("a.hdf5"))
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        assert "Permission denied" in _sentence(path)
    finally:
        os.seteuid(user)


def test_links_that_lead_nowhere_are_not_called_damage(tmp_path):
    path = tmp_path / "a.hdf5"
    (tmp_path / "text.hdf5").write_text("no HDF5")
    with h5py.File(path, "w") as file:
        file["outside"] = h5py.ExternalLink("gone.hdf5", "/x")
        file["inside"] = h5py.SoftLink("/gone")
        file["text"] = h5py.ExternalLink("text.hdf5", "/x")
        file["circle"] = h5py.SoftLink("/circle")
        file.create_dataset("raw", (10,), "u1", external=[(str(tmp_path / "raw.bin"), 0, 10)])
    (tmp_path / "raw.bin").unlink(missing_ok=True)
    assert "links to a file that is not there" in _sentence(path, lambda file: file["outside"])
    assert "link to something that is not there" in _sentence(path, lambda file: file["inside"])
    assert _sentence(path, lambda file: file["text"]) == "a file that it links to is no HDF5 file"
    assert "in a circle" in _sentence(path, lambda file: file["circle"])
    assert "in another file that is not there" in _sentence(path, lambda file: file["raw"][()])
    assert "object 'y' doesn't exist" in _sentence(path, lambda file: file["y"])


def test_a_damaged_chunk_and_a_filter_that_is_missing_are_two_things(tmp_path):
    path = _written(tmp_path / "a.hdf5")
    with h5py.File(path, "r") as file:
        chunk = file["x"].id.get_chunk_info(0)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)
    assert "filter returned failure" in (sentence := _sentence(path)) and "h5repack" not in sentence

    with h5py.File(path, "w") as file:
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk((10,))
        layout.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (2, 2, 1, 10, 5, 1, 0))  # blosc
        made = h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((10,)), layout)
        made.write_direct_chunk((0,), b"0123456789")
    assert "h5repack" in _sentence(path)


def test_errors_of_other_programs_pass_and_the_place_in_the_file_can_be_named(tmp_path):
    path = _written(tmp_path / "a.hdf5")
    with pytest.raises(KeyError, match="mine"), open_hdf5(path):
        raise KeyError("mine")
    with pytest.raises(OSError, match="No space"), open_hdf5(path):
        raise OSError(28, "No space left on device")
    problem = OSError("Can't synchronously read data (filter returned failure during read)")
    expected = f"{path}: demo_3: can't synchronously read data: filter returned failure during read"
    assert str(hdf5_problem(path, problem, "demo_3")) == expected
