"""Packed integer linears against a literal product, on every instruction set this machine has."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import q8

from topiarist.core.compiled import NoKernels
from topiarist.core.patterns import NM
from topiarist.runtime import linear
from topiarist.runtime.build import LEVELS, load_kernels
from topiarist.runtime.linear import QuantisedLinear, form_of


def levels() -> list[int]:
    try:
        return list(range(load_kernels().level + 1))
    except NoKernels:
        return []


pytestmark = pytest.mark.skipif(not levels(), reason="no C++ compiler")


def integers(rows: int, cols: int, bits: int, zeros: str, groups: int, dtype: torch.dtype, *, seed: int = 0):
    """Random codes with the extreme ones among them, and scales."""
    generator = torch.Generator().manual_seed(seed)
    limit = 1 << bits - 1
    codes = torch.randint(-limit, limit, (rows, cols), generator=generator, dtype=torch.int8)
    if zeros == "2:4":
        codes *= NM(2, 4).mask(torch.rand(rows, cols, generator=generator))
    elif zeros != "none":
        codes[torch.rand(rows, cols, generator=generator) < float(zeros)] = 0
    scales = (0.01 + torch.rand(rows, groups, generator=generator)).to(dtype)
    return codes, scales


@settings(deadline=None, max_examples=120)
@given(
    rows=st.integers(1, 21),
    blocks=st.integers(1, 7),
    group=st.sampled_from([32, 64, 128, 0]),
    ragged=st.sampled_from([0, 4, 20]),
    batch=st.integers(1, 9),
    bits=st.sampled_from([8, 4]),
    zeros=st.sampled_from(["none", "2:4", "0.5", "0.7", "0.97", "1"]),
    form=st.sampled_from(["full", "bitmask"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_equal_to_the_literal_product(rows, blocks, group, ragged, batch, bits, zeros, form, dtype, seed):
    cols = blocks * group if group else blocks * 32 + ragged
    codes, scales = integers(rows, cols, bits, zeros, blocks if group else 1, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(rows, generator=generator).to(dtype)
    packed = QuantisedLinear(codes, scales, bits, bias=bias, form=zeros if zeros == "2:4" and cols % 4 == 0 else form)
    x = torch.randn(batch, cols, generator=generator).to(dtype)
    expected = q8.product(codes, scales, x) + bias.double()
    summed = q8.product(codes.short().abs(), scales, x.abs())  # what the rounding of fp32 sums grows with
    tolerance = 2 * torch.finfo(dtype).eps * float(expected.abs().max()) + 2e-6 * float(summed.max()) + 1e-6
    for level in levels():
        assert (packed.multiply(x, level=level).double() - expected).abs().max() <= tolerance, LEVELS[level]
    assert torch.equal(packed.codes, codes)
    product = torch.nn.functional.linear(x.double(), packed.weight.double(), bias.double())
    products = torch.nn.functional.linear(x.double().abs(), packed.weight.double().abs(), bias.double().abs())
    for tokens in (linear.OWN_TOKENS, 0):  # up to these our own code multiplies panels, torch more of them
        with mock.patch.object(linear, "OWN_TOKENS", tokens):
            panels = packed.multiply_by_panels(x).double()
        assert (panels - product).abs().max() <= 2 * torch.finfo(dtype).eps * products.max()
    spread = scales.repeat_interleave(cols // scales.shape[1], dim=1)
    assert torch.equal(packed.weight, codes.to(dtype) * spread), "code times scale, rounded once, as others do it"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("zeros", "form"), [("none", "full"), ("2:4", "2:4"), ("0.7", "bitmask"), ("0.2", "bitmask")])
def test_bytes_a_weight(zeros, bits, form):
    codes, scales = integers(64, 1024, bits, zeros, 16, torch.bfloat16)
    packed = QuantisedLinear(codes, scales, bits, form=form)
    kept = 0.5 if form == "2:4" else float((codes != 0).float().mean()) if form == "bitmask" else 1
    expected = kept * bits / 8 + (form != "full") / 8 + 2 / 64
    assert packed.packed_bytes / codes.numel() == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize(
    ("zeros", "bits", "with_expansion", "without"),
    [("none", 8, "full", "full"), ("2:4", 4, "2:4", "2:4"), ("0.7", 8, "bitmask", "full"), ("0.2", 4, "full", "full")],
)
def test_the_form_that_is_chosen(monkeypatch, zeros, bits, with_expansion, without):
    codes, _ = integers(16, 512, bits, zeros, 1, torch.bfloat16)
    for level, form in ((1, without), (2, with_expansion)):
        kernels = replace(load_kernels(), level=level)
        monkeypatch.setattr(linear, "load_kernels", lambda kernels=kernels: kernels)
        assert form_of(codes, bits) == form


def test_sixteen_nibbles_that_begin_in_half_a_byte():
    codes = torch.zeros(5, 128, dtype=torch.int8)
    codes[:, 3], codes[:, 16:32], codes[:, 77], codes[:, 112:] = (
        5,
        torch.arange(16) % 7 - 8,
        -3,
        torch.arange(16) % 7 - 8,
    )
    packed = QuantisedLinear(codes, torch.ones(5, 1), 4, form="bitmask")
    x = torch.randn(2, 128)
    for level in levels():
        torch.testing.assert_close(
            packed.multiply(x, level=level), q8.product(codes, packed.weight[:, :1] * 0 + 1, x).float()
        )
    assert torch.equal(packed.codes, codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_nan_and_inf_reach_every_output_of_their_token(value):
    packed = QuantisedLinear(*integers(9, 96, 8, "2:4", 3, torch.float32), 8)
    x = torch.randn(3, 96)
    x[1, 70] = value
    for level in levels():
        finite = packed.multiply(x, level=level).isfinite().all(dim=1)
        assert finite.tolist() == [True, False, True], LEVELS[level]


def test_large_batches_multiply_the_dense_weight():
    """Panels do not round the inputs."""
    codes, scales = integers(48, 256, 4, "0.5", 4, torch.float32)
    packed = QuantisedLinear(codes, scales, 4, max_batch=2)
    x = torch.randn(2, 5, 256)
    torch.testing.assert_close(packed(x), torch.nn.functional.linear(x, packed.weight))
    assert packed.to_linear().weight.equal(packed.weight) and packed.state_dict()["weight"].equal(packed.weight)


def test_groups_that_do_not_fit():
    with pytest.raises(ValueError, match="multiples of 32"):
        QuantisedLinear(torch.ones(4, 96, dtype=torch.int8), torch.ones(4, 2), 8)
