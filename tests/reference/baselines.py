"""Magnitude, Wanda and SparseGPT exactly as their released scripts behave, quirks of counting included.

W  weight (out, in)     H  Gram, sum over tokens of x x^T (in, in)     every function returns (new weight, mask), True = kept
"""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(W: Tensor, sparsity: float | None = None, nm: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Prunes |w| <= the int(numel * sparsity)-th smallest: one weight too many, and every tie with it."""
    score = W.abs()
    if nm is not None:
        mask = keep_nm(score, *nm)
    else:
        assert sparsity is not None
        threshold = score.flatten().sort().values[int(W.numel() * sparsity)]
        mask = score > threshold
    return W * mask, mask


def wanda(
    W: Tensor, H: Tensor, tokens: int, sparsity: float | None = None, nm: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Prunes the int(in * sparsity) smallest |w| * rms(x) of every row: the count is rounded down."""
    score = W.abs() * (H.diagonal() / tokens).sqrt()
    if nm is not None:
        mask = keep_nm(score, *nm)
    else:
        assert sparsity is not None
        order = score.sort(dim=1, stable=True).indices
        mask = torch.ones_like(W, dtype=torch.bool)
        mask.scatter_(1, order[:, : int(W.shape[1] * sparsity)], False)
    return W * mask, mask


def sparsegpt(
    W: Tensor,
    H: Tensor,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    *,
    damping: float = 0.01,
    blocksize: int = 128,
) -> tuple[Tensor, Tensor]:
    """Columns left to right; the mask of a block is a threshold on w^2 / U_jj^2 over all its rows."""
    W, H = W.float().clone(), H.float().clone()
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    d = len(H)
    H[range(d), range(d)] += damping * H.diagonal().mean()
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    pruned = torch.zeros_like(W, dtype=torch.bool)
    for i1 in range(0, d, blocksize):
        i2 = min(i1 + blocksize, d)
        W1, U1 = W[:, i1:i2].clone(), U[i1:i2, i1:i2]
        Q1, E1, M1 = torch.zeros_like(W1), torch.zeros_like(W1), torch.zeros_like(W1, dtype=torch.bool)
        if nm is None:
            assert sparsity is not None
            score = W1**2 / U1.diagonal() ** 2
            threshold = score.flatten().sort().values[int(score.numel() * sparsity)]
            M1 = score <= threshold
        for i in range(i2 - i1):
            w, u = W1[:, i], U1[i, i]
            if nm is not None and i % nm[1] == 0:
                score = W1[:, i : i + nm[1]] ** 2 / U1.diagonal()[i : i + nm[1]] ** 2
                drop = score.topk(nm[1] - nm[0], dim=1, largest=False).indices
                M1.scatter_(1, i + drop, True)
            q = w.clone()
            q[M1[:, i]] = 0
            Q1[:, i] = q
            error = (w - q) / u
            W1[:, i:] -= error[:, None] * U1[i, i:]
            E1[:, i] = error
        W[:, i1:i2], pruned[:, i1:i2] = Q1, M1
        W[:, i2:] -= E1 @ U[i1:i2, i2:]
    return W, ~pruned


def keep_nm(score: Tensor, keep: int, of: int) -> Tensor:
    """Mask of the `keep` largest of every `of` consecutive entries of a row, by top-k."""
    groups = score.unflatten(1, (-1, of))
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(-1, groups.topk(keep, dim=-1).indices, True).flatten(1)
