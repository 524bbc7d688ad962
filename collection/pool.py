"""The worker processes of collect_demos.py and their orders: attempts at demonstrations, or scenes to be drawn."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from collection.files import CONTINUES
from collection.worker import prepare_worker
from errors import BadInput

GB_PER_WORKER = 1.5


class Order(NamedTuple):
    """What a worker is to do."""

    function: Callable
    arguments: tuple
    finished: Callable[..., int]  # takes what the function returned and the seconds that it took -> demos or scenes got


class Collection(Protocol):
    """What becomes one file: the demonstrations of a task, or scenes of it."""

    unit: str  # of its progress: demo or scene

    def missing(self) -> int:
        """How many demos or scenes are wanted and not there yet."""

    def next_order(self) -> Order | None:
        """What a free worker can do for it now, which counts as begun from here on."""

    def is_complete(self) -> bool:
        """Whether all is there, and no worker at it."""


C = TypeVar("C", bound=Collection)


@contextlib.contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Until the block is over. A process that is started in it inherits the blocked signal, so Ctrl-C, which a terminal
    sends to all, is the main process's alone, which ends its workers; half-started ones would print tracebacks."""
    came, handler = [], signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # another thread, such as tqdm's, may take a signal that is blocked here
        signal.signal(signal.SIGINT, lambda *_: came.append(True))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def collect(collections: Sequence[C], num_workers: int, finish: Callable[[C], None]) -> None:
    """Has all workers work off orders until every collection is complete; calls finish(collection) when one is."""
    missing = sum(collection.missing() for collection in collections)
    running: dict[Future, tuple[Order, float]] = {}  # and the time when it was handed out
    processes: set[BaseProcess] = set()
    open_ones = list(collections)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS"):  # LP: Mesa's software renderer
        os.environ[name] = "1"  # inherited by the workers, one of which keeps one core busy by itself
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), prepare_worker)
    unit = collections[0].unit
    progress = tqdm(total=missing, unit=unit, desc="collecting", smoothing=0, disable=not missing)
    try:
        while True:
            for collection in [collection for collection in open_ones if collection.is_complete()]:
                finish(collection)
                open_ones.remove(collection)
            if not open_ones:
                break
            for collection in open_ones:  # the first ones first: changing the task costs a worker some seconds
                while len(running) < num_workers and (order := collection.next_order()) is not None:
                    with ctrl_c_waits():
                        running[pool.submit(order.function, *order.arguments)] = order, time.monotonic()
                        processes.update(multiprocessing.active_children())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                order, begun = running.pop(future)
                progress.update(order.finished(future.result(), time.monotonic() - begun))
    except BrokenProcessPool:
        pool.shutdown()  # waits for the other workers, which it ends with SIGTERM
        raise BadInput(f"{how_it_ended([process.exitcode for process in processes])}; {CONTINUES}") from None
    finally:
        progress.close()
        if running:  # stopped: nobody waits for what the workers are still at
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown(cancel_futures=True)


def how_it_ended(exit_codes: Sequence[int | None]) -> str:
    """What the exit codes of all workers say about the one that was the first to end."""
    codes = [code for code in exit_codes if code not in (0, None, -signal.SIGTERM)] or [-signal.SIGTERM]
    if codes[0] >= 0:
        return f"a worker ended with exit code {codes[0]}, it may have said above why"
    if codes[0] == -signal.SIGKILL:
        return (
            f"a worker was killed (SIGKILL), most likely for want of memory ({GB_PER_WORKER} GB each);"
            " use fewer --num_workers"
        )
    return f"a worker was ended by {signal.Signals(-codes[0]).name}"
