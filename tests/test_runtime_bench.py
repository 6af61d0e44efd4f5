"""`bench_folder`: both variants are the same model, it comes back as it was, and the verdict is plain. No time is asserted."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny import tiny_checkpoint
from torch import nn

import topiarist as tp
from topiarist import runtime
from topiarist.core.compiled import NoKernels
from topiarist.core.errors import CheckpointError
from topiarist.core.grammar import OptionError
from topiarist.core.patterns import NM
from topiarist.results.pages import save_evaluation
from topiarist.runtime import bench, cpu, limits
from topiarist.runtime.bench import BenchReport, Speed, bench_model
from topiarist.runtime.build import load_kernels
from topiarist.runtime.linear import PackedLinear, QuantisedLinear
from topiarist.runtime.loading import load_model


def tiny_llama(*, pruned: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for module in model.model.layers.modules() if pruned else ():
        if type(module) is nn.Linear:
            module.weight.data.masked_fill_(~NM(2, 4).mask(module.weight.data.abs()), 0)
    return model


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cpu, "race", functools.partial(cpu.race, seconds=0.0))
    monkeypatch.setattr(cpu, "COLD_BYTES", 1 << 12)
    monkeypatch.setattr(bench, "ROUNDS", 1)


def test_a_model_in_memory_comes_back_as_it_was():
    model = tiny_llama()
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    report = bench_model(model, tokens=2, batches=(1, 3), prompt=4)
    assert {name: module for name, module in model.named_modules() if type(module) is nn.Linear} == linears
    phases = ("prefill", "decode", "generate") if compiled() else ("prefill", "decode")
    assert [(speed.phase, speed.batch) for speed in report.speeds] == [(p, batch) for batch in (1, 3) for p in phases]
    assert all(speed.dense > 0 and speed.sparse > 0 for speed in report.speeds)
    assert report.verdict and "torch" in report.machine
    assert {layer.name: layer.reason for layer in report.acceleration.layers}["lm_head"] == "not pruned"


def test_a_model_that_runs_packed_already():
    model = tiny_llama()
    cpu.accelerate(model, measure=False)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, PackedLinear))}
    report = bench_model(model, tokens=1, batches=(1,), prompt=2)
    assert [layer.name for layer in report.acceleration.layers] == list(linears)
    assert all(model.get_submodule(name) is module for name, module in linears.items())


def test_folders_ordinary_and_packed(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "plain")
    runtime.pack_folder(tmp_path / "plain", tmp_path / "packed")
    for name in ("plain", "packed"):
        report = runtime.bench_folder(tmp_path / name, tokens=1, batches=(1,), prompt=2)
        assert len(report.acceleration.layers) == 15 and (report.tokens, report.prompt) == (1, 2)


def test_several_folders_quantised_ones_among_them(tmp_path, command):
    source = tiny_checkpoint(tmp_path / "dense", dtype=torch.bfloat16)
    tp.quantize(source, tmp_path / "int8", bits=8)
    tp.prune(source, tmp_path / "pruned", method="magnitude", pattern="2:4")
    for name, value in (("int8", 10.0), ("pruned", 11.0)):
        entry = {
            "text": "t",
            "digest": "d",
            "window": 8,
            "tokens": 8,
            "start_tokens": 0,
            "dtype": "bfloat16",
            "value": value,
        }
        save_evaluation(tmp_path / name, {"perplexity": [{**entry, "dense": {"model": "dense", "value": 9.9}}]})
    if compiled():
        layers = dict(load_model(tmp_path / "int8").named_modules())
        assert isinstance(layers["model.layers.0.mlp.up_proj"], QuantisedLinear)
    words = ("--tokens", 1, "--prompt", 2, "--batch", 1)
    code, printed, _ = command("bench", tmp_path / "int8", tmp_path / "pruned", *words)
    assert code == 0 and "Not dominated in perplexity and tokens a second: " in " ".join(printed.split())


def test_limits_are_measured_once_a_machine(tmp_path, monkeypatch):
    if not compiled():
        pytest.skip("no compiler")
    monkeypatch.setattr(limits, "cache_folder", lambda: tmp_path / "cache")
    asked = []

    def measure() -> int:
        asked.append(1)
        return 8

    assert limits.Limits().of(((4, 8), 4), "a processor", measure) == 8
    assert limits.Limits().of(((4, 8), 4), "a processor", measure) == 8 and len(asked) == 1
    assert limits.Limits().of(((4, 8), 4), "another", measure) == 8 and len(asked) == 2
    (tmp_path / "cache" / limits.FILE).write_text("{")
    assert limits.Limits().of(((4, 8), 4), "a processor", measure) == 8 and len(asked) == 3
    (tmp_path / "cache" / limits.FILE).unlink()
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("no folder")
    assert limits.Limits().of(((4, 8), 4), "a processor", measure) == 8


def test_refusals(tmp_path):
    tiny_llama(pruned=False).save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"dense: no linear has zeros to skip.*prune the model first"):
        runtime.bench_folder(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="does not exist"):
        runtime.bench_folder(tmp_path / "nothing")


def test_learned_positions_are_a_limit_and_rotary_ones_a_warning(tmp_path, command):
    model = tiny_checkpoint(tmp_path / "model", "opt")
    code, _, said = command("bench", model, "--prompt", 60, "--tokens", 5, "--batch", 1)
    assert (
        code == 2
        and f"a prompt of 60 tokens with 5 more is longer than the 64 positions of {model}: pass a shorter" in said
    )
    tiny_llama().save_pretrained(tmp_path / "rotary")
    with pytest.warns(UserWarning, match="with 1 more is longer than the 64 that .*rotary was made for"):
        runtime.bench_folder(tmp_path / "rotary", tokens=1, batches=(1,), prompt=64)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"tokens": -1}, {"prompt": 0}, {"batches": (4, 0)}, {"batches": ()}])
def test_numbers_below_one_are_refused_before_the_model_is_read(wrong, tmp_path, command):
    with pytest.raises(OptionError, match="nothing can be timed"):
        runtime.bench_folder(tmp_path / "nothing", **wrong)
    word = "--batch" if "batches" in wrong else f"--{next(iter(wrong))}"
    for number in next(iter(wrong.values())) if word == "--batch" else wrong.values():
        code, _, said = command("bench", tmp_path / "nothing", word, number)
        assert code == 2 and ("does not exist" if number > 0 else "greater than or equal to 1") in said


def test_without_kernels_it_says_so(monkeypatch):
    def none():
        raise NoKernels("no C++ compiler found")

    monkeypatch.setattr(cpu, "load_kernels", none)
    with pytest.warns(UserWarning, match="run as dense ones"):
        report = bench_model(tiny_llama(), tokens=1, batches=(1,), prompt=2)
    assert "no layer runs sparse (no C++ compiler found)" in report.verdict


def compiled() -> bool:
    try:
        load_kernels()
    except NoKernels:
        return False
    return True


def test_a_folder_of_integers(tmp_path):
    if not compiled():
        pytest.skip("no C++ compiler")
    tiny_llama(pruned=False).save_pretrained(tmp_path / "plain")
    runtime.pack_folder(tmp_path / "plain", tmp_path / "packed", values="int4", group=32, head="int8")
    report = runtime.bench_folder(tmp_path / "packed", tokens=1, batches=(1,), prompt=2)
    assert report.acceleration.num_packed == 15 and report.sparse_bytes < 0.35 * report.dense_bytes
    assert {layer.reason for layer in report.acceleration.layers} == {"4-bit integers", "8-bit integers"}
    assert all(1 <= layer.max_batch <= 32 for layer in report.acceleration.layers)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_integers_are_counted_once(tied, tmp_path):
    if not compiled():
        pytest.skip("no C++ compiler")
    source = tiny_checkpoint(tmp_path / "source", tie_word_embeddings=tied)
    runtime.pack_folder(source, tmp_path / "packed", values="int8", group=32, head="int8")
    report = runtime.bench_folder(tmp_path / "packed", tokens=1, batches=(1,), prompt=2)
    assert report.dense_bytes == sum(weight.nbytes for weight in load_model(source).parameters())
    model = load_model(tmp_path / "packed")
    packed = {id(table): table.packed_bytes for table in model.modules() if isinstance(table, QuantisedLinear)}
    table = model.get_input_embeddings().table
    rest = sum(weight.nbytes for weight in model.parameters())
    assert report.sparse_bytes == rest + sum((packed | {id(table): table.packed_bytes}).values())


def test_accelerated_logits_and_saved_weights(tmp_path):
    try:
        load_kernels()
    except NoKernels:
        pytest.skip("no C++ compiler")
    model, tokens = tiny_llama(), torch.arange(6)[None]
    expected = model(tokens).logits
    report = runtime.accelerate(model, measure=False)
    assert report.num_packed == 14 and report.bytes_after < report.bytes_before
    torch.testing.assert_close(model(tokens).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(tokens).logits, expected)
    runtime.restore(model)
    assert torch.equal(model(tokens).logits, expected)


def report_of(*speeds: Speed, packed: int = 1) -> BenchReport:
    layer = cpu.Layer("a", (4, 4), "2:4", 0.5, bool(packed), "lost", 100, 60)
    return BenchReport(speeds, cpu.Acceleration((layer,), "AVX2", 1), 1000, 960 if packed else 1000, "here", 32, 64)


@pytest.mark.parametrize(
    ("report", "verdict"),
    [
        (
            report_of(Speed("prefill", 1, 10, 9), Speed("decode", 1, 10, 15), Speed("decode", 4, 10, 12)),
            "Decoding is up to 1.50 x as fast (batch 1). Slower: prefill at batch 1. Weights take 4% less memory.",
        ),
        (
            report_of(Speed("decode", 1, 10, 10.2)),
            "No gain on this machine: decoding is as fast dense. Weights take 4%",
        ),
        (report_of(Speed("decode", 1, 10, 10), packed=0), "no layer runs sparse (lost). Weights take no less memory."),
    ],
    ids=["gain", "none", "dense"],
)
def test_verdicts(report, verdict):
    assert verdict in report.verdict
