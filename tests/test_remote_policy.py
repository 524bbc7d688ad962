"""rollouts/remote_policy.py and rollouts/delay.py: policies behind servers that work, and behind servers that don't."""

import math
import re
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from websockets.sync.server import serve

from errors import BadInput
from observation import CAMERAS, STATE_WIDTHS
from rollouts.delay import measured_delay, steps_of_chunk, with_recorded_delay
from rollouts.episodes import Episode, Task
from rollouts.evaluation import AUTO, Evaluation
from rollouts.folder import EvaluationFolder
from rollouts.pool import Attempt, Elsewhere, NoChunk, SimulatorProcess
from rollouts.remote_policy import remote_policy
from run_libero_eval import evaluation_of, parse_arguments
from serving.messages import packed, unpacked

SETTINGS = {
    "policy": "server", "task_suite": "libero_object", "instructions": {}, "num_trials": 1, "seed": 0, "max_steps": 9,
    "shard": None, "decision_delay_steps": 3,
}  # fmt: skip
TASKS = {6: Task("butter", "pick up the butter", True, np.zeros((1, 20)))}
EPISODE = Episode("libero_object", 6, 0, seed=5)
OBS = {camera: np.zeros((8, 8, 3), np.uint8) for camera in CAMERAS}
OBS |= {part: np.zeros(width, np.float32) for part, width in STATE_WIDTHS.items()}
CHUNK = np.arange(70.0).reshape(10, 7)


def asked(address: str, *flags: object) -> Evaluation:
    command = ["run_libero_eval.py", "--policy", address, *map(str, flags)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        return evaluation_of(parse_arguments())


@contextmanager
def another_server(answers, metadata: dict | bytes | str | None = None):
    """A server that is not ours: answers(message, its number on the connection) is what it sends, None closes. It has
    no health check."""

    def converse(connection):
        connection.send(packed(metadata or {}) if isinstance(metadata, dict | None) else metadata)
        for number, message in enumerate(connection):
            answer = answers(unpacked(message), number)
            if answer is None:
                return
            connection.send(packed(answer) if isinstance(answer, dict) else answer)

    with serve(converse, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_says_nothing_of_itself_gets_openpis_message():
    messages = []

    def answers(message, number):
        messages.append(message)
        return {"actions": CHUNK.astype(np.float32), "other": 1}

    with another_server(answers) as address:
        policy, settings = remote_policy(asked(address), TASKS)
        conversation = policy.converse(EPISODE)
        chunks = [conversation.decide(OBS) for _ in range(2)]
        conversation.close()
    assert settings == {
        "image_size": 224, "visual_mesh_ratio": 1.0, "server": {}, "execute_steps": 10, "decision_delay_steps": 0
    }  # fmt: skip
    np.testing.assert_array_equal(chunks, [CHUNK, CHUNK])
    tried, first, second = messages
    assert tried["observation/image"].shape == (224, 224, 3) and tried["observation/state"].dtype == np.float64
    assert (first["observation/sampling_seed"], first["observation/decision"]) == (5, 0)
    assert second["observation/decision"] == 1 and first["prompt"] == "pick up the butter"


def test_what_a_server_says_of_itself_decides_pictures_and_settings():
    says = {
        "image_size": 64,
        "visual_mesh_ratio": 0.2,
        "code": "c0ffee",
        "name": "other",
        "list": np.arange(2),
        "x": math.nan,
    }
    with another_server(lambda *_: {"actions": CHUNK}, says) as address:
        policy, settings = remote_policy(asked(address, "--execute_steps", 4, "--decision_delay_steps", 3), TASKS)
        conversation = policy.converse(EPISODE)
        assert conversation.decide(OBS).shape == (7, 7)
        conversation.close()
        _, thinner = remote_policy(asked(address, "--visual_mesh_ratio", 0.5), TASKS)
    assert settings == {
        "image_size": 64, "visual_mesh_ratio": 0.2, "execute_steps": 4, "decision_delay_steps": 3,
        "server": {"image_size": 64, "visual_mesh_ratio": 0.2, "name": "other", "list": [0, 1], "x": "nan"},
    }  # fmt: skip
    assert policy.metadata["code"] == "c0ffee" and "visual_mesh_ratio" not in thinner  # the flag's


@pytest.mark.parametrize(
    "answer, sentence",
    [
        (None, "closed the connection"),
        ("Traceback ...\n  KeyError", "answered: Traceback ... KeyError"),
        (b"\xc1", "sent no chunk: the message is not readable as msgpack"),
        ({}, "sent no chunk: key actions is missing, expected an array of numbers"),
        ({"actions": [1.0]}, "sent no chunk: key actions is list, expected an array of numbers"),
        ({"actions": CHUNK > 0}, "sent no chunk: key actions is bool, expected an array of numbers"),
        ({"actions": CHUNK[0]}, r"sent no chunk: key actions is \(7,\), expected \(n, 7\)"),
        ({"actions": CHUNK[:, :6]}, r"sent no chunk: key actions is \(10, 6\), expected \(n, 7\)"),
        ({"actions": CHUNK[:0]}, r"sent no chunk: key actions is \(0, 7\), expected \(n, 7\)"),
        ({"actions": CHUNK[:9]}, r"sent no chunk: key actions is \(9, 7\), expected at least 10"),
    ],
)
def test_an_answer_that_is_no_chunk_is_the_servers_crash_in_one_sentence(answer, sentence):
    good, wrong = iter([{"actions": CHUNK}]), answer
    with another_server(lambda *_: next(good, wrong)) as address:
        policy, _ = remote_policy(asked(address), TASKS)
        conversation = policy.converse(EPISODE)
        with pytest.raises(NoChunk, match=f"^the policy's server {sentence}"):
            conversation.decide(OBS)
        conversation.close()
    with pytest.raises(NoChunk, match=r"^the policy's server cannot be reached"):
        policy.converse(EPISODE)


def test_a_chunk_that_is_not_finite_is_handed_on():
    """It is the policy's own failure, which the simulator's worker names."""
    with another_server(lambda *_: {"actions": CHUNK * math.nan}) as address:
        conversation = remote_policy(asked(address), TASKS)[0].converse(EPISODE)
        assert np.isnan(conversation.decide(OBS)[0, 1:]).all()
        conversation.close()


@pytest.mark.parametrize(
    "metadata, flags, sentence",
    [
        ("hello", (), "the policy's server answered: hello"),
        (b"\x93", (), "the policy's server sent no metadata: the message is not readable"),
        ({"image_size": 4000}, (), "its metadata's image_size is 4000, expected a whole number from 16 to 1024"),
        ({"image_size": "64"}, (), "its metadata's image_size is -1"),
        ({"visual_mesh_ratio": 2}, (), "its metadata's visual_mesh_ratio is 2, expected at most 1"),
        ({"instructions": ["Pick the milk."]}, (), "does not know the instruction 'pick up the butter'"),
        ({}, ("--execute_steps", 11), "--execute_steps 11: expected between 1 and 10"),
        ({}, ("--decision_delay_steps", 6), "--execute_steps 4 and --decision_delay_steps 6: expected at most the"),
    ],
)
def test_a_server_that_cannot_be_evaluated_is_one_sentence(metadata, flags, sentence):
    server = another_server(lambda *_: {"actions": CHUNK}, metadata)
    with server as address, pytest.raises(BadInput, match=re.escape(sentence)):
        remote_policy(asked(address, *flags), TASKS)


def test_nobody_at_the_address_is_one_sentence(monkeypatch):
    monkeypatch.setattr("rollouts.remote_policy.SECONDS_TO_CONNECT", 0.1)
    for address, sentence in (
        ("ws://127.0.0.1:9", r"nobody answers at http://127.0.0.1:9/healthz within 0.1 seconds \(.*refused\); is it"),
        ("ws://127.0.0.1:port", "is no address"),
    ):
        with pytest.raises(BadInput, match=f"--policy {address}: {sentence}"):
            remote_policy(asked(address), TASKS)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--checkpoint", "x"), "--checkpoint and --policy ws://h:1 both say who acts; give one of them"),
        (("--flow_start", "zero"), "--flow_start belongs to a checkpoint; the server at ws://h:1 has chosen its own"),
        (("--sample_steps", 2), "--sample_steps belongs to a checkpoint"),
        (("--decision_timeout", 0), "--decision_timeout 0: expected more than 0 seconds"),
        (("--decision_delay_steps", -1), "--decision_delay_steps -1: expected 0 or more, or auto"),
        (("--policy", "zero", "--decision_delay_steps", 1), "belongs to a policy that decides; --policy zero does not"),
    ],
)
def test_flags_that_contradict_a_server_are_one_sentence(flags, sentence):
    with pytest.raises(BadInput, match=re.escape(sentence)):
        asked("ws://h:1", *flags)


# ------------------------------------------------------------------------------------------- many episodes at once


def waiting_worker(trial: int) -> SimulatorProcess:
    """A worker that has asked, and the other end of its pipe."""
    worker = SimulatorProcess.__new__(SimulatorProcess)
    worker.attempt = Attempt(Episode("libero_object", 6, trial, trial))
    worker.conversation, worker.decision_ms, worker.answers, worker.resume = None, [], [], None
    worker.resume = worker.answers.append
    return worker


def test_a_server_that_is_slow_for_one_episode_holds_up_no_other():
    goes_on = threading.Event()

    def answers(message, number):
        if message["observation/sampling_seed"] == 0 and message["observation/image"].shape[0] == 8:
            goes_on.wait(10)
        return {"actions": CHUNK}

    slow, *quick = (waiting_worker(trial) for trial in range(3))
    with another_server(answers) as address:
        elsewhere = Elsewhere(remote_policy(asked(address), TASKS)[0])
        elsewhere.ask([(slow, OBS)])
        for n in (1, 2, 3):
            elsewhere.ask([(worker, OBS) for worker in quick])
            until(lambda n=n: all(len(worker.answers) == n for worker in quick), elsewhere, [slow, *quick])
        assert not slow.answers
        goes_on.set()
        until(lambda: slow.answers, elsewhere, [slow, *quick])
        for worker in (slow, *quick):
            worker.end_conversation()
    assert len(slow.decision_ms) == 1 and slow.decision_ms[0] > 0


def until(condition, elsewhere: Elsewhere, playing: list) -> list:
    failures, deadline = [], time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        elsewhere.bell.poll(0.1)
        failures += elsewhere.failures(playing)
    assert condition()
    return failures


def test_a_server_that_does_not_answer_in_time_fails_that_episode_alone():
    goes_on = threading.Event()

    def answers(message, number):
        if message["observation/sampling_seed"] == 1:
            goes_on.wait(10)
        return {"actions": CHUNK}

    workers, failures = [waiting_worker(trial) for trial in range(2)], []
    with another_server(answers) as address:
        elsewhere = Elsewhere(remote_policy(asked(address, "--decision_timeout", 0.3), TASKS)[0])
        elsewhere.ask([(worker, OBS) for worker in workers])
        deadline = time.monotonic() + 10
        while not failures and time.monotonic() < deadline:
            elsewhere.bell.poll(0.1)
            failures += elsewhere.failures(workers)
        goes_on.set()
        for worker in workers:
            worker.end_conversation()
    assert failures == [(workers[1], "the policy's server has sent no chunk within 0.3 seconds")]
    np.testing.assert_array_equal(workers[0].answers, [CHUNK])


@pytest.mark.parametrize("answer", [{"actions": CHUNK}, {}])
def test_an_answer_for_a_simulator_that_died_while_it_waited_is_for_nobody(answer):
    """Its episode has crashed and is tried again, whether the server decided or not."""
    died, plays = waiting_worker(0), waiting_worker(1)

    def answers(message, number):
        for_the_dead = message["observation/sampling_seed"] == 0 and message["observation/image"].shape[0] == 8
        return answer if for_the_dead else {"actions": CHUNK}

    with another_server(answers) as address:
        elsewhere = Elsewhere(remote_policy(asked(address), TASKS)[0])
        elsewhere.ask([(died, OBS)])
        assert elsewhere.bell.poll(10)
        elsewhere.ask([(plays, OBS)])
        assert until(lambda: plays.answers, elsewhere, [plays]) == []
        for worker in (died, plays):
            worker.end_conversation()
    assert not died.answers and not died.decision_ms


# ---------------------------------------------------------------------------------------------------------- delays


def test_a_delay_is_measured_once_in_whole_steps_and_a_started_evaluation_keeps_it(tmp_path):
    assert measured_delay(lambda: time.sleep(0.06))[0] >= 2  # of 50 ms
    assert measured_delay(lambda: None)[0] == 1
    evaluation = asked("ws://h:1", "--decision_delay_steps", AUTO, "--output_dir", tmp_path)
    assert with_recorded_delay(evaluation) is evaluation
    of_chunk, steps = steps_of_chunk(evaluation, 10, lambda: None)
    assert (of_chunk, steps) == ({"execute_steps": 9, "decision_delay_steps": 1}, 10)
    EvaluationFolder(tmp_path, SETTINGS).close()
    assert with_recorded_delay(evaluation).decision_delay_steps == 3


@pytest.mark.parametrize(
    "executed, delay, found",
    [(None, 0, (10, 10)), (None, 3, (7, 10)), (5, 3, (5, 8)), (5, 5, (5, 10)), (5, 0, (5, 5))],
)
def test_steps_executed_and_delay_share_the_chunk(executed, delay, found):
    flags = [] if executed is None else ["--execute_steps", executed]
    of_chunk, steps = steps_of_chunk(asked("ws://h:1", *flags, "--decision_delay_steps", delay), 10, lambda: None)
    assert (of_chunk["execute_steps"], steps) == found


@pytest.mark.parametrize("executed, delay", [(10, 1), (4, 5), (None, 6), (1, 2)])
def test_more_steps_than_the_chunk_has_are_one_sentence(executed, delay):
    flags = [] if executed is None else ["--execute_steps", executed]
    with pytest.raises(BadInput, match="expected at most the chunk's 10 actions together, and no more steps of delay"):
        steps_of_chunk(asked("ws://h:1", *flags, "--decision_delay_steps", delay), 10, lambda: None)
