"""Hybrid-grained importance: fine and coarse Taylor estimates, fused without a ratio set by hand.

HyWIA ("Adaptive Estimation Fusion", Liu et al., AAAI 2025, arXiv 2403.10799) publishes neither code nor the formula of
its attention; the fusion rules here are reconstructions, and the default is the one that an ablation on calibration
text chose (docs/log-policy.md), not one known to be the authors'.

c, f  the two estimates of the units of one layer (count,), each divided by its mean: scale-free
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from topiarist.errors import TopiaristError
from topiarist.structured.gates import gates
from topiarist.structured.methods import Method, Scores, Task
from topiarist.structured.taylor import Estimates, taylor
from topiarist.structured.trial import chosen, gated_loss, short_windows, split

LEVELS = ("model", "layer")


def attention(c: Float[Tensor, " n"], f: Float[Tensor, " n"], temperature: float) -> Float[Tensor, " n"]:
    """R1: the estimates are two tokens of n numbers, their mean the query: weights softmax(<c, q>, <f, q>) / (n tau).

    Divided by n and not by sqrt(n): entries here have mean 1, and with sqrt(n) the larger product always takes all.
    """
    c, f = _scale_free(c), _scale_free(f)
    query = (c + f) / 2
    logits = torch.stack([c @ query, f @ query]) / (len(c) * temperature)
    a = torch.softmax(logits, 0)
    return a[0] * c + a[1] * f


def attention_per_unit(c: Float[Tensor, " n"], f: Float[Tensor, " n"], temperature: float) -> Float[Tensor, " n"]:
    """R1 for every unit: weights softmax(c_k, f_k) / tau; leans to the larger of its two estimates."""
    c, f = _scale_free(c), _scale_free(f)
    a = torch.softmax(torch.stack([c, f]) / temperature, 0)
    return a[0] * c + a[1] * f


def uncertainty(c: Float[Tensor, "windows n"], f: Float[Tensor, "windows n"]) -> Float[Tensor, " n"]:
    """R3: weights 1 / sigma^2, the variance of each estimate over calibration windows (as in SAAP, arXiv 2412.15127)."""
    if len(c) < 2:
        raise TopiaristError(
            "fusion by uncertainty needs an estimate of every window: pooled=False and 2 windows or more"
        )
    c, f = (x / _positive(x.mean()) for x in (c, f))
    precision = torch.stack([1 / _positive(x.var(0).mean()) for x in (c, f)])
    a = precision / precision.sum()
    return a[0] * c.mean(0) + a[1] * f.mean(0)


def _scale_free(x: Tensor) -> Tensor:
    return x / _positive(x.mean())


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)


def blend(c: Tensor, f: Tensor, share: float | Tensor) -> Tensor:
    """share of the coarse estimate, the rest of the fine one; R2 learns the share."""
    return share * _scale_free(c.mean(0)) + (1 - share) * _scale_free(f.mean(0))


FUSIONS = ("attention", "attention-per-unit", "learned", "uncertainty", "fine", "coarse", "mean")


@dataclass(frozen=True)
class Hybrid(Method):
    """Keeps the units with the largest fused Taylor estimates: what the loss loses with them, by gradients.

    Choose it when a backward pass fits in memory: a window gives every unit an estimate, where a policy needs many
    masks. See the module for the source. Cost: `samples` forward and backward passes of `window` tokens; weights, one
    gradient at a time and the activations of one window in memory.

    Differs from LLM-Pruner, whose estimates these are, in: 1. an estimate for every window and their mean, so that
    nothing of the model's size is kept; `pooled=True` is theirs. 2. All layers may be cut, under one budget.
    """

    samples: int = 128
    window: int = 128
    order: str = "mix"
    pooled: bool = False
    fusion: str = "attention"
    temperature: float = 1.0
    level: str = "model"
    """What scores compare within: `model`, layers keep the size of their estimates; `layer`, each has mean 1."""
    learn_steps: int = 16
    """Of fusion=learned (R2): steps, each two choices tried on `learn_windows` windows."""
    learn_windows: int = 16
    learn_rate: float = 1.0

    def __post_init__(self) -> None:
        for name, value, table in (("fusion", self.fusion, FUSIONS), ("level", self.level, LEVELS)):
            if value not in table:
                raise TopiaristError(f"unknown {name} {value!r}; choose one of {', '.join(table)}")

    def scores(self, task: Task) -> Scores:
        windows = short_windows(task.tokens, self.window)
        found = taylor(task, windows[: self.samples], order=self.order, pooled=self.pooled)
        return self.fused(task, found)

    def fused(self, task: Task, found: Estimates) -> Scores:
        """Scores from ready estimates: every layer fused by itself, then brought back to its own size."""
        if self.fusion == "learned":
            return self._learned(task, found)
        rules: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "attention": lambda c, f: attention(c.mean(0), f.mean(0), self.temperature),
            "attention-per-unit": lambda c, f: attention_per_unit(c.mean(0), f.mean(0), self.temperature),
            "uncertainty": uncertainty,
            "fine": lambda c, f: blend(c, f, 0.0),
            "coarse": lambda c, f: blend(c, f, 1.0),
            "mean": lambda c, f: blend(c, f, 0.5),
        }
        rule = rules[self.fusion]
        return self._sized(task, found, {key: rule(found.coarse[key], found.fine[key]) for key in found.fine})

    def _sized(self, task: Task, found: Estimates, fused: Scores) -> Scores:
        """Times the layer's size, a parameter: the geometric mean of its two mean estimates, so that all layers and
        kinds compare; as they are with level=layer."""
        if self.level == "layer":
            return fused
        sizes = {
            group.key: (found.fine[group.key].mean() * found.coarse[group.key].mean()).sqrt() / group.cost
            for group in task.groups
        }
        return {key: score * sizes[key] for key, score in fused.items()}

    def _learned(self, task: Task, found: Estimates) -> Scores:
        """R2: a gate theta for every layer, share of the coarse estimate sigmoid(theta), by mirrored Gaussian trials on
        the loss of the model that the scores would leave. The best shares tried on held-out windows are returned."""
        training, watching = split(short_windows(task.tokens, self.window), self.learn_windows)
        theta = torch.zeros(len(task.groups), dtype=torch.float64)
        rng = torch.Generator().manual_seed(task.seed)

        def scores(theta: Tensor) -> Scores:
            shares = torch.sigmoid(theta)
            fused = {
                group.key: blend(found.coarse[group.key], found.fine[group.key], share)
                for group, share in zip(task.groups, shares, strict=True)
            }
            return self._sized(task, found, fused)

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
