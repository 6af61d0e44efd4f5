"""One block at a time: the hidden states between blocks, the Grams inside them.

Peak memory = one block + its Grams + the hidden states (which may lie in a file), whatever the model's size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from topiarist.core.errors import UnsupportedModel
from topiarist.core.slots import slot_batches
from topiarist.models.attention import watch_attention
from topiarist.models.calls import BlockCall, capture_calls, equal, first_of
from topiarist.models.families import Matrix
from topiarist.models.hooks import EndForward, watch_inputs
from topiarist.models.opened import OpenedModel
from topiarist.models.paused import PausedForward
from topiarist.models.probe import flow_of
from topiarist.pipelines.common.grams import GramCollector, GramGroup
from topiarist.pipelines.common.hidden_states import HiddenStates
from topiarist.pipelines.training.processes import Processes


class BlockStream:
    """Hidden states on their way through the blocks, in batches that are called as the model itself would.

    Blocks are replayed one by one on stored hidden states. Where that cannot be (`Flow`), PausedStream takes its place.

    tokens (num, window), int64. batch_size: windows a forward. spill: folder for hidden states that do not fit in
    memory. processes: each has the hidden states of its own windows only, whole batches in whole slots; Grams are those of
    all windows.
    """

    def __init__(
        self,
        source: OpenedModel,
        tokens: Tensor,
        *,
        batch_size: int,
        device: torch.device,
        spill: Path | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.source, self.device, self._spill = source, device, spill
        self.processes = processes or Processes()
        self.num_all_batches = -(-len(tokens) // batch_size)
        """Of all processes."""
        slots = slot_batches(self.num_all_batches, self.processes.rank, self.processes.size)
        self._first = first = slots[0].start
        # Batches of this process, slot by slot.
        self.slots = [range(slot.start - first, slot.stop - first) for slot in slots]
        self.num_all_windows = len(tokens)
        """Of all processes."""
        bounds = [(slot.start * batch_size, slot.stop * batch_size) for slot in slots]
        self.slot_windows = [range(min(start, len(tokens)), min(stop, len(tokens))) for start, stop in bounds]
        """The windows in each slot of this process, counted among those of all."""
        tokens = tokens[first * batch_size : slots[-1].stop * batch_size]
        self._batches = [slice(s, min(s + batch_size, len(tokens))) for s in range(0, len(tokens), batch_size)]
        self.attention_unseen = False
        """Whether Grams that go by attention were taken where none could be seen."""
        self.dense: HiddenStates | None = None
        """The dense model's own hidden states after the block that `follow_dense` saw last."""
        self._entering: HiddenStates | None = None
        source.load_embeddings()
        self._begin(tokens)

    @classmethod
    def of(
        cls,
        source: OpenedModel,
        tokens: Int[Tensor, "num window"],
        *,
        batch_size: int,
        spill: Path | None = None,
        needs_states: str = "",
        processes: Processes | None = None,
    ) -> BlockStream:
        """The stream that fits the model.

        needs_states: what of the run works on hidden states as one tensor between blocks ("refinement"). Raises
        UnsupportedModel if it is asked of a model that has none, and for a block that is called twice a forward.
        """
        if flow_of(source, tokens[:1]).replays:
            return cls(source, tokens, batch_size=batch_size, device=source.device, spill=spill, processes=processes)
        check_flow(source, tokens, needs_states, spills=spill is not None)
        return PausedStream(source, tokens, batch_size=batch_size, device=source.device, processes=processes)

    def _begin(self, tokens: Tensor) -> None:
        """Take the tokens to where the first block would run."""
        self._calls: list[list[BlockCall]] = []
        self._hidden: HiddenStates | None = None
        flow = flow_of(self.source, tokens[:1])
        for rows in self._batches:
            calls = capture_calls(
                self.source.model, self.source.family, tokens[rows].to(self.device), returns_tuple=flow.returns_tuple
            )
            hidden = calls[0].hidden
            if self._hidden is None:
                shape = (len(tokens), hidden.shape[1], hidden.shape[2])
                self._hidden = HiddenStates(shape, hidden.dtype, self._spill)
            self._hidden.values[rows] = hidden.cpu()
            self._calls.append([self._shared(i, call) for i, call in enumerate(calls)])
        self.source.release_embeddings()

    def _shared(self, index: int, call: BlockCall) -> BlockCall:
        """Masks and positions are the same for every full batch: keep one copy."""
        for other in self._calls[:1]:
            if equal((other[index].args, other[index].kwargs), (call.args, call.kwargs)):
                return other[index]
        return replace(call, hidden=torch.empty(0))

    @property
    def hidden(self) -> Float[Tensor, "num window width"]:
        """The hidden states that enter the next block, (num, window, width), in the model's dtype on the CPU."""
        assert self._hidden is not None
        return self._hidden.values

    @property
    def num_batches(self) -> int:
        """Number of batches that this process' windows are divided into."""
        return len(self._batches)

    def slot_of(self, batch: int) -> int:
        """The slot that a batch lies in, counted among those of all processes."""
        return next(slot for slot, its in enumerate(slot_batches(self.num_all_batches, 0, 1)) if batch in its)

    def has(self, batch: int) -> bool:
        """Whether a batch, counted among those of all processes, is this one's."""
        return 0 <= self.own(batch) < self.num_batches

    def own(self, batch: int) -> int:
        """The number among this process' batches of one counted among those of all."""
        return batch - self._first

    def run_batch(
        self, index: int, block: Callable[..., Any], batch: int, states: Float[Tensor, "num window width"] | None = None
    ) -> tuple[slice, Tensor, Tensor]:
        """(rows, hidden states entering, output) of one batch; the stored hidden states stay as they are.

        states: hidden states of all windows to take in place of the stored ones.
        """
        hidden = self.batch_of(self.hidden if states is None else states, batch)
        return self._batches[batch], hidden, self._calls[batch][index].run(block, hidden)

    def batch_of(self, states: Float[Tensor, "num window width"], batch: int) -> Float[Tensor, "batch window width"]:
        """One batch of hidden states of all windows, on the device."""
        return states[self._batches[batch]].to(self.device)

    def reaches(self, index: int) -> bool:
        """Whether the forward calls this block at all; some are for other inputs than text."""
        return True

    def close(self) -> None:
        """Give up what is under way."""

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by the block's output."""
        for batch in range(self.num_batches):
            self.advance_batch(index, block, batch)

    @torch.no_grad()
    def advance_batch(self, index: int, block: nn.Module, batch: int) -> None:
        """Replace the hidden states of one batch by the block's output."""
        rows, _, out = self.run_batch(index, block, batch)
        self.hidden[rows] = out.cpu()

    @torch.no_grad()
    def outputs(
        self, index: int, block: nn.Module, states: Float[Tensor, "num window width"] | None = None
    ) -> HiddenStates:
        """The block's output for all windows, (num, window, width); the hidden states stay as they are.

        states: what enters the block, if not the stored hidden states.
        """
        found = self.new_states(self.hidden.shape[2], self.hidden.dtype)
        for batch in range(self.num_batches):
            rows, _, out = self.run_batch(index, block, batch, states)
            found.values[rows] = out.cpu()
        return found

    @property
    def entering(self) -> Float[Tensor, "num window width"]:
        """The dense model's own hidden states before the block that `follow_dense` saw last, if it kept them."""
        assert self._entering is not None
        return self._entering.values

    def follow_dense(self, index: int, block: nn.Module, *, keep_entering: bool = False) -> None:
        """Take the dense model's hidden states (`dense`) one block further. Every block in turn, before it is pruned.

        keep_entering: those before it stay too, as `entering`.
        """
        assert self._hidden is not None
        before, self._entering = self.dense or self._hidden, None  # nothing is pruned before the first block
        self.dense = self.outputs(index, block, before.values)
        self._entering = before if keep_entering else None

    def new_states(self, width: int, dtype: torch.dtype = torch.float32) -> HiddenStates:
        """Room for (num, window, width) values beside the hidden states: in memory, or in a file if those are in one."""
        return HiddenStates((*self.hidden.shape[:2], width), dtype, self._spill)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def inputs(self, index: int, block: nn.Module, matrix: Matrix) -> HiddenStates:
        """What `matrix` reads, for all windows (num, window, in), in the model's dtype."""
        found = self.new_states(matrix.shape[1], self.hidden.dtype)
        rows = slice(0)

        def on_input(_: Matrix, x: Tensor) -> None:
            found.values[rows] = x.reshape(rows.stop - rows.start, -1, x.shape[-1]).cpu()
            raise EndForward

        with watch_inputs([matrix], on_input):
            for batch, rows in enumerate(self._batches):  # noqa: B007  (on_input reads rows)
                with suppress(EndForward):
                    self.run_batch(index, block, batch)
        return found

    @torch.no_grad()
    def grams(
        self,
        index: int,
        block: nn.Module,
        matrices: Sequence[Matrix],
        *,
        stop_early: bool = False,
        one_batch: bool = False,
        by_attention: bool = False,
    ) -> list[GramGroup]:
        """Run the block over the hidden states and return a Gram for every distinct input of `matrices`.

        Groups come in the order in which the forward reaches them. `stop_early` ends each forward once every matrix
        has been seen; `one_batch` looks at the first batch only, whole: some families' masks have its size.
        `by_attention`: in the Gram of a matrix of values each token counts by the attention that it is given.
        """
        collector = GramCollector(matrices, self.source.family.attention.values if by_attention else frozenset())
        remaining: set[Matrix] = set()

        def end_if_done() -> None:
            if stop_early and not remaining and not collector.waits:
                raise EndForward

        def on_input(matrix: Matrix, x: Tensor) -> None:
            collector.on_input(matrix, x)
            remaining.discard(matrix)
            end_if_done()

        def on_attention(received: Tensor) -> None:
            collector.on_attention(received)
            end_if_done()

        with watch_inputs(matrices, on_input), watch_attention(on_attention) if by_attention else nullcontext():
            for slot in [range(1)] if one_batch else self.slots:
                for batch in slot:
                    remaining.update(matrices)
                    with suppress(EndForward):
                        self.run_batch(index, block, batch)
                    collector.end_of_forward()
                if not one_batch:
                    collector.end_of_slot()
        self.attention_unseen |= collector.attention_unseen
        return collector.groups if one_batch else collector.of_all(self.processes)

    def stages(self, index: int, block: nn.Module, matrices: Sequence[Matrix]) -> list[list[Matrix]]:
        """The matrices in the order in which a forward reaches them; those that read one input stay together."""
        stages: dict[str, list[Matrix]] = {}
        by_name = {matrix.name: matrix for matrix in matrices}

        def reached() -> list[list[str]]:
            groups = self.grams(index, block, matrices, one_batch=True)
            return [[matrix.name for matrix in group.matrices] for group in groups]

        for group in self.processes.on_main(reached):  # which has the first batch
            stages.setdefault(by_name[group[0]].stage, []).extend(by_name[name] for name in group)
        # One batch may miss some experts; they belong to the stage of their siblings.
        seen = {matrix for stage in stages.values() for matrix in stage}
        for matrix in matrices:
            if matrix not in seen:
                stages.setdefault(matrix.stage, []).append(matrix)
        return list(stages.values())


def check_flow(source: OpenedModel, tokens: Int[Tensor, "num window"], what: str, *, spills: bool = False) -> None:
    """Raise UnsupportedModel for a model whose blocks cannot be run on text one by one, and if `what` needs hidden states
    that it has not: one tensor between blocks. what: nothing, if it is empty. spills: whether they are to go into a file.
    """
    flow = flow_of(source, tokens[:1])
    what = what or ("spilling hidden states to a file" if spills else "")
    if what and not flow.replays:
        raise UnsupportedModel(f"{what} needs hidden states that are one tensor, and here {flow.why}: leave it out")


class PausedStream(BlockStream):
    """The model's own forward, one thread a batch, paused at every block: for models whose blocks hand on more than one
    tensor. There are no hidden states to look at, only the arguments that each block is called with.
    """

    def _begin(self, tokens: Tensor) -> None:
        self._forward = PausedForward(
            self.source.model, self.source.block_names, [tokens[rows].to(self.device) for rows in self._batches]
        )
        weakref.finalize(self, self._forward.close)

    @property
    def hidden(self) -> Tensor:
        """Raises UnsupportedModel: what flows between these blocks is more than one tensor."""
        raise UnsupportedModel("this model has no hidden states between blocks that are one tensor")

    def reaches(self, index: int) -> bool:
        """Whether the paused forwards call this block."""
        return self._forward.reaches(index)

    def run_batch(
        self, index: int, block: Callable[..., Any], batch: int, states: Float[Tensor, "num window width"] | None = None
    ) -> tuple[slice, Tensor, Tensor]:
        """(rows, hidden states entering, output) of one batch, by the model's own block and states, whatever is given."""
        call, out = self._forward.run(index, batch)
        return self._batches[batch], call.hidden, first_of(out)

    @torch.no_grad()
    def advance_batch(self, index: int, block: nn.Module, batch: int) -> None:
        """Run the block for one batch, and its forward up to the next block."""
        self._forward.advance(index, batch)

    def close(self) -> None:
        """End the paused forwards."""
        self._forward.close()
