"""Layers with learned masks, in plain training loops."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from topiarist.core.errors import PatternError
from topiarist.core.patterns import NM, Unstructured
from topiarist.masklearn.layer import Annealing, LearnedMask, MaskedLinear, learned_masks, mask_parameter, set_draws
from topiarist.masklearn.optim import MaskAdamW
from topiarist.masklearn.relax import Bernoulli, Categorical, TopN
from topiarist.masklearn.relaxation import Prior
from topiarist.masklearn.schedule import PRESETS, Schedule

PATTERN = NM(2, 4)
QUIET = Schedule(0.0, 0.0)


class Conv1D(nn.Module):
    """The shape of transformers' layer of that name: y = x W + b with W (in, out) and an attribute nf."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_a_linear_keeps_its_bias_and_shares_its_weight():
    linear = nn.Linear(48, 16)
    mask = PATTERN.mask(linear.weight.detach().abs())
    layer = MaskedLinear.from_module(linear, Categorical(NM(2, 4)), mask, index=0)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["logits"]
    x = torch.randn(5, 48)
    expected = nn.functional.linear(x, linear.weight * mask, linear.bias)
    assert torch.allclose(layer(x), expected, atol=1e-5)  # no draw yet: the hard mask
    assert torch.equal(layer.finalize(), mask)


def test_evaluation_mode_uses_the_hard_mask_without_noise():
    linear = nn.Linear(48, 16)
    layer = MaskedLinear.from_module(linear, Categorical(NM(2, 4)), PATTERN.mask(linear.weight.detach().abs()), index=0)
    set_draws([layer], Annealing(), 0, 10)
    x = torch.randn(5, 48)
    noisy, again = layer(x), layer(x)
    assert torch.equal(noisy, again)
    set_draws([layer], Annealing(), 1, 10)
    assert not torch.equal(layer(x), noisy)
    layer.eval()
    assert torch.allclose(layer(x), nn.functional.linear(x, linear.weight * layer.finalize(), linear.bias), atol=1e-5)


def test_conv1d_is_masked_along_its_inputs():
    conv = Conv1D(16, 48)
    mask = PATTERN.mask(conv.weight.detach().T.abs()).T
    layer = MaskedLinear.from_module(conv, Categorical(NM(2, 4)), mask, index=0)
    assert torch.equal(layer.finalize(), mask) and layer.finalize().shape == conv.weight.shape
    x = torch.randn(5, 48)
    assert torch.allclose(layer(x), x @ (conv.weight * mask) + conv.bias, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stacked", [(3,), ()], ids=["experts", "one matrix"])
def test_a_parameter_is_masked_where_it_stands(transposed, stacked):
    """Its own module goes on multiplying by it."""
    experts = nn.Module()
    experts.gate = nn.Parameter(torch.randn(*stacked, *((48, 16) if transposed else (16, 48))))
    rows = (experts.gate.mT if transposed else experts.gate).detach().flatten(0, -2)
    mask = PATTERN.mask(rows.abs()).view(*stacked, 16, 48)
    mask = mask.mT if transposed else mask
    dense = experts.gate.detach().clone()
    learned = mask_parameter(experts, "gate", Categorical(NM(2, 4)), mask, index=0, transposed=transposed)
    assert torch.equal(experts.gate, dense * mask) and learned_masks(experts) == [learned]
    set_draws([learned], Annealing(), 3, 10)
    experts.gate.square().sum().backward()
    assert learned.logits.grad.abs().sum() > 0
    assert torch.equal(learned.finalize(), mask)
    parametrize.remove_parametrizations(experts, "gate", leave_parametrized=False)
    assert torch.equal(experts.gate, dense)


def test_wrong_priors_and_modules_are_errors():
    linear = nn.Linear(48, 16)
    with pytest.raises(PatternError, match="prior"):
        MaskedLinear.from_module(linear, Categorical(NM(2, 4)), None, index=0)
    with pytest.raises(PatternError, match="shape"):
        MaskedLinear.from_module(linear, Categorical(NM(2, 4)), PATTERN.mask(torch.rand(8, 48)), index=0)
    with pytest.raises(PatternError, match="no weight matrix"):
        MaskedLinear.from_module(nn.LayerNorm(8), Categorical(NM(2, 4)), None, index=0)
    with pytest.raises(PatternError, match="shape"):
        mask_parameter(linear, "weight", Categorical(NM(2, 4)), torch.ones(2, dtype=torch.bool), index=0)


def test_the_certainty_of_shards_is_that_of_the_whole():
    W = torch.randn(32, 64)
    mask = NM(2, 4).mask(W.abs())
    parts = [slice(0, 32), slice(0, 12), slice(12, 32)]
    layers = [MaskedLinear(W[p], None, Categorical(NM(2, 4)), mask[p], index=0, first_row=p.start) for p in parts]
    set_draws(layers, Annealing(), 0, 2)
    whole, *shards = [float(layer.statistics()["certainty"]) for layer in layers]
    assert (12 * shards[0] + 20 * shards[1]) / 32 == pytest.approx(whole, rel=1e-6)


def planted(relaxation, *, steps=150, lr=5e-3, **optimizer):
    """Fraction of weights whose state is the planted one after learning from y = x (W * planted)^T alone."""
    torch.manual_seed(0)
    W = torch.randn(24, 48)
    best, prior = (relaxation.pattern.mask(torch.rand(W.shape)) for _ in range(2))
    X = torch.randn(512, 48)
    layer = MaskedLinear(W, None, relaxation, prior, index=0, prior=Prior(gap=0.03))
    trainer = MaskAdamW([layer], lr=lr, weight_decay=0.0, **optimizer)
    annealing = Annealing(tau=Schedule(2.0, 0.05, "exponential"), lam=QUIET)
    for step in range(steps):
        set_draws([layer], annealing, step, steps)
        x = X[torch.randint(0, 512, (128,))]
        (layer(x) - x @ (W * best).T).square().mean().backward()
        trainer.step()
    statistics = layer.statistics(prior)
    assert statistics["certainty"] > 0.98
    assert torch.isclose(statistics["flips"], (layer.finalize() != prior).float().mean())
    assert relaxation.pattern.holds(layer.finalize())
    return float((layer.finalize() == best).float().mean())


@pytest.mark.parametrize("relaxation, options, least", [
    (Categorical(NM(2, 4)), {}, 0.97),
    (Categorical(NM(2, 4)), {"max_norm": 1.0, "moments": torch.float32}, 0.97),
    (Categorical(NM(2, 4)), {"second_moment": "group"}, 0.9),
    (Categorical(NM(2, 4)), {"second_moment": "row"}, 0.9),
    (Categorical(NM(1, 4)), {}, 0.97),
    (TopN(NM(2, 4)), {}, 0.95),
    (Bernoulli(Unstructured(0.5)), {}, 0.9),
], ids=str)  # fmt: skip
def test_a_planted_mask_is_found(relaxation, options, least):
    assert planted(relaxation, **options) > least


def test_any_optimizer_trains_the_logits():
    """The layer alone, with logits.grad and torch's own Adam."""
    torch.manual_seed(0)
    W, best = torch.randn(16, 48), PATTERN.mask(torch.rand(16, 48))
    layer = MaskedLinear(W, None, Categorical(NM(2, 4)), PATTERN.mask(torch.rand(16, 48)), index=0)
    adam = torch.optim.Adam([layer.logits], lr=5e-3)
    for step in range(150):
        set_draws([layer], Annealing(tau=Schedule(2.0, 0.05, "exponential"), lam=QUIET), step, 150)
        x = torch.randn(128, 48)
        adam.zero_grad()
        (layer(x) - x @ (W * best).T).square().mean().backward()
        adam.step()
    assert (layer.finalize() == best).float().mean() > 0.95


def test_regulariser_rewards_large_weights():
    """With no loss at all, the regulariser alone keeps nearly all of the weights' energy that a 2:4 mask can keep."""
    torch.manual_seed(0)
    W = torch.randn(8, 48)
    layer = MaskedLinear(W, None, Categorical(NM(2, 4)), PATTERN.mask(torch.rand(8, 48)), index=0)
    trainer = MaskAdamW([layer], lr=5e-3, weight_decay=0.0)
    x = torch.zeros(1, 48)
    for step in range(120):
        set_draws([layer], Annealing(lam=Schedule(1e-2, 1e-2)), step, 120)
        layer(x).sum().backward()
        trainer.step()
    kept, most = ((W * mask).square().sum() for mask in (layer.finalize(), PATTERN.mask(W.abs())))
    assert kept > 0.95 * most


def test_schedules():
    assert (
        Schedule(100.0, 500.0)(0, 11) == 100
        and Schedule(100.0, 500.0)(5, 11) == 300
        and Schedule(100.0, 500.0)(10, 11) == 500
    )
    exponential = Schedule(1.0, 0.01, "exponential", until=0.5)
    assert exponential(5, 21) == pytest.approx(0.1) and exponential(10, 21) == exponential(20, 21) == pytest.approx(
        0.01
    )
    assert Schedule(1.0, 0.1, "cosine")(5, 11) == pytest.approx(0.55)
    warm = Schedule(1.0, 0.0, "cosine", warmup=3)
    assert [warm(step, 1001) for step in range(3)] == pytest.approx([0.25, 0.5, 0.75], abs=1e-4)
    assert warm(3, 11) == Schedule(1.0, 0.0, "cosine")(3, 11) and warm(10, 11) == 0.0
    for bad in (
        lambda: Schedule(1.0, 0.0, "exponential"),
        lambda: Schedule(1.0, 2.0, "cubic"),
        lambda: Schedule(1.0, 2.0, until=0.0),
    ):
        with pytest.raises(ValueError):
            bad()


def test_presets_hold_the_constants_of_the_paper():
    paper = PRESETS["paper"]
    assert (paper.steps, paper.sequences, paper.length, paper.betas) == (2000, 256, 4096, (0.9, 0.95))
    ends = [schedule(step, 9) for schedule in (paper.kappa, paper.tau) for step in (0, 8)]
    assert ends == pytest.approx([100, 500, 4, 0.05])
    assert paper.tokens == 2_097_152_000 and paper.gap is None and paper.alpha == 3


def test_micro_batches_share_the_regulariser():
    draws = [Annealing().draw(0, 10, layer=0, sample=i, samples=4) for i in range(4)]
    assert sum(d.lam for d in draws) == pytest.approx(1e-5) and len({d.key for d in draws}) == 4


def test_the_base_class_has_no_weight():
    mask = PATTERN.mask(torch.rand(4, 8))
    with pytest.raises(NotImplementedError):
        _ = LearnedMask(Categorical(NM(2, 4)), mask, index=0).matrix
