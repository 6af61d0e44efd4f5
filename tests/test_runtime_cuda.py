"""Which linears may run 2:4 on a GPU, and which do after timing. The GPU's own calls are replaced where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from topiarist.core.patterns import NM, Unstructured, parse_pattern
from topiarist.runtime import cuda
from topiarist.runtime.cuda import SemiStructuredLinear, choose, linear_obstacle


def pruned(rows: int, cols: int, pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    linear = nn.Linear(cols, rows).requires_grad_(False)
    linear.weight.masked_fill_(~parse_pattern(pattern).mask(linear.weight.abs()), 0)
    return linear.to(dtype)


@pytest.mark.parametrize(
    ("name", "shape", "pattern", "dtype", "backend", "expected"),
    [
        ("layers.0.mlp.up_proj", (32, 64), "2:4", torch.bfloat16, "cusparselt", ""),
        ("layers.0.mlp.up_proj", (32, 64), "1:4", torch.float16, "cutlass", ""),
        ("layers.0.self_attn.q_proj", (32, 64), "2:4", torch.bfloat16, "cusparselt", "not in an MLP"),
        ("layers.0.mlp.up_proj", (40, 64), "2:4", torch.bfloat16, "cusparselt", "multiple of (16, 16)"),
        ("layers.0.mlp.up_proj", (32, 72), "2:4", torch.bfloat16, "cusparselt", "multiple of (16, 16)"),
        ("layers.0.mlp.up_proj", (32, 32), "2:4", torch.bfloat16, "cutlass", "multiple of (32, 64)"),
        ("layers.0.mlp.up_proj", (16, 64), "2:4", torch.bfloat16, "cutlass", "multiple of (32, 64)"),
        ("layers.0.mlp.up_proj", (32, 64), "2:4", torch.float32, "cusparselt", "no 2:4 product for float32"),
        ("layers.0.mlp.up_proj", (32, 64), "0.5", torch.bfloat16, "cusparselt", "not 2:4"),
        ("layers.0.mlp.up_proj", (32, 64), "4:8", torch.bfloat16, "cusparselt", "not 2:4"),
    ],
)
def test_what_fits(name, shape, pattern, dtype, backend, expected):
    reason = linear_obstacle(name, pruned(*shape, pattern, dtype), layers="mlp", backend=backend)
    assert expected in reason if expected else reason == ""


def test_shared_weights_stay():
    linear = pruned(32, 64)
    assert "shared" in linear_obstacle("mlp.up", linear, layers="mlp", backend="cusparselt", shared=True)


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.down_proj", "h.0.mlp.c_fc", "layers.1.feed_forward.w1", "decoder.layers.0.fc1"]
)
def test_names_of_mlps(name):
    assert cuda.MLP.search(name)


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.o_proj", "h.0.attn.c_proj", "lm_head", "mlpx.up"])
def test_names_of_others(name):
    assert not cuda.MLP.search(name)


def test_our_table_of_shapes_is_that_of_torch():
    classes = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    for name, dtypes in cuda.MULTIPLES.items():
        for dtype, multiples in dtypes.items():
            theirs = classes[name]._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert multiples == (theirs.sparse_min_rows, theirs.sparse_min_cols)


@pytest.mark.parametrize(
    ("times", "pays", "reason"),
    [
        ([(1.0, 0.8), (2.0, 1.2)], True, "1.67 x at 256 tokens"),
        ([(1.0, 1.01), (2.0, 1.2)], True, "1.67 x"),
        ([(1.0, 1.2), (2.0, 1.2)], False, "dense is faster at 1 tokens: 1 ms against 1.2 ms"),
        ([(1.0, 1.0), (2.0, 1.99)], False, "no faster than dense at 1, 256 tokens"),
    ],
)
def test_choice(times, pays, reason):
    assert choose((1, 256), times)[0] is pays
    assert reason in choose((1, 256), times)[1]


def toy_model() -> nn.Module:
    block = nn.ModuleDict({"q_proj": pruned(64, 64), "k_proj": pruned(16, 64)})
    mlp = nn.ModuleDict({"up_proj": pruned(128, 64), "gate_proj": pruned(128, 64), "down_proj": pruned(64, 128)})
    return nn.ModuleDict({"self_attn": block, "mlp": mlp, "lm_head": pruned(64, 64, "0")})


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Compression that keeps the weight dense; down_proj loses at its shape, all others gain."""
    monkeypatch.setattr(cuda, "device_obstacle", lambda: "")
    monkeypatch.setattr(cuda, "backend", lambda: "cusparselt")
    monkeypatch.setattr(cuda, "_compress", lambda weight: weight.clone())
    monkeypatch.setattr(cuda, "_race", lambda dense, sparse, tokens: (1.0, 2.0 if dense.in_features == 128 else 0.5))


@pytest.mark.usefixtures("pretend_gpu")
@pytest.mark.parametrize("layers", ["mlp", "all"])
def test_swap_and_restore(layers):
    model = toy_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = cuda.accelerate(model, layers=layers)
    swapped = {name for name, module in model.named_modules() if isinstance(module, SemiStructuredLinear)}
    attention = {"self_attn.q_proj", "self_attn.k_proj"} if layers == "all" else set()
    assert swapped == {"mlp.up_proj", "mlp.gate_proj"} | attention
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert "dense is faster" in reasons["mlp.down_proj"]
    assert reasons["lm_head"] == ("not 2:4" if layers == "all" else "not in an MLP (layers='all' tries it)")
    assert {layer.name for layer in report.layers if layer.packed} == swapped
    assert report.bytes_after < report.bytes_before
    x = torch.randn(3, 64).bfloat16()
    module = model.get_submodule("mlp.up_proj")
    assert torch.equal(module(x), module.to_linear()(x))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    cuda.restore(model)
    assert not any(isinstance(module, SemiStructuredLinear) for module in model.modules())


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_without_a_gpu_everything_stays_dense():
    model = toy_model()
    with pytest.warns(UserWarning, match="2:4 layers run as dense ones: no GPU"):
        report = cuda.accelerate(model)
    assert report.num_packed == 0 and {layer.reason for layer in report.layers} == {"no GPU that torch can use"}


def test_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    assert cuda.device_obstacle() == "Tesla T4 has compute capability 7.5, sparse tensor cores begin at 8.0"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(bool(cuda.device_obstacle()), reason="needs sparse tensor cores")
def test_on_a_gpu():
    """Same result as dense to rounding, any number of tokens, and the dense weight comes back exactly."""
    linear = pruned(256, 512).cuda()
    sparse = SemiStructuredLinear(linear)
    for tokens in (1, 7, 64):
        x = torch.randn(tokens, 512, device="cuda").bfloat16()
        torch.testing.assert_close(sparse(x), linear(x), atol=0.02, rtol=0.02)
    assert torch.equal(sparse.weight, linear.weight)
    report = cuda.accelerate(nn.ModuleDict({"mlp": nn.ModuleDict({"up": linear})}), tokens=(64,))
    assert report.layers[0].dense_ms and report.layers[0].packed_ms
    assert NM(2, 4).holds(linear.weight != 0) and Unstructured(0.5).holds(linear.weight != 0)
