"""The shared linear algebra against plain fp64 formulas."""

from __future__ import annotations

import pytest
import torch
from reference import brute

from topiarist.core import linalg
from topiarist.core.errors import NumericalError, NumericalWarning


def gram(width: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return x.T @ x


def test_inverse():
    H = linalg.damped(gram(40, 200), 0.01)
    assert torch.allclose(linalg.inverse(H) @ H, torch.eye(40), atol=1e-3)


def test_cholesky_escalates_aloud_then_gives_up_by_name():
    H = gram(20, 5)
    H.diagonal().sub_(1e-4 * H.diagonal().mean())
    with pytest.warns(NumericalWarning, match="of its mean diagonal"):
        linalg.cholesky(H)
    with pytest.raises(NumericalError, match="not positive definite"):
        linalg.cholesky(-torch.eye(4))


@pytest.mark.parametrize(("width", "tokens"), [(24, 400), (24, 10)])
def test_masked_least_squares_reaches_the_optimum(width, tokens):
    H = gram(width, tokens)
    W = torch.randn(6, width, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(6, width, generator=torch.Generator().manual_seed(2)) < 0.5
    X = linalg.masked_least_squares(W, H, mask, damping=0.01, steps=500, tolerance=1e-7)
    ridged = H + 0.01 * torch.diag(H.diagonal())
    best = brute.least_squares(W, ridged, mask)
    assert (X[~mask] == 0).all()
    assert brute.error(W, X, ridged) <= brute.error(W, best, ridged) * 1.001


def test_masked_least_squares_only_improves_on_its_start():
    H, W = gram(32, 300), torch.randn(8, 32)
    mask = torch.rand(8, 32) < 0.4
    for steps in (1, 3, 10):
        X = linalg.masked_least_squares(W, H, mask, damping=0.0, steps=steps)
        assert brute.error(W, X, H) <= brute.error(W, W * mask, H)


@pytest.mark.parametrize("shape", [(16, 24), (700, 1800)])
def test_reconstruction_error_equals_the_fp64_formula(shape):
    out, width = shape
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2 * width, width, generator=generator) * torch.logspace(-2, 2, width) + 5
    H = x.T @ x
    W = torch.randn(out, width, generator=generator)
    new = W + 0.01 * torch.randn(out, width, generator=generator)
    delta, H64 = (W - new).double(), H.double()
    exact = float(((delta @ H64) * delta).sum() / ((W.double() @ H64) * W.double()).sum())
    assert linalg.reconstruction_error(W, new, H) == pytest.approx(exact, rel=1e-4)


def test_reconstruction_error_of_nothing_is_zero():
    W = torch.randn(3, 5)
    assert linalg.reconstruction_error(W, W, torch.eye(5)) == 0.0
    assert linalg.reconstruction_error(W, W * 0, torch.zeros(5, 5)) == 0.0
