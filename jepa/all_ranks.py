"""Rows of all processes of a run, so that a loss over a batch is one over the batches of all of them together."""

import torch
import torch.distributed as dist
from torch import Tensor


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """(B, ...) of this rank -> those of all ranks, in the order of the ranks.

    With gradients every rank must have the same number of rows; without, they may have different numbers of them. Every
    rank then computes a loss from all rows, and DDP averages the gradients over ranks: together with the sum in
    `GatherRanks` that is the gradient of one process with the joint batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return GatherRanks.apply(rows) if torch.is_grad_enabled() else gather_rows(rows)


class GatherRanks(torch.autograd.Function):
    """(B, D) -> (ranks * B, D). The gradient of a rank's own rows is the sum of what the losses of all ranks say."""

    @staticmethod
    def forward(_ctx, rows: Tensor) -> Tensor:
        shares = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, rows.contiguous())
        return torch.cat(shares)

    @staticmethod
    def backward(_ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """Joins the rows of all ranks, which may have different numbers of them, without gradients."""
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = max(int(count) for count in counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(shares, padded)
    return torch.cat([share[: int(count)] for share, count in zip(shares, counts, strict=True)])
