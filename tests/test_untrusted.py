"""Files from strangers: what they ask to run does not run, the sizes that they claim cost nothing, and the paths in
them lead nowhere else. Each kind of file is made to try."""

import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from helpers import INSTRUCTION, ROOT, data_config, load
from libero_files import TASK, write_task_file

from demos.hdf5 import load_demos
from demos.language import load_language
from errors import BadInput
from rollouts.policies import read_demo
from simulator import suites
from simulator.suites import task_init_states
from statevla_model import load_checkpoint
from training.checkpoint import NO_SCORE, epoch_and_score, read_checkpoint
from untrusted import npy_array, npz_arrays, pickled_arrays

SAVED = torch.load(ROOT / "tests/checkpoints/da2dd2b.pt", weights_only=True)["checkpoint"]
PETABYTE = 1 << 50
NAME = f"{TASK}_demo.hdf5"


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "it_ran"


class Attack:
    """What makes a file when it is unpickled, as any program would be run."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Two gigabytes more than the process has: what believes a claim of petabytes, or of some, ends here."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * 10**9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(read, *arguments, path: Path) -> str:
    """The sentence of BadInput about this file."""
    with pytest.raises(BadInput) as said:
        read(*arguments)
    assert str(path) in str(said.value) and "\n" not in str(said.value)
    return str(said.value)


def test_the_attack_of_these_tests_works_where_a_pickle_is_trusted(marker):
    pickle.loads(pickle.dumps(Attack(marker)))
    assert marker.exists()


# ----------------------------------------------------------------------------------------------------- checkpoints


def rewritten(path: Path, change) -> None:
    """A checkpoint with its archive's parts, name -> bytes, changed."""
    torch.save(SAVED, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def with_pickle(change):
    """Changes the one part that says what the others are."""

    def do(parts: dict) -> None:
        (name,) = (name for name in parts if name.endswith("data.pkl"))
        parts[name] = change(parts[name])

    return do


def shortened(parts: dict) -> None:
    name = max((name for name in parts if "/data/" in name), key=lambda name: len(parts[name]))
    parts[name] = parts[name][:8]


def asks_for(function: str, *arguments) -> bytes:
    """A pickle that calls a function by name."""
    module, name = function.rsplit(".", 1)
    values = pickle.dumps(arguments, 2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + values + b"R."


CHECKPOINTS = {
    "a part of fewer bytes than the pickle claims": (shortened, "its pickle claims"),
    "a million million zeros": (
        with_pickle(lambda old: asks_for("builtins.bytearray", 10**12)), "its pickle names builtins.bytearray",
    ),
    "a call of the shell": (with_pickle(lambda old: asks_for("os.system", "true")), "its pickle names os.system"),
    "a pickle without end": (with_pickle(lambda old: old[:-200]), "its pickle is damaged"),
    "text for a pickle": (with_pickle(lambda old: b"hello"), "not readable as a checkpoint"),
    "a memo of a petabyte": (with_pickle(lambda old: b"\x80\x02Nr\xff\xff\xff\xff."), "it lacks epoch"),
    "a text of a petabyte": (
        with_pickle(lambda old: b"\x80\x04\x8d" + struct.pack("<Q", PETABYTE) + b"x."), "not readable as a checkpoint",
    ),
    "a class that is changed": (
        with_pickle(lambda old: b"\x80\x02ctorch\nFloatStorage\n}U\x04nameU\x01xsb."), "its pickle changes",
    ),
    "two folders": (lambda parts: parts.update({"other/data.pkl": b""}), "it is no archive of torch.save"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_claims_or_asks_for_too_much_is_refused(tmp_path, kind):
    path = tmp_path / "checkpoint.pt"
    change, sentence = CHECKPOINTS[kind]
    rewritten(path, lambda parts: None)
    assert read_checkpoint(path)["phase"] == 2  # written by this test's own hand it is read
    rewritten(path, change)
    assert sentence in refused(read_checkpoint, path, path=path)
    assert epoch_and_score(path) == (0, NO_SCORE)


def test_a_checkpoint_runs_nothing(tmp_path, marker):
    path = tmp_path / "checkpoint.pt"
    torch.save(SAVED | {"loss": Attack(marker)}, path)
    assert "its pickle names posix.system, and nothing is run" in refused(load_checkpoint, path, path=path)
    with path.open("wb") as stream:
        pickle.dump(Attack(marker), stream)
    assert "it is no file of torch.save" in refused(load_checkpoint, path, path=path)
    torch.save(SAVED | {"loss": Attack(marker)}, path, _use_new_zipfile_serialization=False)
    refused(load_checkpoint, path, path=path)
    assert not marker.exists()


def test_a_checkpoint_that_unfolds_is_refused(tmp_path):
    """A megabyte of zeros takes a kilobyte, and so on without end."""
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    assert "archive/data.pkl is compressed, which torch.save never does" in refused(read_checkpoint, path, path=path)
    torch.save(SAVED, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:  # every part is the largest one, over and over
        parts = archive.infolist()
        largest = max(parts, key=lambda part: part.file_size)
        for number in range(200):
            again = zipfile.ZipInfo(f"archive/data/x{number}")
            again.file_size = again.compress_size = largest.file_size
            again.header_offset, again.CRC = largest.header_offset, largest.CRC
            parts.append(again)
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist, archive._didModify = parts, True
    assert len(whole) < path.stat().st_size < len(whole) + 30_000
    assert "its parts claim" in refused(read_checkpoint, path, path=path)


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("schema", "one", "key schema is not a whole number"), ("phase", 3, "key phase is not 1 or 2"),
        ("loss", "low", "key loss is not a number"), ("code", ["x"], "key code is not a text"),
        ("model_state_dict", {"a": 1}, "key model_state_dict is not names with a tensor each"),
        ("language", {"encoder": "x", "embeddings": {"fly": torch.ones(2, 2)}}, "key language is not vectors"),
        ("language", {"encoder": "x"}, "key language is not an encoder"),
        ("observation", {"cameras": torch.ones(3)}, "key observation is not a section of values"),
    ],
)  # fmt: skip
def test_facts_of_another_kind_are_named(tmp_path, key, value, sentence):
    path = tmp_path / "checkpoint.pt"
    torch.save(SAVED | {key: value}, path)
    assert sentence in refused(read_checkpoint, path, path=path)


def test_a_config_that_holds_itself_or_a_thousand_copies_is_refused(tmp_path):
    path, laughs, circle = tmp_path / "checkpoint.pt", ["ha"], []
    for _ in range(40):
        laughs = [laughs, laughs]
    circle.append(circle)
    for tree in (laughs, circle):
        torch.save(SAVED | {"config": SAVED["config"] | {"data": tree}}, path)
        assert "key config is not a section of values" in refused(read_checkpoint, path, path=path)


# ------------------------------------------------------------------------------------------------ NumPy's own files


def npy(shape: tuple, content: bytes, descr: str = "<f8") -> bytes:
    header = str({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


@pytest.mark.parametrize("shape", [(PETABYTE,), (1 << 40, 1 << 40, 1 << 40), (-1, 3), (3,), (0, PETABYTE)])
def test_an_array_is_as_large_as_the_file(tmp_path, shape):
    (tmp_path / "a.npy").write_bytes(npy(shape, bytes(16)))
    with pytest.raises(ValueError, match="was announced, but 16 bytes are there"):
        npy_array(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(shape, bytes(16)))
    with pytest.raises(ValueError, match="was announced, but 16 bytes are there"):
        npz_arrays(tmp_path / "a.npz", ("x",))


def test_arrays_are_read_as_numpy_reads_them(tmp_path):
    arrays = [np.ones(()), np.asfortranarray(np.eye(3, 5)), np.array(["a", "bc"]), np.empty((0, 3))]
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
        np.savez_compressed(tmp_path / f"{number}.npz", x=array)
        for found in (npy_array(tmp_path / f"{number}.npy"), npz_arrays(tmp_path / f"{number}.npz", ("x",))["x"]):
            np.testing.assert_array_equal(found, array)
            assert found.dtype == array.dtype


def embeddings(path: Path, **parts: bytes) -> Path:
    np.savez(path, texts=np.array([INSTRUCTION]), embeddings=np.ones((1, 512), np.float32), encoder=np.array("x"))
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, one in (content | {f"{name}.npy": one for name, one in parts.items()}).items():
            archive.writestr(name, one)
    return path


def test_embeddings_run_nothing_and_unfold_to_nothing(tmp_path, marker):
    path = embeddings(tmp_path / "language.npz")
    assert load_language(path, [INSTRUCTION], 512)[INSTRUCTION].norm() == pytest.approx(1)
    objects = io.BytesIO()
    np.save(objects, np.array([Attack(marker)], dtype=object), allow_pickle=True)
    embeddings(path, texts=objects.getvalue())
    assert "it holds Python objects" in refused(load_language, path, [INSTRUCTION], 512, path=path)
    embeddings(path, embeddings=npy((PETABYTE,), b""))
    assert "was announced, but 0 bytes are there" in refused(load_language, path, [INSTRUCTION], 512, path=path)
    with zipfile.ZipFile(embeddings(path), "a") as archive:  # the table of contents alone claims it
        archive.getinfo("texts.npy").file_size, archive._didModify = 10**9, True
    assert "at most 256,000,000 are read" in refused(load_language, path, [INSTRUCTION], 512, path=path)
    for damaged in (pickle.dumps({INSTRUCTION: Attack(marker)}), pickle.dumps(Attack(marker))):
        path.write_bytes(damaged)
        assert "names posix.system, and nothing is run" in refused(load_language, path, [INSTRUCTION], 512, path=path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5, "torch", "legacy torch"])
def test_public_pickles_of_embeddings_are_read_without_running_them(tmp_path, protocol):
    vector = torch.randn(3, 1, 512)
    texts = OrderedDict({INSTRUCTION: 11 * vector[0], "fly": vector[1].numpy(), "swim": vector[2].numpy()})
    path = tmp_path / "clip_text.pkl"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(texts, protocol))
    else:
        torch.save(texts, path, _use_new_zipfile_serialization=protocol == "torch")
    table = load_language(path, [INSTRUCTION], 512)
    assert table.encoder == "clip_text.pkl" and table.embeddings.keys() == texts.keys()
    torch.testing.assert_close(table[INSTRUCTION], torch.nn.functional.normalize(vector[0, 0], dim=0))
    torch.testing.assert_close(table["fly"], torch.nn.functional.normalize(vector[1, 0], dim=0))


def test_a_pickle_cannot_ask_for_the_same_memory_over_and_over(tmp_path):
    path = tmp_path / "again.pkl"
    once = b"c_codecs\nencode\n" + b"(h\x00X\x06\x00\x00\x00latin1tR"  # text 0 as bytes
    path.write_bytes(b"\x80\x02X" + struct.pack("<I", 10**6) + b"x" * 10**6 + b"q\x000](" + once * 1000 + b"e.")
    with pytest.raises(pickle.UnpicklingError, match="asks for more memory than such a file needs"):
        pickled_arrays(path)


# ------------------------------------------------------------------------------------------------------ init states


@pytest.fixture
def suite(tmp_path, monkeypatch) -> SimpleNamespace:
    """A suite of one task with its init states in upstream's kind of file."""
    folders = SimpleNamespace(get_libero_path=lambda name: str(tmp_path))
    monkeypatch.setattr(suites, "import_libero", lambda: folders)
    task = SimpleNamespace(problem_folder="libero_x", name="lift", init_states_file="lift.pruned_init")
    (tmp_path / "libero_x").mkdir()
    return SimpleNamespace(get_task=lambda task_id: task, path=tmp_path / "libero_x/lift.pruned_init")


def test_init_states_run_nothing(suite, marker):
    states = np.random.default_rng(0).normal(size=(5, 12))
    for is_zip in (True, False):
        torch.save(states, suite.path, _use_new_zipfile_serialization=is_zip)
        np.testing.assert_array_equal(task_init_states(suite, 0), states)
        torch.save([states, Attack(marker)], suite.path, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(BadInput, match=r"init states of task 0, lift, cannot be read \(its pickle names posix.sys"):
            task_init_states(suite, 0)
    suite.path.write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(BadInput, match="nothing is run that a file names"):
        task_init_states(suite, 0)
    assert not marker.exists()


def test_init_states_are_as_many_as_the_file_holds(suite):
    states = np.ones((5, 12))
    honest = pickle.dumps(states, 2)
    claim = pickle.dumps((5, 12), 2)[2:-1]
    assert honest.count(claim[:4]) == 1
    suite.path.write_bytes(honest.replace(b"K\x05K\x0c", b"\x8a\x07" + PETABYTE.to_bytes(7, "little") + b"K\x0c"))
    with pytest.raises(BadInput, match="was announced, but 480 bytes are there"):
        task_init_states(suite, 0)
    with zipfile.ZipFile(f"{suite.path}.npz", "w") as archive:
        archive.writestr("states.npy", npy((PETABYTE, 12), bytes(96)))
    with pytest.raises(BadInput, match="was announced, but 96 bytes are there"):
        task_init_states(suite, 0)


# ------------------------------------------------------------------------------------------------------------- HDF5


def replaced(demo: h5py.Group, key: str, make) -> None:
    del demo[key]
    make(demo, key)


def chunked(shape: tuple, dtype: str):
    return lambda demo, key: demo.create_dataset(key, shape, dtype, chunks=(1, *shape[1:]))


def of_virtual(file: str, source: str, shape: tuple, dtype: str):
    def make(demo: h5py.Group, key: str) -> None:
        layout = h5py.VirtualLayout(shape, dtype)
        layout[:] = h5py.VirtualSource(file, source, shape)
        demo.create_virtual_dataset(key, layout)

    return make


CLAIMS = {  # what stands in a demo's place -> (key, how it is made, the sentence)
    "pictures of a petabyte": ("obs/agentview_rgb", chunked((30, 1 << 22, 1 << 22, 3), "u1"), "more than any demonst"),
    "pictures never written": ("obs/agentview_rgb", chunked((30, 32, 32, 3), "u1"), "but 30 of its 30 parts are mis"),
    "actions never written": (
        "actions", lambda demo, key: demo.create_dataset(key, (30, 7), "f8"), "but holds no data",
    ),
    "states of a terabyte": ("states", chunked((1 << 33, 20), "f8"), "more than any demonstration has"),
    "more states than steps": (
        "states", lambda demo, key: demo.create_dataset(key, data=np.zeros((31, 20))), "expected finite values of 30",
    ),
    "one chunk of three gigabytes": (
        "obs/joint_states",
        lambda demo, key: demo.create_dataset(key, (30, 7), "f8", chunks=(60_000_000, 7), maxshape=(None, 7)),
        "is stored in chunks of 3,360,000,000 bytes",
    ),
    "itself as its part": ("actions", of_virtual(".", "/data/demo_1/actions", (30, 7), "f8"), "or of itself"),
    "itself by its file's name": ("actions", of_virtual(NAME, "/data/demo_1/actions", (30, 7), "f8"), "or of itself"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLAIMS)
def test_demonstrations_are_as_large_as_their_file(tmp_path, kind):
    path, (key, make, sentence) = write_task_file(tmp_path), CLAIMS[kind]
    with h5py.File(path, "a") as file:
        replaced(file["data/demo_1"], key, make)
    assert "demo_1" in (said := refused(load, tmp_path, "data.cache=none", path=path)) and sentence in said


@pytest.fixture
def elsewhere(tmp_path) -> tuple[Path, Path]:
    """A folder of demonstrations, and beside it a file that is no part of it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "private").mkdir()
    return write_task_file(tmp_path / "data"), write_task_file(tmp_path / "private", seed=1)


def raw(path: str):
    return lambda demo, key: demo.create_dataset(key, (30, 7), "f8", external=[(path, 0, 30 * 7 * 8)])


def soft_link_through(target: str):
    def make(demo: h5py.Group, key: str) -> None:
        demo.file["away"] = h5py.ExternalLink(target, "/data")
        demo[key] = h5py.SoftLink("/away/demo_1/actions")

    return make


def link_to(target: str, within: str):
    def make(demo: h5py.Group, key: str) -> None:
        demo[key] = h5py.ExternalLink(target, within)

    return make


@pytest.mark.parametrize("is_absolute", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda place: ("actions", link_to(place, "/data/demo_1/actions")),
        lambda place: ("obs", link_to(place, "/data/demo_1/obs")),
        lambda place: ("actions", soft_link_through(place)),
        lambda place: ("actions", of_virtual(place, "/data/demo_1/actions", (30, 7), "f8")),
        lambda place: ("actions", raw(place)),
    ],
    ids=["a dataset's link", "a group's link", "a link through a link", "a virtual dataset", "a raw file"],
)
def test_links_of_a_demonstration_stay_in_its_folder(elsewhere, monkeypatch, make, is_absolute):
    path, private = elsewhere
    config = data_config(path.parent, "data.cache=none")
    monkeypatch.chdir(path.parent)  # raw files are looked for in the working directory
    place = str(private) if is_absolute else f"../private/{private.name}"
    key, change = make(place)
    with h5py.File(path, "a") as file:
        replaced(file["data/demo_1"], key, change)
    said = refused(load_demos, config, 10, path=path)
    assert "leads to" in said and private.name in said and "outside of the file's folder" in said
    if key == "actions":
        assert "outside of the file's folder" in refused(read_demo, path, "demo_1", path=path)


def test_a_whole_demo_or_all_of_them_elsewhere_are_refused_before_they_are_opened(elsewhere):
    path, private = elsewhere
    for key, within in (("data/demo_1", "/data/demo_1"), ("data", "/data")):
        private.unlink(missing_ok=True)  # HDF5 would complain of a file that is not there
        with h5py.File(path, "a") as file:
            replaced(file, key, link_to(str(private), within))
        assert "outside of the file's folder" in refused(load, path.parent, path=path)


def test_links_within_the_folder_and_its_symbolic_links_are_followed(elsewhere, tmp_path):
    path, _ = elsewhere
    before = [demo.actions for demo in load(path.parent)[0]]
    with h5py.File(path, "a") as file, h5py.File(path.parent / "part.h5", "w") as part:
        file.copy("data/demo_1", part, name="it")
        replaced(file, "data/demo_1", link_to("part.h5", "/it"))
    os.rename(path.parent / "part.h5", tmp_path / "annex.h5")
    (path.parent / "part.h5").symlink_to(tmp_path / "annex.h5")  # as data management programs keep large files
    (tmp_path / "linked").symlink_to(path.parent)
    for folder in (path.parent, tmp_path / "linked"):
        assert all(torch.equal(a, demo.actions) for a, demo in zip(before, load(folder)[0], strict=True))


# --------------------------------------------------------------------------------------------- evaluations' folders


def test_an_episode_of_a_strangers_evaluation_names_no_file(tmp_path):
    from rollouts.folder import EPISODE_KEYS, read_episodes

    episode = dict.fromkeys(EPISODE_KEYS, 0)
    for key, value in (("task_id", "../../secret"), ("trial", [1]), ("task_id", True)):
        (tmp_path / "episodes.jsonl").write_text(json.dumps(episode | {key: value}) + "\n")
        with pytest.raises(BadInput, match=rf"episodes\.jsonl: line 1 is no episode; {key} is not a whole number"):
            read_episodes(tmp_path)
