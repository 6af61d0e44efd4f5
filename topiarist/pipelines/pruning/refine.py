"""Block refinement: after a block is pruned, its surviving weights learn what the dense model has at that depth.

Transformer Matching of 3BASiL (arXiv 2603.01376, section 3.3): squared error, Adam, cosine schedule, gradients only
where the mask keeps a weight. Works after any solver, keeps the pattern exactly. Differs in the goal, see `target`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from topiarist.core.options import options
from topiarist.models.families import Matrix
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.training.batches import held_out_count
from topiarist.pipelines.training.loop import FineTuning
from topiarist.pipelines.training.weights import TrainedWeights
from topiarist.results.report import BlockRefinement


@options
class Refine:
    """How long and how fast. A step is one forward of the stream: one window, unless the run's batch size says otherwise."""

    epochs: Annotated[int, Field(gt=0)] = 8
    """Passes over the calibration windows."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """Of Adam, as a fraction of the root mean square of the parameter's kept weights, so that one value fits models of
    any size."""
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Fraction of the learning rate that the cosine ends at."""
    target: Literal["current", "dense"] = "dense"
    """`dense`: the dense model's own hidden states, so that a block also learns to undo what those before it did; `current`
    (3BASiL): the dense block's output for the inputs as the pruned blocks before it left them, half the hidden states."""
    norms: bool = False
    """Also train the block's one-dimensional parameters (norms and biases)."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the calibration windows that only chooses the best epoch; 0: all train, and choose."""
    accumulate: PositiveInt = 1
    """Forwards whose mean gradient makes one step; so many processes can work on it at once."""


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
    the held-out windows wins, the unrefined block included, both measured with weights as they will be stored. Every process
    runs the forwards of its own windows and takes the same steps, whatever their number.
    Raises NumericalError if the loss is not finite.
    """
    trained = _trained_parameters(block, matrices, settings.norms)
    masks = {key: trained[key].detach() != 0 for key in (_parameter_name(block, m) for m in matrices)}
    weights = TrainedWeights(trained, masks)

    def squared_error(batch: int) -> tuple[Tensor, Tensor]:
        """(sum of squared differences, sum of squared changes that the dense block makes) over one batch of this process."""
        rows, hidden, out = stream.run_batch(index, block, stream.own(batch))
        target = targets[rows].to(out.device).float()
        return (out.float() - target).square().sum(), (target - hidden.float()).square().sum()

    def loss(batch: int) -> Tensor:
        squared, change = squared_error(batch)
        return squared / change.clamp_min(1e-30)

    @torch.no_grad()
    def held_out_error() -> float:
        own = {batch: squared_error(batch) for batch in checking if stream.has(batch)}
        of_all = {batch: sums for its in processes.gather(own) for batch, sums in its.items()}
        sums = [of_all[batch] for batch in checking]
        return float(sum(s for s, _ in sums)) / max(float(sum(t for _, t in sums)), 1e-30)

    num_batches, processes = stream.num_all_batches, stream.processes
    held = held_out_count(settings.held_out, num_batches)
    # Spread over all: every process then has about as many of either kind.
    checking = [(2 * i + 1) * num_batches // (2 * held) for i in range(held)]
    training = [batch for batch in range(num_batches) if batch not in checking]
    checking = checking or training
    steps = -(-len(training) // settings.accumulate)
    tuning = FineTuning(
        name=f"{name} refinement",
        steps=settings.epochs * steps,
        learning_rate=settings.learning_rate,
        scales=[_rms_of_kept(master) for master in weights.masters.values()],
        final_learning_rate=settings.final_learning_rate,
        betas=(0.9, 0.999),
        max_norm=None,
        evaluate_every=steps,
        processes=processes,
        slot_of=stream.slot_of,
    )
    # The forwards of a step lie far apart, so that they are different processes'.
    history = tuning.run(block, weights, lambda step: training[step % steps :: steps], loss, held_out_error)
    best_step, after = history.best
    return BlockRefinement(name, history.evaluations[0][1], after, best_step // max(1, steps))


def _rms_of_kept(weight: Tensor) -> float:
    return float(weight.detach().norm() / max(int(weight.count_nonzero()), 1) ** 0.5)


def _parameter_name(block: nn.Module, matrix: Matrix) -> str:
    stored = getattr(matrix.module, matrix.parameter)
    return next(name for name, parameter in block.named_parameters() if parameter is stored)


def _trained_parameters(block: nn.Module, matrices: Sequence[Matrix], norms: bool) -> dict[str, nn.Parameter]:
    names = {_parameter_name(block, matrix) for matrix in matrices}
    return {name: p for name, p in block.named_parameters() if name in names or (norms and p.ndim == 1)}
