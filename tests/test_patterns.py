"""Patterns: exact counts under heavy ties, what each accepts and refuses, optimality against enumeration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute

from topiarist.core.errors import PatternError
from topiarist.core.patterns import NM, Columns, TransposableNM, Unstructured, parse_pattern
from topiarist.core.selection import keep_largest


def tied_scores(rows: int, cols: int, levels: int, seed: int) -> torch.Tensor:
    return torch.randint(levels, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()


@st.composite
def nm(draw: st.DrawFn) -> NM:
    of = draw(st.integers(2, 32))
    return NM(keep=draw(st.integers(1, of - 1)), of=of)


@settings(deadline=None, max_examples=60)
@given(
    pattern=nm(), rows=st.integers(1, 5), groups=st.integers(1, 4), levels=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_nm_keeps_exactly_n_of_every_m(pattern, rows, groups, levels, seed):
    scores = tied_scores(rows, groups * pattern.of, levels, seed)
    mask = pattern.mask(scores)
    kept = mask.unflatten(1, (-1, pattern.of))
    assert (kept.sum(-1) == pattern.keep).all()
    assert pattern.holds(mask) and int(mask.sum()) == pattern.num_kept(tuple(scores.shape))
    order = (
        scores.unflatten(1, (-1, pattern.of)).sort(dim=-1, descending=True, stable=True).indices[..., : pattern.keep]
    )
    assert kept.gather(-1, order).all(), "ties go to the lower index"


@settings(deadline=None, max_examples=60)
@given(
    sparsity=st.floats(0, 0.99),
    rows=st.integers(1, 9),
    cols=st.integers(1, 40),
    levels=st.integers(1, 6),
    seed=st.integers(0, 99),
    per=st.sampled_from(["matrix", "row"]),
)
def test_unstructured_counts_are_exact(sparsity, rows, cols, levels, seed, per):
    pattern, scores = Unstructured(sparsity, per=per), tied_scores(rows, cols, levels, seed)
    mask = pattern.mask(scores)
    assert int(mask.sum()) == pattern.num_kept((rows, cols))
    assert pattern.holds(mask)
    if per == "row":
        assert len(set(mask.sum(1).tolist())) == 1
    elif 0 < int(mask.sum()) < mask.numel():
        assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("levels", [1, 3, 1000, 10**6])
@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.999])
def test_the_sampled_threshold_agrees_with_a_sort(levels, fraction):
    scores = tied_scores(300, 400, levels, seed=1) / levels
    kept = int(fraction * scores.numel())
    expected = torch.zeros(scores.numel(), dtype=torch.bool)
    expected[scores.flatten().sort(descending=True, stable=True).indices[:kept]] = True
    assert torch.equal(keep_largest(scores, kept), expected.view_as(scores))
    assert int(keep_largest(scores.T, kept).sum()) == kept


def test_a_sample_that_misleads_is_noticed():
    scores = torch.rand(512, 512, generator=torch.Generator().manual_seed(0))
    scores.view(-1)[::16] = 100.0
    assert int(keep_largest(scores, 1000).sum()) == 1000


@pytest.mark.parametrize(
    ("pattern", "row", "holds"),
    [
        (NM(2, 4), [1, 1, 0, 0, 0, 1, 0, 1], True),
        (NM(2, 4), [1, 1, 0, 0, 0, 0, 0, 1], True),
        (NM(2, 4), [1, 1, 1, 0, 0, 0, 0, 1], False),
        (NM(1, 4), [1, 0, 0, 0, 0, 0, 0, 1], True),
        (NM(1, 4), [1, 0, 0, 1, 0, 0, 0, 0], False),
        (Unstructured(0.5), [1, 1, 1, 1, 0, 0, 0, 0], True),
        (Unstructured(0.5), [1, 1, 1, 1, 1, 0, 0, 0], False),
        (Columns(0.5), [1, 1, 1, 1, 0, 0, 0, 0], True),
        (Columns(0.5), [1, 1, 1, 1, 1, 0, 0, 0], False),
    ],
)
def test_hand_written_masks(pattern, row, holds):
    assert pattern.holds(torch.tensor([row], dtype=torch.bool)) is holds


def test_nm_means_kept_not_pruned():
    assert NM(1, 4).mask(torch.tensor([[4.0, 3.0, 2.0, 1.0]])).tolist() == [[True, False, False, False]]


def test_columns_drop_whole_inputs():
    mask = Columns(0.25).mask(torch.rand(5, 8))
    assert (mask.all(0) | ~mask.any(0)).all() and int(mask[0].sum()) == 6


@pytest.mark.parametrize("text", ["2:4", "1:4", "8:16", "0.7", "0.7/row", "0.5/columns", "2:4/transposable"])
def test_text_round_trip(text):
    assert str(parse_pattern(text)) == text
    assert parse_pattern(parse_pattern(text)) == parse_pattern(text)


@pytest.mark.parametrize(
    "text", ["4:2", "0:4", "1.5", "2:", ":4", "2:64", "-0.5", "1.0", "", "nan", "0.5/cols", "2:4/t"]
)
def test_nonsense_is_refused(text):
    with pytest.raises(PatternError):
        parse_pattern(text)


def test_a_width_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(PatternError, match="divisible by 4, got 6"):
        NM(2, 4).mask(torch.rand(3, 6))


@pytest.mark.parametrize(("keep", "of"), [(1, 4), (2, 4), (3, 4), (4, 8), (3, 8), (8, 16), (16, 32)])
@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_transposable_is_exact_on_both_axes(keep, of, levels):
    pattern, scores = TransposableNM(keep, of), tied_scores(2 * of, 3 * of, levels, seed=keep)
    mask = pattern.mask(scores)
    assert (mask.unflatten(1, (-1, of)).sum(-1) == keep).all()
    assert (mask.T.unflatten(1, (-1, of)).sum(-1) == keep).all()
    assert pattern.holds(mask) and pattern.holds(mask.T)


@pytest.mark.parametrize(("keep", "of"), [(1, 4), (2, 4), (3, 6), (2, 6)])
def test_transposable_is_close_to_the_optimum(keep, of):
    ratios = []
    for seed in range(12):
        block = torch.randn(of, of, generator=torch.Generator().manual_seed(seed)).abs()
        energy = block.double().square()
        got = float(energy[TransposableNM(keep, of).mask(block)].sum())
        ratios.append(got / brute.best_transposable(energy, keep))
    assert min(ratios) >= 0.9 and sum(ratios) / len(ratios) >= 0.99
