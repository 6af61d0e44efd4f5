"""SparseLLM's sub-problems: each is the minimum it says it is."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from topiarist.solvers.auxiliary import (
    output_step,
    refit,
    update_gate,
    update_linear,
    update_output,
    update_relu,
)

ALPHA, BETA, GAMMA = 0.7, 1.3, 2.1


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_outputs_by_woodbury_are_those_of_the_direct_solve():
    Wd, h, Y = draw(6, 20, seed=1), draw(50, 20, seed=2), draw(50, 6, seed=3)
    p = update_output(h, Y, Wd, output_step(Wd, GAMMA / BETA))
    W, b = Wd.double(), BETA * Y.double() @ Wd.double() + GAMMA * h.double()
    direct = b @ torch.linalg.inv(BETA * W.T @ W + GAMMA * torch.eye(20).double())
    torch.testing.assert_close(p.double(), direct, rtol=1e-5, atol=1e-5)


def test_outputs_survive_a_matrix_of_zeros():
    h = draw(5, 8)
    assert torch.equal(update_output(h, draw(5, 3), torch.zeros(3, 8), output_step(torch.zeros(3, 8), 0.1)), h)


def test_the_gradient_of_the_linear_update_is_zero():
    m, g, p = draw(40, 9, seed=1), draw(40, 9, seed=2), draw(40, 9, seed=3)
    z = update_linear(m, g, p, ALPHA, GAMMA).requires_grad_()
    (ALPHA * (z - m).square() + GAMMA * (p - g * z).square()).sum().backward()
    assert z.grad is not None and z.grad.abs().max() < 1e-5


def test_equal_prices_give_the_published_update():
    m, g, p = draw(40, 9, seed=1), draw(40, 9, seed=2), draw(40, 9, seed=3)
    torch.testing.assert_close(update_linear(m, g, p, 5.0, 5.0), (m + g * p) / (g.square() + 1))


def test_the_relu_update_is_the_minimum_of_a_fine_grid():
    m, p = draw(60, 1, seed=1), draw(60, 1, seed=2)
    grid = torch.linspace(-6, 6, 24001)

    def cost(z: torch.Tensor) -> torch.Tensor:
        return ALPHA * (z - m).square() + GAMMA * (p - z.relu()).square()

    best = cost(grid.expand(60, -1)).min(1).values
    assert (cost(update_relu(m, p, ALPHA, GAMMA)).squeeze(1) <= best + 1e-6).all()


@pytest.mark.parametrize("activation", [functional.silu, functional.gelu, functional.relu])
@pytest.mark.parametrize("gated", [True, False])
def test_gate_steps_lower_every_entry(activation, gated: bool):
    s, m, p = (draw(200, 7, seed=i) for i in range(3))
    z = 3 * draw(200, 7, seed=4) if gated else 1.0

    def cost(s: torch.Tensor) -> torch.Tensor:
        return ALPHA * (s - m).square() + GAMMA * (p - activation(s) * z).square()

    moved = update_gate(s, m, z, p, activation, ALPHA, GAMMA, steps=2)
    assert (cost(moved) <= cost(s)).all()
    assert cost(moved).sum() < 0.5 * cost(s).sum()
    assert torch.equal(update_gate(s, m, z, p, activation, ALPHA, GAMMA, steps=0), s)


def test_gradient_steps_are_gradient_steps():
    s, m, z, p = (draw(30, 4, seed=i) for i in range(4))
    leaf = s.clone().requires_grad_()
    (ALPHA * (leaf - m).square() + GAMMA * (p - functional.silu(leaf) * z).square()).sum().backward()
    stepped = update_gate(s, m, z, p, functional.silu, ALPHA, GAMMA, steps=1, rate=0.01)
    torch.testing.assert_close(stepped, s - 0.01 * leaf.grad)


def test_a_refit_without_ridge_is_the_pseudo_inverse():
    X, T = draw(12, 300, seed=1).double(), draw(5, 300, seed=2).double()
    found = refit((X @ X.T).float(), (T @ X.T).float(), draw(5, 12, seed=3), 1e-12)
    torch.testing.assert_close(found.double(), T @ torch.linalg.pinv(X), rtol=1e-4, atol=1e-5)


def test_what_tokens_do_not_determine_stays_as_it_was():
    start, X, T = draw(5, 12, seed=3), draw(12, 300, seed=1), draw(5, 300, seed=2)
    X[4] = 0  # a dead input
    found = refit(X @ X.T, T @ X.T, start, 1e-3)
    assert torch.equal(found[:, 4], start[:, 4]) and torch.isfinite(found).all()
    torch.testing.assert_close(refit(X @ X.T, T @ X.T, start, 1e6), start, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(refit(X @ X.T, start @ X @ X.T, start, 0.1), start, rtol=1e-4, atol=1e-5)
