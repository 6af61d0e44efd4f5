"""The variables of a policy: units, or channels tied in groups, and the budgets that they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from topiarist.structured import policy
from topiarist.structured.choose import step_of
from topiarist.structured.methods import Scores, Task
from topiarist.structured.units import DEPTH_KINDS, UnitGroup

TIE_BREAK = 1e-6
"""Units of equal probability (many end at 0 or 1) keep the order of the metric that they started from."""


@dataclass
class Variables:
    """The policy's variables: units, or channels tied in groups; and the budgets they share."""

    of: dict[str, Tensor]
    """Group key -> the variable of every unit."""
    ranks: Tensor
    """Where a variable's metric stands among those of its budget that it compares with, 0 to 1."""
    metrics: Tensor
    """Mean metric of every variable."""
    cost: Tensor
    """Parameters of every variable."""
    pools: list[tuple[Tensor, float]]
    """(variables, the parameters they may keep)"""
    within: dict[str, Tensor]
    """Group key -> rank of every unit in its layer, 0 to 1: breaks ties."""

    @classmethod
    def make(
        cls, task: Task, metric: Mapping[str, Tensor], comparable: Mapping[str, str], channel_group: int | None
    ) -> Variables:
        """Variables for the task's groups: every unit its own, channels tied by the rank of their metric.

        metric: group key -> metric of every unit. comparable: kind -> what its ranks are taken within: kinds of one
        name together over all layers of a budget, "" for
        each layer alone. channel_group: channels of a variable; None: the step that rounding moves together.
        """
        of: dict[str, Tensor] = {}
        cost, means, first = [], [], 0
        for group in task.groups:
            tied = (channel_group or step_of(group, task.round_to)) if group.kind == "channels" else 1
            place = torch.argsort(torch.argsort(-metric[group.key].double(), stable=True), stable=True)
            of[group.key] = first + place // tied
            number = -(-group.count // tied)
            size = torch.bincount(place // tied, minlength=number).double()
            cost.append(size * group.cost)
            means.append(
                torch.zeros(number, dtype=torch.float64).index_add_(0, place // tied, metric[group.key].double())
            )
            means[-1] /= size
            first += number
        costs, metrics = torch.cat(cost), torch.cat(means)
        ranks, pools = torch.empty(first, dtype=torch.float64), []
        for groups, budget in budgets(task):
            pools.append((torch.cat([of[group.key].unique() for group in groups]), budget))
            alike: dict[str, list[Tensor]] = {}
            for group in groups:
                alike.setdefault(comparable[group.kind] or group.key, []).append(of[group.key].unique())
            for members in map(torch.cat, alike.values()):
                ranks[members] = policy.quantiles(metrics[members])
        within = {key: policy.quantiles(values) for key, values in metric.items()}
        return cls(of, ranks, metrics, costs, pools, within)

    def start(self, sharpness: float) -> Float[Tensor, " variables"]:
        """Probabilities that meet every budget: `logistic` over ranks."""
        s = torch.empty_like(self.cost)
        for members, budget in self.pools:
            s[members] = policy.logistic(
                self.ranks[members], self.cost[members], budget, sharpness=max(sharpness, 1e-6)
            )
        return s

    def project(self, s: Float[Tensor, " variables"]) -> Float[Tensor, " variables"]:
        """Probabilities moved, in place, to where every budget is met."""
        for members, budget in self.pools:
            s[members] = policy.project(s[members], self.cost[members], budget)
        return s

    def by_group(self, values: Shaped[Tensor, " variables"]) -> dict[str, Tensor]:
        """Values of variables as values of units, by group key."""
        return {key: values[index] for key, index in self.of.items()}

    def scores(self, s: Float[Tensor, " variables"]) -> Scores:
        """Probabilities as scores of units; those of one variable are told apart by their own metric's rank."""
        return {key: value + TIE_BREAK * self.within[key] for key, value in self.by_group(s).items()}


def budgets(task: Task) -> list[tuple[list[UnitGroup], float]]:
    """Groups that share a budget, in parameters, as `choose` will see it."""

    def share(groups: list[UnitGroup]) -> tuple[list[UnitGroup], float]:
        return groups, task.keep * sum(group.cost * group.count for group in groups)

    by_kind: dict[str, list[UnitGroup]] = {}
    for group in task.groups:
        by_kind.setdefault(group.kind, []).append(group)
    if task.scope == "parameters":
        return [share(list(task.groups))]
    if task.scope == "global":
        return [share(groups) for groups in by_kind.values()]
    depth = [group for group in task.groups if group.kind in DEPTH_KINDS]
    layers = [group for group in task.groups if group.kind not in DEPTH_KINDS]
    counts = task.layer_counts()
    fixed = [([group], float(counts[group.place] * group.cost)) for group in layers]
    return [*fixed, *([share(depth)] if depth else [])]
