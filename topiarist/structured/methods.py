"""What a method that scores units is: a frozen dataclass of its hyper-parameters; and the two that look at no text.

The table of all methods, which CLI, tests and docs read, is in table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from topiarist.checkpoints.writing import SavedState
from topiarist.core.options import options
from topiarist.structured.choose import layer_counts
from topiarist.structured.units import HEAD_KINDS, KINDS, LAYER_KINDS, Kept, UnitGroup

Scores = dict[str, Tensor]
"""Group key -> (count,), higher = keep."""
HEAD_WEIGHT = 2.0
"""Times the scores of heads that were taken from the loss of the model as it is. They are no guide to what a refit gives
back: much of what channels of a layer did, less of what heads did. Where little stays and nothing is refitted, 1 is
better. docs/notes/structural.md and docs/results/structural.md have the numbers."""


def weigh_heads(scores: Scores, groups: Sequence[UnitGroup], weight: float) -> Scores:
    """The scores, those of heads times `weight`."""
    heads = {group.key for group in groups if group.kind in HEAD_KINDS}
    return {key: score * weight if key in heads else score for key, score in scores.items()}


@dataclass
class Task:
    """All that a method may look at. The model is whole, in evaluation mode, without gradients; it must stay as it is."""

    model: Any
    groups: Sequence[UnitGroup]
    tokens: Tensor
    """Calibration windows (num, window), int64, on the CPU; (0, 0) for methods that need none."""
    keep: float
    """Share of the units' parameters that may stay, in (0, 1]."""
    scope: str = "global"
    """How `choose` will be called with the scores."""
    counts: Mapping[str, int] | None = None
    """With scope per_layer: place -> units kept in every group of it."""
    round_to: int | None = None
    batch_size: int = 8
    seed: int = 0
    progress: Callable[[str, int, int], None] = lambda *_: None
    state: SavedState = field(default_factory=SavedState)

    def layer_counts(self) -> Mapping[str, int]:
        """`counts`, or what `choose` takes without them."""
        return self.counts or layer_counts(self.groups, self.keep, self.round_to)


@options
class Method:
    """Base of all methods."""

    kinds: ClassVar[tuple[str, ...]] = LAYER_KINDS
    """Kinds of units that it can score."""
    needs_data: ClassVar[bool] = True
    scope: ClassVar[str] = "global"
    """Scope of the choice where the layout leaves it free."""

    def check_windows(self, tokens: Int[Tensor, "num window"]) -> None:
        """Raise CalibrationError for calibration windows that are too few to score by."""

    def scores(self, task: Task) -> Scores:
        """Scores of the units of every group, (count,), by group key: the larger, the sooner a unit stays."""
        raise NotImplementedError

    def biases(self, task: Task, kept: Kept) -> dict[str, Tensor]:
        """{consumer: what to add to its bias (out,)} that makes up for the units that go. Only of consumers whose
        stored form can hold a bias; none by default.
        """
        return {}


@options
class Magnitude(Method):
    """Root mean square of all weights of a unit. When: never, except to compare. No data, seconds."""

    kinds: ClassVar[tuple[str, ...]] = KINDS
    needs_data: ClassVar[bool] = False

    @torch.no_grad()
    def scores(self, task: Task) -> Scores:
        """Root mean square of every unit's weights."""
        scores: Scores = {}
        for group in task.groups:
            total = torch.zeros(group.count, dtype=torch.float64)
            for part in group.parts:
                parameter = task.model.get_parameter(part.parameter)
                tensor = (parameter if part.expert is None else parameter[part.expert]).movedim(part.axis, 0)
                stretch = tensor[part.start : part.start + group.count * part.size].float().square()
                total += stretch.reshape(group.count, -1).sum(1, dtype=torch.float64).cpu()
            scores[group.key] = (total / group.cost).sqrt()
        return scores


@options
class Random(Method):
    """Uniform noise from the seed: what any method must beat."""

    kinds: ClassVar[tuple[str, ...]] = KINDS
    needs_data: ClassVar[bool] = False

    def scores(self, task: Task) -> Scores:
        """A number from [0, 1) for every unit, by the task's seed."""
        generator = torch.Generator().manual_seed(task.seed)
        return {group.key: torch.rand(group.count, generator=generator) for group in task.groups}
