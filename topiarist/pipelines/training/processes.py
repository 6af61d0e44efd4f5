"""Several processes that work on one run: this one's rank, sums over all, and work that only the main one does.

Started by `torchrun`, or by code that has called `torch.distributed.init_process_group` itself. For a single process
every method is the identity.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from topiarist.__about__ import __version__
from topiarist.checkpoints.journal import differences, listed
from topiarist.core.errors import LostProcess, ProcessError, TopiaristError, first_line
from topiarist.core.options import plain
from topiarist.core.slots import added
from topiarist.models.interface import OpenedModel

T = TypeVar("T")
JOINING = timedelta(minutes=5)
"""How long a process waits for the others to start."""
PATIENCE = timedelta(hours=12)
"""How long a process waits for another that is alive: one may solve, or measure, while the others have nothing to do."""


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
            # Shards and Grams lie on GPUs, the prior and the model's first copy on the host.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            with _connected():
                found = dist.rendezvous("env://", timeout=JOINING)  # pyright: ignore[reportPrivateImportUsage]
                store, rank, size = next(found)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
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
            with _connected():
                dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Overwrite a tensor with the main process' values, in place, and return it."""
        if self.size > 1:
            with _connected():
                dist.broadcast(tensor, src=0)
        return tensor

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` in the main process; every process returns its result, or raises the TopiaristError it raised."""
        if self.size == 1:
            return work()
        result: Any = None
        if self.is_main:
            try:
                result = work()
            except TopiaristError as error:
                result = error
        return self.share(result, 0)

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, small ones: they travel as pickles between processes of one run."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _connected():
            dist.all_gather_object(values, value)
        return values

    def share(self, value: T | TopiaristError, owner: int) -> T:
        """The value that process `owner` has, whatever it is, in all processes; the others' own is ignored.

        Tensors in it travel as they are, the rest as a pickle between processes of one run. Raises the value in all
        processes if it is a TopiaristError.
        """
        if self.size > 1:
            with _connected():
                value = self._sent(value, owner)
        if isinstance(value, TopiaristError):
            raise value
        return value

    def _sent(self, value: Any, owner: int) -> Any:
        tensors: list[Tensor] = []
        about: list[Any] = [None, None]
        if self.rank == owner:
            pickled = io.BytesIO()
            _TensorPickler(pickled, tensors).dump(value)
            about = [pickled.getvalue(), [(t.shape, t.dtype, t.device.type) for t in tensors]]
        dist.broadcast_object_list(about, src=owner)
        if self.rank != owner:
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in about[1]]
        for tensor in tensors:
            if not tensor.numel():
                continue
            # Bytes: backends do not know every dtype.
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=owner)
        return value if self.rank == owner else _TensorUnpickler(io.BytesIO(about[0]), tensors).load()

    def add_pairwise(
        self, value: Float[Tensor, " n"] | None, owner: int, num: int, device: torch.device, having: Sequence[bool]
    ) -> Float[Tensor, " n"] | None:
        """The sum of all processes' values in process `owner`, added as `PairwiseSum` adds; None in the others.

        value: n fp32 numbers, used up; None in processes that have none. num: n. having: which processes have one.
        """
        if self.size == 1:
            return value
        with _connected():
            if self.rank != owner:
                if value is not None:
                    dist.send(value, dst=owner)
                return None

            def total(first: int, last: int) -> Tensor | None:
                if last - first > 1:
                    middle = (first + last) // 2
                    return added(total(first, middle), total(middle, last))
                if first == self.rank or not having[first]:
                    return value if first == self.rank else None
                received = torch.empty(num, dtype=torch.float32, device=device)
                dist.recv(received, src=first)
                return received

            return total(0, self.size)

    def totals(
        self, own: Sequence[Float[Tensor, "..."] | None], like: Sequence[Float[Tensor, "..."]], having: Sequence[bool]
    ) -> list[Float[Tensor, "..."] | None]:
        """The sums of all processes' tensors in all of them, added as `PairwiseSum` adds: neighbours exchange what they have.

        own: fp32; None is zero. like: tensors of their shapes. having: which processes have any.
        """
        if self.size == 1:
            return list(own)
        sizes = [tensor.numel() for tensor in like]
        flat = None
        if having[self.rank]:
            parts = [torch.zeros_like(ours) if mine is None else mine for mine, ours in zip(own, like, strict=True)]
            flat = torch.cat([part.detach().flatten() for part in parts])
        width = 1
        while width < self.size:
            # All processes of a half hold its sum.
            first, upper = self.rank // (2 * width) * 2 * width, bool(self.rank & width)
            halves = [any(having[start : start + width]) for start in (first, first + width)]
            other = like[0].new_empty(sum(sizes)) if halves[not upper] else None
            with _connected():
                sent = [] if flat is None else [dist.P2POp(dist.isend, flat, self.rank ^ width)]
                received = [] if other is None else [dist.P2POp(dist.irecv, other, self.rank ^ width)]
                for work in dist.batch_isend_irecv(sent + received) if sent + received else []:
                    work.wait()
            flat = added(other, flat) if upper else added(flat, other)
            width *= 2
        assert flat is not None
        return [part.view(ours.shape) for part, ours in zip(flat.split(sizes), like, strict=True)]

    def check_agreement(self, about: Mapping[str, Any]) -> None:
        """Raise ProcessError, naming the first process whose `about` is not the main one's, and what differs."""
        everyone = self.gather((socket.gethostname(), dict(about)))
        for rank, (host, its) in enumerate(everyone):
            if named := list(differences(everyone[0][1], its)):
                raise ProcessError(
                    f"process {rank} on {host} works on something else than process 0: {listed(named)}. Give all processes "
                    "the same files, settings and versions"
                )

    def check_shared(self, text: Callable[[], str], what: str) -> None:
        """Raise ProcessError for the first process where `text()`, the content of a file, is not what the main one reads.

        what: the file's folder, for the message.
        """

        def read() -> str:
            try:
                return text()
            except OSError:
                return ""

        if self.size == 1:
            return
        everyone = self.gather((socket.gethostname(), read()))
        for rank, (host, its) in enumerate(everyone):
            if its != everyone[0][1]:
                raise ProcessError(
                    f"{what} is not the same folder for process {rank} on {host} and process 0 on {everyone[0][0]}: give one "
                    "on a disk that all share"
                )


def computing(device: torch.device) -> dict[str, Any]:
    """What the bits of a sum depend on beside the numbers: alike in all processes of a run, or their results are not."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "topiarist version": __version__,
        "torch version": torch.__version__,
        "transformers version": version("transformers"),
        "device": device.type,
        "processor": processor,
        "threads": torch.get_num_threads(),
    }


def check_same_run(processes: Processes, options: Any, model: OpenedModel, more: Mapping[str, Any]) -> None:
    """Raise ProcessError, naming the first difference, unless all processes have the same settings, model and versions.

    options: an options value, whose text is left out: what is drawn from it is compared by its digest. more: what else
    must be the same.
    """
    if processes.size > 1:
        said = {key: value for key, value in plain(options).items() if key != "data"}
        processes.check_agreement({**computing(model.device), "model": model.digest(), **said, **more})


@contextmanager
def _connected() -> Iterator[None]:
    """Turn what backends raise when a process is gone into one line."""
    try:
        yield
    except TopiaristError:
        raise
    except (RuntimeError, OSError) as error:
        raise LostProcess(
            f"lost a process of this run ({first_line(error)}): what is finished is kept, and the same command resumes"
        ) from error


class _TensorPickler(pickle.Pickler):
    """Puts the tensors of a value into a list, and their numbers into the pickle."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        """The number of a tensor; None for all else, which is pickled."""
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj.detach().contiguous())
        return len(self.tensors) - 1


class _TensorUnpickler(pickle.Unpickler):
    """Puts the tensors back."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        """The tensor of a number."""
        return self.tensors[pid]
