"""Plays many episodes at once: worker processes simulate (worker.py), one policy in this process decides.

A worker that dies, hangs or cannot build its environment is replaced and its episode tried once more. Workers keep to
one task for as long as it has episodes, since building an environment takes seconds; while one builds, others step.
A worker's time is what it works for: while it waits for the policy its clock stands still. A policy that answers from
elsewhere is asked for each worker apart, so that one answer that is late, or never comes, holds up no other worker.
"""

import errno
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from errors import BadInput, out_of_memory_named
from rollouts.crashes import exception_line, place_of_hang
from rollouts.episodes import Episode, Rollouts

GB_PER_ENVIRONMENT = 1.6  # measured: 1.3 to 1.55
TOO_MANY = {errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE}  # no memory, no more processes or files for a user
TRIES = 2
KEPT_OUTPUT = 4000  # characters of a dead worker's output that are kept
# The working directory stays the main process's: PYTHONPATH, which may bring another simulator, can be relative to it.
START_WORKER = f"import sys; sys.path[0] = {str(Path(__file__).parent.parent)!r}; import rollouts.worker as w; w.main()"
LONGEST_WAIT = 3600.0  # seconds; the system's call takes no endless ones


class NoChunk(Exception):
    """What a policy elsewhere has done instead of answering, in one sentence: a crash of the episode that asked."""


@dataclass(frozen=True)
class Attempt:
    """An episode that waits for a worker, with what became of the attempt before."""

    episode: Episode
    number: int = 1
    earlier_crash: str | None = None


class SimulatorProcess:
    """A worker process as the main process sees it. Raises BadInput where none can be started."""

    def __init__(self, rollouts: Rollouts):
        # One thread each: there is a process for every core already. LP is Mesa's software renderer, 0: no helpers.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}
        try:
            self.output_file = tempfile.TemporaryFile()  # noqa: SIM115  closed by kill()
            self.pipe, theirs = Pipe()
            self.process = subprocess.Popen(
                [sys.executable, "-c", START_WORKER, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self.output_file,
                stderr=self.output_file,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches the main process alone
            )
        except OSError as problem:
            advice = "; try fewer --num_workers" if problem.errno in TOO_MANY else ""
            raise BadInput(f"a simulator's process cannot be started ({problem}){advice}") from None
        theirs.close()
        self.send(rollouts)
        self.task_id: int | None = None
        self.attempt: Attempt  # from begin() on
        self.conversation: Any = None  # of this attempt, with a policy elsewhere

    def begin(self, attempt: Attempt, init_state: np.ndarray | None, timeout: float) -> None:
        self.end_conversation()
        self.attempt, self.task_id = attempt, attempt.episode.task_id
        self.generator = torch.Generator().manual_seed(attempt.episode.seed)
        self.decision_ms: list[float] = []
        self.seconds_left = timeout
        self.resume((attempt.episode, init_state))

    def resume(self, message) -> None:
        """Sends what the worker goes on with, and lets its clock run."""
        self.send(message)
        self.deadline = time.monotonic() + self.seconds_left

    def stop_clock(self, seconds_worked: float) -> None:
        """It waits for actions. The worker measures its time itself: how long its message lay here does not count."""
        self.seconds_left -= seconds_worked
        self.deadline = math.inf

    def is_late(self) -> bool:
        """A worker whose message lies here unread is not late."""
        return self.deadline < time.monotonic() and not self.pipe.poll()

    def send(self, message) -> None:
        try:
            self.pipe.send(message)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has died; the next read finds out, and how

    def how_it_ended(self) -> str:
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it has closed its pipe and hangs all the same
            self.process.kill()
            code = self.process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def output(self) -> str:
        self.output_file.seek(0)
        return self.output_file.read().decode(errors="replace").strip()

    def end_conversation(self) -> None:
        """Says goodbye in the background: a server that hangs would not answer it."""
        if self.conversation is not None:
            threading.Thread(target=self.conversation.close, daemon=True).start()
            self.conversation = None

    def kill(self) -> None:
        self.end_conversation()
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        self.output_file.close()


def play_all(
    episodes: Sequence[Episode],
    init_state_of: Callable[[Episode], np.ndarray | None],
    policy,
    rollouts: Rollouts,
    num_workers: int,
    episode_timeout: float,
) -> Generator[dict]:
    """Yields the record of each episode when it is over, in the order in which they end.

    Raises BadInput where no environment can be built at all, or where a worker cannot write its pictures.
    """
    pool = Pool(episodes, init_state_of, rollouts, episode_timeout)
    elsewhere = Elsewhere(policy) if hasattr(policy, "converse") else None
    try:
        for _ in range(min(num_workers, len(episodes))):
            pool.assign()
        while pool.workers:
            asking: list[tuple[SimulatorProcess, dict]] = []
            for worker in pool.ready(elsewhere.bell if elsewhere else None):
                kind, content = _receive(worker.pipe)
                if kind == "observation":
                    obs, seconds_worked = content
                    worker.stop_clock(seconds_worked)
                    pool.environment_worked = True
                    asking.append((worker, obs))
                elif (over := pool.handle(worker, kind, content)) is not None:
                    yield over
            if elsewhere:
                elsewhere.ask(asking)
                for worker, why in elsewhere.failures(pool.workers):
                    if (over := pool.crashed(worker, why)) is not None:
                        yield over
            elif asking:
                decide(asking, policy)
            for worker in pool.late():
                if (over := pool.stop(worker)) is not None:
                    yield over
    finally:
        for worker in pool.workers:
            worker.kill()


def decide(asking: list[tuple[SimulatorProcess, dict]], policy) -> None:
    """One decision of the policy for all workers that wait for one."""
    start = time.perf_counter()
    with out_of_memory_named(
        f"out of memory while deciding for {len(asking)} simulators; try fewer --num_workers: each has its share of the"
        " memory, and of the GPU's where it draws on one"
    ):
        chunks = policy.act(
            [obs for _, obs in asking],
            [worker.attempt.episode for worker, _ in asking],
            [worker.generator for worker, _ in asking],
        )
    passes = math.ceil(len(asking) / policy.rows)
    ms = 1000 * (time.perf_counter() - start) / passes
    for (worker, _), chunk in zip(asking, chunks, strict=True):
        if policy.looks:  # a baseline decides nothing
            worker.decision_ms.append(round(ms, 3))
        worker.resume(chunk)


class Elsewhere:
    """The decisions of a policy that answers from elsewhere. Each is waited for in a thread of its own."""

    def __init__(self, policy):
        self.policy = policy
        self.bell, self._rings = Pipe(duplex=False)  # rings when an answer is there: wait() knows no queues
        self._answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask(self, asking: Sequence[tuple[SimulatorProcess, dict]]) -> None:
        for worker, obs in asking:
            threading.Thread(target=self._wait_for_answer, args=(worker, obs), daemon=True).start()

    def _wait_for_answer(self, worker: SimulatorProcess, obs: dict) -> None:
        start = time.perf_counter()
        try:
            if worker.conversation is None:
                worker.conversation = self.policy.converse(worker.attempt.episode)
            answer = worker.conversation.decide(obs)
        except Exception as problem:  # the main thread raises it, or knows what to do
            answer = problem
        self._answers.put((worker, answer, 1000 * (time.perf_counter() - start)))
        self._rings.send_bytes(b"!")

    def failures(self, playing: Collection[SimulatorProcess]) -> Iterator[tuple[SimulatorProcess, str]]:
        """Hands the answers that have come to their workers. Yields the others: who has none, and why. A worker that is
        no longer playing died while it waited, and its answer is for nobody."""
        while self.bell.poll():
            self.bell.recv_bytes()
            worker, answer, ms = self._answers.get()
            if worker not in playing:
                continue
            if isinstance(answer, NoChunk):
                yield worker, str(answer)
            elif isinstance(answer, Exception):
                raise answer
            else:
                worker.decision_ms.append(round(ms, 3))
                worker.resume(answer)


class Pool:
    """The workers, and the episodes that they have yet to play."""

    def __init__(
        self,
        episodes: Sequence[Episode],
        init_state_of: Callable[[Episode], np.ndarray | None],
        rollouts: Rollouts,
        episode_timeout: float,
    ):
        self.queue = EpisodeQueue(episodes)
        self.workers: list[SimulatorProcess] = []
        self.init_state_of, self.rollouts, self.episode_timeout = init_state_of, rollouts, episode_timeout
        self.environment_worked = False  # since one could be built, a later failure is that worker's alone

    def assign(self, worker: SimulatorProcess | None = None) -> None:
        """Gives the worker, or a new one, its next episode. A worker for which there is none is removed."""
        attempt = self.queue.next_for(worker.task_id if worker else None, [other.task_id for other in self.workers])
        if attempt is not None:
            if worker is None:
                worker = SimulatorProcess(self.rollouts)
                self.workers.append(worker)
            worker.begin(attempt, self.init_state_of(attempt.episode), self.episode_timeout)
        elif worker is not None:
            self.remove(worker)

    def remove(self, worker: SimulatorProcess) -> None:
        self.workers.remove(worker)
        worker.kill()

    def ready(self, bell: Connection | None = None) -> list[SimulatorProcess]:
        """The workers that have sent something. Waits for one, or for the bell, until the first is late."""
        seconds = min(worker.deadline for worker in self.workers) - time.monotonic()
        pipes = [worker.pipe for worker in self.workers] + ([bell] if bell else [])
        ready = wait(pipes, timeout=min(max(seconds, 0), LONGEST_WAIT))
        return [worker for worker in self.workers if worker.pipe in ready]

    def late(self) -> list[SimulatorProcess]:
        return [worker for worker in self.workers if worker.is_late()]

    def handle(self, worker: SimulatorProcess, kind: str, content) -> dict | None:
        """Any message but an observation. Returns the record of an episode that is over."""
        if kind == "finished":
            finished = record(worker.attempt, content, worker.decision_ms, None)
            self.assign(worker)
            return finished
        if kind == "bad input" or (kind == "no environment" and not self.environment_worked):
            raise BadInput(content)
        if kind == "no environment":
            return self.crashed(worker, content)
        how, output = worker.how_it_ended(), worker.output()
        exception = exception_line(output)
        return self.crashed(worker, f"{how}: {exception}" if exception else how, output)

    def stop(self, worker: SimulatorProcess) -> dict | None:
        """Ends a worker that hangs. Returns the record of its episode where that is not tried again."""
        worker.process.send_signal(signal.SIGUSR1)  # faulthandler prints where it hangs
        time.sleep(0.2)
        worker.process.kill()
        worker.process.wait()
        output = worker.output()
        how = f"not finished within --episode_timeout {self.episode_timeout:g} seconds of its own work"
        place = place_of_hang(output)
        return self.crashed(worker, f"{how}, {place}" if place else how, output)

    def crashed(self, worker: SimulatorProcess, why: str, output: str = "") -> dict | None:
        """Tries the worker's episode once more, or returns its record where that was the last try. `why` is the first
        line of what is kept."""
        how = f"{why}\n{output[-KEPT_OUTPUT:]}".strip()
        attempt = worker.attempt
        self.remove(worker)
        if attempt.number < TRIES:
            self.queue.again(Attempt(attempt.episode, attempt.number + 1, how))
            self.assign()
            return None
        self.assign()
        return record(attempt, {"success": False, "steps": None, "broken_by_policy": None}, [], how)


def _receive(pipe: Connection) -> tuple:
    try:
        return pipe.recv()
    except (EOFError, OSError):  # OSError: it died in the middle of a message
        return "died", None


def record(attempt: Attempt, outcome: dict, decision_ms: list[float], error: str | None) -> dict:
    return {
        **asdict(attempt.episode),
        "crashed": error is not None,
        **outcome,
        "decision_ms": decision_ms,
        "tries": attempt.number,
        "error": error,
        "earlier_crash": attempt.earlier_crash,
    }


class EpisodeQueue:
    """The episodes that no worker plays yet, by task."""

    def __init__(self, episodes: Sequence[Episode]):
        self.by_task: dict[int, deque[Attempt]] = {}
        for episode in episodes:
            self.by_task.setdefault(episode.task_id, deque()).append(Attempt(episode))

    def next_for(self, task_id: int | None, tasks_of_workers: Sequence[int | None]) -> Attempt | None:
        """One of the worker's own task, else of the task with the fewest workers, and of these the largest."""
        if not self.by_task:
            return None
        if task_id not in self.by_task:
            task_id = min(self.by_task, key=lambda task: (tasks_of_workers.count(task), -len(self.by_task[task])))
        attempt = self.by_task[task_id].popleft()
        if not self.by_task[task_id]:
            del self.by_task[task_id]
        return attempt

    def again(self, attempt: Attempt) -> None:
        self.by_task.setdefault(attempt.episode.task_id, deque()).appendleft(attempt)
