"""A short training of the kept weights under a learned mask, on the language-model loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import torch
from jaxtyping import Bool, Shaped
from pydantic import Field
from torch import Tensor, nn

from topiarist.checkpoints.writing import SavedState
from topiarist.core.losses import next_token_loss
from topiarist.core.options import options
from topiarist.pipelines.training.batches import Batches, micro_batch_size
from topiarist.pipelines.training.loop import FineTuning, Progress
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.recompute import recomputing
from topiarist.pipelines.training.text import Sequences
from topiarist.pipelines.training.weights import TrainedWeights


@options
class Recover:
    """How long and how fast the kept weights are trained."""

    steps: Annotated[int, Field(gt=0)] = 50
    """Steps of the optimiser."""
    sequences: Annotated[int, Field(gt=0)] = 2
    """Sequences a step."""
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    """Peak; falls to zero along a cosine. Default: 0.0005 times the size of the weights, their root mean square."""

    default_rate = 5e-4

    def tuning(
        self,
        weights: TrainedWeights,
        parameters: Iterable[Tensor],
        progress: Progress,
        processes: Processes,
        state: SavedState,
    ) -> FineTuning:
        """Return these settings as the training loop takes them. parameters: of the model, which change in the end."""
        rate = self.learning_rate or self.default_rate * weights.typical_size(parameters, processes)
        return FineTuning(steps=self.steps, learning_rate=rate, progress=progress, processes=processes, state=state)


def recover_weights(
    model: nn.Module,
    masks: Mapping[str, Bool[Tensor, "..."]],
    settings: Recover,
    tokens: Sequences,
    *,
    batch_size: int,
    seed: int,
    progress: Progress,
    processes: Processes,
    state: SavedState,
    recompute: Sequence[nn.Module] = (),
) -> dict[str, Shaped[Tensor, "..."]]:
    """Train the masked weights of a causal language model; return their new values, by parameter name, in their dtype.

    masks: by parameter name, True where a weight is kept. batch_size: sequences a forward. seed: of the text's order.
    recompute: blocks that keep their inputs alone for backward.
    The model itself is as before when this returns or raises. Raises NumericalError for a loss that is not finite.
    """
    named = dict(model.named_parameters())
    parameters = {name: named[name] for name in masks}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    size = micro_batch_size(settings.sequences, batch_size)
    batches = Batches(len(tokens), settings.sequences, seed + 1)
    device = next(model.parameters()).device

    def loss(rows: list[int]) -> Tensor:
        batch = tokens[rows].to(device)
        return next_token_loss(model(input_ids=batch, use_cache=False).logits, batch)

    weights = TrainedWeights(parameters, masks)
    try:
        tuning = settings.tuning(weights, parameters.values(), progress, processes, state)
        with recomputing(recompute):
            tuning.run(model, weights, lambda step: batches.micro_batches(step, size), loss)
        return weights.snapshot()
    finally:
        with torch.no_grad():
            weights.restore(before)
