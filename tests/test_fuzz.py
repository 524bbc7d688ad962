"""Readers given what nobody wrote on purpose: each input is read, or refused with one sentence.

`make test` draws the same inputs each time. STATEVLA_FUZZ=1000 draws so many others for each test.
"""

import contextlib
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import hypothesis
import numpy as np
import pytest
import torch
import yaml
from broken_demos import close_the_fingers, settings, verdict, write_embeddings
from helpers import INSTRUCTION
from hypothesis import strategies as st
from libero_files import write_task_file
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from config import load_config, parse_config
from demos.language import LanguageTable, load_language
from demos.scenes import load_scenes
from errors import BadInput
from observation import CAMERAS, ROBOT_STATES, STATE_WIDTHS
from serving.libero_message import MOST_DECISIONS, RequestReader, message_of
from serving.messages import BadMessage, packed, unpacked
from serving.policy_server import PolicyServer, in_background
from training.checkpoint import config_of, read_checkpoint

EXAMPLES = int(os.environ.get("STATEVLA_FUZZ", "0"))


def outcomes(inputs: st.SearchStrategy, examples: int, read: Callable[[object], None]) -> Counter:
    """How many inputs were "read" and how many "refused", BadInput with one sentence. Anything else that `read` raises
    fails with the smallest input that does it. Fails where all came to the same end: that would show little."""
    found: Counter = Counter()

    @hypothesis.settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(inputs)
    def one(value: object) -> None:
        try:
            read(value)
            found["read"] += 1
        except BadInput as refused:
            assert str(refused) and "\n" not in str(refused)
            found["refused"] += 1

    one()
    print(f"{found.total()} inputs: {dict(found)}")
    assert found.total() >= (EXAMPLES or examples) and found["read"] and found["refused"]
    return found


def damaged_bytes(data: bytes, most_places: int = 3) -> st.SearchStrategy[bytes]:
    """A file cut short, or with bytes written over."""

    def written_over(places: list[tuple[int, bytes]]) -> bytes:
        damaged = bytearray(data)
        for start, new in places:
            damaged[start : start + len(new)] = new
        return bytes(damaged[: len(data)])

    place = st.tuples(st.integers(0, len(data) - 1), st.binary(min_size=1, max_size=8))
    return st.one_of(
        st.lists(place, max_size=most_places).map(written_over),
        st.integers(0, len(data)).map(lambda end: data[:end]),
    )


# ------------------------------------------------------------------------------------------------------------ HDF5

PARTS = ("actions", "states", "obs", *(f"obs/{n}" for n in ("agentview_rgb", "eye_in_hand_rgb", "joint_states")))
DEMOS = ("data/demo_0", "data/demo_2")
PLACES = st.sampled_from(["data", *DEMOS, *(f"{demo}/{part}" for demo in DEMOS for part in PARTS)])
ATTRIBUTES = st.sampled_from(
    ["num_samples", "num_demos", "problem_info", "visual_mesh_ratio", "macros_image_convention", "bddl_file_content",
     "bddl_file_name"]
)  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 12]), max_size=4)
TYPES = st.sampled_from(["u1", "i8", "f2", "f4", ">f8", "f8", "?", "c8", "S3", "f8,i4", "i1"])
TEXTS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20)
VALUES = st.one_of(
    TEXTS, st.binary(min_size=1, max_size=8).map(np.bytes_), st.integers(-(2**63), 2**63 - 1), st.floats(),
    st.lists(st.integers(-5, 50), max_size=3).map(np.array), st.just(h5py.Empty("f8")),
)  # fmt: skip
CHANGES = st.one_of(
    st.tuples(st.just("delete"), PLACES),
    st.tuples(st.just("group"), PLACES),
    st.tuples(st.just("array"), PLACES, TYPES, SHAPES, st.integers(0, 300)),
    st.tuples(st.just("number"), PLACES, st.integers(0, 300), st.floats()),
    st.tuples(st.just("link"), PLACES, PLACES),
    st.tuples(st.just("file"), PLACES, st.sampled_from(["gone.hdf5", "data.hdf5", "../data", "/etc/passwd"]), PLACES),
    st.tuples(st.just("attribute"), PLACES, ATTRIBUTES, VALUES),
    st.tuples(st.just("no attribute"), PLACES, ATTRIBUTES),
)


def filled(dtype: str, shape: list[int], value: int) -> np.ndarray:
    return np.resize(np.array(value).astype(np.dtype(dtype)), shape)


def change(file: h5py.File, kind: str, place: str, *how) -> None:
    """One change to an open file. Raises what h5py does where the place is gone already."""
    if kind == "attribute":
        file[place].attrs[how[0]] = how[1]
    elif kind == "no attribute":
        del file[place].attrs[how[0]]
    elif kind == "number":
        values = file[place][()]
        values.flat[how[0] % values.size] = how[1] if values.dtype.kind == "f" else 0
        file[place][...] = values
    else:
        del file[place]
        if kind == "group":
            file.create_group(place)
        elif kind == "array":
            file[place] = filled(*how)
        elif kind == "link":
            file[place] = h5py.SoftLink(f"/{how[0]}")
        elif kind == "file":
            file[place] = h5py.ExternalLink(*how)


@pytest.fixture(scope="module")
def good_file(tmp_path_factory) -> Path:
    path = write_task_file(tmp_path_factory.mktemp("good"), steps=12, image_size=8)
    close_the_fingers(path)
    write_embeddings(path.parent)
    return path


@pytest.fixture
def read_demonstrations(good_file, tmp_path) -> Callable[[Path], None]:
    """Reads a file as training and check_demos.py do, which must agree. Raises BadInput where training does."""
    folder = tmp_path / "data"
    shutil.copytree(good_file.parent, folder)
    config = settings(folder)

    def read(source: Path) -> None:
        shutil.copy(source, folder / good_file.name)
        shutil.rmtree(tmp_path / "frames", ignore_errors=True)
        if errors := verdict(config).all_errors():
            raise BadInput(errors[0])

    return read


def test_any_structure_of_an_hdf5_file_is_read_or_refused(good_file, tmp_path, read_demonstrations):
    def read(changes) -> None:
        target = tmp_path / "changed.hdf5"
        shutil.copy(good_file, target)
        with h5py.File(target, "a") as file:
            for one in changes:
                with contextlib.suppress(KeyError, ValueError, TypeError, OSError, AttributeError, RuntimeError):
                    change(file, *one)
        read_demonstrations(target)

    outcomes(st.lists(CHANGES, min_size=1, max_size=2), 50, read)


def test_an_hdf5_file_with_any_bytes_damaged_is_read_or_refused(good_file, tmp_path, read_demonstrations):
    def read(data: bytes) -> None:
        (tmp_path / "damaged.hdf5").write_bytes(data)
        read_demonstrations(tmp_path / "damaged.hdf5")

    outcomes(damaged_bytes(good_file.read_bytes()), 40, read)


MODEL = """<mujoco><worldbody>
  <camera name="agentview" pos="1 0 1" xyaxes="0 1 0 -0.7 0 0.7"/>
  <body name="arm" pos="0 0 1">
    <joint name="robot0_joint1"/><joint name="robot0_joint2"/><joint name="robot0_joint3"/><joint name="robot0_joint4"/>
    <body name="robot0_right_hand">
      <joint name="robot0_joint5"/><joint name="robot0_joint6"/><joint name="robot0_joint7"/>
      <joint name="gripper0_finger_joint1"/><joint name="gripper0_finger_joint2"/>
      <camera name="robot0_eye_in_hand" euler="3.1 0 0"/><body name="gripper0_eef"/>
    </body>
  </body>
  <body name="milk_1_main"><freejoint name="milk_1_joint0"/></body>
</worldbody></mujoco>"""


def test_any_structure_of_a_file_of_scenes_is_read_or_refused(tmp_path):
    path, language = tmp_path / "OBJECT_SCENE1_scenes.hdf5", LanguageTable("e", {INSTRUCTION: torch.ones(512)})
    places = st.sampled_from(["states", *CAMERAS])
    names = st.sampled_from(["model_file", "instructions"])
    texts = '{"milk_1": 3}', '{"milk_1": "lift it"}', "[1]", "{}", "<mujoco>", MODEL.replace("_1", "_2")
    changes = st.one_of(
        st.tuples(st.just("delete"), places), st.tuples(st.just("group"), places),
        st.tuples(st.just("array"), places, TYPES, SHAPES, st.integers(0, 300)),
        st.tuples(st.just("number"), places, st.integers(0, 300), st.floats()),
        st.tuples(st.just("attribute"), st.just("/"), names, VALUES | st.sampled_from(texts)),
        st.tuples(st.just("no attribute"), st.just("/"), names),
    )  # fmt: skip

    def read(change_of_it) -> None:
        with h5py.File(path, "w") as file:
            file["states"] = np.tile([0, *[0.1] * 9, 0, 0, 0.1, 1, 0, 0, 0], (4, 1))
            for camera in CAMERAS:
                file[camera] = np.zeros((4, 16, 16, 3), np.uint8)
            file.attrs["model_file"], file.attrs["instructions"] = MODEL, f'{{"milk_1": "{INSTRUCTION}"}}'
            with contextlib.suppress(KeyError, ValueError, TypeError, OSError, AttributeError, RuntimeError):
                change(file, *change_of_it)
        scenes = load_scenes(tmp_path, 16, language)
        assert scenes.draw(3, torch.device("cpu"))["target_at"].shape == (3, 2, 2)

    outcomes(changes, 80, read)


# -------------------------------------------------------------------------------------------- language embeddings


def test_any_archive_of_embeddings_is_read_or_refused(tmp_path):
    path, whole = tmp_path / "language.npz", tmp_path / "language_embeddings.npz"
    write_embeddings(tmp_path)
    array = st.one_of(
        st.builds(filled, TYPES, SHAPES, st.integers(0, 9)),
        st.just(np.array([INSTRUCTION])), st.just(np.ones((1, 512))), st.just(np.array("encoder")),
    )  # fmt: skip
    names = st.sampled_from(["texts", "embeddings", "encoder"])

    def read(archive: bytes | dict) -> None:
        if isinstance(archive, bytes):
            path.write_bytes(archive)
        else:
            good = {"texts": np.array([INSTRUCTION]), "embeddings": np.ones((1, 512)), "encoder": np.array("e")}
            np.savez(path, **good | archive)
        table = load_language(path, [INSTRUCTION], 512)
        assert table[INSTRUCTION].norm() == pytest.approx(1)

    outcomes(st.one_of(damaged_bytes(whole.read_bytes()), st.dictionaries(names, array, max_size=2)), 150, read)


# ----------------------------------------------------------------------------------------------------- checkpoints

PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXTS, st.just(torch.zeros(2))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers(), inner, max_size=3),
    max_leaves=4,
)


def places_in(tree: object, place: tuple = ()) -> list[tuple]:
    """The keys that lead to each part of nested dictionaries."""
    found = [place] if place else []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        found += places_in(value, (*place, key))
    return found


def changed(tree: dict, places: dict[tuple, object]) -> dict:
    """A copy with other values at these places; `...` deletes one."""
    made = {key: changed(value, {}) if isinstance(value, dict) else value for key, value in tree.items()}
    for place, value in places.items():
        section: object = made
        for key in place[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(place[-1], None)
            if value is not ...:
                section[place[-1]] = value
    return made


def test_a_checkpoint_with_any_metadata_is_read_or_refused(tmp_path):
    good = {
        "epoch": 1, "model_state_dict": {}, "optimizer_state_dict": {}, "loss": 0.5, "config": load_config().to_dict(),
        "phase": 2, "best_loss": 0.4, "observation": {"image_size": 128}, "held_out_demos": ["a.hdf5/demo_1"],
        "language": {"encoder": "e", "embeddings": {INSTRUCTION: torch.ones(512)}}, "schema": 1, "code": "1234567",
    }  # fmt: skip
    path = tmp_path / "checkpoint.pt"

    def read(places: dict) -> None:
        torch.save(changed(good, places), path)
        config_of(read_checkpoint(path), path)

    values = st.one_of(PLAIN, st.just(...))
    outcomes(st.dictionaries(st.sampled_from(places_in(good)), values, max_size=2), 100, read)


def test_a_checkpoint_with_any_bytes_damaged_is_read_or_refused(tmp_path):
    good = torch.load(sorted(Path(__file__).with_name("checkpoints").glob("*.pt"))[-1], weights_only=True)["checkpoint"]
    path = tmp_path / "checkpoint.pt"
    torch.save({**good, "model_state_dict": {}, "optimizer_state_dict": {}}, path)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        config_of(read_checkpoint(path), path)

    outcomes(damaged_bytes(path.read_bytes(), most_places=1), 100, read)


# ---------------------------------------------------------------------------------------------------- configuration

DEFAULTS = load_config().to_dict()
KEYS = st.sampled_from([".".join(place) for place in places_in(DEFAULTS)])
USUAL = st.one_of(
    st.integers(1, 64).map(lambda n: 16 * n), st.floats(0.01, 0.99), st.sampled_from([None, True, "none"])
)
YAML_TEXTS = st.text(st.sampled_from("data: model[]{}-&*!<>|'\"#%@,\n\t 019.e~?=x"), max_size=40)


def test_any_value_that_is_set_is_read_or_refused():
    keys = st.one_of(KEYS, TEXTS)
    values = st.one_of(YAML_TEXTS, TEXTS, st.integers().map(str), st.floats().map(str), USUAL.map(str))
    override = st.one_of(st.builds("{}={}".format, keys, values), TEXTS)
    outcomes(override, 300, lambda text: parse_config(DEFAULTS, "--set", [text]))


def test_any_config_file_is_read_or_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    plain = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.dates()),
        lambda inner: (
            st.lists(inner, max_size=2) | st.dictionaries(TEXTS | st.integers() | st.none(), inner, max_size=2)
        ),
        max_leaves=4,
    )
    places = st.sampled_from(places_in(DEFAULTS))
    sections = st.tuples(places, plain | USUAL).map(lambda made: yaml.safe_dump(nested(*made)))

    def read(content: str | bytes) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        load_config(path)

    outcomes(st.one_of(sections, YAML_TEXTS, plain.map(yaml.safe_dump), st.binary(max_size=30)), 60, read)


def nested(place: tuple, value: object) -> object:
    return {place[0]: nested(place[1:], value)} if place else value


# --------------------------------------------------------------------------------------- messages of policy servers

READER = RequestReader(list(ROBOT_STATES["joints"]), 8, 8, [INSTRUCTION])
SEEN = {camera: np.arange(192, dtype=np.uint8).reshape(8, 8, 3) for camera in CAMERAS}
SEEN |= {part: np.linspace(-1, 1, width, dtype=np.float32) for part, width in STATE_WIDTHS.items()}
GOOD = message_of(SEEN, INSTRUCTION, 7, 3)
CHUNK = np.linspace(-1, 1, 70).reshape(10, 7)
STATES = st.lists(st.floats(width=32), min_size=6, max_size=8).map(lambda values: np.array(values, np.float32))
SIZES = st.lists(st.integers(-1, 8) | st.sampled_from([2**31, 2**62, 2**63, 0.5, True, None, "3"]), max_size=9)
LAID_OUT = st.fixed_dictionaries(  # an array as a client claims it to be
    {b"__ndarray__": st.just(True)},
    optional={
        b"dtype": st.sampled_from(
            ["|O", "|O8", "<f4", "|u1", "<U3", "<c8", "(9,9)f4", "<f9", "<M8", b"<f4", 4, "f4,i4"]
        ),
        b"shape": SIZES | st.integers() | st.just([8, 8, 3]),
        b"data": st.binary(max_size=16) | st.just(bytes(192)) | TEXTS,
    },
)
NUMBER = st.fixed_dictionaries(
    {b"__npgeneric__": st.just(True)},
    optional={b"dtype": st.sampled_from(["|i1", "<f4", "|O8", "|b1"]), b"data": st.integers() | st.floats() | TEXTS},
)
SENT = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), TEXTS, st.binary(max_size=8), STATES,
        LAID_OUT, NUMBER, st.builds(filled, TYPES.filter(lambda name: name not in ("c8", "S3", "f8,i4")), SHAPES,
                                    st.integers(0, 300)),
        st.integers(1, 60).map(lambda size: np.zeros((size, size, 3), np.uint8)), st.just("pick up " * 20_000),
        st.sampled_from(["Pick the milk and place it in the basket.", 3, np.int64(5)]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.binary(max_size=4), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
KNOWN = st.sampled_from([*sorted(GOOD), "observation/state"])
MESSAGES = st.one_of(
    st.dictionaries(KNOWN | TEXTS, SENT | st.just(...), max_size=2).map(
        lambda changes: packed({key: value for key, value in (GOOD | changes).items() if value is not ...})
    ),
    SENT.map(packed),
    TEXTS.map(lambda prompt: packed(GOOD | {"prompt": prompt})),
    damaged_bytes(packed(GOOD)),
    st.binary(max_size=30),
    st.builds(lambda level, depth: level * depth, st.sampled_from([b"\x91", b"\x81\xa1a", b"\xdc\x4e\x20"]),
              st.integers(1, 3000)),
)  # fmt: skip


def test_any_message_to_a_policy_server_is_read_or_refused():
    def read(data: bytes) -> None:
        try:
            request = READER.read(unpacked(data))
        except BadMessage as refused:
            assert str(refused).isprintable() and len(str(refused)) < 400
            raise BadInput(str(refused)) from None
        assert request.obs.keys() == {*CAMERAS, *READER.robot_state}
        for name, value in request.obs.items():
            is_picture = name in CAMERAS
            assert value.dtype == (np.uint8 if is_picture else np.float32) and np.isfinite(value).all()
            assert value.shape == ((len(value),) * 2 + (3,) if is_picture else (STATE_WIDTHS[name],))
        assert request.instruction == INSTRUCTION
        assert request.seed is None or 0 <= request.seed < 2**63
        assert 0 <= request.decision < MOST_DECISIONS

    outcomes(MESSAGES, 200, read)


def test_a_server_answers_any_message_with_a_chunk_or_a_sentence_and_the_next_good_one_with_its_chunk():
    """What is beyond the bound, or is no websocket message at all, ends its own connection alone."""
    most = READER.largest_message
    outside = st.sampled_from([b"", bytes(most + 1), b"GET /", b"\x88\x80", b"\xff" * 40])
    sent = st.one_of(MESSAGES, MESSAGES, TEXTS, st.tuples(outside, st.booleans()))
    begin = lambda: lambda request: CHUNK  # noqa: E731
    with in_background(PolicyServer(begin, READER, {"name": "test"}, "127.0.0.1", 0)) as server:

        def talk():
            connection = connect(server.address, compression=None, proxy=None)
            connection.recv(10)
            return connection

        def read(message: bytes | str | tuple) -> None:
            if isinstance(message, tuple):  # another client, with or without a handshake
                data, has_joined = message
                with (
                    contextlib.suppress(OSError, ConnectionClosed),
                    socket.create_connection(("127.0.0.1", server.port)) if not has_joined else talk() as other,
                ):
                    (other.send if has_joined else other.sendall)(data)
            else:
                steady.send(message)
            answers = [steady.recv(10)] if not isinstance(message, tuple) else []
            steady.send(packed(GOOD))
            answers.append(steady.recv(10))
            assert np.array_equal(unpacked(answers[-1])["actions"], CHUNK)
            if isinstance(answers[0], str):
                assert answers[0].isprintable()
                raise BadInput(answers[0])
            assert np.array_equal(unpacked(answers[0])["actions"], CHUNK)

        with talk() as steady:
            outcomes(sent, 60, read)
    assert not server.clients
