"""What the loss loses with a unit, by gradients: a score of units from two Taylor estimates (estimates.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from jaxtyping import Int
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from topiarist.core.errors import TopiaristError
from topiarist.core.options import options
from topiarist.structured.choose import total_cost
from topiarist.structured.estimates import ORDERS, Estimates, taylor_estimates
from topiarist.structured.fusion import FUSIONS, check_windows, fixed_shares, learned_shares
from topiarist.structured.methods import HEAD_WEIGHT, Method, Scores, Task, weigh_heads
from topiarist.structured.trial import short_windows, split
from topiarist.structured.units import KINDS

LEVELS = ("model", "layer")


@options
class Taylor(Method):
    """Keeps the units with the largest Taylor estimates: what the loss loses with them, by gradients.

    Choose it when a backward pass fits in memory: a window gives every unit an estimate, where a policy needs many
    masks. LLM-Pruner, Ma et al., NeurIPS 2023, arXiv 2305.11627, equation 5 (`vector`); HyWIA's fusions of two estimates,
    arXiv 2403.10799, are the option `fusion`. Cost: `num_windows` forward and backward passes of `window_tokens` tokens;
    weights, one gradient at a time and the activations of one window in memory.

    Differs from LLM-Pruner in: 1. an estimate for every window and their mean, so that nothing of the model's size is
    kept; `pooled=True` is theirs. 2. All layers may be cut, under one budget. 3. Scores of heads count twice.
    """

    kinds: ClassVar[tuple[str, ...]] = KINDS
    scope: ClassVar[str] = "parameters"
    num_windows: PositiveInt = 128
    window_tokens: Annotated[int, Field(ge=2)] = 512
    """Tokens of a backward pass: short ones do not show what long contexts need."""
    order: str = "mix"
    pooled: bool = False
    fusion: str = "coarse"
    """One of FUSIONS. `coarse` leaves the fine estimate out; `attention` is HyWIA's."""
    temperature: PositiveFloat = 1.0
    head_weight: PositiveFloat = HEAD_WEIGHT
    """1 trusts the estimates."""
    level: str = "model"
    """What scores compare within: `model`, layers keep the size of their estimates; `layer`, each has mean 1."""
    learn_steps: PositiveInt = 16
    """Of fusion=learned: steps, each two choices tried on `learn_windows` windows."""
    learn_windows: PositiveInt = 16
    learn_rate: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        named = (("order", self.order, ORDERS), ("fusion", self.fusion, FUSIONS), ("level", self.level, LEVELS))
        for name, value, table in named:
            if value not in table:
                raise TopiaristError(f"unknown {name} {value!r}; choose one of {', '.join(table)}")
        if self.fusion == "uncertainty":
            check_windows(1 if self.pooled else self.num_windows)

    def check_windows(self, tokens: Int[Tensor, "num window"]) -> None:
        """Raise CalibrationError for windows too few to hold some out, for a fusion that is learned, or for a variance."""
        if self.fusion == "learned":
            split(short_windows(tokens, self.window_tokens), self.learn_windows)
        if self.fusion == "uncertainty":
            check_windows(len(self.windows_of(tokens)))

    def scores(self, task: Task) -> Scores:
        """Taylor estimates on short windows: a forward and a backward pass for each of `num_windows` windows."""
        found = taylor_estimates(task, self.windows_of(task.tokens), order=self.order, pooled=self.pooled)
        return self.fused(task, found)

    def windows_of(self, tokens: Int[Tensor, "num window"]) -> Int[Tensor, "num_windows window_tokens"]:
        """The windows that are looked at."""
        return short_windows(tokens, self.window_tokens)[: self.num_windows]

    def fused(self, task: Task, found: Estimates) -> Scores:
        """Scores from ready estimates."""
        if self.fusion != "learned":
            return self._blend(task, found, fixed_shares(self.fusion, found, self.temperature))
        shares = learned_shares(
            task, lambda shares: self._blend(task, found, shares), steps=self.learn_steps,
            num_windows=self.learn_windows, window_tokens=self.window_tokens, rate=self.learn_rate,
        )  # fmt: skip
        return self._blend(task, found, shares)

    def _blend(self, task: Task, found: Estimates, shares: Mapping[str, Tensor]) -> Scores:
        """shares (coarse, fine) of every layer times its estimates, both scale-free at the method's level."""
        scores: Scores = {group.key: torch.zeros(group.count, dtype=torch.float64) for group in task.groups}
        for index, estimates in enumerate((found.coarse, found.fine)):
            # A parameter's share, so that heads and channels compare.
            each = {group.key: estimates[group.key].mean(0) / group.cost for group in task.groups}
            whole = sum(float(each[g.key].sum()) * g.cost for g in task.groups) / total_cost(task.groups)
            for key, value in each.items():
                size = whole if self.level == "model" else float(value.mean())
                scores[key] += shares[key][index] * value / (size or 1.0)
        return weigh_heads(scores, task.groups, self.head_weight)
