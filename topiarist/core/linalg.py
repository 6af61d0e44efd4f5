"""The linear algebra every solver shares: a Cholesky that escalates, least squares on a fixed support, the error.

W  weight (out, in), fp32      H  Gram (in, in), fp32      mask  bool (out, in), True = kept
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topiarist.core.errors import NumericalError, NumericalWarning
from topiarist.core.gram import Gram
from topiarist.core.processor import multiplies_bf16

MAX_ESCALATIONS = 5


def damped(H: Float[Tensor, "n n"], fraction: float) -> Float[Tensor, "n n"]:
    """H + fraction * mean(diag H) * I, a new tensor."""
    out = H.clone()
    out.diagonal().add_(fraction * H.diagonal().mean())
    return out


def cholesky(H: Float[Tensor, "n n"], *, upper: bool = False) -> Float[Tensor, "n n"]:
    """Lower Cholesky factor, or the upper one. If there is none, the diagonal of H is raised, ten times more at every try.

    Warns (NumericalWarning) with the value that helped; raises NumericalError if none does.
    """
    factor, info = torch.linalg.cholesky_ex(H, upper=upper)
    jitter = 1e-6
    for _ in range(MAX_ESCALATIONS):
        if int(info) == 0:
            return factor
        factor, info = torch.linalg.cholesky_ex(damped(H, jitter), upper=upper)
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


def inverse_factor(H: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Upper Cholesky factor U of the inverse U^T U. Raises and warns as `cholesky` does."""
    return cholesky(inverse(H), upper=True)


def search_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where products in it are at least as fast as in fp32, else float32. All sums are fp32 either way."""
    on_gpu = device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else multiplies_bf16()
    return torch.bfloat16 if fast else torch.float32


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
    """Minimise tr((X - W) (H + damping * diag H) (X - W)^T) over X with support `mask`.

    All rows at once by conjugate gradients, preconditioned by the diagonal (ALPS, section 3.3); one product with H a
    step. Starts from `start` (default W) cut to the mask. Stops when every row's residual fell below `tolerance`
    times its start, or after `steps`. Cost: (steps + 2) * 2 * out * in^2 flops.
    """
    # Unit diagonal by scaling; a dead input has an empty row and column and stays at zero.
    scale = H.diagonal().clamp_min(0).sqrt()
    live = scale > 0
    scale = torch.where(live, scale, 1.0)
    Hs = H / (scale * (1 + damping)) / scale[:, None]
    Hs.diagonal().copy_(live)
    keep = mask.to(W.dtype)
    X = (W if start is None else start) * scale * keep
    R = ((W * scale - X) @ Hs).mul_(keep)
    return conjugate_gradients(lambda P: P @ Hs, X, R, keep, steps=steps, tolerance=tolerance) / scale


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    X: Float[Tensor, "out in"],
    R: Float[Tensor, "out in"],
    keep: Float[Tensor, "out in"],
    *,
    steps: int,
    tolerance: float,
    diagonal: Float[Tensor, " in"] | None = None,
) -> Float[Tensor, "out in"]:
    """Move X along the kept entries until the residual R is zero there. Rows are separate systems; X and R are overwritten.

    `product` multiplies by the Gram, `diagonal` is its diagonal (unit if not given): the preconditioner.
    """
    P = R.clone() if diagonal is None else R / diagonal
    rz = (R * P).sum(1, keepdim=True)
    goal = rz * tolerance**2
    for _ in range(steps):
        if bool((rz <= goal).all()):
            break
        HP = product(P)
        curvature = (P * HP).sum(1, keepdim=True)
        alpha = torch.where(curvature > 0, rz / curvature, 0.0)
        X.addcmul_(P, alpha)
        R.addcmul_(HP, -alpha).mul_(keep)
        Z = R if diagonal is None else R / diagonal
        rz_next = (R * Z).sum(1, keepdim=True)
        P.mul_(torch.where(rz > 0, rz_next / rz, 0.0)).add_(Z)
        rz = rz_next
    return X


ERROR_ROWS = 1024
"""Rows of a weight whose error is taken at once: fewer copies of a large weight in memory."""


def reconstruction_error(
    weight: Float[Tensor, "out in"], new_weight: Float[Tensor, "out in"], gram: Gram | Float[Tensor, "in in"]
) -> float:
    """Relative error tr((W - W') H (W - W')^T) / tr(W H W^T). Zero if the layer's output is zero.

    Small products in fp64, others in fp32 with fp64 sums: within 1e-4 of the fp64 formula, relatively, and 2e-7 on Grams of a
    real model.
    """
    H = gram.matrix if isinstance(gram, Gram) else gram
    small = weight.numel() * H.shape[0] < 2**26
    dtype = torch.float64 if small and H.device.type == "cpu" else torch.float32
    H = H.to(dtype)
    dense = lost = 0.0
    for W, new in zip(weight.split(ERROR_ROWS), new_weight.split(ERROR_ROWS), strict=True):
        W = W.to(H.device, dtype)
        dense += energy(W, H)
        lost += energy(W - new.to(W), H)
    return max(lost, 0.0) / dense if dense > 0 else 0.0


def energy(D: Float[Tensor, "out in"], H: Float[Tensor, "in in"]) -> float:
    """tr(D H D^T), products in the dtype given and sums in fp64. H is symmetric, so half the product is enough."""
    width, block = H.shape[0], max(128, -(-H.shape[0] // 8))
    total = torch.zeros((), dtype=torch.float64, device=D.device)
    for start in range(0, width, block):
        stop = start + block
        D_block = D[:, start:stop]
        DH = D_block @ H[start:stop, start:]
        total += _dot(DH[:, :block], D_block)
        total += 2 * _dot(DH[:, block:], D[:, stop:])
    return float(total)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b: rows in the dtype given, then fp64. Rows are short enough for fp32 to hold seven digits."""
    return (a * b).sum(1, dtype=torch.float64).sum()
