"""Occlusion: the loss of the model without a unit, one at a time. Forward passes only."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from topiarist.core.errors import NumericalError
from topiarist.core.options import options
from topiarist.structured.gates import Masks, gates
from topiarist.structured.methods import HEAD_WEIGHT, Method, Scores, Task, weigh_heads
from topiarist.structured.metrics import WandaSP
from topiarist.structured.trial import Prefix, gated_loss, short_windows
from topiarist.structured.units import WIDTH_KINDS, UnitGroup

TIE_BREAK = 1e-6
"""Of the mean score: channels of one slice keep the order of their metric."""


@options
class Occlusion(Method):
    """What the loss gains when a unit alone goes, a parameter; channels in `slices` a layer, by the rank of their
    Wanda-sp metric.

    The one forward-only score that says how much a layer matters to the loss; blind to units that stand in for each
    other. The start of the policy gradient: at the same cost it knows more than as many random masks, whose losses
    differ by what all the other units do. For blocks it is the perplexity criterion of Shortened LLaMA (arXiv
    2402.02834). Cost: (heads + slices) * layers forwards of `windows` * `window` tokens; with scope per_layer only those
    of heads, if not all of them stay.
    """

    scope: ClassVar[str] = "parameters"
    windows: PositiveInt = 4
    window: Annotated[int, Field(ge=2)] = 512
    slices: PositiveInt = 4
    head_weight: PositiveFloat = HEAD_WEIGHT
    """1 trusts the loss."""
    metric_tokens: PositiveInt = 8192
    """Calibration tokens that Wanda-sp looks at."""

    def scores(self, task: Task) -> Scores:
        """The rise of the loss without each unit or slice, a parameter, in units of its mean size; ties go by Wanda-sp."""
        order = self._ranks(task)
        windows = short_windows(task.tokens, self.window)[: self.windows]
        trials = [
            (group, units)
            for group in sorted(task.groups, key=lambda group: group.block)
            if (pieces := self._pieces(task, group))
            for units in order[group.key].tensor_split(pieces)
        ]
        losses = torch.zeros(1 + len(trials), dtype=torch.float64)  # of the whole model, of every trial
        batches = windows.split(task.batch_size)
        with gates(task.model, task.groups) as masks:
            for place, batch in enumerate(batches):
                losses += self._losses(task, masks, trials, batch, place, len(batches)) * (len(batch) / len(windows))
        scores: Scores = {group.key: torch.zeros(group.count, dtype=torch.float64) for group in task.groups}
        for (group, units), loss in zip(trials, losses[1:], strict=True):
            scores[group.key][units] = (loss - losses[0]) / (group.cost * len(units))
        scores = weigh_heads(scores, task.groups, self.head_weight)
        size = float(torch.cat(list(scores.values())).abs().mean()) or 1.0
        return {
            key: score / size + TIE_BREAK * torch.argsort(order[key]).neg() / len(score)
            for key, score in scores.items()
        }

    def _pieces(self, task: Task, group: UnitGroup) -> int:
        """Trials of a group. Where every layer keeps a count of its own, slices of channels, which tell layers apart, only
        disturb their metric's order (docs/notes/structural.md), and where all units stay nothing is left to tell.
        """
        fixed = task.scope == "per_layer" and group.kind in WIDTH_KINDS
        if fixed and (group.kind == "channels" or task.layer_counts()[group.place] == group.count):
            return 0
        return min(self.slices, group.count) if group.kind == "channels" else group.count

    def _losses(
        self, task: Task, masks: Masks, trials: list[tuple[UnitGroup, Tensor]], batch: Tensor, place: int, of: int
    ) -> Tensor:
        """The loss of the whole model on a batch, then of every trial, whose blocks must not fall."""
        losses = [gated_loss(task, masks, {}, batch)]
        with Prefix(task.model, batch.to(task.model.device)) as prefix:
            for number, (group, units) in enumerate(trials):
                task.progress("occlusion", place * len(trials) + number, of * len(trials))
                prefix.begin_at(group.block)
                mask = torch.ones(group.count)
                mask[units] = 0
                losses.append(gated_loss(task, masks, {group.key: mask}, batch))
                if math.isnan(losses[-1]):
                    raise NumericalError(
                        f"the loss without {group.key} is not a number: check the model's weights and dtype"
                    )
                masks[group.key] = torch.ones_like(masks[group.key])
        return torch.tensor(losses, dtype=torch.float64)

    def _ranks(self, task: Task) -> dict[str, Tensor]:
        """Group key -> units from the largest metric down."""
        order = {group.key: torch.arange(group.count) for group in task.groups}
        sliced = [group for group in task.groups if group.kind == "channels"]
        if sliced:
            few = max(1, -(-self.metric_tokens // task.tokens.shape[1]))
            found = WandaSP().scores(replace(task, groups=sliced, tokens=task.tokens[:few]))
            order |= {key: torch.argsort(-metric.cpu(), stable=True) for key, metric in found.items()}
        return order
