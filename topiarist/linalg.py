"""The linear algebra every solver shares: a Cholesky that escalates, least squares on a fixed support, the error.

W  weight (out, in), fp32      H  Gram (in, in), fp32      mask  bool (out, in), True = kept
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topiarist.errors import NumericalError, NumericalWarning
from topiarist.gram import Gram

MAX_ESCALATIONS = 5


def damped(H: Float[Tensor, "n n"], fraction: float) -> Float[Tensor, "n n"]:
    """H + fraction * mean(diag H) * I, a new tensor."""
    out = H.clone()
    out.diagonal().add_(fraction * H.diagonal().mean())
    return out


def cholesky(H: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Lower Cholesky factor. If H is not positive definite its diagonal is raised, ten times more at every try.

    Warns (NumericalWarning) with the value that helped; raises NumericalError if none does.
    """
    factor, info = torch.linalg.cholesky_ex(H)
    jitter = 1e-6
    for _ in range(MAX_ESCALATIONS):
        if int(info) == 0:
            return factor
        factor, info = torch.linalg.cholesky_ex(damped(H, jitter))
        if int(info) == 0:
            warnings.warn(
                f"Gram is not positive definite: added {jitter:g} of its mean diagonal", NumericalWarning, stacklevel=3
            )
            return factor
        jitter *= 10
    raise NumericalError(
        f"Gram is not positive definite even with {jitter / 10:g} of its mean diagonal added; use more calibration tokens"
    )


def inverse(H: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Inverse of a positive definite matrix through `cholesky`."""
    return torch.cholesky_inverse(cholesky(H))


def masked_least_squares(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    mask: Bool[Tensor, "out in"],
    *,
    start: Float[Tensor, "out in"] | None = None,
    damping: float = 1e-3,
    steps: int = 20,
    tolerance: float = 1e-5,
) -> Float[Tensor, "out in"]:
    """Minimise tr((X - W) (H + damping * mean(diag H) I) (X - W)^T) over X with support `mask`.

    All rows at once by conjugate gradients, preconditioned by the diagonal (ALPS, section 3.3); one product with H a
    step. Starts from `start` (default W) cut to the mask. Stops when every row's residual fell below `tolerance`
    times its start, or after `steps`. Cost: (steps + 2) * 2 * out * in^2 flops.
    """
    if damping:
        H = damped(H, damping)
    # Unit diagonal by scaling; a dead input has an empty row and column and stays at zero.
    scale = H.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    Hs = H / scale / scale[:, None]
    keep = mask.to(W.dtype)
    X = (W if start is None else start) * scale * keep
    R = ((W * scale - X) @ Hs).mul_(keep)
    P = R.clone()
    rr = R.square().sum(1, keepdim=True)
    goal = rr * tolerance**2
    for _ in range(steps):
        if bool((rr <= goal).all()):
            break
        HP = P @ Hs
        curvature = (P * HP).sum(1, keepdim=True)
        alpha = torch.where(curvature > 0, rr / curvature, 0.0)
        X.addcmul_(P, alpha)
        R.addcmul_(HP, -alpha).mul_(keep)
        rr_next = R.square().sum(1, keepdim=True)
        beta = torch.where(rr > 0, rr_next / rr, 0.0)
        P.mul_(beta).add_(R)
        rr = rr_next
    return X / scale


def reconstruction_error(
    weight: Float[Tensor, "out in"], new_weight: Float[Tensor, "out in"], gram: Gram | Float[Tensor, "in in"]
) -> float:
    """Relative error tr((W - W') H (W - W')^T) / tr(W H W^T), in fp64. Zero if the layer's output is zero."""
    H = (gram.matrix if isinstance(gram, Gram) else gram).double()
    W = weight.to(H)
    dW = W - new_weight.to(H)
    dense = float(((W @ H) * W).sum())
    return float(((dW @ H) * dW).sum()) / dense if dense > 0 else 0.0
