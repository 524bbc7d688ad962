"""Which number of a dataset's actions opens the gripper and which closes it, found out from what the fingers then do.

LIBERO's simulator takes -1 to open and +1 to close. Other sets have 0 and 1, and some have them the other way round.

Letters: N frames of an episode.
"""

from dataclasses import dataclass, field

import numpy as np

from errors import BadInput

STILL = 0.01  # share of an episode's range of opening; what is less in a step is a tremble
CLEAR = 0.5  # share of all finger movement that must agree on more than goes against it


@dataclass
class GripperConvention:
    """What the episodes seen so far say; `add` every one of them before asking."""

    low: float = np.inf
    high: float = -np.inf
    # Metres that fingers opened after commands above a middle, less those after commands below it. Which of the two
    # middles counts is known when all commands have been seen.
    opened: dict[float, float] = field(default_factory=lambda: {0.0: 0.0, 0.5: 0.0})
    moved: float = 0.0  # metres that fingers moved at all
    between: int = 0  # commands that are none of the two ends

    def add(self, commands: np.ndarray, fingers: np.ndarray) -> None:
        """commands (N,) as stored; fingers (N, 2), metres, recorded before each command."""
        self.low, self.high = min(self.low, float(commands.min())), max(self.high, float(commands.max()))
        opening = np.abs(fingers).sum(axis=1)
        change = np.diff(opening)  # after commands[:-1]
        change[np.abs(change) < STILL * np.ptp(opening)] = 0
        for middle in self.opened:
            self.opened[middle] += float((change * np.sign(commands[:-1] - middle)).sum())
        self.moved += float(np.abs(change).sum())
        self.between += int((~np.isin(commands, (-1, 0, 1))).sum())

    @property
    def middle(self) -> float:
        return 0.5 if self.low >= 0 else 0.0

    @property
    def agreement(self) -> float:
        """-1 where the fingers always close after a high command, 1 where they always open."""
        return self.opened[self.middle] / self.moved if self.moved else 0.0

    def closing_is_high(self, where: object, told: str | None) -> bool:
        """Whether the higher number closes. `told`, "high" or "low", decides where it is given. Raises BadInput where
        the fingers say nothing clear."""
        if told:
            return told == "high"
        if abs(self.agreement) < CLEAR:
            raise BadInput(
                f"{where}: whether {self.high:g} opens or closes the gripper cannot be found out from its fingers "
                f"(agreement {self.agreement:+.2f}, expected beyond {CLEAR:g} either way); say it with --closes high "
                "or --closes low"
            )
        return self.agreement < 0

    def as_libero(self, commands: np.ndarray, closing_is_high: bool) -> np.ndarray:
        """commands (N,) -> -1 (open) or +1 (close)."""
        return np.where((commands > self.middle) == closing_is_high, 1.0, -1.0)
