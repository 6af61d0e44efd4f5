"""Taylor estimates against autograd worked out directly, and the rules that fuse them."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import topiarist as tp
from topiarist.models.families import FAMILIES
from topiarist.structured import choose, units_of
from topiarist.structured.estimates import Estimates, taylor_estimates
from topiarist.structured.fusion import FUSIONS, attention, attention_per_unit, uncertainty
from topiarist.structured.methods import Task
from topiarist.structured.taylor import Taylor


def task_of(model, kinds=("kv_groups", "channels"), **options) -> Task:
    defaults = {"keep": 0.5, "tokens": tiny.tiny_tokens(6, 12), "batch_size": 3}
    return Task(model=model.requires_grad_(False), groups=units_of(model, kinds), **(defaults | options))


def gradients(model, window: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of one window's mean loss, as transformers itself computes it."""
    model.requires_grad_(True)
    model.zero_grad()
    model(window[None], labels=window[None]).loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.requires_grad_(False)
    return found


def by_hand(model, found: list[tuple[dict, dict]], group, order: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(fine, coarse) averaged over (gradient, Fisher) pairs, slice by slice in plain loops."""
    fine, coarse = torch.zeros(group.count, dtype=torch.float64), torch.zeros(group.count, dtype=torch.float64)
    for g, F in found:
        for part in group.parts:
            w = model.get_parameter(part.parameter).detach().double()
            first, second = g[part.parameter] * w, F[part.parameter] * w * w
            e = {"first": first, "second": second, "mix": first - second / 2}[order]
            for unit in range(group.count):
                for slice_ in range(part.start + unit * part.size, part.start + (unit + 1) * part.size):
                    piece = e.select(part.axis, slice_)
                    fine[unit] += piece.abs().sum() / len(found)
                    coarse[unit] += piece.sum().abs() / len(found)
    return fine, coarse


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("order", ["first", "second", "mix"])
def test_estimates_are_those_of_autograd(family: str, order: str):
    model = tiny.tiny_model(family)
    task = task_of(model)
    windows = task.tokens[:2]
    each = [(g, {name: value.square() for name, value in g.items()}) for g in (gradients(model, w) for w in windows)]
    names = each[0][0]
    pool = (
        {n: (each[0][0][n] + each[1][0][n]) / 2 for n in names},
        {n: (each[0][1][n] + each[1][1][n]) / 2 for n in names},
    )
    for pooled, pairs in ((False, each), (True, [pool])):
        found = taylor_estimates(task, windows, order=order, pooled=pooled)
        for group in task.groups[:2]:
            fine, coarse = by_hand(model, pairs, group, order)
            torch.testing.assert_close(found.fine[group.key].mean(0), fine, rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(found.coarse[group.key].mean(0), coarse, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("kinds", [("kv_groups", "channels"), ("block",)])
def test_every_family_is_scored_and_left_as_it_was(family: str, kinds: tuple[str, ...]):
    model = tiny.tiny_model(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    task = task_of(model, kinds)
    scores = Taylor(num_windows=3).scores(task)
    kept = choose(task.groups, scores, task.keep)
    assert any(bool((~mask).any()) for mask in kept.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and not parameter.requires_grad


def test_experts_are_scored():
    task = task_of(tiny.tiny_model("qwen3_moe"), ("experts",))
    found = taylor_estimates(task, task.tokens[:2])
    for group in task.groups:
        assert found.fine[group.key].shape == (2, 4) and bool((found.fine[group.key] >= found.coarse[group.key]).all())


def test_only_one_gradient_lives_at_a_time():
    """When a parameter's gradient is there, no other is."""
    model = tiny.tiny_model()
    task = task_of(model)
    alive: list[int] = []
    for parameter in model.requires_grad_(True).parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    # The hooks above run before those of `taylor_estimates`, which free what they have used.
    taylor_estimates(task, task.tokens[:1])
    assert alive and max(alive) <= 1


vectors = st.lists(st.floats(0.01, 100), min_size=2, max_size=20)


@settings(deadline=None, max_examples=100)
@given(vectors, st.integers(0, 10**6), st.floats(0.01, 1000), st.floats(0.01, 1000))
def test_fusion_is_scale_free(values, seed: int, a: float, b: float):
    c = torch.tensor(values, dtype=torch.float64)
    f = torch.rand(len(c), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    torch.testing.assert_close(attention(a * c, b * f, 1.0), attention(c, f, 1.0))
    torch.testing.assert_close(attention_per_unit(a * c, b * f, 1.0), attention_per_unit(c, f, 1.0))
    windows = torch.rand(5, 1, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) + 0.5
    torch.testing.assert_close(uncertainty(a * c * windows, b * f * windows), uncertainty(c * windows, f * windows))
    for shares in (attention(c, f, 1.0), attention_per_unit(c, f, 1.0)):
        assert bool((shares >= 0).all())
        torch.testing.assert_close(shares.sum(0), torch.ones_like(shares[0]))
    torch.testing.assert_close(attention(c, 3 * c, 1.0), torch.full((2,), 0.5, dtype=torch.float64))


def test_uncertainty_trusts_the_steadier_estimate():
    rng = torch.Generator().manual_seed(0)
    steady = torch.tensor([1.0, 3.0]) + 0.01 * torch.randn(50, 2, generator=rng)
    noisy = torch.tensor([3.0, 1.0]) + 0.1 * torch.randn(50, 2, generator=rng)
    assert float(uncertainty(steady, noisy)[0]) == pytest.approx(0.99, abs=0.01)
    with pytest.raises(tp.TopiaristError, match="pooled=False"):
        uncertainty(steady[:1], noisy[:1])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_is_repeatable_and_ranks_what_agrees(fusion: str):
    model = tiny.tiny_model()
    task = task_of(model)
    method = Taylor(num_windows=4, window_tokens=12, fusion=fusion, learn_steps=3, learn_windows=2)
    one, two = method.scores(task), method.scores(task)
    assert all(torch.equal(one[key], two[key]) for key in one)
    ordered = torch.arange(1.0, 65.0).repeat(3, 1) * torch.tensor([[0.9], [1.0], [1.1]])
    alike = Estimates({}, {})
    for group in task.groups:
        alike.fine[group.key] = ordered[:, : group.count]
        alike.coarse[group.key] = ordered[:, : group.count] / 2
    for score in method.fused(task, alike).values():
        assert bool((score.diff() > 0).all())


def test_layers_keep_their_size_or_lose_it():
    task = task_of(tiny.tiny_model(), ("channels",))
    values = torch.rand(3, 64, dtype=torch.float64) + 0.1
    found = Estimates({}, {})
    for group, size in zip(task.groups, (1.0, 100.0), strict=True):
        found.fine[group.key], found.coarse[group.key] = size * values, size * values / 3
    whole, layer = (Taylor(level=level).fused(task, found) for level in ("model", "layer"))
    first, second = (group.key for group in task.groups)
    torch.testing.assert_close(whole[second], 100 * whole[first])
    torch.testing.assert_close(layer[second], layer[first])


def test_bad_settings_are_named():
    for options, message in (
        ({"fusion": "hope"}, "unknown fusion 'hope'"),
        ({"level": "head"}, "unknown level 'head'"),
    ):
        with pytest.raises(tp.TopiaristError, match=message):
            Taylor(**options)
    task = task_of(tiny.tiny_model())
    with pytest.raises(tp.TopiaristError, match="unknown order"):
        taylor_estimates(task, task.tokens, order="third")
    task.model.model.layers[0].mlp.up_proj.weight.data[0] = float("nan")
    with pytest.raises(tp.NumericalError, match="not finite"):
        taylor_estimates(task, task.tokens[:1])
