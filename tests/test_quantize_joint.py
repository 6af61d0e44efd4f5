"""Pruning and quantising in one walk: the mask is the solver's, the values lie on a grid, the files are those of `quantize`."""

from __future__ import annotations

import pytest
import torch
import yaml
from tiny import tiny_checkpoint, tiny_model, tiny_text, tiny_tokens

import topiarist as tp
from topiarist.checkpoints.dequantised import DequantisedCheckpoint
from topiarist.checkpoints.reading import Checkpoint
from topiarist.core.errors import CalibrationError, CheckpointError, QuantizationError, UnsupportedModel
from topiarist.core.grammar import OptionError
from topiarist.core.linalg import reconstruction_error
from topiarist.evaluation.verify import verify
from topiarist.pipelines.recipes.recipe import read_recipe
from topiarist.pipelines.recipes.running import run_recipe
from topiarist.quantization import GPTQ, Grid
from topiarist.solvers.quantized import Quantized

TOKENS = tiny_tokens(8, 32)
SETTINGS = {"pattern": "2:4", "method": "wanda", "data": TOKENS}


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_the_mask_is_the_solvers_and_the_error_no_worse_than_one_after_the_other(name):
    generator = torch.Generator().manual_seed(0)
    weight, mix = torch.randn(32, 64, generator=generator), torch.randn(64, 64, generator=generator)
    gram = tp.Gram(64)
    gram.add(torch.randn(512, 64, generator=generator) @ mix)
    pattern, grid, solver = tp.parse_pattern("2:4"), Grid(bits=4, group=32), tp.solvers.SOLVERS[name]()
    pruned = solver(weight, gram, pattern)
    joint = Quantized(solver=solver, grid=grid)(weight, gram, pattern)
    after = GPTQ()(pruned.weight, gram, grid, pruned.mask)
    assert torch.equal(joint.mask, pruned.mask)
    assert joint.error <= reconstruction_error(weight, after.dequantized(), gram)


def test_a_pruned_and_quantised_folder_has_the_mask_of_one_that_was_pruned(tmp_path):
    source = tiny_checkpoint(tmp_path / "dense", dtype=torch.bfloat16)
    report = tp.prune(source, tmp_path / "joint", **SETTINGS, bits=4)
    tp.prune(source, tmp_path / "pruned", **SETTINGS)
    tp.quantize(tmp_path / "pruned", tmp_path / "after", bits=4, data=TOKENS)
    joint, after = DequantisedCheckpoint(tmp_path / "joint"), DequantisedCheckpoint(tmp_path / "after")
    pruned = Checkpoint(tmp_path / "pruned")
    assert set(joint.files) == set(after.files) and len(report.layers) == 14
    for layer in report.layers[:7]:  # the inputs of later blocks differ, for both walks run on what they wrote
        name = layer.name + ".weight"
        assert not bool(joint.read(name)[pruned.read(name) == 0].any())
        assert joint.quantized(name) is not None and layer.sparsity >= 0.5
    assert (
        report.weights["after"]
        == tp.quantize(tmp_path / "pruned", tmp_path / "after", bits=4, data=TOKENS).weights["after"]
    )
    about = Checkpoint(tmp_path / "joint").config
    assert about["quantization_config"] == Checkpoint(tmp_path / "after").config["quantization_config"]
    assert about["pruning_config"]["pattern"] == "2:4" and about["pruning_config"]["quantized"]["bits"] == 4
    assert verify(tmp_path / "joint").holds
    for page in ("README.md", "pruning_report.html"):
        assert "integers of 4 bits" in " ".join((tmp_path / "joint" / page).read_text().split())


def test_transformers_opens_it(tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    tp.prune(tiny_checkpoint(tmp_path / "dense"), tmp_path / "out", **SETTINGS, bits=8)
    found, model = DequantisedCheckpoint(tmp_path / "out"), tiny_model()
    model.load_state_dict({name: found.read(name) for name in found.files})
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits
        assert torch.allclose(logits, model(TOKENS).logits, atol=1e-3)


def test_an_object_gets_the_values_of_the_file(tmp_path):
    source = tiny_checkpoint(tmp_path / "dense")
    tp.prune(source, tmp_path / "out", **SETTINGS, bits=4)
    model, found = tiny_model(), DequantisedCheckpoint(tmp_path / "out")
    tp.prune(model, **SETTINGS, bits=4)
    assert all(torch.equal(p, found.read(name)) for name, p in model.named_parameters())


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path):
    source = tiny_checkpoint(tmp_path / "dense")
    settings = {**SETTINGS, "bits": 4, "correct": True, "skip": ["down_proj"]}
    tp.prune(source, tmp_path / "whole", **settings)

    def stop(what: str, done: int, total: int) -> None:
        if what == "pruning" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tp.prune(source, tmp_path / "out", **settings, progress=stop)
    report = tp.prune(source, tmp_path / "out", **settings)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert tp.prune(source, tmp_path / "out", **settings).layers == report.layers
    with pytest.raises(CheckpointError, match="holds another run: quantized"):
        tp.prune(source, tmp_path / "out", **(settings | {"bits": 8}))


def test_without_text_eight_bits_are_rounded(tmp_path):
    source = tiny_checkpoint(tmp_path / "dense")
    report = tp.prune(source, tmp_path / "out", method="magnitude", pattern=0.5, bits=8)
    assert report.quantized["method"]["name"] == "round" and abs(report.sparsity - 0.5) < 0.02
    with pytest.raises(CalibrationError, match="GPTQ to 4 bits looks at what flows"):
        tp.prune(source, tmp_path / "other", method="magnitude", bits=4)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 3}, OptionError, "bits"),
        ({"group": 32}, OptionError, "give bits=8 or bits=4"),
        ({"bits": 4, "group": 24}, QuantizationError, r"layers\.0\.self_attn\.q_proj: groups of 24 do not divide"),
        ({"bits": 4, "refine": True}, OptionError, "prune with refine, then quantize"),
        ({"bits": 4, "method": "sparsellm"}, OptionError, "prune, then quantize"),
    ],
)
def test_what_cannot_be_joint_is_refused_before_anything_is_written(tmp_path, settings, error, message):
    source = tiny_checkpoint(tmp_path / "dense")
    with pytest.raises(error, match=message):
        tp.prune(source, tmp_path / "out", **(SETTINGS | settings))
    with pytest.raises(CheckpointError, match="quantised in place"):
        tp.prune(tiny_model(), tmp_path / "out", **SETTINGS, bits=4)
    assert not (tmp_path / "out").exists()


def test_matrices_without_a_place_are_refused_or_skipped(tmp_path):
    source = tiny_checkpoint(tmp_path / "gpt2", "gpt2")
    for run in (tp.quantize, tp.prune):
        with pytest.raises(UnsupportedModel, match="gpt2 stores 8 of 8 matrices transposed or stacked"):
            run(source, tmp_path / "out", bits=4, data=TOKENS)
    assert not (tmp_path / "out").exists()


def test_the_command_and_the_stage(tmp_path, command):
    source, text = tiny_checkpoint(tmp_path / "dense"), tiny_text(tmp_path)
    words = ("--method", "wanda", "--bits", 4, "--group", 32, "--data", text, "--samples", 8, "--window", 32)
    code, printed, _ = command("prune", source, tmp_path / "out", *words)
    assert code == 0 and "4 bits: " in printed
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["stages"][0]["prune"]["bits"] == 4 and recipe["stages"][0]["prune"]["group"] == 32
    run_recipe(read_recipe(tmp_path / "out" / "recipe.yaml", out=tmp_path / "again"))
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    recipe["stages"].append({"shrink": {"keep": 0.8}})
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(OptionError, match=r"shrink takes a model that is .* quantised there"):
        run_recipe(read_recipe(tmp_path / "more.yaml", out=tmp_path / "more"))
