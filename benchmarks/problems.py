"""Synthetic layer problems with the features that make real ones hard. Written down, so anyone can make the same.

Inputs: x = s * (Q diag(i^-0.6) z + 0.05 g + m): z and g standard normal, Q a random orthogonal basis (latent spectrum
i^-1.2), m a non-zero mean, s log-normal channel scales of which 1 % are 10 to 30 times larger.
Weights: t(6) entries with log-normal row scales, plus a weak low-rank part; they do not know the channel scales.
Calibration and held-out tokens are separate draws. Everything depends on (shape, tokens, seed) alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from topiarist.core.gram import Gram

EXPONENT = 1.2  # of the latent spectrum
FLOOR = 0.05  # standard deviation of the white part, relative to a typical channel of deviation 1
MEAN = 0.5  # standard deviation of the channel means
CHANNEL_SIGMA = 0.4  # log-normal spread of the channel scales
ROW_SIGMA = 0.3  # log-normal spread of the row scales
LOW_RANK, LOW_RANK_SHARE = 8, 0.1  # rank of the structured part of the weight, and its share of the energy


@dataclass(frozen=True)
class LayerProblem:
    """A weight, the Gram of its calibration tokens and the Gram of held-out ones."""

    weight: Tensor
    gram: Gram
    held_out: Gram


def make(out: int, inputs: int, seed: int, *, tokens: int = 32768, device: str = "cpu") -> LayerProblem:
    """A layer problem; `tokens` calibrate, a quarter as many more (at least 8192) are held out."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    basis = torch.linalg.qr(normal(inputs, inputs)).Q
    spectrum = torch.arange(1, inputs + 1, device=device, dtype=torch.float32).pow(-EXPONENT / 2)
    mixing = basis * (spectrum * (inputs / spectrum.square().sum()).sqrt())
    scales = (CHANNEL_SIGMA * normal(inputs)).exp()
    outliers = torch.randperm(inputs, generator=generator, device=device)[: max(1, inputs // 100)]
    scales[outliers] *= 10 + 20 * torch.rand(len(outliers), generator=generator, device=device)
    mean = MEAN * normal(inputs)

    def gram_of(count: int) -> Gram:
        gram = Gram(inputs, device=device)
        while gram.tokens < count:
            batch = min(8192, count - gram.tokens)
            gram.add((normal(batch, inputs) @ mixing.T + FLOOR * normal(batch, inputs) + mean) * scales)
        return gram

    gram, held_out = gram_of(tokens), gram_of(max(8192, tokens // 4))
    chi = normal(6, out, inputs).square_().mean(0).sqrt_()
    weight = normal(out, inputs) / chi
    low_rank = normal(out, LOW_RANK) @ normal(LOW_RANK, inputs) / LOW_RANK**0.5
    weight = (1 - LOW_RANK_SHARE) ** 0.5 * weight / weight.std() + LOW_RANK_SHARE**0.5 * low_rank
    weight *= (ROW_SIGMA * normal(out, 1)).exp() / inputs**0.5
    return LayerProblem(weight, gram, held_out)
