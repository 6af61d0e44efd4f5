"""The Gram matrix H = sum over tokens of x x^T: all that one-shot solvers need to know about a layer's inputs.

Sums are exact in the sense that matters: `Gram(a) + Gram(b)` equals `Gram(ab)` to fp32 rounding, so ranks and resumes
add up. The matrix is not averaged; every solver is invariant to its scale.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topiarist.core.compiled import NoKernels, loaded
from topiarist.core.errors import NumericalError
from topiarist.core.processor import quick_bf16_vectors

SOURCE = Path(__file__).with_suffix(".cpp")
BLOCK = 192  # rows per tile of the upper triangle: 1.6 x faster than one full product (one core, 576 to 4096 inputs)


class Gram:
    """Accumulates H of shape (in_features, in_features) in fp32.

    Raises NumericalError from `matrix` when an input held NaN or Inf, ValueError from `add` on a width that differs.
    """

    def __init__(self, in_features: int, *, device: torch.device | str = "cpu") -> None:
        self.in_features = in_features
        self.tokens = 0
        self._upper = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    @classmethod
    def from_matrix(cls, matrix: Float[Tensor, "in in"], tokens: int | None = None) -> Gram:
        """A Gram from a ready H; `tokens` defaults to its width. Raises NumericalError if H is not finite and symmetric."""
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a Gram is a square matrix, got shape {tuple(matrix.shape)}")
        if not torch.isfinite(matrix).all():
            raise NumericalError("NaN or Inf in the Gram matrix")
        if (matrix - matrix.T).abs().max() > 1e-4 * matrix.diagonal().abs().max():
            raise NumericalError("the Gram matrix is not symmetric: it must be the sum of x x^T over tokens")
        gram = cls(matrix.shape[0], device=matrix.device)
        gram._upper = matrix.to(torch.float32, copy=True)
        gram.tokens = matrix.shape[0] if tokens is None else tokens
        return gram

    @torch.no_grad()
    def add(self, x: Float[Tensor, "*batch in"]) -> None:
        """Add the tokens of x, any leading shape."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"Gram of {self.in_features} inputs was given x of shape {tuple(x.shape)}")
        x = x.reshape(-1, self.in_features).to(self._upper.device)
        self.tokens += x.shape[0]
        kernel = _kernel() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else None
        if kernel is not None:
            x = x.contiguous()
            kernel(x.data_ptr(), *x.shape, self._upper.data_ptr(), torch.get_num_threads())
            return
        x = x.to(torch.float32)
        for start in range(0, self.in_features, BLOCK):
            stop = start + BLOCK
            self._upper[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    def merge(self, other: Gram) -> Gram:
        """Add another Gram of the same inputs into this one, in place."""
        if other.in_features != self.in_features:
            raise ValueError(f"cannot merge Grams of {self.in_features} and {other.in_features} inputs")
        self._upper += other._upper.to(self._upper.device)
        self.tokens += other.tokens
        return self

    def take(self) -> Float[Tensor, " sums"]:
        """The sums so far as one vector, the upper triangle alone; those here start again from zero. `tokens` stays."""
        sums = torch.empty(self.num_sums, dtype=torch.float32, device=self._upper.device)
        for strip, part in self._strips(sums):
            part.copy_(strip)
        self._upper.zero_()
        return sums

    def put(self, sums: Float[Tensor, " sums"]) -> None:
        """Set the sums to those that a `take` gave."""
        if not self.is_here:
            self._upper = torch.zeros(self.in_features, self.in_features, dtype=torch.float32, device=sums.device)
        for strip, part in self._strips(sums):
            strip.copy_(part)

    def drop(self) -> None:
        """Free the sums, which another process has; `tokens` stays."""
        self._upper = self._upper.new_empty(0, 0)

    @property
    def is_here(self) -> bool:
        """Whether the sums are in this process."""
        return len(self._upper) == self.in_features

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._upper.device

    @property
    def num_sums(self) -> int:
        """Elements of what `take` returns."""
        return sum(
            min(BLOCK, self.in_features - start) * (self.in_features - start)
            for start in range(0, self.in_features, BLOCK)
        )

    def _strips(self, sums: Float[Tensor, " sums"]) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows of the upper triangle from their diagonal tile on, their part of `sums`), from the top down."""
        place = 0
        for start in range(0, self.in_features, BLOCK):
            strip = self._upper[start : start + BLOCK, start:]
            yield strip, sums[place : place + strip.numel()].view(strip.shape)
            place += strip.numel()

    def __add__(self, other: Gram) -> Gram:
        total = Gram(self.in_features, device=self._upper.device)
        return total.merge(self).merge(other)

    @property
    def matrix(self) -> Float[Tensor, "in in"]:
        """H, symmetric, fp32; a new tensor."""
        if not self.is_here:
            raise ValueError("the sums of this Gram are in another process")
        # A finite sum proves every term finite, several times faster than testing each.
        if not torch.isfinite(self._upper.sum()) and not torch.isfinite(self._upper).all():
            raise NumericalError("NaN or Inf in the Gram: the model's activations overflow; check weights and dtype")
        H = self._upper.clone()
        for start in range(0, self.in_features, BLOCK):  # tile by tile: one copy in memory, not four
            stop = start + BLOCK
            tile = H[start:stop, start:stop]
            tile.copy_(tile.triu() + tile.triu(1).T)
            H[stop:, start:stop] = H[start:stop, stop:].T
        return H

    @property
    def diagonal(self) -> Float[Tensor, " in"]:
        """Sum of squares of every input channel."""
        return self._upper.diagonal().clone()

    @property
    def dead(self) -> Bool[Tensor, " in"]:
        """Inputs that were zero for every token."""
        return self._upper.diagonal() == 0


@functools.cache
def _kernel() -> Any:
    """The sum for bf16 inputs in C++, more than twice as fast; None on processors where it is not, or without a compiler."""
    if not quick_bf16_vectors():
        return None
    try:
        library, _ = loaded(SOURCE, ("-std=c++17", "-O3"))
    except NoKernels:
        return None
    library.topiarist_gram.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    library.topiarist_gram.restype = None
    return library.topiarist_gram
