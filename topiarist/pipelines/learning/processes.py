"""Several processes with one model each (data parallel): who I am, sums over all, and things that only the first does.

Started by `torchrun`, or by code that has called `torch.distributed.init_process_group` itself. One process needs
nothing of this: every method is then the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from topiarist.core.errors import TopiaristError


@dataclass(frozen=True)
class Processes:
    """This process among its equals."""

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
    def leave() -> None:
        """Leave the group, for a program that ends here."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's values, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def once(self, what: Callable[[], Any]) -> Any:
        """What the first process returns, or the user error it raises, in every process. Small values only."""
        if self.size == 1:
            return what()
        result: list[Any] = [None, None]
        if self.first:
            try:
                result[0] = what()
            except TopiaristError as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise result[1]
        return result[0]
