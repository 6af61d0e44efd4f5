"""Descent from a given mask: never worse, the best where the best is known, and what a learned mask starts from."""

import itertools

import pytest
import tiny
import torch

from topiarist.core.errors import PatternError
from topiarist.core.patterns import NM, parse_pattern
from topiarist.evaluation.perplexity import load_model
from topiarist.masklearn.candidates import candidates
from topiarist.masklearn.descent import improve_mask
from topiarist.models.opened import ObjectModel
from topiarist.pipelines.common.setup import resolve_patterns
from topiarist.pipelines.learning.masking import targets
from topiarist.pipelines.learning.priors import one_shot_masks
from topiarist.solvers import SparseGPT, Wanda


def problem(rows: int, width: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    W = torch.randn(rows, width, generator=generator)
    return W, X.T @ X


def error(W, H, mask) -> torch.Tensor:
    """Of each row, fp64."""
    E = W.masked_fill(mask, 0.0).double()
    return ((E @ H.double()) * E).sum(1)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 7)], ids=str)
def test_every_row_gets_better_until_no_group_can(pattern: NM):
    width = 18 * pattern.of  # wider than one block of the lazy products, and no multiple of it
    W, H = problem(16, width)
    mask = pattern.mask(W.abs() * H.diagonal().sqrt())
    before = error(W, H, mask)
    found = improve_mask(W, H, mask, pattern, sweeps=1)
    assert pattern.holds(found) and int(found.sum()) == int(mask.sum())
    assert (error(W, H, found) <= before * (1 + 1e-6)).all() and error(W, H, found).sum() < 0.9 * before.sum()
    last = improve_mask(W, H, mask, pattern, sweeps=100)
    assert torch.equal(improve_mask(W, H, last, pattern, sweeps=1), last)
    S, least = candidates(pattern), error(W, H, last)
    for group, kept in itertools.product((0, 7, 17), S):
        other = last.clone()
        other[:, group * pattern.of : (group + 1) * pattern.of] = kept
        assert (error(W, H, other) >= least * (1 - 1e-5)).all()


def test_two_groups_end_in_a_mask_that_is_best_given_either():
    pattern, S = NM(2, 4), candidates(NM(2, 4))
    W, H = problem(32, 8, seed=3)
    every = torch.stack([error(W, H, torch.cat([a, b]).expand(32, 8)) for a, b in itertools.product(S, S)])
    found = error(W, H, improve_mask(W, H, pattern.mask(W.abs()), pattern, sweeps=20))
    assert (found <= every.min(0).values * (1 + 1e-6)).float().mean() > 0.7  # a few rows stop in another optimum


def test_uncorrelated_inputs_leave_wandas_mask():
    W, _ = problem(8, 64)
    H = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1)
    mask = NM(2, 4).mask(W.abs() * H.diagonal().sqrt())
    assert torch.equal(improve_mask(W, H, mask, NM(2, 4), sweeps=3), mask)


def test_too_many_masks_a_group_are_refused():
    W, H = problem(2, 32)
    with pytest.raises(PatternError, match="12870 masks a group"):
        improve_mask(W, H, NM(8, 16).mask(W.abs()), NM(8, 16), sweeps=1)


@pytest.mark.parametrize("solver", [Wanda(), SparseGPT()], ids=["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_priors_on_dense_weights(solver, pattern: str, tmp_path):
    """The layer's error falls; the model's weights are as before; unstructured masks are the solver's own."""
    source = ObjectModel(load_model(tiny.tiny_checkpoint(tmp_path / "base")))
    patterns, _ = resolve_patterns(source, parse_pattern(pattern), None, [])
    blocks, tokens = targets(source, patterns), tiny.tiny_tokens(32, 32)
    before = {name: p.clone() for name, p in source.model.named_parameters()}
    plain, _ = one_shot_masks(source, blocks, patterns, tokens, solver)
    fitted, _ = one_shot_masks(source, blocks, patterns, tokens, solver, sweeps=3)
    assert all(torch.equal(p, before[name]) for name, p in source.model.named_parameters())
    same = all(torch.equal(plain[name], fitted[name]) for name in plain)
    assert same == (pattern == "0.5")
