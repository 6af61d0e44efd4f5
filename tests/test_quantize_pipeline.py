"""Quantising whole models: what is written opens elsewhere with equal logits, zeros stay, a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint, tiny_model, tiny_text, tiny_tokens

import topiarist as tp
from topiarist.checkpoints.dequantised import DequantisedCheckpoint, readable
from topiarist.checkpoints.reading import Checkpoint
from topiarist.core.errors import CalibrationError, CheckpointError, QuantizationError, UnsupportedModel
from topiarist.core.grammar import OptionError
from topiarist.evaluation.verify import verify
from topiarist.models.opened import open_model
from topiarist.quantization import Grid
from topiarist.solvers.quantized import Quantized

TOKENS = tiny_tokens(8, 32)


def packed(folder: Path) -> DequantisedCheckpoint:
    found = readable(folder)
    assert isinstance(found, DequantisedCheckpoint)
    return found


def loaded(family: str, folder: Path, **options):
    """A plain model with the weights that a folder dequantises to."""
    checkpoint = readable(folder)
    model = tiny_model(family, dtype=checkpoint.dtype(), **options)
    model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.files}, strict=False)
    return model


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    tp.prune(tiny_checkpoint(folder / "dense", dtype=torch.bfloat16), folder / "pruned", data=TOKENS, method="wanda")
    return folder / "pruned"


@pytest.mark.parametrize(
    "settings", [{"bits": 8}, {"bits": 4, "data": TOKENS}, {"bits": 4, "data": TOKENS, "head": True}]
)
def test_transformers_opens_what_is_written(tmp_path, pruned, settings):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    report = tp.quantize(pruned, tmp_path / "out", **settings)
    assert report.format == "pack-quantized" and report.group == 32
    dense, found = Checkpoint(pruned), packed(tmp_path / "out")
    for layer in report.layers:
        name = layer.name + ".weight"
        weight = found.quantized(name)
        assert weight is not None and weight.grid.bits == settings["bits"]
        assert not bool(found.read(name)[dense.read(name) == 0].any())
        assert layer.sparsity >= layer.sparsity_before == 0.5 and layer.error <= layer.rounding_error
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(opened(TOKENS).logits, loaded("llama", tmp_path / "out")(TOKENS).logits, atol=1e-3)
    own, before = found.config["pruning_config"], dense.config["pruning_config"]
    assert {key: own[key] for key in before if key != "base_model"} == {
        key: value for key, value in before.items() if key != "base_model"
    }
    assert report.weights["after"] == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) - len(
        _header(tmp_path / "out" / "model.safetensors")
    )


def _header(path: Path) -> bytes:
    with path.open("rb") as stream:
        size = stream.read(8)
        return size + stream.read(int.from_bytes(size, "little"))


def test_a_tied_head_gets_a_table_of_its_own(tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    tp.quantize(source, tmp_path / "out", bits=8, head=True)
    found = packed(tmp_path / "out")
    head = found.quantized("lm_head.weight")
    assert head is not None and head.scale.shape == (260, 1)
    table = found.read("model.embed_tokens.weight")
    assert torch.equal(table, Checkpoint(source).read("model.embed_tokens.weight"))
    assert torch.allclose(found.read("lm_head.weight"), table, atol=0.01)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = loaded("llama", tmp_path / "out")
    dense = tiny_model(tie_word_embeddings=True)
    with torch.no_grad():
        logits = opened(TOKENS).logits
        assert torch.allclose(logits, model(TOKENS).logits, atol=1e-3)
        assert float((logits.argmax(-1) == dense(TOKENS).logits.argmax(-1)).float().mean()) > 0.95


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_go_under_their_own_names(tmp_path, family):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = tiny_checkpoint(tmp_path / "model", family)
    report = tp.quantize(source, tmp_path / "out", bits=4, group=16, data=TOKENS)
    dense, found = Checkpoint(source), packed(tmp_path / "out")
    assert set(found.files) == set(dense.files)
    names = [name for name in found.files if found.quantized(name) is not None]
    assert len(names) == 8 + 2 * 4 * 3 and not any("gate.weight" in name for name in names)
    assert max(layer.error for layer in report.layers) < 0.2
    about = CompressedTensorsConfig(dequantize=True)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=about)
    state = {name: found.read(name) for name in found.files}
    wanted = type(opened).from_pretrained(None, config=tiny_model(family).config, state_dict=state)
    with torch.no_grad():
        assert torch.allclose(opened(TOKENS).logits, wanted(TOKENS).logits, atol=1e-3)


def test_an_object_gets_the_values_of_the_file(tmp_path):
    source = tiny_checkpoint(tmp_path / "model")
    tp.quantize(source, tmp_path / "out", bits=4, data=TOKENS)
    model = tiny_model()
    report = tp.quantize(model, bits=4, data=TOKENS)
    found = readable(tmp_path / "out")
    assert report.layers == tp.quantize(source, tmp_path / "out", bits=4, data=TOKENS).layers
    assert all(torch.equal(p, found.read(name)) for name, p in model.named_parameters())
    with pytest.raises(CheckpointError, match="save it, and give its folder"):
        tp.quantize(tiny_model(), tmp_path / "other", bits=8)


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path):
    source = tiny_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    settings = {"bits": 4, "data": TOKENS, "correct": True, "head": True}
    whole = tp.quantize(source, tmp_path / "whole", **settings)

    def stop(what: str, done: int, total: int) -> None:
        if what == "pruning" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tp.quantize(source, tmp_path / "out", **settings, progress=stop)
    report = tp.quantize(source, tmp_path / "out", **settings)
    assert report.layers == whole.layers
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = tp.quantize(source, tmp_path / "out", **settings)
    assert again.layers == whole.layers and again.command == whole.command
    with pytest.raises(CheckpointError, match="holds another run: grid"):
        tp.quantize(source, tmp_path / "out", **(settings | {"bits": 8}))


def test_skipped_layers_keep_their_values_and_are_ignored(tmp_path, pruned):
    report = tp.quantize(pruned, tmp_path / "out", bits=8, skip=["down_proj"])
    assert len(report.layers) == 12
    found = packed(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(found.read(name + ".weight"), Checkpoint(pruned).read(name + ".weight"))
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert name in ignored and "lm_head" in ignored and "model.layers.1.mlp.up_proj" not in ignored


def test_a_solver_and_a_grid_make_up_for_each_other():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    gram = tp.Gram(64)
    gram.add(x @ torch.randn(64, 64, generator=torch.Generator().manual_seed(2)))
    pattern, grid = tp.parse_pattern("2:4"), Grid(bits=4, group=32)
    for name in ("sparsegpt", "alps"):
        solver = tp.solvers.SOLVERS[name]()
        joint = Quantized(solver=solver, grid=grid)(weight, gram, pattern)
        assert joint.error < joint.rounding_error and pattern.holds(joint.weight != 0)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 3}, OptionError, "bits"),
        ({"bits": 4}, CalibrationError, "gptq looks at what flows"),
        ({"bits": 8, "group": 24}, QuantizationError, r"layers\.0\.self_attn\.q_proj: groups of 24 do not divide"),
        ({"bits": 8, "correct": True}, CalibrationError, "error correction looks"),
        ({"bits": 8, "skip": [".*"]}, QuantizationError, "skip leaves no matrix to quantise"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, pruned, settings, error, message):
    with pytest.raises(error, match=message):
        tp.quantize(pruned, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_quantised_folder_is_not_quantised_again(tmp_path, pruned):
    tp.quantize(pruned, tmp_path / "out", bits=8)
    with pytest.raises(UnsupportedModel, match="quantised already"):
        tp.quantize(tmp_path / "out", tmp_path / "again", bits=4, data=TOKENS)


def test_quantised_folders_are_opened_verified_and_pruned(tmp_path, pruned):
    tp.quantize(pruned, tmp_path / "out", bits=8)
    assert verify(tmp_path / "out").holds
    assert all(found.holds for found in tp.audit(tmp_path / "out")[1])
    opened = open_model(tmp_path / "out").whole().model
    with torch.no_grad():
        assert torch.equal(opened(TOKENS).logits, loaded("llama", tmp_path / "out")(TOKENS).logits)
    tp.prune(tmp_path / "out", tmp_path / "sparser", method="magnitude", pattern="1:4")
    config = Checkpoint(tmp_path / "sparser").config
    assert "quantization_config" not in config and verify(tmp_path / "sparser").holds
    shard = tmp_path / "out" / "model.safetensors"
    tensors = load_file(shard)
    name = "model.layers.0.mlp.up_proj.weight_packed"
    tensors[name] = torch.full_like(tensors[name], 0x10101010)
    save_file(tensors, shard, metadata={"format": "pt"})
    (breach,) = verify(tmp_path / "out").breaches
    assert breach.name == "model.layers.0.mlp.up_proj" and breach.came_back == breach.of == 64 * 16


def test_the_commands(tmp_path, pruned, command):
    text = tiny_text(tmp_path)
    code, printed, _ = command(
        "quantize", pruned, tmp_path / "out", "--bits", 4, "--data", text, "--samples", 8, "--window", 32
    )
    assert code == 0 and "gptq, 4 bits, a scale for 32 weights: 14 matrices" in printed
    for more in ((), ("--data", text, "--samples", 4, "--window", 32, "--bits", 4)):
        code, printed, _ = command("quantize", pruned, tmp_path / "planned", "--plan", *more)
        assert code == 0 and "2 x 7" in printed and not (tmp_path / "planned").exists()
    pytest.importorskip("gguf")
    code, printed, _ = command("export", tmp_path / "out", tmp_path / "out.gguf")
    assert code == 0 and "14 quantised matrices keep their integers and scales" in printed and "q4_0" in printed
    code, _, errors = command("export", tmp_path / "out", tmp_path / "out.gguf")
    assert code == 2 and "exists" in errors
