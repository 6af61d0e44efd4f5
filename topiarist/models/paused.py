"""The model's own forward, paused at every block: whatever goes from block to block is the model's own affair."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from topiarist.core.errors import UnsupportedModel
from topiarist.models.calls import BlockCall
from topiarist.models.derive import base_model, text_inputs
from topiarist.models.hooks import EndForward

END = "end"


class PausedForward:
    """Forwards of several batches, each in a thread of its own that waits wherever a block would run.

    Only one thread runs at a time, and blocks run in the caller's: its hooks and modes see them.

    names: of the blocks, in the order of the forward. `close` ends the threads.
    """

    def __init__(self, model: Any, names: Sequence[str], batches: Sequence[Int[Tensor, "batch window"]]) -> None:
        self._model, self._names = model, names
        self._blocks = [model.get_submodule(name) for name in names]
        self._at: list[Any] = [None] * len(batches)
        """Where each batch stands: (block, arguments, keyword arguments), END, or the error that ended it."""
        self._result: list[Any] = [None] * len(batches)
        self._go = [threading.Semaphore(0) for _ in batches]
        self._stopped = [threading.Semaphore(0) for _ in batches]
        self._own = threading.local()
        self._closed = False
        for index, block in enumerate(self._blocks):
            block.__dict__["forward"] = self._pause_at(index)
        for batch, tokens in enumerate(batches):
            threading.Thread(target=self._run, args=(batch, tokens), daemon=True).start()
            self._wait_for(batch)

    def _run(self, batch: int, tokens: Tensor) -> None:
        self._own.batch = batch
        try:
            with torch.no_grad():
                base_model(self._model)(**text_inputs(self._model, tokens))
            self._at[batch] = END
        except EndForward:
            self._at[batch] = END
        except BaseException as error:
            self._at[batch] = error
        self._stopped[batch].release()

    def _pause_at(self, index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            batch = getattr(self._own, "batch", None)
            if batch is None:  # the caller's thread runs the block itself
                block = self._blocks[index]
                return type(block).forward(block, *args, **kwargs)
            self._at[batch] = index, args, kwargs
            self._stopped[batch].release()
            self._go[batch].acquire()
            if self._closed:
                raise EndForward
            return self._result[batch]

        return forward

    def _wait_for(self, batch: int) -> None:
        self._stopped[batch].acquire()
        if isinstance(self._at[batch], BaseException):
            error = self._at[batch]
            self.close()
            raise error

    def reaches(self, index: int, batch: int = 0) -> bool:
        """Whether the forward of a batch stands before this block; False if it went past it.

        Raises UnsupportedModel if it stands at an earlier one, which was run already.
        """
        at = self._at[batch]
        if at == END or at[0] > index:
            return False
        if at[0] < index:
            raise UnsupportedModel(
                f"{self._names[at[0]]} is called more than once a forward: what a block reads is then no one distribution; "
                "prune its modules with prune_module"
            )
        return True

    def run(self, index: int, batch: int) -> tuple[BlockCall, Any]:
        """(call, output) of the block for one batch, which goes no further."""
        _, args, kwargs = self._at[batch]
        call = BlockCall.of(args, kwargs)
        return call, self._blocks[index](*map(_copied, args), **{k: _copied(v) for k, v in kwargs.items()})

    def advance(self, index: int, batch: int) -> None:
        """Run the block for one batch, and its forward up to the next."""
        if not self.reaches(index, batch):
            return
        _, args, kwargs = self._at[batch]
        self._result[batch] = self._blocks[index](*args, **kwargs)
        self._go[batch].release()
        self._wait_for(batch)
        self._result[batch] = None

    def close(self) -> None:
        """End all forwards, and leave the model as it was."""
        if self._closed:
            return
        self._closed = True
        for block in self._blocks:
            block.__dict__.pop("forward", None)
        for batch, at in enumerate(self._at):
            if isinstance(at, tuple):
                self._go[batch].release()


def _copied(value: Any) -> Any:
    """Arguments that a block may change are given to a trial run as copies."""
    return type(value)(value) if type(value) in (dict, list) else value
