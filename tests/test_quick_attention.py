"""Attention in blocks is PyTorch's attention, forward and backward, and is used only where it says what it computes."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import topiarist as tp
from topiarist.data import Windows
from topiarist.models import quick_attention as module
from topiarist.models.attention import WATCHED
from topiarist.models.opened import evaluated
from topiarist.models.quick_attention import causal_attention, quick_attention

SHAPES = [(3, 9, 3, 130, 16, 16), (2, 4, 4, 64, 8, 8), (1, 6, 2, 7, 8, 12), (2, 4, 1, 65, 8, 8)]


@pytest.fixture(autouse=True)
def products_in_16_bits(monkeypatch):
    monkeypatch.setattr(module, "search_dtype", lambda device: torch.bfloat16)


def made(batch: int, heads: int, groups: int, tokens: int, size: int, value_size: int, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, tokens, size), (batch, groups, tokens, size), (batch, groups, tokens, value_size)]
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_pytorch_s_attention(shape, dtype: torch.dtype, bound: float):
    given = made(*shape, dtype=dtype)
    copies = [x.detach().float().requires_grad_() for x in given]
    own = causal_attention(*given, 0.3)
    expected = F.scaled_dot_product_attention(*copies, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    upstream = torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    own.backward(upstream.to(dtype))
    expected.backward(upstream)
    for found, wanted in [(own, expected), *((a.grad, b.grad) for a, b in zip(given, copies, strict=True))]:
        assert found.dtype == dtype
        assert (found.detach().float() - wanted.detach()).norm() <= bound * wanted.norm()


def test_later_tokens_play_no_part():
    query, key, value = (x.detach() for x in made(*SHAPES[0]))
    before = causal_attention(query, key, value, 0.3)
    key[:, :, 100:], value[:, :, 100:] = 7.0, -3.0
    after = causal_attention(query, key, value, 0.3)
    assert torch.equal(before[:, :100], after[:, :100]) and not torch.equal(before, after)


@pytest.mark.parametrize(
    "change",
    [{"mask": torch.ones(1, 1, 9, 9, dtype=torch.bool).tril(5)}, {"is_causal": False}, {"tokens": 5}, {"dtype": torch.float32}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_everything_else_goes_the_usual_way(change, monkeypatch):
    called = []
    monkeypatch.setattr(module, "causal_attention", lambda *args: called.append(args))
    query, key, value = (x.detach() for x in made(1, 4, 4, 9, 8, 8, dtype=change.get("dtype", torch.bfloat16)))
    query = query[:, :, : change.get("tokens", 9)]
    of, settings = torch.nn.Module(), {"is_causal": change.get("is_causal")}
    wanted = ALL_ATTENTION_FUNCTIONS[WATCHED](of, query, key, value, change.get("mask"), **settings)[0]
    with quick_attention():
        assert torch.equal(
            ALL_ATTENTION_FUNCTIONS[WATCHED](of, query, key, value, change.get("mask"), **settings)[0], wanted
        )
    assert not called


def test_its_logits_are_those_of_the_model():
    tokens = tiny.tiny_tokens(2, 80)
    model = tiny.tiny_model()
    half = tiny.tiny_model().bfloat16()
    half.load_state_dict(model.state_dict())
    with evaluated(half), quick_attention():
        found = half(tokens).logits.float()
    with evaluated(model):
        wanted = model(tokens).logits
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_trainings_use_it_and_nothing_else_does(monkeypatch):
    seen, usual = [], ALL_ATTENTION_FUNCTIONS[WATCHED]
    monkeypatch.setattr(module, "causal_attention", lambda *args: (seen.append(0), causal_attention(*args))[1])
    tokens = tiny.tiny_tokens(12, 32)
    dense, model = tiny.tiny_model().bfloat16(), tiny.tiny_model().bfloat16()
    tp.prune(model, method="wanda", pattern="2:4", calibration=tokens)
    tp.perplexity(model, Windows(tokens, "", frozenset()))
    assert not seen
    trainings = (
        lambda: tp.recover(model, teacher=dense, data=tokens, window_tokens=32, tokens=64, held_out=1, dtype="stored"),
        lambda: tp.learn(tiny.tiny_model().bfloat16(), prior="magnitude", steps=1, held_out=1, data=tokens),
        lambda: tp.prune(tiny.tiny_model().bfloat16(), method="magnitude", refine="epochs=1", calibration=tokens),
    )  # fmt: skip
    for training in trainings:
        seen.clear()
        training()
        assert seen and ALL_ATTENTION_FUNCTIONS[WATCHED] is usual
