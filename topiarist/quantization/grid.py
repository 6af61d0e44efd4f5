"""The grid that quantised weights lie on: symmetric integers times one scale a group of weights of a row.

q  integers (out, in), lowest <= q <= highest     s  scales (out, groups), > 0, in the dtype they are stored in
W  weight (out, in)                               g  weights of a row that share a scale

A zero of the weight is q = 0, and q = 0 is exactly 0.0: the grid has no zero point, so a mask survives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int8
from pydantic import Field
from torch import Tensor

from topiarist.core.errors import NumericalError, QuantizationError
from topiarist.core.options import options

GROUPS = (128, 64, 32)
"""Weights that share a scale, the best first: what vLLM's and llama.cpp's kernels take."""
CLIP_RATIOS = tuple(1.0 - step / 40 for step in range(21))
"""Candidates for the end of the grid, as fractions of the group's largest magnitude; at 1.0 only rounding is lost."""


@options
class Grid:
    """Symmetric integers of `bits` bits with a scale for every `group` weights of a row."""

    bits: Literal[4, 8] = 4
    """Bits an integer."""
    group: Annotated[int, Field(gt=0)] | None = 128
    """Consecutive weights of a row that share a scale; None: one scale a row."""

    def __str__(self) -> str:
        return f"int{self.bits}, " + ("a scale a row" if self.group is None else f"groups of {self.group}")

    @property
    def lowest(self) -> int:
        """The smallest integer, -8 for 4 bits."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest integer, 7 for 4 bits."""
        return (1 << (self.bits - 1)) - 1

    @classmethod
    def fitting(cls, bits: Literal[4, 8], group: int | str, shapes: Mapping[str, tuple[int, int]]) -> Grid:
        """The grid for matrices of these shapes (out, in), by name.

        group: weights that share a scale; "channel" for a whole row; "auto" for the best of `GROUPS` that fits them all.
        Raises QuantizationError, naming a matrix, if groups do not fit it.
        """
        if group == "channel":
            return cls(bits=bits, group=None)
        if group != "auto":
            grid = cls(bits=bits, group=int(group))
            for name, (_, columns) in shapes.items():
                try:
                    grid.width(columns)
                except QuantizationError as error:
                    raise QuantizationError(f"{name}: {error}") from None
            return grid
        for width in GROUPS:
            if all(columns % width == 0 for _, columns in shapes.values()):
                return cls(bits=bits, group=width)
        name, columns = next((name, columns) for name, (_, columns) in shapes.items() if columns % GROUPS[-1])
        raise QuantizationError(
            f"{name}: rows of {columns} weights hold no whole groups of {', '.join(map(str, GROUPS))}: take "
            "group=channel, or skip it"
        )

    def width(self, in_features: int) -> int:
        """Weights that share a scale in a row of `in_features`. Raises QuantizationError if groups do not fill the row."""
        group = self.group or in_features
        if in_features % group:
            raise QuantizationError(
                f"groups of {group} do not divide a row of {in_features} weights: choose a group that does "
                f"({', '.join(str(g) for g in (128, 64, 32) if in_features % g == 0) or 'one scale a row'})"
            )
        return group

    def round(self, x: Float[Tensor, "*shape"], scale: Float[Tensor, "*scale_shape"]) -> Float[Tensor, "*shape"]:
        """The nearest integers of the grid, as floats; `scale` broadcasts against x."""
        return (x / scale).round_().clamp_(self.lowest, self.highest)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on a grid. What a file stores is `q` and `scale`; what a model computes with is `dequantized()`."""

    q: Int8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    grid: Grid

    @property
    def mask(self) -> Bool[Tensor, "out in"]:
        """True where the weight is not zero."""
        return self.q != 0

    def dequantized(self) -> Float[Tensor, "out in"]:
        """q times scale, rounded once to the scale's dtype: what readers of the file compute, bit for bit."""
        return dequantize(self.q, self.scale)


def dequantize(q: Int8[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out in"]:
    """q times its group's scale, in the scale's dtype."""
    grouped = q.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
    return (grouped * scale[..., None]).flatten(1)


def stored(scale: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Scales as a file of `dtype` will hold them, in fp32. One that is or rounds to zero becomes a small positive number."""
    rounded = scale.to(dtype).float()
    return rounded.masked_fill(rounded <= 0, torch.finfo(dtype).eps)


def search_scale(
    W: Float[Tensor, "out g"],
    grid: Grid,
    dtype: torch.dtype,
    cost: Callable[[Float[Tensor, "ratios out"]], Float[Tensor, "ratios out"]],
) -> Float[Tensor, " out"]:
    """The scale of one group in every row, by trying `CLIP_RATIOS` and none.

    W: the group's weights. dtype: of the scales as stored. cost: the error of every row under every candidate scale.
    Ties go to the larger scale.
    """
    # The grid reaches half a step beyond its last integer; the first candidate has the largest weight on that integer.
    ratios = W.new_tensor([1 + 0.5 / grid.highest, *CLIP_RATIOS])
    candidates = stored(W.abs().amax(1) / (grid.highest + 0.5) * ratios[:, None], dtype)
    return candidates.gather(0, cost(candidates).argmin(0)[None])[0]


def round_to_nearest(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    H: Float[Tensor, "in in"] | None = None,
    *,
    search: bool = True,
) -> QuantizedWeight:
    """Round every weight to its grid by itself.

    H: the Gram of its inputs: scales are those with the least error d H d^T within each group (identity if not given).
    search: try clipped scales; otherwise the group's largest magnitude is the grid's end.
    Raises QuantizationError if groups do not fit, NumericalError on NaN or Inf.
    """
    W = finite(weight)
    g, dtype = grid.width(W.shape[1]), weight.dtype
    groups = W.unflatten(1, (-1, g))
    if search:
        columns = [
            search_scale(part, grid, dtype, lambda s, part=part, a=a: _errors(part, s, grid, H, a * g))
            for a, part in enumerate(groups.unbind(1))
        ]
        scale = torch.stack(columns, 1)
    else:
        scale = stored(groups.abs().amax(2) / (grid.highest + 0.5), dtype)
    q = grid.round(groups, scale[..., None]).flatten(1)
    return QuantizedWeight(q.to(torch.int8), scale.to(dtype), grid)


def finite(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The weight in fp32. Raises NumericalError if it holds NaN or Inf."""
    W = weight.detach().float()
    if not bool(torch.isfinite(W).all()):
        raise NumericalError("NaN or Inf in the weight")
    return W


def _errors(
    W: Float[Tensor, "out g"], scales: Float[Tensor, "ratios out"], grid: Grid, H: Tensor | None, start: int
) -> Float[Tensor, "ratios out"]:
    block = None if H is None else H[start : start + W.shape[1], start : start + W.shape[1]]
    errors = []
    for scale in scales:
        D = W - grid.round(W, scale[:, None]) * scale[:, None]
        errors.append(((D if block is None else D @ block) * D).sum(1))
    return torch.stack(errors)
