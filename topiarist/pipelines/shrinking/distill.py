"""A short training of a shrunk model towards the dense model's predictions: all weights, or a low-rank update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topiarist.core.errors import TopiaristError
from topiarist.core.losses import divergence
from topiarist.models.families import Matrix, family_of, matrices_of
from topiarist.models.hooks import hooked
from topiarist.pipelines.learning.recover import STATE_BYTES, Descent, Loss, Recover, recover_weights


@dataclass(frozen=True, kw_only=True)
class Distill(Recover):
    """What is trained, how long, how fast."""

    kind: str = "lora"
    """"lora": low-rank updates of the blocks' linears, merged at the end. "full": all matrices of the blocks, 16 bytes
    a weight."""
    rank: int = 16
    """Of the low-rank updates."""
    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "full"):
            raise TopiaristError(f"unknown recovery {self.kind!r}; choose lora or full")


@dataclass
class _Update:
    """W + B A for one linear, with A (rank, in) and B (out, rank); where W has empty rows and columns they stay empty."""

    matrix: Matrix
    A: nn.Parameter
    B: nn.Parameter
    rows: Tensor | None
    columns: Tensor | None
    """Which are not empty; None: all."""

    @classmethod
    def of(cls, matrix: Matrix, rank: int, generator: torch.Generator) -> _Update:
        weight = matrix.weight
        out_features, in_features = weight.shape
        rank = min(rank, out_features, in_features)
        A = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        B = torch.zeros(out_features, rank)
        filled = [(weight != 0).any(dim) for dim in (1, 0)]
        rows, columns = (None if bool(x.all()) else x for x in filled)
        place = {"device": weight.device, "dtype": torch.float32}
        return cls(matrix, nn.Parameter(A.to(**place)), nn.Parameter(B.to(**place)), rows, columns)

    def hook(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Adds B A x to the module's output."""
        x = args[0] if self.columns is None else args[0] * self.columns.to(args[0].dtype)
        low = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return output + (low if self.rows is None else low * self.rows.to(low.dtype))

    def merge(self) -> None:
        update = (self.B @ self.A).detach()
        if self.rows is not None:
            update *= self.rows[:, None]
        if self.columns is not None:
            update *= self.columns
        self.matrix.assign((self.matrix.weight.float() + update).to(self.matrix.weight.dtype))


def disk_bytes(model: Any, settings: Distill) -> int:
    """Of the states of a run, at most: a new one is whole before the old one goes."""
    matrices = _matrices(model)
    if settings.kind == "full":
        return 2 * STATE_BYTES * sum(matrix.weight.numel() for matrix in matrices)
    return 2 * STATE_BYTES * settings.rank * sum(sum(matrix.shape) for matrix in matrices if matrix.expert is None)


def _matrices(model: Any) -> list[Matrix]:
    family = family_of(model.config.model_type)
    return [matrix for block in model.get_submodule(family.blocks) for matrix in matrices_of(block, family)]


def distill(student: Any, teacher: Any, settings: Distill, descent: Descent) -> list[float]:
    """Train the blocks of `student` in place; empty rows and columns stay empty. Loss: KL(teacher || student), the mean
    over all positions. Returns that of every step.
    """
    matrices, loss = _matrices(student), _divergence(teacher)
    if settings.kind == "full":
        names = {id(parameter): name for name, parameter in student.named_parameters()}
        wanted = {names[id(getattr(matrix.module, matrix.parameter))] for matrix in matrices}
        masks = {name: student.get_parameter(name) != 0 for name in sorted(wanted)}
        new, losses = recover_weights(student, masks, settings, descent, loss)
        for name, weight in new.items():
            student.get_parameter(name).data = weight
        return losses
    for matrix in matrices:  # the caller's model may share them
        stored = getattr(matrix.module, matrix.parameter)
        stored.data = stored.data.clone()
    generator = torch.Generator().manual_seed(descent.seed)
    updates = [_Update.of(m, settings.rank, generator) for m in matrices if m.expert is None]

    def logits(batch: Tensor) -> Tensor:
        return student(input_ids=batch, use_cache=False).logits

    masters = [master for update in updates for master in (update.A, update.B)]
    with hooked(*(update.matrix.module.register_forward_hook(update.hook) for update in updates)):
        losses = descent.run(settings, masters, logits, loss)
    for update in updates:
        update.merge()
    return losses


def _divergence(teacher: Any) -> Loss:
    def loss(logits: Tensor, batch: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=batch, use_cache=False).logits
        return divergence(logits, wanted)

    return loss
