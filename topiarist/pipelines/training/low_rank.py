"""Low-rank updates of linear layers (Hu et al., arXiv 2106.09685) that leave pruned weights pruned.

peft's LoRA does not serve here: its update B A fills every row and column of the matrix it is merged into, so padding,
pruned units and pruned weights would come back, and it has no place where a mask could cut them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from topiarist.core.errors import TopiaristError
from topiarist.models.families import Matrix

RANK = 16
"""Of updates, if nothing is said."""


def check_rank(rank: int | None, kind: str) -> None:
    """Raise TopiaristError for a rank of a training that has no updates."""
    if rank is not None and kind != "lora":
        raise TopiaristError("rank is that of low-rank updates: leave it out, or use kind lora")


@dataclass
class LowRankUpdate:
    """W + B A for one linear, cut where W is pruned.

    Empty rows and columns are cut from the output and input, which costs nothing. Another mask is put on B A, which
    takes rank x out x in products a forward, and holds a second matrix of W's size until backward.
    """

    matrix: Matrix
    A: Float[nn.Parameter, "rank in"]
    B: Float[nn.Parameter, "out rank"]
    rows: Bool[Tensor, " out"] | None
    columns: Bool[Tensor, " in"] | None
    """Which rows and columns are not empty; None: all."""
    mask: Bool[Tensor, "out in"] | None
    """Which weights are kept, where that is more than whole rows and columns."""

    @classmethod
    def of(
        cls, matrix: Matrix, rank: int, generator: torch.Generator, mask: Bool[Tensor, "out in"] | None = None
    ) -> LowRankUpdate:
        """Make an update that starts at zero. generator: of the first A. mask: by default, empty rows and columns stay."""
        weight = matrix.weight
        out_features, in_features = weight.shape
        rank = min(rank, out_features, in_features)
        A = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        B = torch.zeros(out_features, rank)
        kept = weight != 0 if mask is None else mask
        filled = kept.any(1), kept.any(0)
        if mask is not None and bool((mask == filled[0][:, None] & filled[1]).all()):
            mask = None
        rows, columns = (None if mask is not None or bool(part.all()) else part for part in filled)
        place = {"device": weight.device, "dtype": torch.float32}
        return cls(matrix, nn.Parameter(A.to(**place)), nn.Parameter(B.to(**place)), rows, columns, mask)

    def hook(
        self, _: nn.Module, args: tuple[Any, ...], output: Float[Tensor, "*batch out"]
    ) -> Float[Tensor, "*batch out"]:
        """Add the update's product with the module's input to its output: a forward hook."""
        if self.mask is not None:
            return output + F.linear(args[0], self._product().to(args[0].dtype))
        x = args[0] if self.columns is None else args[0] * self.columns.to(args[0].dtype)
        low = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return output + (low if self.rows is None else low * self.rows.to(low.dtype))

    def _product(self) -> Float[Tensor, "out in"]:
        """B A, cut where W is pruned."""
        product = self.B @ self.A
        if self.mask is not None:
            return product.masked_fill(~self.mask, 0.0)
        if self.rows is not None:
            product = product * self.rows[:, None]
        return product if self.columns is None else product * self.columns

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the stored weight."""
        self.matrix.assign((self.matrix.weight.float() + self._product()).to(self.matrix.weight.dtype))
