"""SparseLLM's feed-forward solve, step by step as published: columns are tokens, every inverse is taken, fp64.

Without the released script's accidents: damping that piles up, fp16 pseudo-inverses, gradient steps on W2 of OPT.

X (d, N)    Y (d, N) dense output    z, s, p (f, N)    prune(W, H) -> pruned W; H = inputs x inputs^T
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Prune = Callable[[Tensor, Tensor], Tensor]


def opt(
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    b2: Tensor,
    X: Tensor,
    prune: Prune,
    T: int,
    alpha: float,
    beta: float,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """fc1 and fc2 after T passes."""
    b1, b2 = b1[:, None], b2[:, None]
    z = W1 @ X + b1
    p = z.relu()
    Y = W2 @ p + b2
    X_inverse = torch.linalg.pinv(X)
    for epoch in range(T):
        if epoch:
            W1, W2 = (z - b1) @ X_inverse, (Y - b2) @ torch.linalg.pinv(p)
        W1, W2 = prune(W1, X @ X.T), prune(W2, p @ p.T)
        h, m = z.relu(), W1 @ X + b1
        p = _outputs(W2, Y - b2, h, beta, gamma)
        z = _relu_preactivations(m, p, alpha, gamma)
    return W1, W2


def swiglu(
    Wg: Tensor,
    Wu: Tensor,
    Wd: Tensor,
    X: Tensor,
    prune: Prune,
    T: int,
    alpha: float,
    beta: float,
    gamma: float,
    lr: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and down after T passes."""
    z, s = Wu @ X, Wg @ X
    p = torch.nn.functional.silu(s) * z
    Y = Wd @ p
    X_inverse = torch.linalg.pinv(X)
    for epoch in range(T):
        if epoch:
            Wu, Wg, Wd = z @ X_inverse, s @ X_inverse, Y @ torch.linalg.pinv(p)
        Wu, Wg, Wd = prune(Wu, X @ X.T), prune(Wg, X @ X.T), prune(Wd, p @ p.T)
        g, m_z, m_s = torch.nn.functional.silu(s), Wu @ X, Wg @ X
        p = _outputs(Wd, Y, g * z, beta, gamma)
        z = (alpha * m_z + gamma * g * p) / (alpha + gamma * g**2)
        for _ in range(2):
            s = s.detach().requires_grad_()
            loss = alpha * ((s - m_s) ** 2).sum() + gamma * ((p - torch.nn.functional.silu(s) * z) ** 2).sum()
            loss.backward()
            s = (s - lr * s.grad).detach()
    return Wg, Wu, Wd


def _outputs(W2: Tensor, Y: Tensor, h: Tensor, beta: float, gamma: float) -> Tensor:
    """(beta W2^T W2 + gamma I)^-1 (beta W2^T Y + gamma h)"""
    eye = torch.eye(len(h), dtype=h.dtype)
    return torch.linalg.inv(beta * W2.T @ W2 + gamma * eye) @ (beta * W2.T @ Y + gamma * h)


def _relu_preactivations(m: Tensor, p: Tensor, alpha: float, gamma: float) -> Tensor:
    up = ((gamma * p + alpha * m) / (gamma + alpha)).clamp(min=0)
    down = m.clamp(max=0)

    def loss(z: Tensor) -> Tensor:
        return gamma * (p - z.relu()) ** 2 + alpha * (z - m) ** 2

    return torch.where(loss(up) <= loss(down), up, down)
