"""Block refinement: after a block is pruned, its surviving weights learn what the dense model has at that depth.

Transformer Matching of 3BASiL (arXiv 2603.01376, section 3.3): squared error, Adam, cosine schedule, gradients only
where the mask keeps a weight. Works after any solver, keeps the pattern exactly. Differs in the goal, see `target`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from topiarist.core.errors import NumericalError
from topiarist.models.families import Matrix
from topiarist.pipelines.common.stream import BlockStream
from topiarist.results.report import BlockRefinement


@dataclass(frozen=True, kw_only=True)
class Refine:
    """How long and how fast. A step is one forward of the stream: one window, unless the run's batch size says otherwise."""

    epochs: int = 8
    learning_rate: float = 0.01
    """Of Adam, as a fraction of the root mean square of the parameter's kept weights, so that one value fits models of
    any size."""
    final_learning_rate: float = 0.2
    """Fraction of the learning rate that the cosine ends at."""
    target: Literal["current", "dense"] = "dense"
    """`dense`: the dense model's own hidden states, so that a block also learns to undo what those before it did; `current`
    (3BASiL): the dense block's output for the inputs as the pruned blocks before it left them, half the hidden states."""
    norms: bool = False
    """Also train the block's one-dimensional parameters (norms and biases)."""
    held_out: float = 0.1
    """Share of the calibration windows that only chooses the best epoch."""


def refine_block(
    settings: Refine,
    stream: BlockStream,
    index: int,
    block: nn.Module,
    matrices: Sequence[Matrix],
    targets: Float[Tensor, "num window width"],
    name: str,
) -> BlockRefinement:
    """Train the kept weights of `matrices` (already pruned, in place) towards `targets`, the block's outputs as wanted.

    Weights are held in fp32 while they learn and run in the block's own dtype. The epoch with the smallest error on
    the held-out windows wins, the unrefined block included, both measured with weights as they will be stored.
    Raises NumericalError if the loss is not finite.
    """
    trained = _trained_parameters(block, matrices, settings.norms)
    masters = {key: nn.Parameter(value.detach().float().clone()) for key, value in trained.items()}
    pruned = {_parameter_name(block, m) for m in matrices}
    masks = {key: trained[key].detach() != 0 for key in masters if key in pruned}

    def current() -> dict[str, Tensor]:
        return {
            key: (master * masks[key] if key in masks else master).to(trained[key].dtype)
            for key, master in masters.items()
        }

    def error(rows: Sequence[int]) -> float:
        with torch.no_grad():
            weights = current()
            sums = [_squared_error(stream, index, block, weights, targets, batch) for batch in rows]
        return float(sum(s for s, _ in sums)) / max(float(sum(t for _, t in sums)), 1e-30)

    num_batches = stream.num_batches
    held = max(1, round(settings.held_out * num_batches)) if num_batches > 1 else 0
    training, checking = list(range(num_batches - held)), list(range(num_batches - held, num_batches)) or [0]
    before = best = error(checking)
    best_epoch, best_weights = 0, None
    scales = {
        key: float(master.detach().norm() / max(int(master.count_nonzero()), 1) ** 0.5)
        for key, master in masters.items()
    }
    optimizer = torch.optim.Adam([{"params": [master], "lr": 0.0} for master in masters.values()], fused=True)
    total = settings.epochs * len(training)
    for step in range(total):
        progress = 0.5 * (1 + math.cos(math.pi * step / total))
        rate = settings.final_learning_rate + (1 - settings.final_learning_rate) * progress
        for group, scale in zip(optimizer.param_groups, scales.values(), strict=True):
            group["lr"] = settings.learning_rate * scale * rate
        squared, change = _squared_error(stream, index, block, current(), targets, training[step % len(training)])
        loss = squared / change.clamp_min(1e-30)
        if not torch.isfinite(loss):
            raise NumericalError(f"{name}: the loss of the refinement is not finite; lower its learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % len(training) == 0:
            now = error(checking)
            if now < best:
                best, best_epoch = now, (step + 1) // len(training)
                best_weights = {key: value.detach().clone() for key, value in current().items()}
    if best_weights is not None:
        with torch.no_grad():
            for key, value in best_weights.items():
                # +0.0 where pruned: a product with the mask may leave -0.0.
                trained[key].copy_(value.masked_fill(~masks[key], 0.0) if key in masks else value)
    return BlockRefinement(name, before, best, best_epoch)


def _squared_error(
    stream: BlockStream, index: int, block: nn.Module, weights: dict[str, Tensor], targets: Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    """(sum of squared differences, sum of squared changes that the dense block makes) over one batch."""

    def run(hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        return functional_call(block, weights, (hidden, *args), kwargs)

    rows, hidden, out = stream.run_batch(index, run, batch)
    wanted = targets[rows].to(out.device).float()
    return (out.float() - wanted).square().sum(), (wanted - hidden.float()).square().sum()


def _parameter_name(block: nn.Module, matrix: Matrix) -> str:
    stored = getattr(matrix.module, matrix.parameter)
    return next(name for name, parameter in block.named_parameters() if parameter is stored)


def _trained_parameters(block: nn.Module, matrices: Sequence[Matrix], norms: bool) -> dict[str, nn.Parameter]:
    names = {_parameter_name(block, matrix) for matrix in matrices}
    return {name: p for name, p in block.named_parameters() if name in names or (norms and p.ndim == 1)}
