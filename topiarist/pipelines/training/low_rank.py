"""Low-rank updates of linear layers (Hu et al., arXiv 2106.09685) that leave pruned weights pruned.

peft's LoRA does not serve here: its update B A fills every row and column of the matrix it is merged into, so padding,
pruned units and pruned weights would come back, and it has no place where a mask could cut them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from topiarist.core.errors import TopiaristError
from topiarist.models.families import Matrix
from topiarist.models.hooks import hooked
from topiarist.models.opened import evaluated

RANK = 16
"""Of updates, if nothing is said."""


def check_rank(rank: int | None, kind: str) -> None:
    """Raise TopiaristError for a rank of a training that has no updates."""
    if rank is not None and kind != "lora":
        raise TopiaristError("rank is that of low-rank updates: leave it out, or use kind lora")


@torch.no_grad()
def updatable(model: Any, matrices: Sequence[Matrix]) -> tuple[list[Matrix], list[str]]:
    """(matrices that take an update, each weight once; sentences on those that take none).

    model: the causal language model whose they are, in memory. It is run on two tokens: an update is added to what linear
    layers return, and some are never called, for their modules multiply by the weight themselves (Mamba's steps in time).
    """
    readers, own = _readers(model), dict[tuple[nn.Parameter, int | None], Matrix]()
    for matrix in matrices:
        own.setdefault((_parameter(matrix), matrix.expert), matrix)
    plain = [matrix for matrix in own.values() if matrix.is_plain]
    called: set[nn.Module] = set()
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    watched = (reader for matrix in plain for reader in readers[_parameter(matrix)])
    hooks = (reader.register_forward_pre_hook(lambda module, *_: called.add(module)) for reader in watched)
    with evaluated(model), hooked(*hooks):
        model(input_ids=tokens, use_cache=False)
    taking = [matrix for matrix in plain if called.issuperset(readers[_parameter(matrix)])]
    experts = sum(matrix.expert is not None for matrix in own.values())
    notes: list[str] = []
    if experts:
        notes.append(f"{experts} experts share parameters and take no low-rank update: use kind full for them")
    if others := len(own) - experts - len(taking):
        notes.append(
            f"{others} matrices are multiplied in their modules' own way and take no low-rank update: use kind full for them"
        )
    return taking, notes


def _parameter(matrix: Matrix) -> nn.Parameter:
    return getattr(matrix.module, matrix.parameter)


def _readers(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """The modules that hold each parameter: layers of some models share their weights."""
    found: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(parameter, []).append(module)
    return found


@contextmanager
def adding(model: nn.Module, updates: Sequence[LowRankUpdate]) -> Iterator[None]:
    """Let the updates be added inside, in every module that holds their weights."""
    readers = _readers(model) if updates else {}
    hooks = (r.register_forward_hook(u.hook) for u in updates for r in readers[_parameter(u.matrix)])
    with hooked(*hooks):
        yield


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
