"""ALPS as released, transcribed from its description: every slow step kept, because the benchmarks measure against it.

B  iterate (in, out) = scaled W^T     D  its sparse copy     V  unscaled dual     Hs  unit-diagonal damped Gram     G = Hs B0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Trace:
    """What the run did."""

    iterations: int = 0
    rho: float = 0.1
    restarts: int = 0


def alps(
    W0: Tensor,
    H: Tensor,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    *,
    damping: float = 0.01,
    rho: float = 0.1,
    max_iterations: int = 300,
    cg_steps: int = 10,
    cg_tolerance: float = 1e-4,
    with_diagnostics: bool = False,
) -> tuple[Tensor, Tensor, Trace]:
    """(new weight, mask, trace). `with_diagnostics` adds the test error the release computes and throws away."""
    W0, H = W0.float(), H.float().clone()
    d = len(H)
    H[range(d), range(d)] += damping * H.diagonal().mean()
    scale = H.diagonal().sqrt() + 1e-8
    Hs = H / scale[:, None] / scale[None, :]
    B0 = W0.T * scale[:, None]
    G = Hs @ B0
    kept = B0.numel() - int(B0.numel() * sparsity) if sparsity is not None else B0.numel() * nm[0] // nm[1]

    def project(T: Tensor) -> Tensor:
        if sparsity is not None:
            out = T.reshape(-1).clone()
            out[T.abs().reshape(-1).topk(T.numel() - kept, largest=False).indices] = 0
            return out.reshape(T.shape)
        keep, of = nm
        groups = T.T.reshape(-1, of)
        drop = groups.abs().topk(of - keep, dim=1, largest=False).indices
        return groups.clone().scatter_(1, drop, 0).reshape(T.shape[1], T.shape[0]).T

    L, Q = torch.linalg.eigh(Hs.double())

    def invert(rho: float) -> Tensor:
        return (Q @ torch.diag(1 / (L + rho)) @ Q.T).float()

    D0 = project(B0)
    B, D, V = B0.clone(), D0.clone(), torch.zeros_like(B0)
    support = D != 0
    inverse = invert(rho)
    grown, trace = False, Trace()
    for i in range(max_iterations):
        trace.iterations += 1
        B = inverse @ (G - V + rho * D)
        D = project(B + V / rho)
        V = V + rho * (B - D)
        if (i + 1) % 3:
            continue
        if with_diagnostics:
            T = project(B)
            _test_error = ((B0 - T).T @ (Hs @ (B0 - T))).diagonal().sum()
        now = D != 0
        flips = int((now ^ support).sum())
        support = now
        if flips == 0 and grown:
            break
        if i >= 30 and flips < 0.0003 * kept:
            break
        if flips > 0.1 * kept:
            rho, grown = rho * 1.3, True
        elif flips > 0.005 * kept:
            rho, grown = rho * 1.2, True
        elif flips > 0 and grown:
            rho = rho * 1.1
        else:
            rho = rho / 5
            trace.restarts += 1
            if flips > 0:
                B, D, V = B0.clone(), D0.clone(), torch.zeros_like(B0)
        rho = min(rho, 1e6)
        inverse = invert(rho)
    trace.rho = rho

    X = project(B)
    mask = X != 0
    X = _masked_cg(Hs, G, X, mask, cg_steps, cg_tolerance)
    return (X / scale[:, None]).T.contiguous(), mask.T.contiguous(), trace


def _masked_cg(A: Tensor, G: Tensor, X: Tensor, mask: Tensor, steps: int, tolerance: float) -> Tensor:
    """Three products a step, as released: A P twice and A X for a test on the unmasked residual that never passes."""
    R = (G - A @ X) * mask
    P = R.clone()
    rr = (R * R).sum(0)
    norm = G.norm()
    for _ in range(steps):
        alpha = rr / ((P * (A @ P)).sum(0) + 1e-8)
        X = X + alpha * P
        R = (R - alpha * (A @ P)) * mask
        if (G - A @ X).norm() / norm < tolerance:
            break
        rr_next = (R * R).sum(0)
        P = R + rr_next / (rr + 1e-8) * P
        rr = rr_next
    return X
