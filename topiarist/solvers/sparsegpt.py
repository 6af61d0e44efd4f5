"""SparseGPT (Frantar & Alistarh, ICML 2023, arXiv 2301.00774): left to right, prune and let later weights compensate.

W  weight (out, in)     U  upper Cholesky factor of (H + damping)^-1, U[j, j]^2 = 1 / (OBS cost of column j)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from topiarist.core import linalg
from topiarist.core.options import options
from topiarist.core.patterns import NM, Pattern, Unstructured
from topiarist.core.selection import keep_largest, keep_largest_per_row
from topiarist.solvers.base import GramSolver


@dataclass(frozen=True)
class Factor:
    """What the weights of one input share."""

    U: Float[Tensor, "in in"]
    divisor: Float[Tensor, " in"]
    """|w| over its column's entry is the root of the saliency."""


@options
class SparseGPT(GramSolver):
    """Minimises ||X W^T - X W'^T||^2 greedily: columns in order; each block of columns gets its mask by `saliency`,
    each pruned weight's error is spread over the columns to its right (algorithm 1). Choose it when ALPS takes too
    long. Cost: one inverse and two Cholesky factors of (in, in), then out * in^2 flops.

    Differs from the authors' code in: 1. exact counts: the matrix's budget is divided over the blocks to the weight.
    2. Nothing given is changed. 3. The inverse is fp32 with damping that escalates loudly instead of failing.
    """

    copies: ClassVar[tuple[int, int]] = (3, 4)

    damping: PositiveFloat = 0.01
    """Added to the diagonal of H, as a fraction of its mean."""
    block_size: PositiveInt = 128
    """Columns whose mask is chosen together (rounded up to whole N:M groups)."""

    def prepare(self, H: Float[Tensor, "in in"]) -> Factor:
        """The factor U of the damped inverse; the weight of least w^2 / U_jj^2 goes first."""
        U = linalg.inverse_factor(linalg.damped(H, self.damping))
        return Factor(U, U.diagonal())

    def solve(
        self, state: Factor, W: Float[Tensor, "out in"], pattern: Pattern
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """Sweep over the columns of one weight."""
        U, divisor = state.U, state.divisor
        # Transposed, so that the columns the sweep walks along are contiguous.
        Wt = W.t().clone(memory_format=torch.contiguous_format)
        mask = torch.zeros_like(Wt, dtype=torch.bool)
        group = pattern.of if isinstance(pattern, NM) else 1
        if not isinstance(pattern, NM | Unstructured):
            mask = pattern.mask((Wt / divisor[:, None]).abs().t()).t().contiguous()
        width = -(-self.block_size // group) * group
        for start in range(0, Wt.shape[0], width):
            block, kept = Wt[start : start + width], mask[start : start + width]
            stop = start + block.shape[0]
            Ub = U[start:stop, start:stop]
            scale, divide = Ub.diagonal(), divisor[start:stop, None]
            if isinstance(pattern, Unstructured):
                kept.copy_(_budgeted((block / divide).abs().t(), pattern, start, Wt.shape).t())
            errors = torch.empty_like(block)
            for i in range(block.shape[0]):
                if isinstance(pattern, NM) and i % group == 0:
                    saliency = (block[i : i + group] / divide[i : i + group]).abs()
                    kept[i : i + group] = pattern.mask(saliency.t()).t()
                errors[i] = block[i].masked_fill(kept[i], 0.0) / scale[i]
                block[i + 1 :].addr_(Ub[i, i + 1 :], errors[i], alpha=-1)
            Wt[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
        return Wt.t().contiguous(), mask.t().contiguous()


def _budgeted(saliency: Tensor, pattern: Unstructured, start: int, shape: torch.Size) -> Tensor:
    """Mask of one block of columns; the blocks' budgets add up to the pattern's own count."""
    width, (inputs, outputs) = saliency.shape[1], shape
    total = pattern.num_kept((outputs, inputs)) // (outputs if pattern.per == "row" else 1)
    kept = total * (start + width) // inputs - total * start // inputs
    return keep_largest_per_row(saliency, kept) if pattern.per == "row" else keep_largest(saliency, kept)
