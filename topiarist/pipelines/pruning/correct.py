"""Error correction: every matrix is asked for what the dense model has at its place, and so for what those before it lost.

A solver prunes W for the inputs x that the pruned model gives it, towards W x. Here it prunes the weight W* that comes closest,
on the same inputs, to what the dense model has there: min over W* of sum || W* x - (W x_d + r) ||^2, with x_d the dense model's
input and r what the hidden states lack where the matrix writes to them, 0 elsewhere. The Gram stays that of x, so any
solver takes it. W* - W = E (H + ridge)^-1 with E = sum (W (x_d - x) + r) x^T.

Without r this is the correction of Quantization Error Propagation (arXiv 2504.09629, section 4), there for quantisation.
Matrices of a block are pruned one stage after the other: corrected side by side they would all make good the same loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from topiarist.core import linalg
from topiarist.core.options import Share, options
from topiarist.core.slots import PairwiseSum
from topiarist.models.families import Matrix, matrices_of
from topiarist.models.hooks import EndForward, hooked, watch_inputs
from topiarist.pipelines.common.grams import GramCollector, GramGroup
from topiarist.pipelines.common.stream import BlockStream

ROUNDING = 0.1
"""Relative error of the median token up to which two sums in the model's dtype count as equal. With a norm or a factor in
between they differ by about 1; the median, for a few tokens have hidden states so large that only rounding is left of a sum."""


@options
class Correct:
    """How much of the loss is made good."""

    share: Share = 1.0
    """Of W* - W that is added to W."""
    ridge: NonNegativeFloat = 8.0
    """Keeps W* near W: raises each input's own energy by inputs / tokens of it, times this."""
    residual: bool = True
    """Matrices that write to the hidden states also make good what those lack; otherwise only what their inputs lack."""


@dataclass
class Corrector:
    """One block beside a copy of itself that stays dense. Make it before anything of the block is pruned."""

    settings: Correct
    stream: BlockStream
    index: int
    block: nn.Module
    writers: set[str] = field(init=False)
    """Names of the matrices that also make good what the hidden states lack."""

    def __post_init__(self) -> None:
        self._family = self.stream.source.family
        self._dense = copy.deepcopy(self.block)
        self._twins = {m.name: m for m in matrices_of(self._dense, self._family)}
        self._attention = f"{self._family.attention.module}.{self._family.attention.out}"
        # Asked of the first batch, which the main process has.
        find = self._find_writers if self.settings.residual else set
        self.writers = self.stream.processes.on_main(find)

    @torch.no_grad()
    def groups(self, matrices: Sequence[Matrix]) -> list[GramGroup]:
        """The Gram of every distinct input of `matrices`, a stage of the block, with the weights to prune in their place.

        Experts keep their own weights: in the dense model other tokens reach them.
        """
        collector, lacks = GramCollector(matrices), dict[str, PairwiseSum]()
        twins = [self._twins[m.name] for m in matrices if m.expert is None]
        for number, slot in enumerate(self.stream.slots):
            of_slot: dict[str, Tensor] = {}
            for batch in slot:
                wanted, read = dict[str, Tensor](), dict[str, Tensor]()
                states_wanted = self._run(self._dense, twins, batch, partial(_note_input, wanted)) if twins else None
                states = self._run(self.block, matrices, batch, partial(_note_input, read), collector.on_input)
                for lead in (group.matrices[0] for group in collector.groups):
                    if lead.expert is not None:
                        continue
                    x = _tokens(read[lead.name])
                    if lead.name in self.writers:
                        assert states is not None and states_wanted is not None
                        missing = _tokens(states_wanted) - _tokens(states)
                    else:
                        missing = _tokens(wanted[lead.name]) - x
                    of_slot[lead.name] = _add(of_slot.get(lead.name), missing, x)
                collector.end_of_forward()
            for name in {**lacks, **of_slot}:
                lacks.setdefault(name, PairwiseSum(empty=number)).push(of_slot.get(name))
            collector.end_of_slot()
        groups = collector.of_all(self.stream.processes)
        for group in groups:
            if (lack := lacks.pop(group.matrices[0].name, None)) is not None:
                self._correct(group, lack.total)
        return groups

    def _correct(self, group: GramGroup, lack: Float[Tensor, "missing in"] | None) -> None:
        """Set the weights to prune in the process that owns the group, from this process' sum over tokens.

        lack: of (x_d - x) x^T, or for a writer of (what the states lack after it) x^T.
        """
        assert lack is not None  # every process has windows, and none leaves a linear layer out
        processes = self.stream.processes
        everyone = [True] * processes.size
        total = processes.add_pairwise(lack.flatten(), group.owner, lack.numel(), lack.device, everyone)
        if total is not None:
            group.asked = self._corrected(group, total.view(lack.shape))

    def _corrected(self, group: GramGroup, lack: Float[Tensor, "missing in"]) -> list[Tensor]:
        gram, H = group.gram, group.gram.matrix
        H.diagonal().mul_(1 + self.settings.ridge * gram.in_features / max(gram.tokens, 1)).masked_fill_(gram.dead, 1.0)
        factor = linalg.cholesky(H)
        asked = []
        for matrix in group.matrices:
            W = matrix.weight.float()
            E = lack if group.matrices[0].name in self.writers else W @ lack
            asked.append((W + self.settings.share * torch.cholesky_solve(E.T, factor).T).to(matrix.weight.dtype))
        return asked

    def _run(
        self, block: nn.Module, matrices: Sequence[Matrix], batch: int, *on_input: Callable[[Matrix, Tensor], None]
    ) -> Tensor | None:
        """Run one batch no further than `matrices` have seen their inputs; a writer among them, till it has written.

        Returns the hidden states after the writer, None if there is none.
        """
        states = self.stream.entering if block is self._dense else self.stream.hidden
        writer = next((m for m in matrices if m.name in self.writers), None)
        to_the_end = any(m.expert is not None for m in matrices) or (
            writer is not None and writer.name != self._attention
        )
        remaining, written = set(matrices), list[Tensor]()

        def seen(matrix: Matrix, x: Tensor) -> None:
            for told in on_input:
                told(matrix, x)
            remaining.discard(matrix)
            if not remaining and writer is None and not to_the_end:
                raise EndForward

        def wrote(_: nn.Module, __: object, out: Tensor) -> None:
            written.append(out)
            raise EndForward

        with ExitStack() as stack:
            stack.enter_context(watch_inputs(matrices, seen))
            if writer is not None and not to_the_end:
                stack.enter_context(hooked(writer.module.register_forward_hook(wrote)))
            with suppress(EndForward):
                _, _, out = self.stream.run_batch(self.index, block, batch, states)
                return out if writer is not None else None
        return _tokens(self.stream.batch_of(states, batch)) + _tokens(written[0]) if written else None

    @torch.no_grad()
    def _find_writers(self) -> set[str]:
        """The matrices whose outputs are added to the hidden states as they are: asked of the block, for in some families a
        norm or a factor stands between. Only then does it take a linear map to make good what the states lack.
        """
        modules, outputs = dict(self.block.named_modules()), dict[str, Tensor]()
        downs = [row.down for row in self._family.feed_forward]
        last = self._family.ffn[-1]
        names = {self._attention, last, *downs} & modules.keys()
        with hooked(*(modules[n].register_forward_hook(partial(_note_output, outputs, n)) for n in names)):
            _, hidden, out = self.stream.run_batch(self.index, self.block, 0)
        if not {self._attention, last} <= outputs.keys():
            return set()
        network = _tokens(outputs[last])
        change = _tokens(out) - _tokens(hidden)
        if not _close(_tokens(outputs[self._attention]) + network, change):
            return set()
        return {self._attention} | {d for d in downs if d in outputs and _close(_tokens(outputs[d]), network)}


def _note_input(inputs: dict[str, Tensor], matrix: Matrix, x: Tensor) -> None:
    inputs[matrix.name] = x


def _note_output(outputs: dict[str, Tensor], name: str, _: nn.Module, __: object, out: Any) -> None:
    outputs[name] = out[0] if isinstance(out, tuple) else out


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).norm(dim=1) / b.norm(dim=1)).nanmedian() <= ROUNDING)


def _tokens(x: Tensor) -> Float[Tensor, "tokens width"]:
    return x.reshape(-1, x.shape[-1]).float()


def _add(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a^T b, in place where there is a total."""
    return a.T @ b if total is None else total.addmm_(a.T, b)
