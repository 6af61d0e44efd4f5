"""Packed linears against an fp32 reference: every instruction set, ragged edges, odd numbers; and what `accelerate`
swaps, keeps and says. No time is ever asserted."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import pickle
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from topiarist.core import products
from topiarist.core.compiled import NoKernels
from topiarist.core.patterns import NM
from topiarist.runtime import build, cpu, linear
from topiarist.runtime.build import LEVELS, load_kernels
from topiarist.runtime.linear import PackedLinear

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def compiled() -> bool:
    try:
        load_kernels()
    except NoKernels:
        return False
    return True


needs_kernels = pytest.mark.skipif(not compiled(), reason="no C++ compiler")


def sparse_linear(rows: int, cols: int, sparsity: float, dtype=torch.bfloat16, *, seed=0, bias=True) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(cols, rows, bias=bias).to(dtype)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand(rows, cols) < sparsity, 0)
    return layer.requires_grad_(False)


def multiply_at(level: int, packed: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    return packed.multiply(x, level=level)


def levels() -> list[int]:
    return list(range(load_kernels().level + 1)) if compiled() else []


@needs_kernels
@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 200),
    batch=st.integers(1, 11),
    sparsity=st.sampled_from([0.0, 0.5, 0.7, 0.97, 1.0]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_error_is_that_of_one_rounding(rows, cols, batch, sparsity, dtype, bias, seed):
    """Within twice the error of torch's own linear of the dtype, on every instruction set this machine has."""
    layer = sparse_linear(rows, cols, sparsity, dtype, seed=seed, bias=bias)
    packed = PackedLinear(layer)
    x = torch.randn(batch, cols).to(dtype)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    torch_error = (F.linear(x, layer.weight, layer.bias).double() - exact).abs().max()
    rounding = torch.finfo(dtype).eps * exact.abs().max() + 1e-6
    for level in levels():
        assert (multiply_at(level, packed, x).double() - exact).abs().max() <= 2 * torch.maximum(
            torch_error, rounding / 2
        )
    assert torch.equal(packed.weight, layer.weight)
    for tokens in (linear.OWN_TOKENS, 0):  # up to these our own code multiplies panels, torch more of them
        with mock.patch.object(linear, "OWN_TOKENS", tokens):
            panels = packed.multiply_by_panels(x).double()
        assert (panels - exact).abs().max() <= 2 * torch.maximum(torch_error, rounding / 2)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_in_the_mean_is_no_worse_than_torch(dtype):
    layer = sparse_linear(512, 1024, 0.7, dtype, bias=False)
    x = torch.randn(4, 1024).to(dtype)
    exact = x.double() @ layer.weight.double().T
    ours, theirs = multiply_at(levels()[-1], PackedLinear(layer), x), F.linear(x, layer.weight)
    assert (ours.double() - exact).square().mean() <= 1.1 * (theirs.double() - exact).square().mean()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("place", ["weight", "input"])
def test_nan_and_inf_spread_as_in_the_dense_product(dtype, value, place):
    """Zeros are multiplied too: 0 * Inf is NaN in rows whose weight there was pruned."""
    layer = sparse_linear(37, 77, 0.8, dtype)
    x = torch.randn(3, 77).to(dtype)
    if place == "weight":
        layer.weight[5, 13] = value
    else:
        x[1, 70] = value
    expected = F.linear(x.float(), layer.weight.float(), layer.bias.float())
    for level in levels():
        y = multiply_at(level, PackedLinear(layer), x)
        assert torch.equal(y.isnan(), expected.isnan()), LEVELS[level]
        assert torch.equal(y.isinf(), expected.isinf()), LEVELS[level]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormal_weights(dtype):
    """Kept as they are. The bf16 dot product of the processor takes denormals for zero, as torch's own does."""
    tiny = torch.finfo(dtype).smallest_normal
    layer = sparse_linear(8, 64, 0.5, dtype, bias=False)
    layer.weight.mul_(tiny)
    packed = PackedLinear(layer)
    assert torch.equal(packed.weight, layer.weight)
    x = torch.full((2, 64), 2.0, dtype=dtype)
    exact = F.linear(x.double(), layer.weight.double())
    for level in levels():
        assert (multiply_at(level, packed, x).double() - exact).abs().max() <= 2 * 64 * tiny


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_and_denormal_results_round_as_torch_does(dtype):
    scale = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * 0.37, 1.0, -1.5]).to(dtype)
    layer = nn.Linear(4, 4, bias=False).to(dtype).requires_grad_(False)
    layer.weight.copy_(torch.diag(scale.float()).to(dtype))
    x = torch.ones(1, 4, dtype=dtype) * 1.5
    expected = F.linear(x.double(), layer.weight.double()).to(dtype)
    for level in levels()[:3]:  # the fourth flushes denormals
        assert torch.equal(multiply_at(level, PackedLinear(layer), x), expected)


@needs_kernels
def test_empty_and_full_rows():
    layer = sparse_linear(9, 100, 0.5, torch.float32)
    layer.weight[0] = 0
    layer.weight[4:8] = 0
    layer.weight[8] = 1
    x = torch.randn(5, 100)
    for level in levels():
        torch.testing.assert_close(multiply_at(level, PackedLinear(layer), x), layer(x))


@needs_kernels
def test_threads_do_not_change_the_result():
    layer = sparse_linear(1003, 1200, 0.5)
    packed, x = PackedLinear(layer), torch.randn(3, 1200).bfloat16()
    before, one = torch.get_num_threads(), multiply_at(levels()[-1], packed, x)
    try:
        torch.set_num_threads(2)
        assert torch.equal(packed.multiply(x), one)
        assert torch.equal(packed.weight, layer.weight)
    finally:
        torch.set_num_threads(before)


def packed_literally(weight: torch.Tensor) -> tuple[list[int], list[float], list[int]]:
    """Masks, values and starts as the head of kernels.cpp describes them."""
    rows, cols = weight.shape
    masks, values, starts = [], [], []
    for tile in range(0, rows, 4):
        starts.append(len(values))
        for block, row in itertools.product(range(0, cols, 32), range(tile, tile + 4)):
            bits = 0
            for j, value in enumerate(weight[row, block : block + 32].tolist() if row < rows else ()):
                if value != 0:
                    bits |= 1 << j
                    values.append(value)
            masks.append(bits)
    return masks, values, starts


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (4, 32), (5, 33), (11, 100)])
def test_the_packed_order(dtype, shape):
    layer = sparse_linear(*shape, 0.5, dtype)
    layer.weight[0, 0] = -0.0
    packed = PackedLinear(layer)
    masks, values, starts = packed_literally(layer.weight)
    assert [mask & 0xFFFFFFFF for mask in packed.masks.tolist()] == masks
    assert packed.values[: len(values)].view(dtype).tolist() == values
    assert packed.values.numel() == len(values) + build.SLACK
    assert packed.starts.tolist() == starts


@needs_kernels
def test_a_model_that_is_moved_or_converted_does_not_compute_nonsense():
    packed = PackedLinear(sparse_linear(16, 64, 0.5))
    x = torch.ones(1, 64)
    with pytest.raises(RuntimeError):
        copy.deepcopy(packed).float()(x)
    with pytest.raises(RuntimeError):
        copy.deepcopy(packed).float()(x.bfloat16())
    with pytest.raises(RuntimeError, match="call restore"):
        copy.deepcopy(packed).to("meta")(x.bfloat16())


@needs_kernels
def test_negative_zeros_are_zeros():
    layer = sparse_linear(16, 64, 0.0)
    layer.weight.mul_(NM(1, 4).mask(layer.weight.abs().float()))  # negative weights become -0.0
    packed = PackedLinear(layer)
    assert packed.values.numel() == 16 * 64 // 4 + build.SLACK
    assert torch.equal(packed.weight, layer.weight)


# -------------------------------------------------------------------------------------------------- the module


@needs_kernels
def test_it_behaves_as_the_linear_it_replaces():
    layer = sparse_linear(48, 40, 0.6, torch.float32)
    packed = PackedLinear(layer, max_batch=4)
    for shape in [(40,), (1, 40), (2, 2, 40), (7, 40), (3, 5, 40), (0, 40), (2, 0, 40)]:
        x = torch.randn(shape)
        torch.testing.assert_close(packed(x), layer(x))
    strided = torch.randn(40, 3).T
    torch.testing.assert_close(packed(strided), layer(strided))
    x = torch.randn(2, 40, requires_grad=True)
    (packed(x).sum()).backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 40))
    for wrong in (torch.randn(2, 41), torch.randn(2, 40).bfloat16()):
        with pytest.raises(RuntimeError):
            packed(wrong)
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(again(torch.ones(1, 40)), packed(torch.ones(1, 40)))
    assert packed.state_dict().keys() == layer.state_dict().keys()
    assert torch.equal(packed.state_dict()["weight"], layer.weight)
    assert torch.equal(packed.to_linear().weight, layer.weight)


def toy_model() -> nn.Module:
    model = nn.ModuleDict(
        {
            "sparse": sparse_linear(256, 256, 0.7),
            "two_four": sparse_linear(128, 256, 0.0, seed=1),
            "dense": sparse_linear(64, 64, 0.0),
            "nearly_dense": sparse_linear(64, 64, 0.1),
            "ints": sparse_linear(64, 64, 0.7, torch.float64),
            "tied": sparse_linear(32, 64, 0.7, bias=False),
            "embedding": nn.Embedding(32, 64),
        }
    )
    weight = model["two_four"].weight
    weight.mul_(NM(2, 4).mask(weight.abs().float()))
    model["embedding"].weight = model["tied"].weight
    return model


@needs_kernels
def test_what_is_swapped_and_why_not():
    model = toy_model()
    before = copy.deepcopy(model.state_dict())
    report = cpu.accelerate(model, measure=False)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons == {
        "sparse": "not measured",
        "two_four": "not measured",
        "dense": "not pruned",
        "nearly_dense": "only 10% zeros",
        "ints": "no kernel for float64",
        "tied": "its weight is shared with another module",
    }
    assert {name for name, module in model.items() if isinstance(module, PackedLinear)} == {"sparse", "two_four"}
    assert {layer.name: layer.pattern for layer in report.layers}["two_four"] == "2:4"
    assert report.num_packed == 2 and report.bytes_after < report.bytes_before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    cpu.restore(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@needs_kernels
@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize(
    ("packed_ms", "expected"),
    [
        ({1: 1, 2: 1, 4: 1, 8: 1, 16: 1, 32: 1}, (32, 32)),
        ({1: 1, 2: 1, 4: 1, 8: 1, 16: 3, 32: 1}, (8, 8)),
        ({1: 1, 2: 1, 4: 3, 8: 1, 16: 1, 32: 1}, (0, 2)),
        ({1: 3, 2: 1, 4: 1, 8: 1, 16: 1, 32: 1}, (0, 0)),
        ({1: 1.99, 2: 1, 4: 1, 8: 1, 16: 1, 32: 1}, (0, 0)),
    ],
    ids=["always", "up to 8", "not at 4", "not at 1", "within the noise"],
)
def test_the_measured_threshold(monkeypatch, packed_ms, expected, keep_dense):
    """Dense takes 2 ms at any batch. A layer that loses at batch 4 stays dense, unless both forms are kept."""
    times = iter([[2.0, float(packed_ms[batch])] for batch in (1, 2, 4, 8, 16, 32)])
    monkeypatch.setattr(cpu, "race", lambda *_: next(times))
    model = nn.Sequential(sparse_linear(64, 64, 0.7))
    (layer,) = cpu.accelerate(model, keep_dense=keep_dense).layers
    assert layer.max_batch == expected[keep_dense]
    assert layer.packed == (expected[keep_dense] > 0) == isinstance(model[0], PackedLinear)
    if not layer.packed:
        assert "dense is faster at batch" in layer.reason


@needs_kernels
@pytest.mark.parametrize("keep_dense", [False, True])
def test_dense_layers_are_timed_as_models_run_them(monkeypatch, keep_dense):
    """Several tokens in fp32, where the processor would emulate the product of 16 bits."""
    wide = mock.Mock(wraps=products._in_float32)
    monkeypatch.setattr(products, "_in_float32", wide)
    monkeypatch.setattr(products.linalg, "search_dtype", lambda _: torch.float32)
    counts = []

    def race(rivals, *_):
        before = wide.call_count
        rivals[0][0]()
        counts.append(wide.call_count - before)
        return [2.0, 1.0]

    monkeypatch.setattr(cpu, "race", race)
    cpu.accelerate(nn.Sequential(sparse_linear(64, 64, 0.7)), keep_dense=keep_dense)
    assert counts == [0, 1, 1, *3 * [int(keep_dense)]]


@needs_kernels
def test_measuring_for_real(monkeypatch):
    monkeypatch.setattr(cpu, "race", functools.partial(cpu.race, seconds=0.0))
    monkeypatch.setattr(cpu, "COLD_BYTES", 1 << 12)
    model = nn.Sequential(sparse_linear(64, 96, 0.7), sparse_linear(64, 64, 0.7), sparse_linear(64, 64, 0.72))
    expected = copy.deepcopy(model)
    report = cpu.accelerate(model, keep_dense=True)
    assert all(layer.dense_ms and layer.packed_ms for layer in report.layers)
    assert report.layers[1].dense_ms == report.layers[2].dense_ms, "one measurement for layers that are alike"
    x = torch.randn(2, 96).bfloat16()
    torch.testing.assert_close(model(x), expected(x))


# --------------------------------------------------------------------------------------------- without kernels


@pytest.fixture
def fresh_kernels():
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": "/nowhere", "CXX": ""}, r"no C\+\+ compiler found; install g\+\+"),
        ({"CXX": "no-such-compiler -O2"}, "CXX names 'no-such-compiler', which is not installed"),
        ({"CXX": "false"}, "false --version failed"),
        ({"TOPIARIST_NO_KERNELS": "1"}, "TOPIARIST_NO_KERNELS is set"),
    ],
    ids=["none", "missing", "broken", "switched off"],
)
def test_without_a_compiler_the_model_stays_dense(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    model = toy_model()
    with pytest.warns(UserWarning, match=message):
        report = cpu.accelerate(model)
    assert report.num_packed == 0 and report.instruction_set == "none"
    assert all(type(module) is not PackedLinear for module in model.modules())
    assert all(layer.reason for layer in report.layers)


@pytest.mark.usefixtures("fresh_kernels")
@needs_kernels
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOPIARIST_CACHE", str(tmp_path / "file"))
    with pytest.raises(NoKernels, match="set \\$TOPIARIST_CACHE to a writable folder"):
        load_kernels()


@pytest.mark.usefixtures("fresh_kernels")
@needs_kernels
def test_source_that_does_not_compile(monkeypatch, tmp_path):
    (tmp_path / "kernels.cpp").write_text("int main( {")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "kernels.cpp")
    monkeypatch.setenv("TOPIARIST_CACHE", str(tmp_path))
    with pytest.raises(NoKernels, match="error"):
        load_kernels()
    assert not list(tmp_path.glob("*.so")) and len(list(tmp_path.iterdir())) == 1


@needs_kernels
def test_an_old_processor(monkeypatch):
    monkeypatch.setattr(cpu, "load_kernels", lambda: dataclasses.replace(load_kernels(), level=0))
    with pytest.warns(UserWarning, match="neither AVX2 nor AVX-512"):
        report = cpu.accelerate(toy_model())
    assert report.num_packed == 0 and report.instruction_set == "plain C++"


@needs_kernels
def test_no_second_openmp_is_loaded():
    code = (
        "import torch\n"
        "from topiarist.runtime.build import load_kernels\n"
        "load_kernels()\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({path for path in maps if 'gomp' in path or 'libomp' in path or 'iomp' in path}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1


@needs_kernels
def test_a_warning_free_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu.accelerate(nn.Sequential(sparse_linear(64, 64, 0.7)), measure=False)
