"""16-bit products in fp32, where the processor multiplies those faster."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import topiarist as tp
from tests.tiny import tiny_model
from topiarist import runtime
from topiarist.core import linalg, processor, products
from topiarist.core.products import quick_products
from topiarist.runtime import bench


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch):
    monkeypatch.setattr(linalg, "search_dtype", lambda device: torch.float32)


def operands(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        (lambda x, w: F.linear(x, w), [(2, 3, 40), (24, 40)]),
        (lambda x, w, b: F.linear(x, w, b), [(5, 40), (24, 40), (24,)]),
        (lambda x, w: x @ w, [(5, 40), (40, 24)]),
        (lambda x, w: x.matmul(w), [(2, 5, 40), (40, 24)]),
        (lambda x, w: torch.bmm(x, w), [(2, 5, 40), (2, 40, 24)]),
        (lambda x, w: torch.einsum("bi,oi->bo", x, w), [(5, 40), (24, 40)]),
        (lambda x, w: torch.einsum("bi,oi->bo", [x, w]), [(5, 40), (24, 40)]),
        (lambda b, x, w: torch.addmm(b, x, w), [(5, 24), (5, 40), (40, 24)]),
        (lambda b, x, w: torch.addmm(b, x, w), [(24,), (5, 40), (40, 24)]),  # as GPT-2's Conv1D
    ],
)
def test_a_product_is_the_rounded_product_in_fp32(product, shapes, monkeypatch):
    given, cast = operands(*shapes), []
    within = products._in_float32
    monkeypatch.setattr(products, "_in_float32", lambda *args, **kwargs: cast.append(1) or within(*args, **kwargs))
    with quick_products():
        found = product(*given)
    assert cast == [1] and found.dtype == torch.bfloat16
    assert torch.equal(found, product(*[g.float() for g in given]).bfloat16())


def test_a_large_linear_is_cast_in_slices(monkeypatch):
    x, w, b = operands((3, 40), (25, 40), (25,))
    monkeypatch.setattr(products, "_SLICE", 400)
    cast = []
    within = products._in_float32
    monkeypatch.setattr(products, "_in_float32", lambda f, x, w, b: cast.append(len(w)) or within(f, x, w, b))
    with quick_products():
        found = F.linear(x, w, b)
    assert cast == [10, 10, 5]
    torch.testing.assert_close(found, F.linear(x.float(), w.float(), b.float()).bfloat16())


@pytest.mark.parametrize("leading", [(), (2,)])
def test_gradients_are_those_of_fp32_and_what_is_kept_are_the_operands(leading, monkeypatch):
    x, w = (given.requires_grad_() for given in operands((*leading, 5, 40), (24, 40)))
    rounded = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: rounded.append(a[0]) or to(self, *a, **k))
    with quick_products():
        found = F.linear(x, w)
    assert rounded == [torch.bfloat16]  # the result alone: no copy of an operand
    upstream = torch.linspace(-1, 1, found.numel()).view_as(found).bfloat16()
    found.backward(upstream)
    g = upstream.float()
    torch.testing.assert_close(x.grad, (g @ w.detach().float()).bfloat16())
    wide = x.detach().float().flatten(0, -2)
    torch.testing.assert_close(w.grad, (g.flatten(0, -2).T @ wide).bfloat16())


def test_casts_live_no_longer_than_the_product(monkeypatch):
    """The graph holds on to its hooks, and by them would hold an fp32 copy of every weight until the backward pass."""
    x, w = (given.requires_grad_() for given in operands((5, 40), (24, 40)))
    casts = []
    wide = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: casts.append(weakref.ref(c := wide(self))) or c)
    with quick_products():
        found = F.linear(x, w)
    assert len(casts) == 2 and found.grad_fn is not None and not any(cast() is not None for cast in casts)


def test_one_row_and_fp32_are_left_alone(monkeypatch):
    monkeypatch.setattr(products, "_in_float32", lambda *_: pytest.fail("nothing to win here"))
    x, w = operands((1, 40), (24, 40))
    with quick_products():
        F.linear(x, w)
        F.linear(x.float().expand(5, -1), w.float())


def test_perplexity_of_a_16_bit_model_is_close_to_that_of_its_values_in_fp32():
    model = tiny_model("llama")
    windows = torch.arange(64).view(4, 16) % model.config.vocab_size
    exact = tp.perplexity(model.bfloat16().float(), windows).value
    found = tp.perplexity(model.bfloat16(), windows)
    assert found.dtype == "bfloat16"
    assert found.value == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize(
    "run",
    [
        lambda model, ids: runtime.Generator(model).generate(ids, 2),
        lambda model, ids: bench.generation_seconds(model, ids, 1),
    ],
    ids=["a prompt", "a benchmark"],
)
def test_what_is_run_or_timed_is_quick(run, monkeypatch):
    """A dense model that emulates its products would make every sparse one look fast."""
    cast, within = [], products._in_float32
    monkeypatch.setattr(products, "_in_float32", lambda *args: cast.append(1) or within(*args))
    with torch.inference_mode():
        run(tiny_model("llama").bfloat16(), torch.arange(4)[None])
    assert len(cast) > 8


def test_operands_given_by_name_are_left_to_torch():
    x, w = operands((5, 40), (24, 40))
    with quick_products():
        assert F.linear(input=x, weight=w).shape == (5, 24)


def test_a_quick_processor_is_left_alone(monkeypatch):
    monkeypatch.setattr(linalg, "search_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(products, "_in_float32", lambda *_: pytest.fail("bfloat16 is quick here"))
    with quick_products():
        nn.Linear(40, 24).bfloat16()(torch.ones(5, 40, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "vendor", "quick"),
    [
        (True, True, "GenuineIntel", True),
        (False, True, "GenuineIntel", False),  # multiplies fp32 one and a half times as fast
        (False, True, "AuthenticAMD", True),
        (False, False, "AuthenticAMD", False),
        (False, False, None, False),
    ],
)
def test_processors_that_multiply_bf16_faster(monkeypatch, amx, avx512_bf16, vendor, quick):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(processor, "said", lambda *_: vendor)
    assert processor.multiplies_bf16() == quick


def test_an_operand_that_was_changed_in_place_is_refused_in_backward():
    x, w = operands((5, 40), (24, 40))
    h = x.requires_grad_() * 1
    with quick_products():
        found = F.linear(h, w.requires_grad_())
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        found.sum().backward()
