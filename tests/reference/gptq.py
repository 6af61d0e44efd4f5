"""GPTQ as its paper writes it: one row, one column at a time, the inverse Hessian of what is left taken anew, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def loop(W: Tensor, H: Tensor, mask: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    """Integers (out, in) for given scales (out, groups): each column is rounded (to 0 where `mask` is False), and the
    columns after it move by the optimal update of equation (2)."""
    W, H, scale = W.double(), H.double(), scale.double()
    rows, width = W.shape
    group = width // scale.shape[1]
    q = torch.zeros(rows, width, dtype=torch.float64)
    for r in range(rows):
        w = W[r].clone()
        for j in range(width):
            s = scale[r, j // group]
            if mask[r, j]:
                q[r, j] = (w[j] / s).round().clamp(lowest, highest)
            left = torch.linalg.inv(H[j:, j:])
            w[j:] -= (w[j] - q[r, j] * s) / left[0, 0] * left[:, 0]
    return q


def error(w: Tensor, q: Tensor, s: Tensor, H: Tensor) -> float:
    """(w - s q) H (w - s q)^T of one row, s one scale a weight, fp64."""
    d = w.double() - s.double() * q.double()
    return float(d @ H.double() @ d)
