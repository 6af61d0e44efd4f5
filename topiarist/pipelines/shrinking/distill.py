"""A short training of a shrunk model towards the dense model's predictions: all weights, or a low-rank update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from topiarist.checkpoints.writing import SavedState
from topiarist.core.losses import divergence
from topiarist.core.options import options
from topiarist.models.derive import family_of
from topiarist.models.families import Matrix, matrices_of
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.learning.train_kept import Recover
from topiarist.pipelines.training.batches import Batches, micro_batch_size
from topiarist.pipelines.training.loop import RATE, Progress
from topiarist.pipelines.training.low_rank import RANK, LowRankUpdate, adding, check_rank, updatable
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.weights import STATE_BYTES, TrainedWeights


@options
class Distill(Recover):
    """What is trained, how long, how fast."""

    leads = "kind"

    kind: Literal["lora", "full"] = "lora"
    """`lora`: low-rank updates of the blocks' linears, merged at the end; `full`: all matrices of the blocks, 16 bytes a
    weight."""
    rank: Annotated[int | None, Field(gt=0)] = None
    """Of the low-rank updates of `lora`; default: 16."""
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    """Peak; falls to zero along a cosine. Default: 0.0016 times the size of the weights, their root mean square."""

    default_rate = RATE

    def __post_init__(self) -> None:
        check_rank(self.rank, self.kind)

    @property
    def lora_rank(self) -> int:
        """The rank that was asked for, or 16."""
        return self.rank or RANK


def bytes_due(source: OpenedModel, settings: Distill | None) -> int:
    """Bytes on disk that a run needs at most: the model with its side files, and states of a recovery, if there is one."""
    total = int(1.1 * source.nbytes)
    if settings is None:
        return total
    matrices = _matrices(source.model)
    trained = sum(matrix.weight.numel() for matrix in matrices)
    if settings.kind != "full":
        trained = settings.lora_rank * sum(sum(matrix.shape) for matrix in matrices if matrix.expert is None)
    return total + 2 * STATE_BYTES * trained  # a new state is whole before the old one goes


def trained_names(source: OpenedModel, settings: Distill) -> set[str]:
    """Full names of the parameters that `distill` changes."""
    return {
        f"{path}.{matrix.path}"
        for index, path in enumerate(source.block_names)
        for matrix in source.matrices(index)
        if settings.kind == "full" or matrix.is_plain
    }


def _matrices(model: Any) -> list[Matrix]:
    family = family_of(model)
    return [matrix for block in model.get_submodule(family.blocks) for matrix in matrices_of(block, family)]


def distill(
    student: Any,
    teacher: Any,
    settings: Distill,
    tokens: Int[Tensor, "num window"],
    *,
    batch_size: int,
    seed: int,
    progress: Progress = lambda *_: None,
    state: SavedState | None = None,
    on_note: Callable[[str], None] = lambda _: None,
) -> list[float]:
    """Train the blocks of `student` in place towards the teacher's predictions; empty rows and columns stay empty.

    Loss: KL(teacher || student) in nats, the mean over all positions; that of every step is returned. batch_size:
    sequences a forward. seed: of the text's order and the low-rank updates' start. on_note: is told which matrices take no
    update. Raises NumericalError for a loss that is not finite.
    """
    matrices = _matrices(student)
    for matrix in matrices:  # the caller's model may share them
        stored = getattr(matrix.module, matrix.parameter)
        stored.data = stored.data.clone()
    changed = {id(p): p for m in matrices for p in [getattr(m.module, m.parameter)]}
    size = micro_batch_size(settings.sequences, batch_size)
    batches = Batches(len(tokens), settings.sequences, seed + 1)
    device = next(student.parameters()).device

    def loss(rows: list[int]) -> Tensor:
        batch = tokens[rows].to(device)
        with torch.no_grad():
            reference = teacher(input_ids=batch, use_cache=False).logits
        return divergence(student(input_ids=batch, use_cache=False).logits, reference)

    def train(weights: TrainedWeights) -> list[float]:
        tuning = settings.tuning(weights, changed.values(), progress, Processes(), state or SavedState())
        return tuning.run(student, weights, lambda step: batches.micro_batches(step, size), loss).losses

    if settings.kind == "full":
        parameters = {name: p for name, p in sorted(student.named_parameters()) if id(p) in changed}
        return train(TrainedWeights(parameters, {name: p != 0 for name, p in parameters.items()}))
    generator = torch.Generator().manual_seed(seed)
    taking, notes = updatable(student, matrices)
    for note in notes:
        on_note(note)
    updates = [LowRankUpdate.of(m, settings.lora_rank, generator) for m in taking]
    parameters = {f"{i} {part}": getattr(update, part) for i, update in enumerate(updates) for part in "AB"}
    with adding(student, updates):
        losses = train(TrainedWeights(parameters))
    for update in updates:
        update.merge()
    return losses
