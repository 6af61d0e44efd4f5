"""Hybrid-grained importance: fine and coarse Taylor estimates, fused without a ratio set by hand.

HyWIA ("Adaptive Estimation Fusion", Liu et al., AAAI 2025, arXiv 2403.10799) publishes neither code nor the formula of
its attention; the fusion rules here are reconstructions. `attention` is the best of them in an ablation on calibration
text (docs/notes/structural.md), and the coarse estimate by itself, meant as a control, is better still: it is the default.

c, f  the two estimates of the units of one layer (count,); rules look at them divided by their means, and give the
      shares (coarse, fine) of the layer, or of every unit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from topiarist.core.errors import TopiaristError
from topiarist.core.options import options
from topiarist.structured.choose import total_cost
from topiarist.structured.gates import gates
from topiarist.structured.methods import HEAD_WEIGHT, Method, Scores, Task, weigh_heads
from topiarist.structured.taylor import Estimates, taylor
from topiarist.structured.trial import chosen, gated_loss, short_windows, split

LEVELS = ("model", "layer")


def attention(c: Float[Tensor, " n"], f: Float[Tensor, " n"], temperature: PositiveFloat) -> Float[Tensor, "2"]:
    """R1: the estimates are two tokens of n numbers, their mean the query: softmax(<c, q>, <f, q>) / (n tau).

    Divided by n and not by sqrt(n): entries here have mean 1, and with sqrt(n) the larger product always takes all.
    """
    c, f = scale_free(c), scale_free(f)
    query = (c + f) / 2
    return torch.softmax(torch.stack([c @ query, f @ query]) / (len(c) * temperature), 0)


def attention_per_unit(
    c: Float[Tensor, " n"], f: Float[Tensor, " n"], temperature: PositiveFloat
) -> Float[Tensor, "2 n"]:
    """R1 for every unit: softmax(c_k, f_k) / tau; leans to the larger of its two estimates."""
    return torch.softmax(torch.stack([scale_free(c), scale_free(f)]) / temperature, 0)


def uncertainty(c: Float[Tensor, "windows n"], f: Float[Tensor, "windows n"]) -> Float[Tensor, "2"]:
    """R3: in proportion to 1 / sigma^2, the variance of each estimate over windows (as in SAAP, arXiv 2412.15127)."""
    if len(c) < 2:
        raise TopiaristError(
            "fusion by uncertainty needs an estimate of every window: pooled=False and 2 windows or more"
        )
    precision = torch.stack([1 / _positive((x / _positive(x.mean())).var(0).mean()) for x in (c, f)])
    return precision / precision.sum()


def scale_free(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The estimates divided by their mean, or as they are where that is not positive."""
    return x / _positive(x.mean())


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)


FUSIONS = ("attention", "attention-per-unit", "learned", "uncertainty", "fine", "coarse", "mean")


@options
class Hybrid(Method):
    """Keeps the units with the largest Taylor estimates, coarse, fine or fused: what the loss loses with them, by gradients.

    Choose it when a backward pass fits in memory: a window gives every unit an estimate, where a policy needs many
    masks. See the module for the source. Cost: `samples` forward and backward passes of `window` tokens; weights, one
    gradient at a time and the activations of one window in memory.

    Differs from LLM-Pruner, whose estimates these are, in: 1. an estimate for every window and their mean, so that
    nothing of the model's size is kept; `pooled=True` is theirs. 2. All layers may be cut, under one budget. 3. Scores
    of heads count twice.
    """

    scope: ClassVar[str] = "parameters"
    samples: PositiveInt = 128
    window: Annotated[int, Field(ge=2)] = 512
    """Tokens of a backward pass: on short ones what long contexts need is not seen (log-policy.md)."""
    order: str = "mix"
    pooled: bool = False
    fusion: str = "coarse"
    """One of FUSIONS. `coarse` leaves the fine estimate out; `attention` is the fusion to compare with."""
    temperature: PositiveFloat = 1.0
    head_weight: PositiveFloat = HEAD_WEIGHT
    """1 trusts the estimates."""
    level: str = "model"
    """What scores compare within: `model`, layers keep the size of their estimates; `layer`, each has mean 1."""
    learn_steps: PositiveInt = 16
    """Of fusion=learned (R2): steps, each two choices tried on `learn_windows` windows."""
    learn_windows: PositiveInt = 16
    learn_rate: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        for name, value, table in (("fusion", self.fusion, FUSIONS), ("level", self.level, LEVELS)):
            if value not in table:
                raise TopiaristError(f"unknown {name} {value!r}; choose one of {', '.join(table)}")

    def scores(self, task: Task) -> Scores:
        """Taylor estimates on short windows, fused. Takes a forward and a backward pass for each of `samples` windows."""
        windows = short_windows(task.tokens, self.window)
        found = taylor(task, windows[: self.samples], order=self.order, pooled=self.pooled)
        return self.fused(task, found)

    def fused(self, task: Task, found: Estimates) -> Scores:
        """Scores from ready estimates."""
        if self.fusion == "learned":
            return self._learned(task, found)
        halves = torch.tensor([0.5, 0.5], dtype=torch.float64)
        rules: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "attention": lambda c, f: attention(c.mean(0), f.mean(0), self.temperature),
            "attention-per-unit": lambda c, f: attention_per_unit(c.mean(0), f.mean(0), self.temperature),
            "uncertainty": uncertainty,
            "fine": lambda *_: halves.new_tensor([0.0, 1.0]),
            "coarse": lambda *_: halves.new_tensor([1.0, 0.0]),
            "mean": lambda *_: halves,
        }
        shares = {key: rules[self.fusion](found.coarse[key], found.fine[key]) for key in found.fine}
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

    def _learned(self, task: Task, found: Estimates) -> Scores:
        """R2: a gate theta for every layer, share of the coarse estimate sigmoid(theta), by mirrored Gaussian trials on
        the loss of the model that the scores would leave. The best shares tried on held-out windows are returned.
        """
        training, watching = split(short_windows(task.tokens, self.window), self.learn_windows)
        theta = torch.zeros(len(task.groups), dtype=torch.float64)
        rng = torch.Generator().manual_seed(task.seed)

        def scores(theta: Tensor) -> Scores:
            shares = torch.sigmoid(theta)
            pairs = torch.stack([shares, 1 - shares], 1)
            return self._blend(task, found, {group.key: pair for group, pair in zip(task.groups, pairs, strict=True)})

        with gates(task.model, task.groups) as masks:

            def loss(theta: Tensor, windows: Tensor) -> float:
                return gated_loss(task, masks, chosen(task, scores(theta)), windows)

            best = (loss(theta, watching), theta)
            for step in range(self.learn_steps):
                task.progress("learning the fusion", step, self.learn_steps)
                noise = torch.randn(len(theta), generator=rng, dtype=torch.float64)
                picked = training[torch.randperm(len(training), generator=rng)[: self.learn_windows]]
                difference = loss(theta + noise, picked) - loss(theta - noise, picked)
                theta = theta - self.learn_rate * difference / 2 * noise
                if (step + 1) % 4 == 0 or step + 1 == self.learn_steps:
                    tried = loss(theta, watching)
                    best = min(best, (tried, theta), key=lambda pair: pair[0])
        return scores(best[1])
