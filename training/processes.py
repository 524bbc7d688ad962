"""The processes of a run: one, or as many as torchrun has started, and what they agree on beside the gradients."""

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from errors import BadInput
from seeds import mixed_seed


def choose_device(name: str) -> torch.device:
    """auto takes CUDA, then Apple's MPS, then the CPU. Raises BadInput for a device that isn't there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if name not in available:
        raise BadInput(f"device is '{name}', expected auto, cuda, mps or cpu")
    if not available[name]:
        raise BadInput(f"device {name} was asked for, but this PyTorch finds none; use auto or cpu")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: float32 products at eight times the speed
    return torch.device(name)


# What gloo, NCCL and the store say where another process has gone or stands still. gloo has no class of errors for it.
LOST = (
    "closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Timed out", "timed out", "Timeout",
    "Application timeout",
)  # fmt: skip
JOINING_SECONDS = 1800.0
ROLL_CALL_SECONDS = 5.0  # how long a process that notices a loss waits for the others to notice it, too


class Processes:
    """The processes of a run, of which this is one.

    What they agree on travels over `control`, a group of its own on the CPU, so that neither the order of the
    gradients' exchanges nor a GPU's queue is touched, and over `store`, which knows no time limit.
    """

    def __init__(self, device: torch.device, store: dist.Store, timeout: timedelta):
        self.device, self.store, self.timeout = device, store, timeout
        self.rank, self.number = dist.get_rank(), dist.get_world_size()
        self.control = dist.new_group(backend="gloo", timeout=timeout) if self.number > 1 else None
        self.meetings = 0

    def largest(self, *values: float) -> Callable[[], list[float]]:
        """Begins to find the largest of every value over all processes. The answer comes when it is called for, so that
        a training step hides the way to the others and back. Every process has to ask at the same place."""
        asked = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, self.control, async_op=True) if self.number > 1 else None

        def answer() -> list[float]:
            if work is not None:
                work.wait()
            return asked.tolist()

        return answer

    def rows(self, row: Tensor) -> Tensor:
        """A row (n,) of every process -> (processes, n), on the CPU."""
        row = row.cpu()
        if self.number == 1:
            return row[None]
        rows = [torch.empty_like(row) for _ in range(self.number)]
        dist.all_gather(rows, row, self.control)
        return torch.stack(rows)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process takes its time in the block, and the others wait at its end, however long that is. Where it
        dies, they wait for torchrun, which ends them."""
        self.meetings += 1
        key, pause = f"first_rank_has_done/{self.meetings}", 0.002
        yield
        if self.number == 1:
            return
        if self.rank == 0:
            self.store.set(key, "yes")
        while not self.store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        dist.barrier(
            self.control
        )  # the store may be the first process's own, which ends no sooner than all have seen it

    @contextlib.contextmanager
    def loss_named(self) -> Iterator[None]:
        """Where another process has ended or stands still in the block, this one ends with a sentence that names it.

        A process that has ended is noticed at once, one that stands still after `timeout`. Raises BadInput."""
        try:
            yield
        except RuntimeError as problem:
            is_lost = isinstance(problem, dist.DistError) or any(words in str(problem) for words in LOST)
            if self.number == 1 or not is_lost:
                raise
            raise BadInput(self._roll_call()) from None

    def _roll_call(self) -> str:
        """Who does not notice what all others do is the one that they have lost."""
        try:
            self.store.set(f"answers/{self.rank}", "yes")
            missing, until = set(range(self.number)), time.monotonic() + ROLL_CALL_SECONDS
            while missing and time.monotonic() < until:
                missing -= {rank for rank in missing if self.store.check([f"answers/{rank}"])}
                time.sleep(0.1)
        except RuntimeError:  # the store's own process has gone
            missing = set()
        if not missing:
            return (
                f"process {self.rank} of {self.number} has lost its connection to the others, or waited for them for "
                f"{_told(self.timeout)} (training.rank_timeout_minutes); what the first of them says tells why"
            )
        which = ", ".join(map(str, sorted(missing)))
        return (
            f"process {which} of 0 to {self.number - 1} has ended, or has stood still for {_told(self.timeout)} "
            f"(training.rank_timeout_minutes); what it says itself tells why. Process {self.rank} ends with it"
        )


def _told(time_span: timedelta) -> str:
    return f"{time_span.total_seconds() / 60:g} minutes"


def join_processes(device_name: str, timeout_minutes: float) -> Processes:
    """This process among those of the run. A single process is a group of one, so that one code path trains on any
    number. Where one waits for another for longer than `timeout_minutes`, both end.

    Raises BadInput for a device that is not there and for processes that cannot find each other.
    """
    device, timeout = choose_device(device_name), timedelta(minutes=timeout_minutes)
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ  # torchrun sets both
    if not launched and os.environ.get("WORLD_SIZE", "1") != "1":
        raise BadInput(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but RANK or MASTER_ADDR is not set; start several processes "
            "with `torchrun --nproc_per_node=N train.py ...`, or unset RANK and WORLD_SIZE to train in one"
        )
    if device.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0)) if launched else 0
        if local_rank >= torch.cuda.device_count():
            raise BadInput(
                f"process {local_rank} has no GPU: --nproc_per_node exceeds {torch.cuda.device_count()} GPU(s)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not launched:
        alone = dist.HashStore()
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
        return Processes(device, alone, timeout)
    rank, world_size = os.environ["RANK"], os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise BadInput(f"RANK is {rank} and WORLD_SIZE {world_size or 'not set'}, expected 0 <= RANK < WORLD_SIZE")
    try:
        store = store_of_this_start(next(rendezvous("env://"))[0], int(rank), int(world_size))
        dist.init_process_group(backend, store=store, rank=int(rank), world_size=int(world_size), timeout=timeout)
        return Processes(device, dist.PrefixStore("statevla", store), timeout)
    except (ValueError, RuntimeError) as problem:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '(MASTER_PORT is not set)')}"
        first_line, *_ = str(problem).splitlines()
        raise BadInput(f"process {os.environ['RANK']} cannot join the others at {where} ({first_line})") from None


def store_of_this_start(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """Where the processes that have started now find each other and nothing of those before them: torchrun keeps its
    store when it starts killed ones again, and in it the addresses that they had.

    Every process comes with a name that nobody has had. The first welcomes all who come with its own, and when the
    right number has joined under that, all begin. Raises RuntimeError after half an hour.
    """
    name, until, seen = secrets.token_hex(8), time.monotonic() + JOINING_SECONDS, set[str]()
    store.set(f"came/{rank}", name)
    while time.monotonic() < until:
        if rank == 0:
            for other in range(world_size):
                came = store.get(f"came/{other}").decode() if store.check([f"came/{other}"]) else name
                if came not in seen:
                    store.set(f"welcome/{came}", name)
                    seen.add(came)
            if all(store.check([f"joined/{name}/{other}"]) for other in range(1, world_size)):
                store.set(f"complete/{name}", "yes")
        if store.check([f"welcome/{name}"]):
            first = store.get(f"welcome/{name}").decode()
            store.set(f"joined/{first}/{rank}", "yes")
            if store.check([f"complete/{first}"]):
                return dist.PrefixStore(first, store)
        time.sleep(0.02 if world_size < 64 else 0.5)
    raise RuntimeError(f"{world_size} process(es) were expected, and not all of them came")


def is_first_rank() -> bool:
    return dist.get_rank() == 0


def report(line: str) -> None:
    if is_first_rank():
        print(line, flush=True)


def seed_noise(seed: int, *of_what: int | str) -> None:
    """Noise is drawn anew from here: another on every rank, in every epoch and with every seed, the same in a resumed
    run."""
    torch.manual_seed(mixed_seed(seed, *of_what, dist.get_rank()))


def noise_state(device: torch.device) -> Tensor:
    """Where this process's noise goes on: the states of the CPU's generator and of the device's, (n,) uint8."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    if device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return torch.cat(states)


def set_noise_state(state: Tensor, device: torch.device) -> None:
    """As it was when `noise_state` gave this state on a device of the same kind."""
    of_cpu, state = len(torch.get_rng_state()), state.clone()  # torch reads a state from where its storage begins
    torch.set_rng_state(state[:of_cpu])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[of_cpu:].clone(), device)
    if device.type == "mps":
        torch.mps.set_rng_state(state[of_cpu:].clone())
