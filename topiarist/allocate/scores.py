"""What the measuring rules measure, on plain tensors: outliers, traces of the loss's Hessian, cheaper stand-ins.

W  weight (out, in)     x  inputs (tokens, in)     H  Hessian of the model's loss with respect to all measured weights
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int8
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """A number for every layer and its standard error (absent where there are no two samples)."""

    values: Mapping[str, float]
    errors: Mapping[str, float]
    notes: Mapping[str, float] = field(default_factory=dict)
    """What else the measurement found, by name."""

    @classmethod
    def of_samples(cls, samples: Mapping[str, Sequence[float]]) -> Scores:
        """Means of independent samples, and standard errors of these means."""
        values, errors = {}, {}
        for name, drawn in samples.items():
            values[name] = math.fsum(drawn) / len(drawn)
            if len(drawn) > 1:
                squares = math.fsum((x - values[name]) ** 2 for x in drawn)
                errors[name] = math.sqrt(squares / (len(drawn) - 1) / len(drawn))
        return cls(values, errors)

    @property
    def unsure(self) -> list[str]:
        """Layers whose score is within two standard errors of zero: their rank says little."""
        return [name for name, error in self.errors.items() if abs(self.values[name]) < 2 * error]


def outlier_ratio(
    weights: Sequence[Float[Tensor, "_out _in"]], norms: Sequence[Float[Tensor, " _in"]], threshold: float
) -> float:
    """Share of weights whose |w| * ||x|| is above `threshold` times the mean over all the matrices given (OWL, eq. 2).

    norms: ||x_j||, the root of the sum of squares of every input channel.
    """
    scores = [w.float().abs() * norm.float() for w, norm in zip(weights, norms, strict=True)]
    count = sum(s.numel() for s in scores)
    limit = threshold * sum(float(s.sum(dtype=torch.float64)) for s in scores) / count
    return sum(int((s > limit).sum()) for s in scores) / count


def random_signs(shape: Sequence[int], generator: torch.Generator) -> Int8[Tensor, "..."]:
    """Independent +1 and -1, each with probability one half: z with E[z z^T] = I."""
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8) * 2 - 1


def probe(
    gradients: Callable[[], Sequence[Tensor]],
    weights: Sequence[Tensor],
    signs: Sequence[Tensor],
    step: float,
) -> list[float]:
    """z_j . (H z)_j for every weight j of a list: one Hutchinson sample of the trace of each diagonal block of H.

    H z = (g(W + step z) - g(W - step z)) / (2 step): two gradients of the loss, no second derivative, so any attention
    kernel will do. All weights move together: the blocks off the diagonal add noise of mean zero, and one probe serves
    every matrix. The weights are changed in place while this runs, and put back bit by bit.
    """
    before = [w.detach().clone() for w in weights]
    total = [0.0] * len(weights)
    try:
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for w, start, z in zip(weights, before, signs, strict=True):
                    w.copy_(start + sign * step * z.to(w.device, w.dtype))
            for j, (g, z) in enumerate(zip(gradients(), signs, strict=True)):
                total[j] += sign * float((g.float() * z.to(g.device)).sum(dtype=torch.float64)) / (2 * step)
    finally:
        with torch.no_grad():
            for w, start in zip(weights, before, strict=True):
                w.copy_(start)
    return total
