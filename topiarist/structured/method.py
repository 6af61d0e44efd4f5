"""What a method of structural pruning is: a frozen value that maps a Problem to a score for every unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from topiarist.errors import UnsupportedModel
from topiarist.structured.choose import choose
from topiarist.structured.units import Kept, UnitGroup


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model in memory, its units, the budget, and the calibration text: all that a method may look at."""

    model: Any
    groups: Sequence[UnitGroup]
    tokens: Tensor
    """Calibration windows (num, window), int64."""
    keep: float
    scope: str = "global"
    round_to: int | None = None
    counts: Mapping[str, int] | None = None
    """Of `choose`, as are keep, scope and round_to."""
    batch_size: int = 8
    seed: int = 0
    state: Path | None = None
    """A file in which a long method keeps its state, so that the same call goes on where a killed one was."""
    progress: Callable[[str, int, int], None] = lambda *_: None

    def choose(self, scores: Mapping[str, Tensor]) -> Kept:
        """The units that these scores keep under this budget."""
        return choose(self.groups, scores, self.keep, scope=self.scope, round_to=self.round_to, counts=self.counts)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Scores:
    """What a method found out."""

    values: dict[str, Tensor]
    """Group key -> (count,), higher = keep."""
    means: dict[str, Tensor] = field(default_factory=dict)
    """Group key -> mean input of its consumer over the calibration tokens (count * width,): what FLAP puts in the place
    of the units that go, see `metrics.compensation`. Empty for all other methods."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Numbers for the report, JSON."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Hyper-parameters are the fields."""

    kinds = ()
    """Kinds of units that it can score; empty for all."""
    comparable = True
    """Whether scores of different layers mean the same; if not, only their order within a layer does."""

    def check(self, groups: Sequence[UnitGroup]) -> None:
        """Raises UnsupportedModel for a kind of unit that this method has no score for."""
        for group in groups:
            if self.kinds and group.kind not in self.kinds:
                raise UnsupportedModel(
                    f"{type(self).__name__} has no score for units of kind {group.kind!r}, only for "
                    f"{', '.join(self.kinds)}; choose other units or another method"
                )

    @abstractmethod
    def scores(self, problem: Problem) -> Scores:
        """A score for every unit. The model is as it was afterwards."""


def window_losses(model: nn.Module, tokens: Tensor) -> Float[Tensor, " batch"]:
    """Mean next-token loss of every window (batch, window), fp32."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)
