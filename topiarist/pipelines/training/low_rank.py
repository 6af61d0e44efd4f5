"""Low-rank updates of linear layers (Hu et al., arXiv 2106.09685) that leave empty rows and columns empty.

peft's LoRA does not serve here: its update B A fills every row and column of the matrix it is merged into, so padding
and pruned units would come back, and it names no place where a mask could cut them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from topiarist.models.families import Matrix


@dataclass
class LowRankUpdate:
    """W + B A for one linear; where W has empty rows and columns they stay empty."""

    matrix: Matrix
    A: Float[nn.Parameter, "rank in"]
    B: Float[nn.Parameter, "out rank"]
    rows: Bool[Tensor, " out"] | None
    columns: Bool[Tensor, " in"] | None
    """Which rows and columns are not empty; None: all."""

    @classmethod
    def of(cls, matrix: Matrix, rank: int, generator: torch.Generator) -> LowRankUpdate:
        """Make an update that starts at zero. generator: of the first A."""
        weight = matrix.weight
        out_features, in_features = weight.shape
        rank = min(rank, out_features, in_features)
        A = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        B = torch.zeros(out_features, rank)
        rows, columns = (
            None if bool(filled.all()) else filled for filled in ((weight != 0).any(1), (weight != 0).any(0))
        )
        place = {"device": weight.device, "dtype": torch.float32}
        return cls(matrix, nn.Parameter(A.to(**place)), nn.Parameter(B.to(**place)), rows, columns)

    def hook(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add B A x to the module's output: a forward hook."""
        x = args[0] if self.columns is None else args[0] * self.columns.to(args[0].dtype)
        low = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return output + (low if self.rows is None else low * self.rows.to(low.dtype))

    def merge(self) -> None:
        """Add B A to the stored weight."""
        update = (self.B @ self.A).detach()
        if self.rows is not None:
            update *= self.rows[:, None]
        if self.columns is not None:
            update *= self.columns
        self.matrix.assign((self.matrix.weight.float() + update).to(self.matrix.weight.dtype))
