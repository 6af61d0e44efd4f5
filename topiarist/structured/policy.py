"""The numerics of a Bernoulli policy over units: sampling, the gradient of its expected loss, the budget.

s  probability that a unit stays (n,)      m  sampled masks (samples, n)      l  their losses (samples,)
c  parameters of each variable (n,)        C  the budget: at most so many parameters in expectation, c . s <= C

Gao et al., arXiv 2406.10576: minimise E_{m ~ Bernoulli(s)} loss(m) over s, by forward passes alone. Tensors only; s is fp64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

BASELINES = ("loo", "ema", "none")
EDGE = 1e-7
"""Keeps the scales finite at s = 0 and 1, where m - s is 0 anyway; the authors' constant."""
HALVINGS = 100


def sample(s: Float[Tensor, " n"], samples: int, generator: torch.Generator) -> Float[Tensor, "samples n"]:
    """Masks of 0 and 1, each unit's 1 with its probability."""
    return (torch.rand(samples, len(s), generator=generator, dtype=torch.float64) < s).double()


def directions(masks: Float[Tensor, "samples n"], s: Float[Tensor, " n"]) -> Float[Tensor, "samples n"]:
    """d log p(m | s) / ds times sqrt(s (1 - s)), as in the authors' code: of unit variance whatever s is, a preconditioner
    with the same sign in every coordinate.
    """
    return (masks - s) / ((s + EDGE) * (1 - s + EDGE)).sqrt()


def leave_one_out(losses: Float[Tensor, " samples"]) -> Float[Tensor, " samples"]:
    """For every mask the mean loss of all others; zero where there are none, which leaves the gradient unbiased as well."""
    others = len(losses) - 1
    return (losses.sum() - losses) / others if others else torch.zeros_like(losses)


def gradient(
    losses: Float[Tensor, " samples"],
    masks: Float[Tensor, "samples n"],
    s: Float[Tensor, " n"],
    *,
    baseline: Float[Tensor, "..."],
    bessel: bool = False,
) -> Float[Tensor, " n"]:
    """Estimate of d E[loss] / ds, times sqrt(s (1 - s)).

    mean over masks of (l - baseline) * direction; unbiased if the baseline of a mask does not depend on it. bessel:
    divide by samples - 1, as the authors' code does.
    """
    weights = (losses - baseline) / (len(losses) - bessel)
    return weights @ directions(masks, s)


def moving_average(average: float | None, losses: Float[Tensor, " samples"], horizon: float) -> float:
    """The authors' baseline: delta <- (1 - 1/T) delta + mean(l) / T, updated before it is used; starts at the first mean."""
    mean = float(losses.mean())
    return mean if average is None else (1 - 1 / horizon) * average + mean / horizon


def project(s: Float[Tensor, " n"], c: Float[Tensor, " n"], budget: float) -> Float[Tensor, " n"]:
    """The nearest point of {0 <= x <= 1, c . x <= budget}: clip(s - v c, 0, 1) with the smallest v >= 0 that fits."""

    def at(v: float) -> Tensor:
        return (s - v * c).clamp(0, 1)

    if float(c @ at(0.0)) <= budget:
        return at(0.0)
    low, high = 0.0, float((s / c).max())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if float(c @ at(middle)) > budget else (low, middle)
    return at(high)


def quantiles(metric: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The rank of every entry as a fraction in (0, 1); equal entries share theirs."""
    ordered = metric.double().sort().values
    low = torch.searchsorted(ordered, metric.double(), right=False)
    high = torch.searchsorted(ordered, metric.double(), right=True)
    return (low + high).double() / (2 * len(metric))


def logistic(
    ranks: Float[Tensor, " n"], c: Float[Tensor, " n"], budget: float, *, sharpness: float
) -> Float[Tensor, " n"]:
    """sigmoid(sharpness * (rank - t)) with t such that the budget is met: units far from the cut begin almost decided."""
    low, high = -1.0 - 40.0 / sharpness, 2.0 + 40.0 / sharpness
    for _ in range(HALVINGS):
        t = (low + high) / 2
        low, high = (t, high) if float(c @ torch.sigmoid(sharpness * (ranks - t))) > budget else (low, t)
    return torch.sigmoid(sharpness * (ranks - high))
