"""Grams: sums add up whatever the split, dead inputs are known, and what is not a Gram is refused."""

from __future__ import annotations

import pytest
import torch

from topiarist.core import gram as module
from topiarist.core.errors import NumericalError
from topiarist.core.gram import Gram


@pytest.fixture
def compiled(monkeypatch):
    """The compiled sum wherever it runs, whether or not it is the quicker one there."""
    monkeypatch.setattr(module, "quick_bf16_vectors", torch.cpu._is_avx512_bf16_supported)
    module._kernel.cache_clear()
    yield
    module._kernel.cache_clear()


def tokens(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 30, width)


def gram(*batches: torch.Tensor) -> Gram:
    total = Gram(batches[0].shape[-1])
    for batch in batches:
        total.add(batch)
    return total


def close(a: Gram, b: Gram, tolerance: float = 1e-6) -> bool:
    scale = b.diagonal.sqrt()
    return bool(((a.matrix - b.matrix).abs() <= tolerance * scale * scale[:, None]).all()) and a.tokens == b.tokens


@pytest.mark.parametrize("width", [5, 192, 400])
def test_it_is_the_sum_of_outer_products(width):
    x = tokens(300, width)
    exact = x.double().T @ x.double()
    H = gram(x).matrix
    scale = exact.diagonal().sqrt()
    assert H.dtype == torch.float32 and torch.equal(H, H.T)
    assert ((H - exact).abs() <= 1e-6 * scale * scale[:, None]).all()


def test_sums_add_up():
    a, b = tokens(200, 230, 1), tokens(100, 230, 2)
    left, right = gram(a), gram(b)
    before = left.matrix
    assert close(left + right, gram(torch.cat([a, b])))
    assert torch.equal(left.matrix, before), "adding makes a new Gram"
    assert close(left.merge(right), gram(torch.cat([a, b])))


@pytest.mark.parametrize("split", [1, 7, 100])
def test_the_batch_split_does_not_matter(split):
    x = tokens(300, 64)
    assert close(gram(*x.split(split)), gram(x))


def test_leading_axes_are_tokens_and_low_precision_is_summed_in_fp32():
    x = tokens(24, 16).bfloat16()
    assert close(gram(x.view(2, 3, 4, 16)), gram(x.float()))


@pytest.mark.parametrize("width", [1, 47, 48, 100, 256])
@pytest.mark.parametrize("count", [1, 33, 700])
def test_bf16_inputs(width, count, compiled, monkeypatch):
    """Panels and depths that are not full, one thread and two, with the compiled sum and without."""
    x = tokens(count, width).bfloat16()
    one = gram(x)
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        assert torch.equal(gram(x).matrix, one.matrix)
    finally:
        torch.set_num_threads(before)
    assert close(one, Gram.from_matrix((x.double().T @ x.double()).float(), tokens=count), 3e-6)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_kernel", lambda: None)
        assert close(gram(x), one, 3e-6)


def test_bf16_nan_is_noticed(compiled):
    x = tokens(40, 60).bfloat16()
    x[7, 59] = float("nan")
    with pytest.raises(NumericalError):
        _ = gram(x).matrix


def test_dead_inputs_are_those_never_used():
    x = tokens(50, 12)
    x[:, [3, 7]] = 0
    assert gram(x).dead.nonzero().flatten().tolist() == [3, 7]


def test_a_ready_matrix_must_be_finite_symmetric_and_square():
    H = gram(tokens(50, 8)).matrix
    assert torch.equal(Gram.from_matrix(H, tokens=50).matrix, H)
    bad = H.clone()
    bad[0, 1] = float("nan")
    with pytest.raises(NumericalError, match="NaN or Inf"):
        Gram.from_matrix(bad)
    skew = H.clone()
    skew[0, 1] += H.diagonal().max()
    with pytest.raises(NumericalError, match="not symmetric"):
        Gram.from_matrix(skew)
    with pytest.raises((ValueError, TypeError)):
        Gram.from_matrix(H[:4])


def test_overflow_is_refused_when_the_matrix_is_read():
    x = tokens(4, 8)
    x[2, 5] = float("inf")
    with pytest.raises(NumericalError, match="NaN or Inf"):
        _ = gram(x).matrix


def test_widths_must_agree():
    with pytest.raises(ValueError, match="8 inputs"):
        Gram(8).add(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="8 and 9"):
        Gram(8).merge(Gram(9))
