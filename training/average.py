"""An average of the weights that a phase trains, in place of those of its last step."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

WARM_UP = 10  # the first steps' weights are forgotten: after n steps nothing older than about n / WARM_UP weighs much


class WeightAverage:
    """The exponential moving average of some parameters, updated once a step.

    With `decay` d it is that of the last 1 / (1 - d) steps or so; at the beginning d grows, (n + 1) / (n + 10) after n
    steps. The last steps of SGD wander about a minimum, and their average lies nearer to it (Polyak and Juditsky 1992).
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float, updates: int = 0):
        """Begins at what the parameters are now, the average of a run after so many updates. 0 < decay < 1."""
        self.parameters, self.decay, self.updates = list(parameters), decay, updates
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (self.updates + 1) / (self.updates + WARM_UP))
        torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.parameters], 1 - decay)
        self.updates += 1

    @contextlib.contextmanager
    def in_use(self) -> Iterator[list[Tensor]]:
        """Within the block the parameters hold their averages. Gives what they held before, which comes back after."""
        last = [parameter.detach().clone() for parameter in self.parameters]
        set_parameters(self.parameters, self.averages)
        try:
            yield last
        finally:
            set_parameters(self.parameters, last)


@torch.no_grad()
def set_parameters(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
