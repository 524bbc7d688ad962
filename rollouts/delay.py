"""A robot goes on moving while its policy decides. How many steps of its old chunk that are, and how many actions of a
chunk are needed then."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

from errors import BadInput
from rollouts.evaluation import AUTO, Evaluation, check_range
from rollouts.folder import read_settings
from rollouts.video import CONTROL_HZ

MEASURED = 5  # decisions whose median is the delay


def with_recorded_delay(evaluation: Evaluation) -> Evaluation:
    """A started evaluation that measured its delay goes on with what it found then: its episodes are of that delay."""
    directory = evaluation.output_dir
    if evaluation.decision_delay_steps != AUTO or directory is None or not (directory / "settings.json").exists():
        return evaluation
    return replace(evaluation, decision_delay_steps=read_settings(directory)["decision_delay_steps"])


def steps_of_chunk(evaluation: Evaluation, chunk_length: int, decide: Callable[[], object]) -> tuple[dict, int]:
    """What settings.json says of a policy's chunks, and how many actions of each the simulator has to be given.

    decide: makes one decision, for AUTO, which measures how long it takes. Without --execute_steps as many actions are
    executed as leave the delay's. Raises BadInput where steps executed and delay do not fit the chunk.
    """
    delay = evaluation.decision_delay_steps
    if delay == AUTO:
        delay, ms = measured_delay(decide)
        print(f"a decision takes {ms:.1f} ms: the robot goes on for {delay} steps meanwhile")
    delay, execute_steps = int(delay), evaluation.execute_steps
    if execute_steps is None:
        execute_steps = max(chunk_length - delay, 1)
    check_range("execute_steps", execute_steps, chunk_length)
    if execute_steps + delay > chunk_length or delay > execute_steps:
        raise BadInput(
            f"--execute_steps {execute_steps} and --decision_delay_steps {delay}: expected at most the chunk's"
            f" {chunk_length} actions together, and no more steps of delay than are executed"
        )
    return {"execute_steps": execute_steps, "decision_delay_steps": delay}, execute_steps + delay


def measured_delay(decide: Callable[[], object]) -> tuple[int, float]:
    """Control steps, rounded up, and milliseconds that a decision takes; the first, which warms up, does not count."""
    decide()
    times = []
    for _ in range(MEASURED):
        start = time.perf_counter()
        decide()
        times.append(time.perf_counter() - start)
    seconds = median(times)
    return math.ceil(seconds * CONTROL_HZ), 1000 * seconds
