"""SparseLLM's sub-problems (arXiv 2402.17946): every one of them in closed form, or one scalar problem an entry.

A feed-forward network is down(p) with p = act(s) * z, where z and s are the outputs of the up and gate matrices; without
a gate p = act(z). Auxiliary copies of p, z and s may differ from what the network computes, at a price:

    beta ||Wd p + b - Y||^2  +  gamma ||p - act(s) z||^2  +  alpha ||z - m_z||^2  +  alpha ||s - m_s||^2

Y  wanted output (tokens, out)    h = act(s) z  (tokens, hidden)    m  what the pruned first matrices give for X
G  Gram of the inputs (in, in)    C  sum over tokens of output x input^T (out, in)
Rows are tokens (columns in the paper), and every auxiliary update treats them one by one, so chunks of them are exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from topiarist.core import linalg

Activation = Callable[[Tensor], Tensor]


def refit(
    G: Float[Tensor, "in in"], C: Float[Tensor, "out in"], start: Float[Tensor, "out in"], ridge: float
) -> Float[Tensor, "out in"]:
    """argmin over W of ||W X - T||^2 + ridge * sum_j G_jj ||W_j - start_j||^2, for C = T X^T; solved in fp64.

    The paper's W = T X^+ is its limit for ridge -> 0. The ridge is relative to every input's own energy, and pulls towards
    `start` instead of zero: what the tokens do not determine stays as it was; so do the columns of dead inputs.
    """
    H = G.double()
    energy = H.diagonal().clone()
    H.diagonal().add_(torch.where(energy > 0, ridge * energy, 1.0))
    start = start.double()
    residual = C.double() - start @ G.double()
    return (start + torch.cholesky_solve(residual.T, linalg.cholesky(H)).T).float()


def output_step(down: Float[Tensor, "out hidden"], ratio: float) -> Float[Tensor, "out hidden"]:
    """(Wd Wd^T + ratio I)^-1 Wd for `update_output`, ratio = gamma / beta: a factor of (out, out), once a network."""
    W = down.double()
    K = W @ W.T
    K.diagonal().add_(ratio)
    return torch.cholesky_solve(W, linalg.cholesky(K)).float()


def update_output(
    h: Float[Tensor, "tokens hidden"],
    Y: Float[Tensor, "tokens out"],
    down: Float[Tensor, "out hidden"],
    step: Float[Tensor, "out hidden"],
) -> Float[Tensor, "tokens hidden"]:
    """argmin over p of beta ||Wd p - Y||^2 + gamma ||p - h||^2; Y without the bias.

    The paper inverts beta Wd^T Wd + gamma I of (hidden, hidden). By Woodbury, on the residual: p = h + step^T (Y - Wd h).
    """
    return h + (Y - h @ down.T) @ step


def update_linear(
    m: Float[Tensor, "tokens hidden"],
    factor: Float[Tensor, "tokens hidden"],
    p: Float[Tensor, "tokens hidden"],
    alpha: float,
    gamma: float,
) -> Float[Tensor, "tokens hidden"]:
    """argmin over z of alpha (z - m)^2 + gamma (p - factor z)^2."""
    return (alpha * m + gamma * factor * p) / (alpha + gamma * factor.square())


def update_relu(
    m: Float[Tensor, "tokens hidden"], p: Float[Tensor, "tokens hidden"], alpha: float, gamma: float
) -> Float[Tensor, "tokens hidden"]:
    """argmin over z of alpha (z - m)^2 + gamma (p - relu(z))^2: the better of the minimum on either side of zero."""
    positive = ((alpha * m + gamma * p) / (alpha + gamma)).clamp_min(0)
    negative = m.clamp_max(0)
    cost = alpha * (positive - m).square() + gamma * (p - positive).square()
    other = alpha * (negative - m).square() + gamma * p.square()
    return torch.where(cost <= other, positive, negative)


def update_gate(
    s: Float[Tensor, "tokens hidden"],
    m: Float[Tensor, "tokens hidden"],
    z: Float[Tensor, "tokens hidden"] | float,
    p: Float[Tensor, "tokens hidden"],
    activation: Activation,
    alpha: float,
    gamma: float,
    *,
    steps: int,
    rate: float | None = None,
) -> Float[Tensor, "tokens hidden"]:
    """Lower alpha (s - m)^2 + gamma (p - act(s) z)^2 from s; z = 1 for a network without a gate.

    Gauss-Newton, entry by entry, a step only where it lowers the cost. With `rate`, plain gradient steps on the sum instead,
    as the authors take them.
    """

    def cost(s: Tensor) -> Tensor:
        return alpha * (s - m).square() + gamma * (p - activation(s) * z).square()

    for _ in range(steps):
        value, grad = _with_grad(activation, s)
        # d/ds of act(s) z, and half of the gradient of the cost
        inner = grad * z
        half = alpha * (s - m) - gamma * inner * (p - value * z)
        if rate is not None:
            s = s - 2 * rate * half
            continue
        moved = s - half / (alpha + gamma * inner.square())
        s = torch.where(cost(moved) < cost(s), moved, s)
    return s


def _with_grad(activation: Activation, s: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise activation and its derivative."""
    with torch.enable_grad():
        s = s.detach().requires_grad_()
        value = activation(s)
        (grad,) = torch.autograd.grad(value.sum(), s)
    return value.detach(), grad
