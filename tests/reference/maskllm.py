"""MaskLLM written out literally, group by group, in fp64: equations 4 to 8 of the paper (slow)."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_2_4 = [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]


def soft_mask(pi: Tensor, g: Tensor, S: Tensor, kappa: float, tau: float) -> Tensor:
    """(groups, of) from logits and noise (groups, classes): y_i = exp((kappa pi_i + g_i) / tau) / sum, M = y S."""
    rows = []
    for group in range(len(pi)):
        weights = torch.exp((kappa * pi[group] + g[group]) / tau)
        y = weights / weights.sum()
        rows.append(y @ S.to(y.dtype))
    return torch.stack(rows)


def loss(W: Tensor, M: Tensor, G: Tensor, lam: float) -> Tensor:
    """A loss linear in W * M with gradient G, minus the regulariser lam ||W * M||^2."""
    return (G * W * M).sum() - lam * (W * M).square().sum()


def prior_logits(noise: Tensor, m0: Tensor, S: Tensor, alpha: float) -> Tensor:
    """pi + sigma(pi) * alpha * (<m0, S_i> - mean_j <m0, S_j>), for noise (groups, classes) and m0 (groups, of)."""
    overlap = m0.to(noise.dtype) @ S.to(noise.dtype).T
    return noise + noise.std() * alpha * (overlap - overlap.mean(1, keepdim=True))
