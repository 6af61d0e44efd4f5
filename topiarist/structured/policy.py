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
SCALES = ("sqrt", "score")
EDGE = 1e-7
"""Keeps the scales finite at s = 0 and 1, where m - s is 0 anyway; the authors' constant."""
HALVINGS = 100


def sample(
    s: Float[Tensor, " n"], samples: int, generator: torch.Generator, *, antithetic: bool = False
) -> Float[Tensor, "samples n"]:
    """Masks of 0 and 1. Antithetic: rows 2k and 2k + 1 come from u and 1 - u; `samples` must be even then."""
    if not antithetic:
        return (torch.rand(samples, len(s), generator=generator, dtype=torch.float64) < s).double()
    if samples % 2:
        raise ValueError(f"antithetic masks come in pairs, {samples} were asked for")
    u = torch.rand(samples // 2, len(s), generator=generator, dtype=torch.float64)
    return (torch.stack([u, 1 - u], 1).flatten(0, 1) < s).double()


def directions(masks: Float[Tensor, "samples n"], s: Float[Tensor, " n"], scale: str) -> Float[Tensor, "samples n"]:
    """score: d log p(m | s) / ds = (m - s) / (s (1 - s)). sqrt: that times sqrt(s (1 - s)), the authors' code: of unit
    variance whatever s is, a preconditioner with the same sign in every coordinate.
    """
    variance = (s + EDGE) * (1 - s + EDGE)
    return (masks - s) / (variance.sqrt() if scale == "sqrt" else variance)


def leave_one_out(losses: Float[Tensor, " samples"], *, antithetic: bool = False) -> Float[Tensor, " samples"]:
    """For every mask the mean loss of the masks drawn independently of it: all others, or all other pairs.

    Zero where there are none, which leaves the gradient unbiased as well.
    """
    size = 2 if antithetic else 1
    by_draw = losses.view(-1, size).sum(1)
    others = len(losses) - size
    if not others:
        return torch.zeros_like(losses)
    return ((by_draw.sum() - by_draw) / others).repeat_interleave(size)


def gradient(
    losses: Float[Tensor, " samples"],
    masks: Float[Tensor, "samples n"],
    s: Float[Tensor, " n"],
    *,
    baseline: Float[Tensor, "..."],
    scale: str = "sqrt",
    bessel: bool = False,
) -> Float[Tensor, " n"]:
    """Estimate of d E[loss] / ds, times sqrt(s (1 - s)) with scale="sqrt".

    mean over masks of (l - baseline) * direction; unbiased if the baseline of a mask does not depend on it. bessel:
    divide by samples - 1, as the authors' code does.
    """
    weights = (losses - baseline) / (len(losses) - bessel)
    return weights @ directions(masks, s, scale)


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


def sigmap(metric: Float[Tensor, " n"], mean: float) -> Float[Tensor, " n"]:
    """The authors' start: sigmoid of the standardised metric, shifted to the mean wanted, cut to [0, 1]."""
    metric = metric.double()
    spread = metric.std(correction=0)
    curve = torch.sigmoid((metric - metric.mean()) / torch.where(spread > 0, spread, 1.0))
    return (curve - curve.mean() + mean).clamp(0, 1)


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
