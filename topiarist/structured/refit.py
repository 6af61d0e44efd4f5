"""After units went, the matrix that consumed them learns to do without: least squares on its kept input columns.

W  weight (out, in)      H  Gram of the consumer's inputs, dense (in, in)      K  kept columns, U  those that go
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topiarist.core.linalg import cholesky


def refit_columns(
    weight: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    columns: Bool[Tensor, " in"],
    *,
    damping: float = 1e-2,
) -> Float[Tensor, "out in"]:
    """Minimise tr((X - W) (H + damping diag H) (X - W)^T) over X that is zero outside `columns`; fp32.

    X_K = W_K + W_U H_UK (H_KK + damping diag H_KK)^-1: one factorisation for all rows. Columns without any input
    energy stay as they are. Cost: |K|^3 / 3 + out |U| |K| + out |K|^2 multiplications.
    """
    K, U = columns.nonzero().flatten(), (~columns).nonzero().flatten()
    X = torch.zeros_like(weight, dtype=torch.float32)
    X[:, K] = weight[:, K].float()
    if not len(U) or not len(K):
        return X
    # Unit diagonal by scaling; a column without energy is an equation of its own, 1 x = 0.
    scale = H.diagonal()[K].clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    A = H[K][:, K] / scale / scale[:, None]
    A.diagonal().copy_(torch.full_like(scale, 1 + damping))
    right = weight[:, U].float() @ (H[U][:, K] / scale)
    X[:, K] += torch.cholesky_solve(right.T, cholesky(A)).T / scale
    return X
