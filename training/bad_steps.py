"""Steps whose loss or gradient is not finite: skipped, counted, and after too many in a row the end of the run."""

from bisect import bisect_right
from collections.abc import Sequence

from torch import Tensor

from demos.hdf5 import Demo
from errors import BadInput
from training.processes import report

SHOWN = 8  # demos that a sentence names


class BadSteps:
    """Counts them, in the same way on every process: `training.optimizer.backpropagate` makes all find the same."""

    def __init__(self, limit: int, advice: str, before: dict[str, int]):
        """`limit` of them in a row are too many; `advice` is for that case. `before`: the counts of the run so far."""
        self.limit, self.advice = limit, advice
        self.in_all, self.in_a_row = before.get("in_all", 0), before.get("in_a_row", 0)

    def counts(self) -> dict[str, int]:
        return {"in_all": self.in_all, "in_a_row": self.in_a_row}

    def add(self, step: int, values: dict[str, Tensor], demos: str) -> None:
        """One more, step number `step` of the run. Raises BadInput where it is one too many, with the names of the
        losses that are not finite and of the demos that the step was trained on."""
        self.in_all += 1
        self.in_a_row += 1
        names = [name for name, value in values.items() if not value.isfinite()]
        found = f"{', '.join(names)} at step {step:,} not finite; the step's samples are from {demos}"
        if self.in_a_row >= self.limit:
            advice = self.advice if self.in_all < step else "no weight was changed; were those at the start finite?"
            raise BadInput(f"training diverged: {self.in_a_row} step(s) in a row were skipped, {found}; {advice}")
        report(f"\nwarning: step skipped ({self.in_a_row} in a row, {self.in_all} in all): {found}")


def demos_of(rows: Tensor, demos: Sequence[Demo]) -> str:
    """The names of the demos that some rows are of."""
    first_rows = [demo.first_row for demo in demos]
    found = sorted({bisect_right(first_rows, row) - 1 for row in rows.tolist()})
    names = ", ".join(demos[index].name for index in found[:SHOWN])
    return names if len(found) <= SHOWN else f"{names} and {len(found) - SHOWN} more"
