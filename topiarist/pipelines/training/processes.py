"""Several processes that work on one run: this one's rank, sums over all, and work that only the main one does.

Started by `torchrun`, or by code that has called `torch.distributed.init_process_group` itself. For a single process
every method is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from topiarist.core.errors import TopiaristError


@dataclass(frozen=True)
class Processes:
    """This process' place among all that work on the run."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Processes:
        """Join the group that torchrun made; a lone process without one."""
        if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            # Shards lie on GPUs, the prior and the model's first copy on the host.
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @staticmethod
    def destroy() -> None:
        """Destroy the process group, for a program that ends here."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def all_reduce(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Sum a tensor over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Overwrite a tensor with the main process' values, in place, and return it."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Do `work` in the main process; every process returns its result, or raises the TopiaristError it raised.

        Small results only: they travel as pickles between processes of one run.
        """
        if self.size == 1:
            return work()
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = work()
            except TopiaristError as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise result[1]
        return result[0]
