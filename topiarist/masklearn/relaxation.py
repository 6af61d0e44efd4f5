"""What a relaxation is: a frozen value that makes a soft mask of logits, a weight and one step's `Draw`.

W   weight (out, in)                     pi  logits (out, classes, groups), contiguous: each class is a vector
y   class probabilities                  M   soft mask
kappa  scale of the logits               tau temperature     lam  weight of the regulariser  G  d loss / d(W * M)

Logits keep the weight's rows as their first axis, so both shard alike along it and no group straddles a shard.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from topiarist.core.errors import PatternError
from topiarist.core.patterns import NM, Pattern
from topiarist.masklearn import noise

# The shapes of the table above, with the axes named.
Dense = Float[Tensor, "out in"]
Mask = Bool[Tensor, "out in"]
Logits = Float[Tensor, "out classes groups"]


@dataclass(frozen=True)
class Draw:
    """One sample of one layer's mask: its noise and the values of the schedules. Plain numbers, no tensors."""

    key: noise.Key
    kappa: float
    tau: float
    lam: float = 0.0
    """lambda_t of L = loss - lambda_t * ||W * M||^2 (equation 8); zero in the last step of the paper's code."""
    straight_through: bool = False
    """Forward with the sampled hard mask, backward through the soft one. Off in the paper: soft masks learn better."""
    first_row: int = 0
    """Global index of the weight's first row, if it is a shard."""
    first_group: int = 0
    """Global index of the first group of a row, if the weight is sharded along its inputs."""
    share: float = 1.0
    """What part of a step's draws this one is: its part of a penalty that a step pays once. `lam` is that part already."""


@dataclass(frozen=True)
class Prior:
    """How a given mask becomes the first logits."""

    gap: float | None = 0.03
    """Deterministic: pi = gap * similarity. None: the paper's random form, pi = std * (normal + alpha * similarity)."""
    alpha: float = 3.0
    std: float = 0.01
    # Differs from the authors' code in: 1. std is this constant, not the empirical deviation of the layer's noise, so
    # that shards agree (the two differ by 1 / sqrt(2 * logits)). 2. The similarity subtracts the true mean.


def check_prior(mask: Shaped[Tensor, "out in"], pattern: Pattern, origin: str = "the prior") -> None:
    """Raise PatternError, with what is wrong, unless a mask is boolean and exactly of the pattern. origin: what it is."""
    kept, wanted = int((mask != 0).sum()), pattern.num_kept((mask.shape[0], mask.shape[1]))
    if mask.dtype != torch.bool:
        wrong = f"it is of {mask.dtype}, where booleans are due (True = kept)"
    elif kept != wanted:
        wrong = f"it keeps {kept:,} of {mask.numel():,} weights, where {wanted:,} are due"
    elif not pattern.holds(mask):
        wrong = f"it keeps {kept:,} of {mask.numel():,} weights as is due, but too many of them side by side"
    else:
        return
    raise PatternError(f"{origin} is not a {pattern} mask: {wrong}")


@dataclass(frozen=True)
class Relaxation(ABC):
    """A soft mask from logits. `effective` is the forward pass and `gradient` its closed backward, without autograd."""

    pattern: Pattern
    name: ClassVar[str]
    takes: ClassVar[type[Pattern]] = NM
    by_row: ClassVar[bool] = True  # whether rows can be computed apart

    @abstractmethod
    def logits_shape(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        """(out, classes, groups) for a weight of `shape`. Raises PatternError if the pattern does not fit."""

    @abstractmethod
    def soft_mask(self, logits: Logits, draw: Draw) -> Dense:
        """M, in the logits' precision."""

    @abstractmethod
    def preference(self, mask: Mask) -> Logits:
        """What a prior mask says about each logit: higher is more alike, mean zero over a group."""

    @abstractmethod
    def hard_mask(self, logits: Logits) -> Mask:
        """The most likely mask, without noise. Exactly of the pattern; ties go to the lower index."""

    def soft_mask_backward(self, logits: Logits, draw: Draw, dM: Dense) -> Logits:
        """dpi for a gradient dM on the soft mask; by autograd on a second forward unless a subclass knows better."""
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.soft_mask(leaf, draw), leaf, dM)
        return grad

    def init_logits(
        self,
        mask: Shaped[Tensor, "out in"] | None,
        prior: Prior,
        *,
        seed: int,
        layer: int,
        first_row: int = 0,
        first_group: int = 0,
    ) -> Logits:
        """The first logits, fp32, from a prior mask. Raises PatternError if there is none or not of the pattern."""
        if mask is None:
            raise PatternError(f"learning a {self.pattern} mask needs a prior mask; compute one with a one-shot method")
        shape = self.logits_shape((mask.shape[0], mask.shape[1]))
        check_prior(mask, self.pattern)
        preference = self.preference(mask)
        if prior.gap is not None:
            return preference * prior.gap
        key_a = noise.noise_key(seed, layer, 0, use=noise.INIT_A)
        key_b = noise.noise_key(seed, layer, 0, use=noise.INIT_B)
        normal = noise.normal(key_a, key_b, shape, first_row=first_row, first_group=first_group, device=mask.device)
        return prior.std * (normal + prior.alpha * preference)

    def effective(self, weight: Dense, logits: Logits, draw: Draw | None) -> Dense:
        """W * M in the weight's dtype; the hard mask if `draw` is None (evaluation). For autograd see kernels.py."""
        if draw is None:
            return weight.masked_fill(~self.hard_mask(logits), 0.0)
        M = self.sampled_hard_mask(logits, draw) if draw.straight_through else self.soft_mask(logits, draw)
        return (weight.to(M.dtype) * M).to(weight.dtype)

    def certainty(self, logits: Logits, draw: Draw) -> Float[Tensor, ""]:
        """How decided the mask of this draw is: 1 if every weight is wholly kept or wholly gone."""
        M = self.soft_mask(logits, draw).clamp(0.0, 1.0)
        return torch.maximum(M, 1.0 - M).mean()

    def sampled_hard_mask(self, logits: Logits, draw: Draw) -> Dense:
        """The hard mask of this draw's noisy logits, as numbers 0 and 1."""
        return self.hard_mask(self.noisy(logits, draw)).to(logits.dtype)

    def noisy(self, logits: Logits, draw: Draw) -> Logits:
        """kappa * pi + g, not yet divided by tau."""
        words = noise.bits(
            draw.key, *logits.shape, first_row=draw.first_row, first_group=draw.first_group, device=logits.device
        )
        return draw.kappa * logits + self.noise_of(words).to(logits.dtype)

    def noise_of(self, words: Int[Tensor, "*words"]) -> Float[Tensor, "*words"]:
        """Standard Gumbel noise from random 32-bit words, one number a word."""
        return noise.gumbel(words)

    def gradient(self, weight: Dense, logits: Logits, grad_effective: Dense, draw: Draw) -> Logits:
        """dpi of loss - lam * ||W * M||^2, given G = d loss / d(W * M): dM = G W - 2 lam W^2 M, then back to pi."""
        W = weight.to(logits.dtype)
        dM = grad_effective.to(logits.dtype) * W
        if draw.lam:
            dM = dM - 2.0 * draw.lam * W.square() * self.soft_mask(logits, draw)
        return self.soft_mask_backward(logits, draw, dM)
