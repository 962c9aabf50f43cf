"""A job of several processes (torchrun): who tunes what, and how it comes together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Share:
    """One process of a job: the only one, or one of torchrun's ranks."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count

    def of(self, items: list[T]) -> list[T]:
        """This process's part: every `count`-th."""
        return items[self.rank :: self.count]

    def gathered(self, mine: T) -> list[T] | None:
        """What every process has, in the order of the ranks, for the first of them; None for the others."""
        if self.count == 1:
            return [mine]
        of_each = [mine] * self.count if self.rank == 0 else None
        dist.gather_object(mine, of_each)
        return of_each


@contextlib.contextmanager
def joined() -> Iterator[Share]:
    """The job that torchrun's environment names, over gloo, each process on the GPU of its local rank."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Share()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("gloo")
    try:
        yield Share(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
