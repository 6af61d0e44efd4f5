"""The policy gradient: unbiased, its variance, the projection, the start, and planted models that it must solve."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import Kept, Killed

import topiarist as tp
from topiarist.structured import Task, choose, policy, policy_search, units_of
from topiarist.structured.policy_search import PAPER, STARTS, PolicyGradient, starting_metric
from topiarist.structured.policy_variables import Variables

N = 6
generator = torch.Generator


def all_masks(n: int = N) -> torch.Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)


def toy_loss(masks: torch.Tensor) -> torch.Tensor:
    """A loss with interactions, (samples,)."""
    weights = torch.tensor([0.9, -0.3, 0.5, 0.1, 0.0, 0.7], dtype=torch.float64)
    pairs = torch.linspace(-1, 1, N * N, dtype=torch.float64).view(N, N)
    return 3.0 - masks @ weights + 0.4 * ((masks @ pairs) * masks).sum(1)


def exact_gradient(s: torch.Tensor) -> torch.Tensor:
    """d/ds of the sum over all masks of p(m | s) loss(m), by autograd."""
    s = s.clone().requires_grad_()
    masks = all_masks()
    probability = (masks * s + (1 - masks) * (1 - s)).prod(1)
    (found,) = torch.autograd.grad((probability * toy_loss(masks)).sum(), s)
    return found


S = torch.tensor([0.2, 0.5, 0.7, 0.9, 0.4, 0.85], dtype=torch.float64)


@pytest.mark.parametrize("baseline", ["loo", "none"])
def test_unbiased_over_all_pairs_of_masks(baseline: str):
    masks = all_masks()
    probability = (masks * S + (1 - masks) * (1 - S)).prod(1)
    expected = torch.zeros(N, dtype=torch.float64)
    for i, j in itertools.combinations_with_replacement(range(len(masks)), 2):
        twice = 1 if i == j else 2  # (i, j) and (j, i) give the same
        both = masks[[i, j]]
        losses = toy_loss(both)
        b = policy.leave_one_out(losses) if baseline == "loo" else torch.zeros(())
        expected += twice * probability[i] * probability[j] * policy.gradient(losses, both, S, baseline=b)
    wanted = exact_gradient(S) * (S * (1 - S)).sqrt()
    torch.testing.assert_close(expected, wanted, rtol=1e-5, atol=1e-6)


def test_unbiased_by_sampling():
    draws, rng = [], generator().manual_seed(1)
    for _ in range(2000):
        masks = policy.sample(S, 4, rng)
        losses = toy_loss(masks)
        b = policy.leave_one_out(losses)
        draws.append(policy.gradient(losses, masks, S, baseline=b))
    found = torch.stack(draws)
    error = found.std(0) / len(draws) ** 0.5
    assert bool(((found.mean(0) - exact_gradient(S) * (S * (1 - S)).sqrt()).abs() < 4 * error).all())


def variance_of(baseline: str, samples: int = 2, n: int = 200, steps: int = 600) -> float:
    """Mean variance of the gradient when every step has its own batch, as noisy as batches of text are."""
    rng = generator().manual_seed(0)
    s, weights = torch.full((n,), 0.7, dtype=torch.float64), torch.rand(n, generator=rng, dtype=torch.float64) / n
    average, draws = None, []
    for _ in range(steps):
        masks = policy.sample(s, samples, rng)
        losses = 4.0 + 0.5 * torch.randn((), generator=rng, dtype=torch.float64) - masks @ weights
        average = policy.moving_average(average, losses, 5.0)
        b = {
            "loo": lambda x=losses: policy.leave_one_out(x),
            "ema": lambda a=average: torch.tensor(a, dtype=torch.float64),
            "none": lambda: torch.zeros(()),
        }[baseline]()
        draws.append(policy.gradient(losses, masks, s, baseline=b, bessel=baseline == "ema"))
    return float(torch.stack(draws).var(0).mean())


def test_leave_one_out_varies_least():
    loo, ema, none = (variance_of(baseline) for baseline in ("loo", "ema", "none"))
    assert loo < 0.1 * ema and ema < 0.2 * none
    assert variance_of("loo", samples=4) < 0.5 * loo


def test_the_authors_update_to_the_letter():
    losses, masks = torch.tensor([2.0, 3.0], dtype=torch.float64), all_masks()[[5, 40]]
    first = policy.moving_average(None, losses, 5.0)
    delta = policy.moving_average(first, losses + 1, 5.0)
    assert first == 2.5 and delta == pytest.approx(0.8 * 2.5 + 3.5 / 5)
    found = policy.gradient(losses + 1, masks, S, baseline=torch.tensor(delta), bessel=True)
    wanted = sum((losses[k] + 1 - delta) * (masks[k] - S) / ((S + 1e-7) * (1 - S + 1e-7)).sqrt() for k in (0, 1)) / 1
    torch.testing.assert_close(found, wanted)


def test_leave_one_out_is_the_mean_of_the_others():
    assert policy.leave_one_out(torch.tensor([1.0, 2.0, 6.0])).tolist() == [4.0, 3.5, 1.5]
    assert policy.leave_one_out(torch.tensor([7.0])).tolist() == [0.0]


points = st.lists(st.floats(-2, 3, allow_nan=False), min_size=1, max_size=30)


@settings(deadline=None, max_examples=150)
@given(points, st.integers(0, 10**6), st.floats(0.01, 1.2))
def test_projection_is_feasible_and_optimal(values, seed: int, share: float):
    s = torch.tensor(values, dtype=torch.float64)
    c = torch.rand(len(s), generator=generator().manual_seed(seed), dtype=torch.float64) * 9 + 0.1
    budget = share * float(c.sum())
    x = policy.project(s, c, budget)
    slack = budget - float(c @ x)
    assert bool(((x >= 0) & (x <= 1)).all()) and slack >= 0
    # KKT of min |x - s|^2 / 2: x - s + v c + (at 1) - (at 0) = 0 with one v >= 0, and v > 0 only on the budget.
    inside = (x > 0) & (x < 1)
    v = float(((s - x) / c)[inside].median()) if bool(inside.any()) else None
    if float(c @ s.clamp(0, 1)) <= budget:
        torch.testing.assert_close(x, s.clamp(0, 1))
        return
    assert slack <= 1e-9 * budget
    if v is None:
        low = ((s - x) / c)[x == 1]  # s - v c >= 1 there, <= 0 where x is 0
        high = ((s - x) / c)[x == 0]
        assert (float(low.min()) if len(low) else 1e9) >= (float(high.max()) if len(high) else 0.0) - 1e-6
        return
    assert v >= -1e-9
    torch.testing.assert_close(x, (s - v * c).clamp(0, 1), rtol=0, atol=1e-8)


@settings(deadline=None, max_examples=100)
@given(points, st.integers(0, 10**6), st.floats(0.05, 0.95), st.sampled_from([1.0, 10.0, 100.0]))
def test_starts_meet_the_budget_and_keep_the_order(values, seed: int, keep: float, sharpness: float):
    metric = torch.tensor(values, dtype=torch.float64)
    c = torch.rand(len(metric), generator=generator().manual_seed(seed), dtype=torch.float64) + 0.5
    order = metric.argsort(stable=True)
    ranks = policy.quantiles(metric)
    start = policy.logistic(ranks, c, keep * float(c.sum()), sharpness=sharpness)
    assert float(c @ start) == pytest.approx(keep * float(c.sum()), rel=1e-6)
    assert bool((start[order].diff() >= -1e-12).all())
    torch.testing.assert_close(policy.quantiles(2 * metric), ranks)


def own_text(model, num: int = 12, window: int = 16) -> torch.Tensor:
    """Windows that the model itself wrote, so that what changes it costs loss."""
    tokens = tiny.tiny_tokens(num, 2)
    with torch.no_grad():
        while tokens.shape[1] < window:
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens


def task_of(model, kinds=("kv_groups", "channels"), **options) -> Task:
    defaults = {"keep": 0.5, "tokens": tiny.tiny_tokens(12, 16), "batch_size": 8}
    return Task(model=model.requires_grad_(False), groups=units_of(model, kinds), **(defaults | options))


QUICK = PolicyGradient(steps=6, samples=4, windows=2, window=16, held_out=3, evaluations=3)


def test_planted_units_are_found():
    """Half of the channels do nothing, three quarters of one layer's and a quarter of the other's: only they may go."""
    model = tiny.tiny_model()
    idle = {0: (0, 1, 2, 5, 6, 7), 1: (3, 4)}
    for index, groups in idle.items():
        for g in groups:
            model.model.layers[index].mlp.down_proj.weight.data[:, 8 * g : 8 * g + 8] = 0
    task = task_of(model, ("channels",), tokens=own_text(model), round_to=8)
    method = PolicyGradient(
        steps=60, samples=8, windows=4, window=16, init="constant", learning_rate=0.1, held_out=3, evaluations=6
    )
    found = method.search(task)
    kept = choose(task.groups, found.scores, task.keep, round_to=8)
    for index, group in enumerate(task.groups):
        gone = {int(unit) // 8 for unit in (~kept[group.key]).nonzero()}
        assert gone == set(idle[index])
    with torch.no_grad():
        dense = float(model(task.tokens[-3:], labels=task.tokens[-3:]).loss)
    assert found.best["held_out"] == pytest.approx(dense, rel=1e-5)
    assert dense < 0.95 * found.history[0]["held_out"]


@pytest.mark.parametrize(
    "method",
    [
        QUICK,
        replace(QUICK, baseline="none", normalise=False, learning_rate=1e-3),
        replace(PAPER, steps=3, windows=2, window=16, evaluations=1, held_out=3),
    ],
)
@pytest.mark.parametrize("scope", ["global", "parameters", "per_layer"])
def test_the_search_stays_in_its_budget_and_repeats(method: PolicyGradient, scope: str, monkeypatch):
    task = task_of(tiny.tiny_model(), scope=scope)
    policies: list[torch.Tensor] = []
    project = Variables.project

    def noted(self: Variables, s: torch.Tensor) -> torch.Tensor:
        policies.append(project(self, s))
        for members, budget in self.pools:
            assert float(self.cost[members] @ policies[-1][members]) <= budget * (1 + 1e-12)
        return policies[-1]

    monkeypatch.setattr(Variables, "project", noted)
    one, two = method.search(task), method.search(task)
    assert len(policies) == 2 * method.steps
    assert all(torch.equal(one.scores[key], two.scores[key]) for key in one.scores)
    choose(task.groups, one.scores, task.keep, scope=scope)
    assert one.best["held_out"] <= one.history[0]["held_out"]


@pytest.mark.parametrize("baseline", ["loo", "ema"])
def test_a_killed_search_goes_on_to_the_same_bits(baseline: str):
    method = replace(QUICK, baseline=baseline)
    model = tiny.tiny_model()
    whole = method.search(task_of(model))

    def kill(_: str, done: int, total: int) -> None:
        if done == 5 and total == method.steps:
            raise Killed

    state = Kept()
    with pytest.raises(Killed):
        method.search(task_of(model, state=state, progress=kill))
    resumed = method.search(task_of(model, state=state))
    assert resumed.history[1:] == whole.history[1:] and resumed.history[0]["held_out"] == whole.history[0]["held_out"]
    assert all(torch.equal(resumed.scores[key], whole.scores[key]) for key in whole.scores)


@pytest.mark.parametrize("baseline", ["loo", "ema", "none"])
def test_masks_without_a_finite_loss_are_dropped(baseline: str, monkeypatch):
    count = itertools.count()
    real = policy_search.gated_loss

    def broken(task, masks, wanted, tokens) -> float:
        sampled = len(tokens) == QUICK.windows
        return math.nan if sampled and next(count) % 3 == 0 else real(task, masks, wanted, tokens)

    monkeypatch.setattr(policy_search, "gated_loss", broken)
    method = replace(QUICK, baseline=baseline)
    found = method.search(task_of(tiny.tiny_model()))
    assert sum(entry["dropped"] for entry in found.history) > 0
    assert all(bool(torch.isfinite(score).all()) for score in found.scores.values())
    monkeypatch.setattr(policy_search, "gated_loss", lambda *_: math.nan)
    with pytest.raises(tp.NumericalError, match="no masked forward"):
        method.search(task_of(tiny.tiny_model()))


def test_only_forwards_and_nothing_kept_for_a_backward():
    model = tiny.tiny_model()
    modes = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    QUICK.search(task_of(model))
    assert modes and all(modes) and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("kinds", [("kv_groups", "channels"), ("block",), ("attention", "ffn"), ("experts",)])
def test_every_kind_of_unit_has_a_start(init: str, kinds: tuple[str, ...]):
    task = task_of(tiny.tiny_model("qwen3_moe"), kinds)
    method = replace(QUICK, init=init, steps=1)
    metric, comparable = starting_metric(method, task)
    assert metric.keys() == {group.key for group in task.groups} and comparable.keys() == set(kinds)
    assert len(method.scores(task)) == len(task.groups)


def test_channels_are_tied_by_rank():
    task = task_of(tiny.tiny_model(), ("channels",))
    metric = {group.key: torch.rand(group.count) for group in task.groups}
    variables = Variables.make(task, metric, {"channels": ""}, 16)
    assert len(variables.cost) == 8 and variables.cost.unique().tolist() == [16 * 96]
    for group in task.groups:
        best = metric[group.key].topk(16).indices
        assert len(variables.of[group.key][best].unique()) == 1
    scores = variables.scores(torch.full((8,), 0.5, dtype=torch.float64))
    kept = choose(task.groups, scores, 0.5, scope="per_layer")
    for group in task.groups:
        assert set(kept[group.key].nonzero().flatten().tolist()) == set(metric[group.key].topk(32).indices.tolist())


def test_bad_settings_are_named():
    for options, message in (
        ({"baseline": "hope"}, "unknown baseline 'hope'"),
        ({"init": "hope"}, "unknown init 'hope'"),
        ({"samples": 1}, "1 samples a step"),
    ):
        with pytest.raises(tp.TopiaristError, match=message):
            PolicyGradient(**options)
    with pytest.raises(tp.CalibrationError, match="too few to hold some out"):
        QUICK.search(task_of(tiny.tiny_model(), tokens=tiny.tiny_tokens(3, 16)))
