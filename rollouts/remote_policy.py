"""A policy behind a server of openpi's protocol, played with everything that an evaluation has.

Each episode is a conversation of its own: a connection, and on it one message for each decision. What the server does
to an episode (it dies, does not answer, answers with anything but a chunk) is a crash of that episode, as what the
machine does is; what its chunk does to the robot is the policy's own failure.
"""

import contextlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from demos.instructions import canonical_instruction
from errors import BadInput
from observation import nothing_seen
from rollouts.delay import steps_of_chunk
from rollouts.episodes import Episode, Task
from rollouts.evaluation import Evaluation
from rollouts.pool import NoChunk
from serving import API_KEY
from serving.libero_message import OPENPI_IMAGE_SIZE, message_of
from serving.messages import BadMessage, packed, unpacked

SECONDS_TO_CONNECT = 10.0
FIRST_DECISION = 5  # times as long as any other may take: many a server compiles its model then
LARGEST_REPLY = 2**24  # bytes
LONGEST_CHUNK = 1000  # actions
IMAGE_SIZES = range(16, 1025)
ANSWERS_KEPT = 300  # characters of what a server says is wrong


class RemotePolicy:
    """`converse` begins an episode. It names its address, what the server says of itself, and how many actions of each
    chunk are handed over (`steps`)."""

    looks = True

    def __init__(self, address: str, told: Mapping[int, str], timeout: float):
        """told: task id -> instruction. timeout: seconds that a decision may take.

        Raises BadInput where nobody answers at the address, or not in this protocol.
        """
        self.address, self.told, self.timeout = address, told, timeout
        self.steps = 1
        wait_until_healthy(address)
        try:
            conversation = Conversation(self, Episode("", next(iter(told)), 0, 0))
        except NoChunk as problem:
            raise BadInput(f"--policy {address}: {problem}") from None
        self.metadata = conversation.metadata
        conversation.close()

    def converse(self, episode: Episode) -> "Conversation":
        """Raises NoChunk where the server cannot be reached."""
        return Conversation(self, episode)


class Conversation:
    """One episode's connection. Raises NoChunk, as `decide` does, with a sentence on what the server did."""

    def __init__(self, policy: RemotePolicy, episode: Episode):
        self.policy, self.episode, self.decisions = policy, episode, 0
        key = os.environ.get(API_KEY)
        try:
            self.connection: ClientConnection = connect(
                policy.address, additional_headers={"Authorization": f"Api-Key {key}"} if key else None, proxy=None,
                compression=None, max_size=LARGEST_REPLY, open_timeout=SECONDS_TO_CONNECT, ping_interval=None,
                close_timeout=1,
            )  # fmt: skip
        except InvalidStatus as problem:
            status = problem.response.status_code
            advice = f"; the environment variable {API_KEY} holds the key" if status in (401, 403) else ""
            raise NoChunk(f"the policy's server refused the connection with HTTP status {status}{advice}") from None
        except (OSError, TimeoutError, InvalidHandshake, WebSocketException) as problem:
            raise NoChunk(f"the policy's server cannot be reached ({_in_short(problem)})") from None
        try:
            self.metadata = self._received(SECONDS_TO_CONNECT, "metadata")
        except NoChunk:
            self.close()
            raise

    def decide(self, obs: Mapping[str, np.ndarray], timeout: float | None = None) -> np.ndarray:
        """observation.from_simulator's -> a chunk (steps, 7) float64, whose numbers may be anything."""
        chunk = self.whole_chunk(obs, timeout)
        steps = self.policy.steps
        if len(chunk) < steps:
            raise NoChunk(f"the policy's server sent no chunk: key actions is {chunk.shape}, expected at least {steps}")
        return chunk[:steps]

    def whole_chunk(self, obs: Mapping[str, np.ndarray], timeout: float | None = None) -> np.ndarray:
        """(H, 7) float64, as long as the server sends them."""
        episode = self.episode
        message = message_of(obs, self.policy.told[episode.task_id], episode.seed, self.decisions)
        self.decisions += 1
        try:
            self.connection.send(packed(message))
        except (ConnectionClosed, OSError) as problem:
            raise NoChunk(f"the policy's server closed the connection ({_in_short(problem)})") from None
        return _chunk_of(self._received(self.policy.timeout if timeout is None else timeout, "chunk"))

    def _received(self, timeout: float, what: str) -> dict:
        try:
            reply = self.connection.recv(timeout)
        except TimeoutError:
            raise NoChunk(f"the policy's server has sent no {what} within {timeout:g} seconds") from None
        except (ConnectionClosed, OSError) as problem:
            raise NoChunk(f"the policy's server closed the connection ({_in_short(problem)})") from None
        if isinstance(reply, str):
            raise NoChunk(f"the policy's server answered: {' '.join(reply.split())[:ANSWERS_KEPT]}")
        try:
            return unpacked(reply)
        except BadMessage as problem:
            raise NoChunk(f"the policy's server sent no {what}: {problem}") from None

    def close(self) -> None:
        self.connection.close()


def _chunk_of(reply: dict) -> np.ndarray:
    actions = reply.get("actions")
    if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "fiu":
        found = actions.dtype if isinstance(actions, np.ndarray) else type(actions).__name__
        found = found if "actions" in reply else "missing"
        raise NoChunk(f"the policy's server sent no chunk: key actions is {found}, expected an array of numbers")
    if actions.ndim != 2 or actions.shape[1] != 7 or not 1 <= len(actions) <= LONGEST_CHUNK:
        raise NoChunk(f"the policy's server sent no chunk: key actions is {actions.shape}, expected (n, 7)")
    return actions.astype(np.float64)


def _in_short(problem: BaseException) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__


# ------------------------------------------------------------------------------------------------------- who it is


def wait_until_healthy(address: str) -> None:
    """Returns when the server answers at all. Raises BadInput where it does not within SECONDS_TO_CONNECT."""
    health = address.replace("ws", "http", 1).rstrip("/") + "/healthz"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + SECONDS_TO_CONNECT
    while True:
        try:
            opener.open(health, timeout=2).close()
            return
        except urllib.error.HTTPError as answer:  # from another server of the protocol, which may have no such page
            answer.close()
            return
        except (ValueError, http.client.InvalidURL) as problem:
            raise BadInput(f"--policy {address}: is no address ({problem}); expected ws://host:port") from None
        except (OSError, http.client.HTTPException) as problem:
            why = _in_short(getattr(problem, "reason", None) or problem)
        if time.monotonic() > deadline:
            seconds = f"{SECONDS_TO_CONNECT:g} seconds"
            raise BadInput(f"--policy {address}: nobody answers at {health} within {seconds} ({why}); is it running?")
        time.sleep(0.3)


def remote_policy(evaluation: Evaluation, tasks: Mapping[int, Task]) -> tuple[RemotePolicy, dict]:
    """The server's policy, and the part of settings.json that says who it is: all that its metadata says but the commit
    that it runs, which the episodes have. Raises BadInput where it is none, or does not answer."""
    assert evaluation.server is not None, "an Evaluation of a server names it"
    told = {task_id: task.instruction for task_id, task in tasks.items()}
    policy = RemotePolicy(evaluation.server, told, evaluation.decision_timeout)
    metadata = _plain(policy.metadata)
    known = metadata.get("instructions")
    if isinstance(known, list):
        known = {canonical_instruction(text) for text in known if isinstance(text, str)}
        if unknown := sorted(set(told.values()) - known):
            raise BadInput(f"--policy {evaluation.server}: does not know the instruction '{unknown[0]}'")
    image_size = _number(metadata, "image_size", OPENPI_IMAGE_SIZE)
    if image_size not in IMAGE_SIZES:
        raise BadInput(
            f"--policy {evaluation.server}: its metadata's image_size is {image_size}, expected a whole number from"
            f" {IMAGE_SIZES[0]} to {IMAGE_SIZES[-1]}"
        )
    mesh_ratio = _number(metadata, "visual_mesh_ratio", 1.0)
    if not 0 < mesh_ratio <= 1:
        raise BadInput(
            f"--policy {evaluation.server}: its metadata's visual_mesh_ratio is {mesh_ratio}, expected at most 1"
        )
    black = nothing_seen(int(image_size))
    try:
        with contextlib.closing(
            policy.converse(Episode(evaluation.task_suite, next(iter(told)), 0, 0))
        ) as conversation:
            first = conversation.whole_chunk(black, FIRST_DECISION * evaluation.decision_timeout)
            of_chunk, policy.steps = steps_of_chunk(evaluation, len(first), lambda: conversation.whole_chunk(black))
    except NoChunk as problem:
        raise BadInput(f"--policy {evaluation.server}: {problem}") from None
    who = {name: value for name, value in metadata.items() if name != "code"}
    of_policy = {"image_size": int(image_size), "server": who} | of_chunk
    if evaluation.visual_mesh_ratio is None:
        of_policy["visual_mesh_ratio"] = float(mesh_ratio)
    return policy, of_policy


def _number(metadata: dict, key: str, usual: float) -> float:
    value = metadata.get(key, usual)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else -1


def _plain(value: Any) -> Any:
    """The same for JSON, whatever a server has packed into its metadata."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
