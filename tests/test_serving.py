"""A policy server of openpi's protocol, asked over a real connection: its messages, its answers, its refusals."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import msgpack
import numpy as np
import pytest
import torch
from helpers import ROOT, fitted, small_config
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from demos.language import LanguageTable
from errors import BadInput
from observation import CAMERAS, ROBOT_STATES, STATE_WIDTHS
from rollouts.policies import CheckpointPolicy
from serve_policy import main
from serving.libero_message import RequestReader, message_of, turned
from serving.messages import BadMessage, packed, unpacked
from serving.policy_server import PolicyServer, in_background
from serving.served_checkpoint import begin
from statevla_model import StateVLA

INSTRUCTION = "pick up the milk"
SIZE = 64  # pixels of the pictures that the model was trained on; its own are 32
# From the real client: {"a": uint8 [[1, 2]], "s": float32 0.5, "p": "x"}
OPENPI_BYTES = (
    "83a16184c40b5f5f6e6461727261795f5fc3c40464617461c4020102c4056474797065a37c7531c4057368617065920102"
    "a17383c40d5f5f6e7067656e657269635f5fc3c40464617461cb3fe0000000000000c4056474797065a33c6634a170a178"
)


# --------------------------------------------------------------------------------------------------------- messages


def test_messages_are_openpis_byte_for_byte():
    message = {"a": np.array([[1, 2]], np.uint8), "s": np.float32(0.5), "p": "x"}
    assert packed(message).hex() == OPENPI_BYTES
    read = unpacked(bytes.fromhex(OPENPI_BYTES))
    assert read["a"].tolist() == [[1, 2]] and read["a"].dtype == np.uint8
    assert read["s"] == 0.5 and read["s"].dtype == np.float32 and read["p"] == "x"


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32", ">f8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_arrays_come_back_as_they_were_sent(dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    found = unpacked(packed({"array": array}))["array"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_what_is_no_number_is_not_sent():
    for wrong in (np.array([{}]), np.array(["text"]), np.zeros(1, complex), object()):
        with pytest.raises(ValueError, match="cannot be sent, expected numbers or texts"):
            packed({"a": wrong})


def array_map(**changes) -> bytes:
    items = {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f4", "shape": [2]} | changes
    return msgpack.packb({"a": {name.encode(): value for name, value in items.items()}})


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"", "not readable as msgpack"),
        (b"\xc1", "not readable as msgpack"),
        (b"\x80\x80", "not readable as msgpack .*extra data"),
        (b"\xdd\xff\xff\xff\xff", "not readable as msgpack .*exceeds max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "not readable as msgpack .*exceeds max_map_len"),
        (b"\x91" * 100_000, "not readable as msgpack"),
        (b"\x81\xa1a\xd9\x05\xff\xff\xff\xff\xff", "not readable as msgpack .*utf-8"),
        (msgpack.packb({"a": msgpack.Timestamp(1)}), "not readable as msgpack .*max_ext_len"),
        (msgpack.packb([1]), "a value of type list, expected a dictionary"),
        (msgpack.packb({"a": [[[]] * 100] * 1000}), "more than 20000 items"),
        (array_map(dtype="|O8"), "dtype '|O8', expected booleans"),
        (array_map(dtype="(9999,9999)f4"), "expected booleans"),
        (array_map(dtype="<f1"), "which there is not"),
        (array_map(dtype=4), "expected booleans"),
        (array_map(shape=[2**62, 2**62]), "has 8 bytes for data, expected 85070591730234615865843651857942052864"),
        (array_map(shape=[-1, -2]), "not of whole numbers from 0 on"),
        (array_map(shape=[True, 2]), "not of whole numbers"),
        (array_map(shape=[1] * 9), "no list of up to 8 sizes"),
        (array_map(shape=2), "no list of up to 8 sizes"),
        (array_map(data="text"), "has a value of type str for data, expected 8"),
        (msgpack.packb({"a": {b"__npgeneric__": True, b"data": b"x", b"dtype": "<f4"}}), "type bytes for data"),
    ],
)
def test_bytes_that_are_no_message_are_one_sentence(data, sentence):
    with pytest.raises(BadMessage, match=sentence.replace("|O8", r"\|O8")):
        unpacked(data)


# ------------------------------------------------------------------------------------------------- LIBERO's message


def seen(seed: int, size: int = SIZE) -> dict:
    rng = np.random.default_rng(seed)
    obs = {camera: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for camera in CAMERAS}
    return obs | {part: rng.normal(size=width).astype(np.float32) for part, width in STATE_WIDTHS.items()}


@pytest.mark.parametrize("robot_state", [["joint_states", "gripper_states"], ["ee_pos", "ee_ori", "gripper_states"]])
def test_what_is_sent_is_what_is_read(robot_state):
    reader = RequestReader(robot_state, SIZE, 32, [INSTRUCTION])
    obs = seen(0)
    message = message_of(obs, INSTRUCTION, seed=7, decision=3)
    np.testing.assert_array_equal(message["observation/image"], obs["agentview_rgb"][::-1, ::-1])
    openpis = {
        key: message[key] for key in ("observation/image", "observation/wrist_image", "observation/state", "prompt")
    }
    extra = (
        {"observation/joint_position": obs["joint_states"].astype(np.float64)} if "joint_states" in robot_state else {}
    )
    for sent, seed, decision in ((message, 7, 3), (openpis | extra, None, 0)):
        request = reader.read(unpacked(packed(sent)))
        assert request.obs.keys() == {*CAMERAS, *robot_state}
        for name, value in request.obs.items():
            np.testing.assert_array_equal(value, obs[name])
            assert value.dtype == obs[name].dtype
        assert (request.instruction, request.seed, request.decision) == (INSTRUCTION, seed, decision)


def test_a_picture_is_turned_by_180_degrees():
    picture = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    for one in (picture, picture[:, ::-1]):
        np.testing.assert_array_equal(turned(one), one[::-1, ::-1])


# ------------------------------------------------------------------------------------------------------ the server


@pytest.fixture(scope="module")
def policy():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    model = fitted(StateVLA(small_config().model, 48)).eval()
    model.language = LanguageTable("test encoder", {INSTRUCTION: torch.nn.functional.normalize(torch.ones(512), dim=0)})
    yield CheckpointPolicy(model, {}, torch.device("cpu"), 10, 4, "noise")
    torch.set_num_threads(threads)


READER = RequestReader(list(ROBOT_STATES["joints"]), SIZE, 32, [INSTRUCTION])


@contextmanager
def served(begins, **options):
    with in_background(PolicyServer(begins, READER, {"name": "test"}, "127.0.0.1", 0, **options)) as server:
        yield server


def talk(server: PolicyServer, **options):
    return connect(server.address, compression=None, proxy=None, **options)


def asked(connection, message: dict | bytes | str) -> dict | str:
    connection.send(packed(message) if isinstance(message, dict) else message)
    answer = connection.recv(30)
    return answer if isinstance(answer, str) else unpacked(answer)


def nothing():
    return lambda request: np.zeros((10, 7))


def health(server: PolicyServer) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_every_client_gets_the_chunks_that_the_model_decides_without_a_server(policy):
    """Four clients at once, each for itself: the noise of a seed is drawn on from decision to decision."""
    episodes, decisions = range(4), range(3)

    def expected(episode: int) -> list[np.ndarray]:
        generator = torch.Generator().manual_seed(episode)
        return [policy.model.decide(seen(n), INSTRUCTION, generator=generator) for n in decisions]

    def answers(episode: int) -> list[np.ndarray]:
        with talk(server) as connection:
            assert unpacked(connection.recv()) == {"name": "test"}
            all_connected.wait(30)
            replies = [asked(connection, message_of(seen(n), INSTRUCTION, episode, n)) for n in decisions]
            last = asked(connection, message_of(seen(0), INSTRUCTION, episode, 0))["actions"]  # the first once more
        assert replies[0].keys() == {"actions", "server_timing"} and "prev_total_ms" not in replies[0]["server_timing"]
        assert replies[1]["server_timing"].keys() == {"infer_ms", "prev_total_ms"}
        np.testing.assert_array_equal(last, replies[0]["actions"])
        return [reply["actions"] for reply in replies]

    all_connected = threading.Barrier(len(episodes))
    with served(lambda: begin(policy, policy.model.language)) as server:
        with ThreadPoolExecutor(len(episodes)) as clients:
            found = list(clients.map(answers, episodes))
        assert server.decisions == 16 and server.most_clients == 4
    np.testing.assert_array_equal(found, [expected(episode) for episode in episodes])


def test_without_a_seed_every_connection_and_decision_has_noise_of_its_own(policy):
    message = message_of(seen(0), INSTRUCTION, 0, 0)
    del message["observation/sampling_seed"]
    chunks = []
    with served(lambda: begin(policy, policy.model.language)) as server:
        for _ in range(2):
            with talk(server) as connection:
                connection.recv()
                chunks += [asked(connection, message)["actions"] for _ in range(2)]
    assert len({chunk.tobytes() for chunk in chunks}) == 4


def test_health_and_refusals_do_not_wait_for_a_decision():
    started, goes_on = threading.Event(), threading.Event()

    def slow(request):
        started.set()
        assert goes_on.wait(30)
        return np.zeros((10, 7))

    with served(lambda: slow) as server, talk(server) as busy, talk(server) as other:
        busy.recv(), other.recv()
        busy.send(packed(message_of(seen(0), INSTRUCTION, 0, 0)))
        assert started.wait(10)
        assert health(server) == (200, b"OK\n")
        assert asked(other, {}) == "the message lacks the key observation/image"
        goes_on.set()
        assert unpacked(busy.recv(10))["actions"].shape == (10, 7)


def without(key: str) -> dict:
    return {name: value for name, value in message_of(seen(0), INSTRUCTION, 0, 0).items() if name != key}


GOOD = message_of(seen(0), INSTRUCTION, 0, 0)
JOINTS = "observation/joint_position"


@pytest.mark.parametrize(
    "message, sentence",
    [
        ("text", "the message is a text, expected msgpack in a binary one"),
        (b"\xc1", "the message is not readable as msgpack (FormatError)"),
        (without("prompt"), "the message lacks the key prompt"),
        (without(JOINTS), f"the message lacks the key {JOINTS}"),
        (GOOD | {JOINTS: [0.0] * 7}, f"key {JOINTS} is of type list, expected an array"),
        (GOOD | {JOINTS: np.zeros(8)}, f"key {JOINTS} is float64 (8,), expected floats (7,)"),
        (GOOD | {JOINTS: np.zeros(7, int)}, f"key {JOINTS} is int64 (7,), expected floats (7,)"),
        (GOOD | {JOINTS: np.full(7, np.nan)}, f"key {JOINTS} has a value that is not finite"),
        (GOOD | {JOINTS: np.full(7, 1e300)}, f"key {JOINTS} has a value that is not finite"),
        (GOOD | {"prompt": 3}, "key prompt is of type int, expected a text"),
        (GOOD | {"prompt": "dance"}, "key prompt is 'dance', which is none of the 1 instructions"),
        (GOOD | {"prompt": "dance\n\x1b[2J"}, r"key prompt is 'dance\n\x1b[2J', which is none of the 1 instructions"),
        (GOOD | {"observation/sampling_seed": -1}, "key observation/sampling_seed is -1, expected a whole number"),
        (GOOD | {"observation/decision": 0.5}, "key observation/decision is 0.5, expected a whole number from 0"),
        *[
            (
                GOOD | {"observation/image": picture},
                f"key observation/image is {picture.dtype} {picture.shape}, expected uint8 (64, 64, 3), or another",
            )
            for picture in (
                np.zeros((64, 64, 3), np.float32), np.zeros((64, 32, 3), np.uint8), np.zeros((31, 31, 3), np.uint8),
                np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64), np.uint8), np.zeros((0, 0, 3), np.uint8),
            )
        ],
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_sentence_and_the_connection_goes_on(plain, message, sentence):
    assert asked(plain, message).startswith(sentence)
    assert asked(plain, GOOD)["actions"].shape == (10, 7)


@pytest.fixture(scope="module")
def plain():
    """A connection to a server that decides nothing."""
    with served(nothing) as server, talk(server) as connection:
        connection.recv()
        yield connection


def test_an_openpi_client_may_send_pictures_of_its_own_size(plain):
    for size in (32, 224, 512):
        message = message_of(seen(0, size), "Pick the milk.", 0, 0)
        assert asked(plain, message)["actions"].shape == (10, 7)


def test_a_message_beyond_the_bound_closes_its_own_connection_alone():
    with served(nothing) as server, talk(server) as other:
        other.recv()
        with talk(server) as large, pytest.raises(ConnectionClosedError, match="1009"):
            large.recv()
            large.send(bytes(READER.largest_message + 1))
            large.recv(10)
        assert asked(other, GOOD)["actions"].shape == (10, 7)


def test_a_decision_that_fails_ends_its_own_connection_and_is_in_the_servers_output(capfd):
    def wrong(request):
        raise RuntimeError("a mistake in the model")

    def no_memory(request):
        raise RuntimeError("could not allocate memory")

    with served(lambda: wrong) as server, talk(server) as connection:
        connection.recv()
        with pytest.raises(ConnectionClosedError, match="internal error"):
            asked(connection, GOOD)
        assert health(server)[0] == 200
    assert "RuntimeError: a mistake in the model" in capfd.readouterr().err
    with served(lambda: no_memory) as server, talk(server) as connection:
        connection.recv()
        assert asked(connection, GOOD) == "the server is out of memory; ask again later"


def test_a_key_is_asked_for_and_pages_of_websites_are_kept_out():
    with served(nothing, api_key="a key") as server:
        with talk(server, additional_headers={"Authorization": "Api-Key a key"}) as connection:
            connection.recv()
        for headers in ({}, {"Authorization": "Api-Key another"}, {"Authorization": "a key"}):
            with pytest.raises(InvalidStatus, match="401"):
                talk(server, additional_headers=headers)
        assert health(server) == (200, b"OK\n")
    with served(nothing) as server, pytest.raises(InvalidStatus, match="403"):
        talk(server, origin="http://example.org")


def test_a_place_where_it_cannot_listen_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host, number, sentence in (
            ("127.0.0.1", port, f"--port {port}: another program listens there already; choose another, or 0 for any"),
            (
                "no.such.host.invalid",
                0,
                "--host no.such.host.invalid: no address of this machine is known by that name",
            ),
            ("192.0.2.1", 0, "--host 192.0.2.1: is no address of this machine"),
        ):
            server = PolicyServer(nothing, READER, {}, host, number)
            with pytest.raises(BadInput, match=re.escape(sentence)), in_background(server):
                pass


def test_only_an_address_of_this_machine_counts_as_local():
    for host, local in (("127.0.0.1", True), ("0.0.0.0", False)):
        with in_background(PolicyServer(nothing, READER, {}, host, 0)) as server:
            assert server.is_local == local and server.address.startswith(f"ws://{host}:")


# ------------------------------------------------------------------------------------------------------ the script


def test_packages_that_are_missing_are_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "serving"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "msgpack", None)
    monkeypatch.setattr(sys, "argv", ["serve_policy.py", "--checkpoint", "best.pt"])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith("error: the package msgpack is not installed; `pip install -r requirements-interop.txt`")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--port", "70000"), "--port 70000: expected 0 to 65535"),
        (("--api_key", "schlüssel"), "--api_key: has characters that no HTTP header can carry"),
        (("--sample_steps", "0"), "--sample_steps 0: expected at least 1"),
        ((), "best.pt: no such checkpoint"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["serve_policy.py", "--checkpoint", str(tmp_path / "best.pt"), *flags])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_the_policy_in_the_tree_is_served_until_sigterm_ends_it():
    command = [
        sys.executable,
        "serve_policy.py",
        "--port",
        "0",
        "--checkpoint",
        "checkpoints/pretrained/libero_object_cpu",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stdout if line.startswith("listening"))
        assert line.endswith("for programs on this machine alone; Ctrl-C ends it\n")
        address = re.search(r"ws://127.0.0.1:\d+", line)[0]
        with connect(address, compression=None, proxy=None) as connection:
            metadata = unpacked(connection.recv())
            assert (metadata["image_size"], metadata["chunk_length"], metadata["control_hz"]) == (128, 10, 20)
            assert len(metadata["instructions"]) == 10 and re.fullmatch("[0-9a-f]{64}", metadata["weights_sha256"])
            message = message_of(seen(0, 128), metadata["instructions"][0], 0, 0)
            assert set(asked(connection, message)["actions"][:, 6]) <= {-1, 1}
            server.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed, match="1001"):
                connection.recv(30)
        said, _ = server.communicate(timeout=30)
    finally:
        server.kill()
    assert server.returncode == 0
    assert said == "stopped after 1 decisions, for at most 1 clients at once\n"
