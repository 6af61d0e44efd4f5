"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323) with the mask held, then coordinate descent on the same grid.

W  weight (out, in)     H  damped Gram (in, in)      U  upper Cholesky factor of H^-1; U[j, j]^2 is the inverse of what an
Q  dequantised (in, out)                                error in column j costs once all later columns made up for it
q  integers (in, out)   s  scale of the group (out)  R  H (W - Q)^T, half the slope of the error in Q
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from topiarist.core import linalg
from topiarist.core.gram import Gram
from topiarist.core.options import options
from topiarist.quantization.grid import Grid, QuantizedWeight, finite, search_scale, stored

ROWS = 1024
"""Rows whose scales are searched at once: the candidates' copies stay small."""


@dataclass(frozen=True)
class Factors:
    """What all weights that read one input share."""

    H: Float[Tensor, "in in"]
    U: Float[Tensor, "in in"]


@options
class GPTQ:
    """Minimises tr((W - Q) H (W - Q)^T) over the integers and scales of a grid.

    First the paper's loop: columns in order, each rounded, its error spread over the columns to its right. A weight
    that the mask removes is a column whose only level is zero: what the updates put there is spread further, so the
    zero stays exact (leaving such weights out of the updates instead costs 20 to 130 % more error). Then `sweeps`
    of coordinate descent on the kept weights (QuantEase, arXiv 2309.01885, without its outliers), each ending a group
    with the least-squares scale of its integers.

    Cost: two Cholesky factors and an inverse of (in, in) for an input, then (2 + 4 sweeps) * out * in^2 flops.
    Differs from the authors' code in: 1. a group's scale is the one of `CLIP_RATIOS` under which the loop itself, run
    within the group, ends with the least error. 2. The mask. 3. The descent. 4. Loud damping.
    """

    needs_data: ClassVar[bool] = True
    damping: Annotated[float, Field(ge=0)] = 0.01
    """Added to the diagonal of the Gram, as a fraction of its mean."""
    block_size: Annotated[int, Field(gt=0)] = 128
    """Columns worked on before the others are updated (rounded up to whole groups)."""
    sweeps: Annotated[int, Field(ge=0)] = 2
    """Passes of coordinate descent after the loop."""

    def __call__(
        self, weight: Float[Tensor, "out in"], gram: Gram, grid: Grid, mask: Bool[Tensor, "out in"] | None = None
    ) -> QuantizedWeight:
        """Quantise one weight; see `quantize`."""
        return self.quantize(self.prepare(gram), weight, grid, mask)

    def prepare(self, gram: Gram) -> Factors:
        """Factor a Gram once for all weights that read this input. Raises NumericalError if no damping makes it definite."""
        H, dead = gram.matrix, gram.dead
        if bool(dead.any()):
            # An input that was never seen costs what an ordinary one does, and moves nothing else.
            live = H.diagonal()[~dead]
            H.diagonal()[dead] = live.mean() if len(live) else 1.0
        H = linalg.damped(H, self.damping)
        return Factors(H, linalg.inverse_factor(H))

    def quantize(
        self,
        factors: Factors,
        weight: Float[Tensor, "out in"],
        grid: Grid,
        mask: Bool[Tensor, "out in"] | None = None,
        target: Float[Tensor, "out in"] | None = None,
    ) -> QuantizedWeight:
        """Quantise one weight.

        mask: weights allowed to be other than zero (default: those that are). It may remove weights that are not zero:
        then this is SparseGPT's joint step, whose later weights make up for pruning and rounding together.
        target: what the descent comes close to (default: the weight). Of a pruned weight, the dense one.
        Raises QuantizationError if groups do not fit the row, NumericalError on NaN or Inf.
        """
        W = finite(weight).t().contiguous()  # transposed: the columns that the loop walks along are contiguous
        kept = (W != 0 if mask is None else mask.t()).to(W.dtype).contiguous()
        walk = _Walk(W, kept, factors, grid, grid.width(W.shape[0]), weight.dtype, self.block_size)
        walk.loop()
        if self.sweeps:
            walk.descend(W if target is None else finite(target).t(), self.sweeps)
        return QuantizedWeight(
            walk.q.t().to(torch.int8).contiguous(), walk.scale.t().to(weight.dtype).contiguous(), grid
        )


class _Walk:
    """One weight on its way to the grid; all tensors have inputs first."""

    def __init__(
        self, W: Tensor, kept: Tensor, factors: Factors, grid: Grid, group: int, dtype: torch.dtype, block_size: int
    ) -> None:
        self.W, self.kept, self.H, self.U = W, kept, factors.H.to(W.device), factors.U.to(W.device)
        self.grid, self.group, self.dtype = grid, group, dtype
        self.q, self.Q = torch.zeros_like(W), torch.zeros_like(W)
        self.scale = W.new_zeros(W.shape[0] // group, W.shape[1])
        # Whole groups in a block; a group wider than a block is cut into blocks, its scale found before.
        self.block = group * -(-block_size // group) if group <= block_size else block_size

    def _blocks(self) -> list[slice]:
        return [slice(a, min(a + self.block, len(self.W))) for a in range(0, len(self.W), self.block)]

    def _level(self, x: Tensor, j: int) -> tuple[Tensor, Tensor]:
        """(integers, their values) nearest to x in column j, as a reader of the file will compute them."""
        scale = self.scale[j // self.group]
        q = self.grid.round(x, scale).mul_(self.kept[j])
        return q, self._value(q, scale)

    def _value(self, q: Tensor, scale: Tensor) -> Tensor:
        return (q.to(self.dtype) * scale.to(self.dtype)).float()

    def loop(self) -> None:
        """GPTQ, algorithm 1."""
        W, U = self.W.clone(), self.U
        for block in self._blocks():
            part, errors = W[block], torch.empty_like(W[block])
            for i in range(len(part)):
                j = block.start + i
                if j % self.group == 0:
                    # A group wider than the block is seen as it was before this block's updates.
                    self.scale[j // self.group] = self._search(W[j : j + self.group], j)
                self.q[j], self.Q[j] = self._level(part[i], j)
                errors[i] = (part[i] - self.Q[j]) / U[j, j]
                part[i + 1 :].addr_(U[j, j + 1 : block.stop], errors[i], alpha=-1)
            W[block.stop :].addmm_(U[block, block.stop :].T, errors, alpha=-1)

    def _search(self, W: Float[Tensor, "g out"], start: int) -> Float[Tensor, " out"]:
        """The scale under which the loop over one group loses least: every candidate is a copy of the rows."""
        U = self.U[start : start + len(W), start : start + len(W)]
        found = []
        for part, kept in zip(W.split(ROWS, 1), self.kept[start : start + len(W)].split(ROWS, 1), strict=True):
            errors = self._column_errors if len(W) > self.block else self._loop_errors
            cost = partial(errors, part, kept, U)
            found.append(search_scale((part * kept).t(), self.grid, self.dtype, cost))
        return torch.cat(found)

    def _loop_errors(self, W: Tensor, kept: Tensor, U: Tensor, scales: Tensor) -> Float[Tensor, "ratios out"]:
        total, rows = torch.zeros_like(scales), W[:, None].repeat(1, len(scales), 1)
        flat = rows.flatten(1)
        for i in range(len(W)):
            error = (rows[i] - self.grid.round(rows[i], scales) * kept[i] * scales) / U[i, i]
            total.addcmul_(error, error)
            flat[i + 1 :].addr_(U[i, i + 1 :], error.flatten(), alpha=-1)
        return total

    def _column_errors(self, W: Tensor, kept: Tensor, U: Tensor, scales: Tensor) -> Float[Tensor, "ratios out"]:
        """For groups too wide to run the loop on: each column by itself, at what its error costs in the end."""
        divide = U.diagonal()[:, None]
        return torch.stack([(((W - self.grid.round(W, s) * s) * kept) / divide).square().sum(0) for s in scales])

    def descend(self, target: Float[Tensor, "in out"], sweeps: int) -> None:
        """Set every kept weight to the best level given all others, and every scale to the best for its integers."""
        R = self.H @ (target.to(self.Q.device) - self.Q)
        for _ in range(sweeps):
            for block in self._blocks():
                part, before = R[block], self.Q[block].clone()
                H = self.H[block, block]
                for i in range(len(part)):
                    j = block.start + i
                    self.q[j], value = self._level(self.Q[j] + part[i] / H[i, i], j)
                    part.addr_(H[i], value - self.Q[j], alpha=-1)
                    self.Q[j] = value
                    if (j + 1) % self.group == 0 and self.group <= self.block:
                        self._rescale(part, H, i + 1 - self.group, j + 1 - self.group)
                change = self.H[:, block] @ (self.Q[block] - before)
                change[block] = 0.0  # those of the block itself are up to date
                R.sub_(change)
            if self.group > self.block:
                for j in range(0, len(R), self.group):
                    self._rescale(R, self.H, j, j)

    def _rescale(self, part: Tensor, H: Tensor, i: int, j: int) -> None:
        """The least-squares scale of the group that starts at row i of `part` and j of all, where it helps."""
        here, there = slice(i, i + self.group), slice(j, j + self.group)
        q, scale, Hg = self.q[there], self.scale[j // self.group], H[here, here]
        slope, curvature = (q * part[here]).sum(0), ((Hg @ q) * q).sum(0)
        better = stored(scale + torch.where(curvature > 0, slope / curvature, 0.0), self.dtype)
        change = self._value(q, better) - self.Q[there]
        gain = 2 * (change * part[here]).sum(0) - ((Hg @ change) * change).sum(0)
        change.mul_(gain > 0)
        self.scale[j // self.group] = torch.where(gain > 0, better, scale)
        self.Q[there] += change
        part.sub_(H[:, here] @ change)
