"""Scores from the size of activations alone, for every axis of width: Minitron's (Muralidharan et al., arXiv 2407.14679).

x  what a unit shows at a token: a hidden channel, the outputs of the norms; a head, its part of the input of o_proj, of which
   the 2-norm is taken; a feed-forward channel, its column of the input of down_proj
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from topiarist.core.errors import NumericalError
from topiarist.core.options import options
from topiarist.models.hooks import hooked, watch_inputs
from topiarist.models.opened import at_rest
from topiarist.structured.methods import Method, Scores, Task
from topiarist.structured.metrics import by_unit, consumers
from topiarist.structured.units import COLUMN_KINDS, HIDDEN, UnitGroup
from topiarist.structured.width import residual_norms

Reduction = Literal["mean", "l2"]


class Sizes:
    """One number a unit from |x| of all tokens: reduced over the tokens of a window, then over windows. Sums in fp64."""

    def __init__(self, over_tokens: Reduction, over_windows: Reduction) -> None:
        self.over_tokens, self.over_windows = over_tokens, over_windows
        self.total: Tensor | float = 0.0

    def add(self, x: Float[Tensor, "windows tokens count"]) -> None:
        """Count the sizes of some windows."""
        if not x.numel():
            return
        x = x.detach().float().abs()
        window = x.mean(1) if self.over_tokens == "mean" else x.square().sum(1).sqrt()
        self.total = self.total + (window.double() if self.over_windows == "mean" else window.double().square()).sum(0)

    def value(self, count: int) -> Float[Tensor, " count"]:
        """The sizes of `count` units; zeros if no token came."""
        total = torch.as_tensor(self.total, dtype=torch.float64).cpu().expand(count)
        return total.sqrt() if self.over_windows == "l2" else total.clone()


@options
class Activation(Method):
    """Mean size of a unit's activations: hidden channels |norm(x)_i|, summed over all norms; heads ||x_h||; channels |x_j|.

    Choose it for the width of the hidden states: forward passes alone, and the only axis where every layer has a say in one
    choice. Minitron (arXiv 2407.14679, section 2.2). Cost: one pass over the text.

    Differs from the paper in: 1. a channel is what down_proj reads, gate and all, not the output of the first matrix alone.
    2. KV groups are scored whole, by the 2-norm over all their query heads.
    """

    kinds: ClassVar[tuple[str, ...]] = (*COLUMN_KINDS, HIDDEN)
    scope: ClassVar[str] = "per_layer"
    over_tokens: Reduction = "mean"
    """How the tokens of a window are reduced: mean, or l2. The paper's best is mean, then l2 over windows."""
    over_windows: Reduction = "l2"
    """How windows are reduced: mean, or l2."""

    @torch.inference_mode()
    def scores(self, task: Task) -> Scores:
        """The mean size of every unit, from one pass over the text. Raises NumericalError if one is not finite."""
        model = task.model
        matrices = consumers(model, task.groups)
        names = {matrix: name for name, matrix in matrices.items()}
        columns: dict[str, list[UnitGroup]] = {}
        for group in task.groups:
            columns.setdefault(group.consumer, []).append(group)
        sizes = {group.key: Sizes(self.over_tokens, self.over_windows) for group in task.groups if group.width}
        hidden = next((group for group in task.groups if group.kind == HIDDEN), None)
        norms = residual_norms(model, hidden.parts) if hidden is not None else {}
        of_norms = {name: Sizes(self.over_tokens, self.over_windows) for name in norms}

        def read(matrix: Any, x: Tensor) -> None:
            for group in columns[names[matrix]]:
                sizes[group.key].add(by_unit(_windows(x), group).float().norm(dim=-1))

        def normed(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
            of_norms[name].add(_windows(output))

        handles = (module.register_forward_hook(partial(normed, name)) for name, module in norms.items())
        batches = task.tokens.split(task.batch_size)
        with watch_inputs(list(names), read), hooked(*handles), at_rest(model):
            for number, batch in enumerate(batches):
                task.progress("looking at activations", number, len(batches))
                model(input_ids=batch.to(model.device), use_cache=False)
        scores = {g.key: sizes[g.key].value(g.count) for g in task.groups if g.width}
        if hidden is not None:
            scores[hidden.key] = _sum([of_norms[name].value(hidden.count) for name in norms])
        if not all(bool(torch.isfinite(score).all()) for score in scores.values()):
            raise NumericalError("NaN or Inf in the activations: check the model's weights and dtype")
        return {group.key: scores[group.key] for group in task.groups}


def _windows(x: Tensor) -> Float[Tensor, "windows tokens width"]:
    """As (windows, tokens, width); tokens without windows, as experts see them, are one."""
    return x.reshape(-1, *x.shape[-2:]) if x.ndim > 2 else x[None]


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0)
