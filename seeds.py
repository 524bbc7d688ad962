"""Seeds that are made of several things: a run's seed with an epoch, a rank or a task."""

import hashlib
import operator


def mixed_seed(*parts: int | str) -> int:
    """A number from 0 to 2^63 - 1, which every generator here takes, another for every combination of the parts: adding
    them up would make epoch 1 of seed 0 epoch 0 of seed 1.

    numpy's integers count as Python's own, for what repr makes of them depends on numpy's version.
    """
    plain = tuple(str(part) if isinstance(part, str) else int(operator.index(part)) for part in parts)
    return int.from_bytes(hashlib.sha256(repr(plain).encode()).digest()[:8], "big") >> 1
