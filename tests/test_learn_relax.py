"""Relaxations: closed gradients, exact patterns, priors."""

import pytest
import torch
from reference import maskllm

from topiarist.core.errors import PatternError
from topiarist.core.patterns import NM, Columns, Unstructured
from topiarist.masklearn import noise
from topiarist.masklearn.candidates import candidates, index_of, mask_of, num_classes, similarity
from topiarist.masklearn.relax import Bernoulli, Categorical, TopN, relaxation_for
from topiarist.masklearn.relaxation import Draw, Prior

KINDS = [
    Categorical(NM(2, 4)),
    Categorical(NM(1, 4)),
    Categorical(NM(4, 8)),
    TopN(NM(2, 4)),
    TopN(NM(8, 16)),
    Bernoulli(Unstructured(0.5)),
]
DRAW = Draw(noise.noise_key(0, 1, 2), kappa=120.0, tau=0.8, lam=3e-2)


def problem(relaxation, rows=6, width=48, dtype=torch.float64):
    """(W, G, pi) with logits of a random prior, off its exact values."""
    generator = torch.Generator().manual_seed(0)
    W, G = (torch.randn(rows, width, generator=generator, dtype=dtype) for _ in range(2))
    pi = relaxation.init_logits(relaxation.pattern.mask(W.abs()), Prior(gap=None, alpha=1.0), seed=0, layer=0)
    return W, G, pi.to(dtype)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(2, 8), NM(4, 8), NM(3, 7), NM(1, 2)], ids=str)
def test_candidates_are_all_rows_in_order(pattern):
    S = candidates(pattern)
    assert S.shape == (num_classes(pattern), pattern.of)
    assert (S.sum(1) == pattern.keep).all()
    values = [int("".join("1" if b else "0" for b in row), 2) for row in S.tolist()]
    assert values == sorted(set(values), reverse=True)
    index = torch.arange(len(S))
    assert torch.equal(index_of(S, pattern), index) and torch.equal(mask_of(index, pattern), S)
    assert similarity(S, pattern).mean(1).abs().max() < 1e-6  # the true mean: keep^2 / of


def test_candidates_of_2_4_are_the_literal_ones():
    assert candidates(NM(2, 4)).int().tolist() == maskllm.ROWS_2_4
    assert similarity(candidates(NM(2, 4)), NM(2, 4))[0].tolist() == [1, 0, 0, 0, 0, -1]


def test_index_without_a_table():
    pattern = NM(8, 16)
    index = torch.randint(0, num_classes(pattern), (500,), generator=torch.Generator().manual_seed(0))
    mask = mask_of(index, pattern)
    assert (mask.sum(1) == 8).all() and torch.equal(index_of(mask, pattern), index)
    with pytest.raises(PatternError, match="TopN"):
        candidates(pattern)
    with pytest.raises(PatternError, match="exactly 8 of 16"):
        index_of(torch.ones(2, 16, dtype=torch.bool), pattern)


def test_soft_mask_is_the_literal_formula():
    relaxation = Categorical(NM(2, 4))
    _, _, pi = problem(relaxation)
    g = noise.gumbel(noise.bits(DRAW.key, *pi.shape)).double()
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (pi, g)]
    literal = maskllm.soft_mask(*flat, torch.tensor(maskllm.ROWS_2_4), DRAW.kappa, DRAW.tau)
    assert torch.allclose(relaxation.soft_mask(pi, DRAW), literal.view(6, 48), atol=1e-12)


@pytest.mark.parametrize("relaxation", KINDS, ids=lambda r: f"{r.name} {r.pattern}")
def test_gradient_equals_autograd_and_finite_differences(relaxation):
    W, G, pi = problem(relaxation)

    def loss(logits):
        M = relaxation.soft_mask(logits, DRAW)
        penalty = M.numel() * (M.mean() - 0.5) ** 2 if isinstance(relaxation, Bernoulli) else 0.0
        return maskllm.loss(W, M, G, DRAW.lam) + penalty

    closed = relaxation.gradient(W, pi, G, DRAW)
    leaf = pi.clone().requires_grad_()
    (auto,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(closed, auto, rtol=1e-9, atol=1e-10)
    direction = torch.randn(pi.shape, generator=torch.Generator().manual_seed(1), dtype=pi.dtype)
    step = 1e-7
    numeric = (loss(pi + step * direction) - loss(pi - step * direction)) / (2 * step)
    assert torch.allclose((closed * direction).sum(), numeric, rtol=1e-5)


@pytest.mark.parametrize(
    "relaxation", [k for k in KINDS if isinstance(k.pattern, NM)], ids=lambda r: f"{r.name} {r.pattern}"
)
@pytest.mark.parametrize("tau", [4.0, 0.05])
def test_soft_mask_sums_to_keep(relaxation, tau):
    _, _, pi = problem(relaxation)
    M = relaxation.soft_mask(pi, Draw(DRAW.key, 100.0, tau))
    assert torch.allclose(
        M.unflatten(1, (-1, relaxation.pattern.of)).sum(2), torch.tensor(float(relaxation.pattern.keep)).double()
    )
    assert M.min() >= 0


@pytest.mark.parametrize("relaxation", KINDS, ids=lambda r: f"{r.name} {r.pattern}")
def test_hard_mask_is_exactly_of_the_pattern_even_on_ties(relaxation):
    for logits in (torch.zeros(relaxation.logits_shape((8, 48))), problem(relaxation)[2]):
        mask = relaxation.hard_mask(logits)
        assert relaxation.pattern.holds(mask)
        assert int(mask.sum()) == relaxation.pattern.num_kept(tuple(mask.shape))


@pytest.mark.parametrize("relaxation", KINDS, ids=lambda r: f"{r.name} {r.pattern}")
def test_deterministic_prior_is_its_own_hard_mask(relaxation):
    mask = relaxation.pattern.mask(torch.rand(16, 48, generator=torch.Generator().manual_seed(0)))
    logits = relaxation.init_logits(mask, Prior(gap=0.03), seed=0, layer=0)
    assert torch.equal(relaxation.hard_mask(logits), mask)
    if isinstance(relaxation, Categorical) and relaxation.pattern.of == 4:
        best = logits.sort(dim=1, descending=True).values
        assert torch.allclose(best[:, 0] - best[:, 1], torch.tensor(0.03))


@pytest.mark.parametrize("alpha, share", [(1.0, 0.49), (2.0, 0.79), (3.0, 0.945), (5.0, 0.999)])
def test_random_prior_is_kept_as_often_as_predicted(alpha, share):
    """With noise of deviation s and offsets of alpha s, argmax is the prior in this share of groups (calculated)."""
    relaxation = Categorical(NM(2, 4))
    mask = relaxation.pattern.mask(torch.rand(128, 1024, generator=torch.Generator().manual_seed(0)))
    logits = relaxation.init_logits(mask, Prior(gap=None, alpha=alpha, std=0.01), seed=0, layer=0)
    kept = (relaxation.hard_mask(logits) == mask).unflatten(1, (-1, 4)).all(2).float().mean()
    assert abs(kept - share) < 0.012
    literal = maskllm.prior_logits(
        0.01 * torch.randn(32768, 6), mask.view(-1, 4), torch.tensor(maskllm.ROWS_2_4), alpha
    )
    assert abs(literal.std() - logits.std()) < 2e-4


def test_random_prior_does_not_depend_on_sharding():
    relaxation = Categorical(NM(2, 4))
    mask = relaxation.pattern.mask(torch.rand(16, 64))
    whole = relaxation.init_logits(mask, Prior(gap=None), seed=1, layer=2)
    part = relaxation.init_logits(mask[4:9], Prior(gap=None), seed=1, layer=2, first_row=4)
    assert torch.equal(part, whole[4:9])


@pytest.mark.parametrize("prior, message", [
    (None, "needs a prior"),
    (torch.zeros(4, 8, dtype=torch.bool), "keeps 0 of 32"),
    (torch.ones(4, 8, dtype=torch.bool), "keeps 32 of 32"),
    (torch.ones(4, 8), "boolean"),
    (torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0]], dtype=torch.bool).expand(4, 8), "as is due, but too many .* side by side"),
    (torch.zeros(4, 6, dtype=torch.bool), "divisible by 4"),
])  # fmt: skip
def test_a_prior_that_does_not_fit_is_an_error(prior, message):
    with pytest.raises(PatternError, match=message):
        Categorical(NM(2, 4)).init_logits(prior, Prior(), seed=0, layer=0)


def test_relaxation_for():
    assert isinstance(relaxation_for("2:4"), Categorical)
    assert isinstance(relaxation_for("4:8"), TopN)
    assert isinstance(relaxation_for(Unstructured(0.5)), Bernoulli)
    assert isinstance(relaxation_for("2:4", "topn"), TopN)
    for pattern, name in ((Columns(0.5), None), ("2:4", "bernoulli"), ("0.5", "topn"), ("2:4", "sigmoid")):
        with pytest.raises(PatternError):
            relaxation_for(pattern, name)
