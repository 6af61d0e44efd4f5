"""MaskAdamW is AdamW, its lean states round without bias, and its memory is what its docstring says."""

import importlib.util

import pytest
import torch
from torch import nn

from topiarist.core.patterns import NM
from topiarist.masklearn import eight_bit, native, noise
from topiarist.masklearn.adamw import Step, _write, adamw_
from topiarist.masklearn.layer import Annealing, MaskedLinear, mask_parameter, set_draws
from topiarist.masklearn.optim import MaskAdamW, resident_bytes
from topiarist.masklearn.relax import Categorical, TopN
from topiarist.masklearn.relaxation import Prior
from topiarist.masklearn.schedule import Schedule

PATTERN = NM(2, 4)
EIGHT_BIT = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def layers(count=2, dtype=torch.float32, weight=torch.float32, shape=(32, 64), relaxation=None):
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        W = torch.randn(shape, generator=generator).to(weight)
        mask = PATTERN.mask(W.float().abs())
        made.append(MaskedLinear(W, None, relaxation or Categorical(NM(2, 4)), mask, index=index, dtype=dtype))
    return made


def train(chain, optimizer, steps, *, first=0, split=1, total=6, per_sample=False):
    """A chain of layers on fixed data; `split` micro-batches a step."""
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(total, 8, 64, generator=generator)
    target = torch.randn(total, 8, 32, generator=generator)
    for step in range(first, first + steps):
        set_draws(chain, Annealing(), step, total)
        for sample, (x, y) in enumerate(zip(data[step].chunk(split), target[step].chunk(split), strict=True)):
            if per_sample:
                set_draws(chain, Annealing(), step, total, sample=sample, samples=split)
            loss = sum((layer(x.to(layer.weight.dtype)).float() - y).square().sum() for layer in chain) / 8
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("native_path", [True, False])
def test_it_is_torch_adamw(native_path, monkeypatch):
    if not native_path:
        monkeypatch.setattr(native, "load", lambda: None)
    ours, theirs = layers(), layers()
    train(ours, MaskAdamW(ours, lr=1e-2, moments=torch.float32, weight_decay=0.1), 4)
    adamw = torch.optim.AdamW([layer.logits for layer in theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    train(theirs, adamw, 4)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.logits, b.logits, atol=2e-6)


def test_clipping_is_torch_clipping():
    ours, theirs = layers(), layers()
    optimizer = MaskAdamW(ours, lr=1e-2, moments=torch.float32, max_norm=0.5)
    adamw = torch.optim.AdamW([layer.logits for layer in theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    adamw.register_step_pre_hook(
        lambda *_: norms.append(float(nn.utils.clip_grad_norm_([layer.logits for layer in theirs], 0.5)))
    )
    norms: list[float] = []
    train(ours, optimizer, 3)
    train(theirs, adamw, 3)
    assert optimizer.grad_norm == pytest.approx(norms[-1], rel=1e-4) and norms[-1] > 0.5
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.logits, b.logits, atol=2e-6)


def test_micro_batches_of_one_draw_add_up():
    whole, parts = layers(), layers()
    train(whole, MaskAdamW(whole, lr=1e-2, moments=torch.float32), 4)
    train(parts, MaskAdamW(parts, lr=1e-2, moments=torch.float32), 4, split=4)
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a.logits, b.logits, atol=5e-6)


def test_micro_batches_of_their_own_draw_add_up_in_the_logits():
    """What autograd itself accumulates when no optimiser takes the layers' gradients."""
    ours, theirs = layers(), layers()
    train(ours, MaskAdamW(ours, lr=1e-2, moments=torch.float32), 4, split=4, per_sample=True)
    adamw = torch.optim.AdamW([layer.logits for layer in theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    train(theirs, adamw, 4, split=4, per_sample=True)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.logits, b.logits, atol=2e-6)


@pytest.mark.skipif(native.load() is None, reason="no C++ compiler")
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", ["logit", "group", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_step_equals_plain_step(moments, share, dtype, monkeypatch):
    fast, plain = layers(dtype=dtype, weight=torch.bfloat16), layers(dtype=dtype, weight=torch.bfloat16)
    options = {"lr": 1e-2, "moments": moments, "second_moment": share}
    fast_optimizer = MaskAdamW(fast, **options)
    train(fast, fast_optimizer, 3)
    monkeypatch.setattr(native, "load", lambda: None)
    plain_optimizer = MaskAdamW(plain, **options)
    train(plain, plain_optimizer, 3)
    for a, b in zip(fast, plain, strict=True):
        difference = (a.logits.float() - b.logits.float()).abs()
        assert (
            difference.mean() < 2e-5
        )  # of about 1e-2 a step; rounding of bf16 may fall to the other side here and there
        for name in ("m", "v"):
            x, y = (o.state[layer.logits][name].float() for o, layer in ((fast_optimizer, a), (plain_optimizer, b)))
            assert (x - y).abs().mean() < 2e-3 * y.abs().mean()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("moments", [torch.bfloat16, pytest.param(torch.uint8, marks=EIGHT_BIT)])
def test_resume_is_bit_equal(steps, moments, tmp_path):
    options = {"lr": 1e-2, "second_moment": "logit", "moments": moments}
    straight = layers(dtype=torch.bfloat16)
    train(straight, MaskAdamW(straight, **options), 5)
    first = layers(dtype=torch.bfloat16)
    optimizer = MaskAdamW(first, **options)
    train(first, optimizer, steps)
    torch.save([[layer.state_dict() for layer in first], optimizer.state_dict()], tmp_path / "state.pt")
    states, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = layers(dtype=torch.bfloat16)
    for layer, state in zip(second, states, strict=True):
        layer.load_state_dict(state)
    resumed = MaskAdamW(second, **options)
    resumed.load_state_dict(optimizer_state)
    train(second, resumed, 5 - steps, first=steps)
    for a, b in zip(straight, second, strict=True):
        assert torch.equal(a.logits, b.logits)


def test_stochastic_rounding_is_unbiased():
    value = torch.full((200_000,), 0.25 + 3e-4)  # a third of the way between two bf16 numbers (0.25 and 0.2510)
    target = torch.zeros(value.shape, dtype=torch.bfloat16)
    words = noise.bits(noise.noise_key(0, 0, 0), 1, 1, 200_000).flatten()
    _write(target, value, words)
    assert set(target.unique().tolist()) == {0.25, 0.2509765625} or set(target.unique().tolist()) == {0.25, 0.251953125}
    assert abs(target.double().mean() - value.double().mean()) < 5e-6


def test_small_updates_count_in_bf16():
    """One bf16 step at 0.25 is 1e-3; updates of 1e-4 must add up all the same."""
    logits = torch.full((64, 6, 64), 0.25, dtype=torch.bfloat16)
    m, v = torch.zeros_like(logits), torch.zeros(64, 64)
    for count in range(1, 21):
        keys = [noise.noise_key(0, 0, count, i, noise.ROUNDING) for i in range(2)]
        step = Step(1e-4, 0.9, 0.95, 1e-8, 0.0, count, keys[0], keys[1], share=1)
        adamw_(logits, torch.ones(logits.shape), m, v, step)
    assert abs(logits.double().mean() - (0.25 - 20e-4)) < 5e-5


@pytest.mark.parametrize("options, dtype, bound", [
    ({}, torch.float32, 14.0),
    ({"second_moment": "group"}, torch.bfloat16, 9.0),
    # codes, their fp32 scales (one for 96 values here) and a table of 1 KB a moment
    pytest.param({"moments": torch.uint8}, torch.float32, 11.2, marks=EIGHT_BIT),
    pytest.param({"moments": torch.uint8, "second_moment": "group"}, torch.bfloat16, 7.6, marks=EIGHT_BIT),
])  # fmt: skip
def test_resident_bytes_per_masked_weight(options, dtype, bound):
    """Over a bf16 weight, between two steps, everything that lives counted. The original keeps 31."""
    chain = layers(dtype=dtype, weight=torch.bfloat16, shape=(256, 64))
    optimizer = MaskAdamW(chain, **options)
    for layer in chain:
        layer.draw = Annealing().draw(0, 2, layer=layer.index)
        layer(torch.randn(4, 64, dtype=torch.bfloat16)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    step_counters = 8 / (256 * 64)
    assert resident_bytes(chain, optimizer) <= bound + step_counters
    topn = layers(dtype=dtype, weight=torch.bfloat16, shape=(256, 64), relaxation=TopN(NM(2, 4)))
    assert resident_bytes(topn, MaskAdamW(topn, **options)) < bound


def test_resident_bytes_of_experts_stored_transposed():
    """Their rows are copies, made one after the other and maybe in the same memory."""
    chain = []
    for index in range(4):
        experts = nn.Bilinear(64, 32, 2, bias=False)  # for its weight (2, 64, 32)
        mask = PATTERN.mask(experts.weight.detach().mT.reshape(64, 64).abs()).view(2, 32, 64).mT
        chain.append(mask_parameter(experts, "weight", Categorical(PATTERN), mask, index=index, transposed=True))
    assert resident_bytes(chain) == 4 + 6


def test_a_gradient_that_is_one_number_everywhere_adds_up():
    module = nn.Linear(64, 16, bias=False)
    mask = PATTERN.mask(module.weight.detach().abs())
    layer = mask_parameter(module, "weight", Categorical(PATTERN), mask, index=0)
    optimizer = MaskAdamW([layer])
    layer.draw = Annealing().draw(0, 2, layer=0)
    for _ in range(2):
        module.weight.sum().backward()
    assert torch.equal(optimizer.pending()[0], torch.full((16, 64), 2.0))


@EIGHT_BIT
@pytest.mark.parametrize("share", ["logit", "group"])
def test_eight_bit_moments_are_those_of_fp32_within_their_codes(share):
    """After ten steps with gradients over three decades, the logits are where exact moments take them."""
    torch.manual_seed(0)
    exact, coded = torch.zeros(8, 6, 48), torch.zeros(8, 6, 48)
    kept = (8, 6, 48) if share == "logit" else (8, 48)
    m, v = torch.zeros(8, 6, 48), torch.zeros(kept)
    m8 = eight_bit.zeros(m.shape, signed=True, device=m.device)
    v8 = eight_bit.zeros(kept, signed=False, device=m.device) if share == "logit" else torch.zeros(kept)
    scale = 10.0 ** torch.empty(8, 6, 48).uniform_(-3, 0)
    for count in range(1, 11):
        step = Step(0.1, 0.9, 0.95, 1e-12, 0.0, count, (0, 0), (0, 0), share=int(share == "group"))
        grad = scale * (1 + 0.1 * torch.randn(8, 6, 48))
        adamw_(exact, grad, m, v, step)
        adamw_(coded, grad, m8, v8, step)
    apart = (exact - coded).abs()
    assert apart.mean() < 0.03 * exact.abs().mean() and apart.max() < 0.2 * exact.abs().max()


@EIGHT_BIT
def test_shards_of_rows_hold_the_eight_bit_blocks_of_the_whole():
    whole, upper = (eight_bit.zeros((rows, 6, 24), signed=True, device=torch.device("cpu")) for rows in (8, 3))
    values = torch.randn(8, 6, 24)
    whole.copy_(values)
    upper.copy_(values[:3])
    assert torch.equal(whole.dequantize()[:3], upper.dequantize())
    assert [eight_bit.block_size(row) for row in (6144, 864, 144, 863, 40)] == [256, 216, 144, 863, 40]


def test_schedulers_and_wrong_options():
    chain = layers(1)
    optimizer = MaskAdamW(chain, lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    for bad in ({"second_moment": "layer"}, {"moments": torch.float16}):
        with pytest.raises(ValueError):
            MaskAdamW(chain, **bad)
    assert Schedule(1.0, 0.0, "cosine")(1, 3) == pytest.approx(0.5)


@pytest.mark.parametrize("share", ["logit", "group", "row"])
@pytest.mark.parametrize("native_path", [True, False])
def test_two_shards_learn_what_the_whole_learns(share, native_path, monkeypatch):
    """Rows split over two layers that know where they begin: logits and lean states equal bit by bit."""
    if not native_path:
        monkeypatch.setattr(native, "load", lambda: None)
    W, mask = torch.randn(32, 64), PATTERN.mask(torch.rand(32, 64))
    parts = [slice(0, 12), slice(12, 32)]
    prior = Prior(gap=None)
    whole = MaskedLinear(W, None, Categorical(PATTERN), mask, index=3, prior=prior, dtype=torch.bfloat16)
    shards = [
        MaskedLinear(
            W[p].contiguous(), None, Categorical(PATTERN), mask[p], index=3, prior=prior, dtype=torch.bfloat16,
            first_row=p.start,
        )
        for p in parts
    ]  # fmt: skip
    optimizers = [MaskAdamW([whole], second_moment=share), MaskAdamW(shards, second_moment=share)]
    for step in range(3):
        set_draws([whole, *shards], Annealing(), step, 3)
        x = torch.randn(8, 64)
        whole(x).square().sum().backward()
        for shard in shards:
            shard(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    together = torch.cat([shard.logits for shard in shards])
    assert torch.equal(together, whole.logits)
