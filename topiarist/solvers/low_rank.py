"""A low-rank companion: the best matrix of rank R for what pruning took from a weight, as its layer's outputs see it.

W  dense weight (out, in)    X  pruned weight (out, in)    E = W - X    H  Gram of the inputs (in, in)    U  (out, rank)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from topiarist.core.gram import Gram
from topiarist.core.linalg import cholesky, reconstruction_error

DAMPING = 1e-6
"""Of H, as a share of its mean diagonal, where it is factored: it may have no inverse."""


@dataclass(frozen=True)
class LowRank:
    """B A, to be added to a pruned weight, fp32, with the relative error of their sum."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    error: float
    """tr((E - B A) H (E - B A)^T) / tr(W H W^T)."""


def low_rank_companion(
    weight: Float[Tensor, "out in"], pruned: Float[Tensor, "out in"], gram: Gram, rank: int
) -> LowRank:
    """Minimise tr((E - B A) H (E - B A)^T) over B A of the given rank, in closed form.

    With H = L L^T it is ||(E - B A) L||_F, so B A L is the truncated SVD of E L, and with U its left singular vectors
    B = U, A = U^T E: H is never inverted. U comes from the smaller of two eigenproblems, E H E^T or L^T E^T E L.
    The step of 3BASiL (Makni et al., arXiv 2603.01376) and SLiM (Mozaffari et al., arXiv 2410.09615) that fits the
    low-rank part to a sparse one. Differs from both in that H is whole where SLiM weighs channels, and in that there is
    one step, not one in turn with the mask as in 3BASiL.

    weight: the dense one. pruned: the same with zeros, or on a grid. Cost: an eigenproblem of min(out, in), about 10
    n^3 flops, and three products. Warns and raises as `core.linalg.cholesky` does.
    """
    W = weight.detach().float()
    E = W - pruned.detach().float()
    H = gram.matrix.to(E.device)
    rank = min(rank, *E.shape)
    if E.shape[0] <= E.shape[1]:
        U = _leading(E @ H @ E.T, rank)
    else:
        damped = H.clone()
        damped.diagonal().add_(DAMPING * H.diagonal().mean().clamp_min(torch.finfo(H.dtype).tiny))
        EL = E @ cholesky(damped)
        # Orthonormal again: singular vectors from V alone are only as good as their singular values are large.
        U = torch.linalg.qr(EL @ _leading(EL.T @ EL, rank))[0]
    A = U.T @ E
    return LowRank(A, U, reconstruction_error(W, W - E + U @ A, H))


def _leading(S: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n rank"]:
    """The eigenvectors of the largest eigenvalues of a symmetric matrix."""
    return torch.linalg.eigh(S)[1][:, -rank:].flip(1)
