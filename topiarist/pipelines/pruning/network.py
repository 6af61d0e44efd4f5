"""The feed-forward network of a block as one function of its matrices, in fp32 whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from topiarist.models.families import FeedForward, Matrix
from topiarist.solvers.auxiliary import Activation

CHUNK = 1024
"""Tokens in work at a time."""


class Weights(NamedTuple):
    """fp32: the first matrices one above the other (rows, in), and the last (out, hidden)."""

    first: Tensor
    down: Tensor


@dataclass(frozen=True)
class Network:
    """down(act(s) * z) of a block; its matrices still hold the dense weights."""

    first: list[Matrix]
    down: Matrix
    activation: Activation
    gated: bool

    @classmethod
    def find(cls, block: nn.Module, rows: Sequence[FeedForward], matrices: Sequence[Matrix]) -> Network | None:
        """The first network of a family's rows that lies whole among `matrices`."""
        by_name = {matrix.name: matrix for matrix in matrices}
        for row in rows:
            if {*row.first, row.down} <= set(by_name):
                first, activation = [by_name[name] for name in row.first], block.get_submodule(row.activation)
                return cls(first, by_name[row.down], activation, row.gated)
        return None

    @property
    def matrices(self) -> list[Matrix]:
        """All matrices, the last one at the end."""
        return [*self.first, self.down]

    @property
    def weights(self) -> Weights:
        """The weights of the first matrices below each other, and of the last, in fp32."""
        return Weights(torch.cat([m.weight.float() for m in self.first]), self.down.weight.float())

    @property
    def biases(self) -> tuple[Tensor, Tensor]:
        """Of the first matrices and of the last; zeros where there is none."""
        return torch.cat([_bias(m) for m in self.first]), _bias(self.down)

    def split(self, A: Float[Tensor, "tokens first"]) -> tuple[Tensor, Tensor | float]:
        """What the activation is applied to, and what multiplies it."""
        if not self.gated:
            return A, 1.0
        s, z = A.chunk(2, dim=1)
        return s, z

    def activate(self, A: Float[Tensor, "tokens first"]) -> Float[Tensor, "tokens hidden"]:
        """act(s) * z, or act(A) where there is no gate."""
        s, z = self.split(A)
        return self.activation(s) * z

    def __call__(self, X: Float[Tensor, "tokens in"], weights: Weights) -> Float[Tensor, "tokens out"]:
        """The output (tokens, width) in fp32 for inputs X (tokens, width), by these weights and the network's biases."""
        first, last = self.biases
        return self.activate(X @ weights.first.T + first) @ weights.down.T + last

    def outputs(self, X: Float[Tensor, "num window in"], into: Float[Tensor, "num window out"]) -> None:
        """The dense network's outputs in fp32, whatever the model's dtype."""
        weights, device = self.weights, self.down.tensor.device
        for x, y in zip(flat(X).split(CHUNK), flat(into).split(CHUNK), strict=True):
            y.copy_(self(x.to(device).float(), weights))


def _bias(matrix: Matrix) -> Tensor:
    bias = getattr(matrix.module, "bias", None)
    return torch.zeros(matrix.shape[0], device=matrix.tensor.device) if bias is None else bias.detach().float()


def flat(states: Shaped[Tensor, "num window width"]) -> Shaped[Tensor, "tokens width"]:
    """(num, window, width) as (tokens, width)."""
    return states.view(-1, states.shape[-1])
