"""The processes of a `torchrun`: one by default, so that nothing else needs to tell the cases apart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["World", "global_mean", "global_sum", "join_world"]


@dataclass(frozen=True)
class World:
    """This process among all of them.

    Attributes:
        rank: from 0.
        size: number of processes.
        device: what this one computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """This process's part of a global batch."""
        local = batch // self.size
        return slice(self.rank * local, (self.rank + 1) * local)


@contextmanager
def join_world() -> Iterator[World]:
    """Joins the processes that `torchrun` started, if it did."""
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if size == 1:
        yield World(0, 1, device)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def global_sum(value: Tensor) -> Tensor:
    """The sum over all processes, without gradient."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def global_mean(value: Tensor) -> Tensor:
    """The mean over all processes, with this one's gradient.

    For any loss f of global means, DistributedDataParallel averages f'(mean) * d(local)/d(weights) over the
    processes, which is the gradient that one process would find on the whole batch.
    """
    if not dist.is_initialized():
        return value
    return value + (global_sum(value) / dist.get_world_size() - value.detach())
