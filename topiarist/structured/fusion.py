"""Fusions of the coarse and the fine Taylor estimate of a unit, without a ratio set by hand.

HyWIA ("Adaptive Estimation Fusion", Liu et al., AAAI 2025, arXiv 2403.10799) publishes neither code nor the formula of
its attention; the rules here are reconstructions. `attention` is the best of them in an ablation on calibration text
(docs/notes/structural.md), and the coarse estimate by itself, meant as a control, is better still.

c, f  the coarse and the fine estimate of the units of one layer (count,), or of every window (windows, count); rules
      look at them divided by their means, and give the shares (coarse, fine) of the layer, or of every unit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from topiarist.core.errors import CalibrationError
from topiarist.structured.estimates import Estimates
from topiarist.structured.gates import gates
from topiarist.structured.methods import Scores, Task
from topiarist.structured.trial import chosen, gated_loss, short_windows, split


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
    check_windows(len(c))
    precision = torch.stack([1 / _positive((x / _positive(x.mean())).var(0).mean()) for x in (c, f)])
    return precision / precision.sum()


def check_windows(num: int) -> None:
    """Raise CalibrationError for too few estimates to have a variance."""
    if num < 2:
        raise CalibrationError(
            "fusion by uncertainty needs an estimate of every window: pooled=False and 2 windows or more"
        )


def scale_free(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The estimates divided by their mean, or as they are where that is not positive."""
    return x / _positive(x.mean())


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)


def fixed_shares(fusion: str, found: Estimates, temperature: float) -> dict[str, Float[Tensor, "2 ..."]]:
    """Shares (coarse, fine) of every group under a rule that needs the estimates alone: all but `learned`."""
    halves = torch.tensor([0.5, 0.5], dtype=torch.float64)
    rules: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "attention": lambda c, f: attention(c.mean(0), f.mean(0), temperature),
        "attention-per-unit": lambda c, f: attention_per_unit(c.mean(0), f.mean(0), temperature),
        "uncertainty": uncertainty,
        "fine": lambda *_: halves.new_tensor([0.0, 1.0]),
        "coarse": lambda *_: halves.new_tensor([1.0, 0.0]),
        "mean": lambda *_: halves,
    }
    return {key: rules[fusion](found.coarse[key], found.fine[key]) for key in found.fine}


def learned_shares(
    task: Task,
    blend: Callable[[Mapping[str, Tensor]], Scores],
    *,
    steps: int,
    num_windows: int,
    window_tokens: int,
    rate: float,
) -> dict[str, Float[Tensor, "2"]]:
    """R2: the share of the coarse estimate in every layer, sigmoid(theta), by mirrored Gaussian trials on the loss of
    the model that the scores would leave. The best shares tried on held-out windows are returned.

    blend: scores from shares. steps: each tries two choices on `num_windows` windows of `window_tokens` tokens.
    """
    training, held_out = split(short_windows(task.tokens, window_tokens), num_windows)
    theta = torch.zeros(len(task.groups), dtype=torch.float64)
    rng = torch.Generator().manual_seed(task.seed)

    def shares(theta: Tensor) -> dict[str, Tensor]:
        coarse = torch.sigmoid(theta)
        pairs = torch.stack([coarse, 1 - coarse], 1)
        return {group.key: pair for group, pair in zip(task.groups, pairs, strict=True)}

    with gates(task.model, task.groups) as masks:

        def loss(theta: Tensor, windows: Tensor) -> float:
            return gated_loss(task, masks, chosen(task, blend(shares(theta))), windows)

        best = (loss(theta, held_out), theta)
        for step in range(steps):
            task.progress("learning the fusion", step, steps)
            noise = torch.randn(len(theta), generator=rng, dtype=torch.float64)
            picked = training[torch.randperm(len(training), generator=rng)[:num_windows]]
            difference = loss(theta + noise, picked) - loss(theta - noise, picked)
            theta = theta - rate * difference / 2 * noise
            if (step + 1) % 4 == 0 or step + 1 == steps:
                tried = loss(theta, held_out)
                best = min(best, (tried, theta), key=lambda pair: pair[0])
    return shares(best[1])


FUSIONS = ("attention", "attention-per-unit", "learned", "uncertainty", "fine", "coarse", "mean")
