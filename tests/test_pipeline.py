"""The walk over the blocks: Grams, propagation, options that must not change the result, and those that must."""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import topiarist as tp
from topiarist.models.calls import capture_calls
from topiarist.models.derive import family_of
from topiarist.models.families import Matrix
from topiarist.models.opened import ObjectModel
from topiarist.pipelines.common.hidden_states import HiddenStates
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.learning.options import LearnOptions
from topiarist.pipelines.pruning.options import PruneOptions
from topiarist.pipelines.quantizing.options import QuantizeOptions
from topiarist.pipelines.recovering.options import RecoverOptions


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_replayed_blocks_give_the_models_own_hidden_states():
    """Per-type masks and positions are captured, not assumed: Gemma 3 alternates two kinds of block."""
    for family in ("gemma3_text", "opt", "gpt_neox", "mixtral"):
        model = tiny.tiny_model(family)
        tokens = tiny.tiny_tokens(6, 24)
        stream = BlockStream(ObjectModel(model), tokens, batch_size=4, device=torch.device("cpu"))
        for index, block in enumerate(model.get_submodule(family_of(model).blocks)):
            stream.advance(index, block)
        seen = []
        last = model.get_submodule(family_of(model).blocks)[-1]
        hook = last.register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model(tokens)
        hook.remove()
        torch.testing.assert_close(stream.hidden, seen[0], rtol=1e-5, atol=1e-5)


def test_grams_are_shared_by_input_and_equal_x_transpose_x():
    model = tiny.tiny_model()
    tokens = tiny.tiny_tokens(6, 24)
    source = ObjectModel(model)
    stream = BlockStream(source, tokens, batch_size=4, device=torch.device("cpu"))
    matrices = source.matrices(0)
    groups = stream.grams(0, model.model.layers[0], matrices)
    kinds = [[m.name.split(".")[1] for m in g.matrices] for g in groups]
    assert kinds == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert all(g.gram.tokens == 6 * 24 for g in groups)
    inputs = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    x = inputs[0].reshape(-1, 64).double()
    torch.testing.assert_close(groups[3].gram.matrix.double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_later_blocks_see_pruned_activations():
    """Pruning block 0 changes the Gram of block 1, and its weights are chosen on that."""
    tokens = tiny.tiny_tokens(8, 32)
    model = tiny.tiny_model()
    tp.prune(model, method="wanda", pattern="2:4", calibration=tokens)
    half = tiny.tiny_model()
    half.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    stream = BlockStream(ObjectModel(half), tokens, batch_size=8, device=torch.device("cpu"))
    stream.advance(0, half.model.layers[0])
    matrices = ObjectModel(half).matrices(1)
    groups = stream.grams(1, half.model.layers[1], matrices)
    gate = next(m for m in matrices if m.name == "mlp.gate_proj")
    gram = next(g.gram for g in groups if gate in g.matrices)
    expected = tp.solvers.Wanda()(gate.weight, gram, tp.NM(2, 4)).weight
    assert torch.equal(model.model.layers[1].mlp.gate_proj.weight, expected)


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": 16}, {"spill": True}])
def test_options_that_do_not_change_the_masks(options, tmp_path: Path):
    if options.get("spill"):
        options = {"spill": tmp_path / "spill"}
    tokens = tiny.tiny_tokens(16, 32)
    one, other = tiny.tiny_model(), tiny.tiny_model()
    tp.prune(one, method="sparsegpt", pattern="0.5", calibration=tokens, batch_size=8)
    tp.prune(other, method="sparsegpt", pattern="0.5", calibration=tokens, **options)
    for name, value in weights(one).items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [PruneOptions, QuantizeOptions, RecoverOptions, LearnOptions])
def test_settings_that_contradict_token_windows_are_refused(kind: Any):
    tokens, has = tiny.tiny_tokens(4, 32), {field.name for field in dataclasses.fields(kind)}
    agreeing = {"num_windows": 4, "window_tokens": 32, "bos": "never"}
    kind(data=tokens, **{name: value for name, value in agreeing.items() if name in has})
    for name, value in {"num_windows": 1, "window_tokens": 8, "bos": "always"}.items():
        if name in has:
            with pytest.raises(tp.CalibrationError, match=f"{name} {value} .* taken as they are: leave it out"):
                kind(data=tokens, **{name: value})


def test_a_spilled_file_has_no_name(tmp_path: Path):
    """So it goes with its values, however the process ends."""
    spilled = HiddenStates((2, 3, 4), torch.bfloat16, tmp_path / "spill")
    assert list((tmp_path / "spill").iterdir()) == []
    wanted = torch.randn(2, 3, 4).bfloat16()
    spilled.values.copy_(wanted)
    assert torch.equal(spilled.values, wanted)


def test_no_room_to_spill_is_said(tmp_path: Path, monkeypatch):
    tiny.tiny_checkpoint(tmp_path / "base")
    (tmp_path / "file").write_text("")

    def refused(said: str, spill: Path) -> None:
        with pytest.raises(tp.CheckpointError, match=said):
            tp.prune(tmp_path / "base", tmp_path / "out", method="wanda", data=tiny.tiny_tokens(4, 16), spill=spill)
        assert not (tmp_path / "out").exists()

    refused(r"cannot create .*file: File exists; choose another folder for --spill", tmp_path / "file")

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(r"cannot spill hidden states to .*spill: the disk is full", tmp_path / "spill")
    assert list((tmp_path / "spill").iterdir()) == []


def test_two_runs_write_the_same_bytes(tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    for out in ("a", "b"):
        tp.prune(tmp_path / "base", tmp_path / out, method="alps", pattern="0.6", calibration=tiny.tiny_tokens(8, 32))
    for path in (tmp_path / "a").iterdir():
        if path.name != "pruning_run.json":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_true_sequential_uses_pruned_inputs_inside_the_block():
    tokens = tiny.tiny_tokens(16, 32)
    model = tiny.tiny_model()
    tp.prune(model, method="wanda", calibration=tokens, true_sequential=True)
    half = tiny.tiny_model()  # everything of block 0 but down_proj is already pruned
    state = model.model.layers[0].state_dict()
    state["mlp.down_proj.weight"] = half.model.layers[0].mlp.down_proj.weight.detach().clone()
    half.model.layers[0].load_state_dict(state)
    stream = BlockStream(ObjectModel(half), tokens, batch_size=16, device=torch.device("cpu"))
    down = next(m for m in ObjectModel(half).matrices(0) if m.name == "mlp.down_proj")
    gram = stream.grams(0, half.model.layers[0], [down])[0].gram
    expected = tp.solvers.Wanda()(down.weight, gram, tp.NM(2, 4)).weight
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])  # a mask of gemma2 has the size of its batch
def test_stages_follow_the_forward(family: str):
    model = tiny.tiny_model(family)
    source = ObjectModel(model)
    stream = BlockStream(source, tiny.tiny_tokens(2, 16), batch_size=2, device=torch.device("cpu"))
    matrices = source.matrices(0)
    stages = stream.stages(0, model.model.layers[0], matrices)
    assert {m for stage in stages for m in stage} == set(matrices)
    assert [len(stage) for stage in stages] == ([3, 1, 4, 4] if family == "mixtral" else [3, 1, 2, 1])


def test_capturing_leaves_the_model_as_it_was():
    model = tiny.tiny_model()
    before = list(model.model.layers)
    calls = capture_calls(model, family_of(model), tiny.tiny_tokens(2, 8))
    assert list(model.model.layers) == before and len(calls) == 2
    assert "position_embeddings" in calls[0].kwargs


def test_a_loaded_model_can_be_saved(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = tiny.tiny_model("qwen3_moe")
    report = tp.prune(
        model,
        tmp_path / "out",
        method="magnitude",
        calibration=tiny.tiny_tokens(8, 32),
        tokenizer=tiny.tiny_tokenizer(),
    )
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert reloaded.config.pruning_config["method"] == "magnitude"
    assert report.output == str(tmp_path / "out")
    with pytest.raises(tp.CheckpointError, match="method name was 'magnitude' and is 'alps'"):
        tp.prune(model, tmp_path / "out", calibration=tiny.tiny_tokens(8, 32))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_magnitude_needs_no_text(family: str, tmp_path: Path):
    """The zeros are those of a run with text; errors are the share of the squares that went."""
    tiny.tiny_checkpoint(tmp_path / "base", family)
    seen = tp.prune(tmp_path / "base", tmp_path / "seen", method="magnitude", calibration=tiny.tiny_tokens(64, 32))
    blind = tp.prune(tmp_path / "base", tmp_path / "blind", method="magnitude", allocation="linear", pattern="2:4")
    again = tp.prune(tmp_path / "base", tmp_path / "uniform", method="magnitude")
    assert [layer.name for layer in again.layers] == [layer.name for layer in seen.layers]
    for path in (tmp_path / "seen").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "uniform" / path.name).read_bytes()
    assert blind.sparsity == pytest.approx(again.sparsity) and again.calibration == {} and not again.warnings
    model, pruned = tiny.tiny_model(family), tiny.tiny_model(family)
    report = tp.prune(pruned, method="magnitude", pattern="0.7")
    assert report.sparsity == pytest.approx(0.7, abs=1e-3)
    layer = next(m for m in report.layers if m.name.endswith(("q_proj", "c_attn")))
    before, after = (net.get_submodule(layer.name).weight.detach().double() for net in (model, pruned))
    assert layer.error == pytest.approx(float((before - after).square().sum() / before.square().sum()))


def test_zeros_of_a_model_that_was_pruned_are_said(tmp_path: Path):
    base, tokens = tiny.tiny_checkpoint(tmp_path / "base"), tiny.tiny_tokens(4, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tp.prune(base, tmp_path / "once", method="wanda", pattern="2:4", calibration=tokens)
    assert not any("already" in str(warning.message) for warning in caught)
    said = r"pruned already: 50\.0% of the first block's weights are zeros, by wanda 2:4\. They count"
    with pytest.warns(UserWarning, match=said):
        twice = tp.prune(tmp_path / "once", tmp_path / "twice", method="wanda", pattern="1:4", calibration=tokens)
    assert any("They count" in note for note in twice.warnings) and twice.sparsity == pytest.approx(0.75)
    unsaid = tp.prune(tiny.tiny_model(), method="magnitude", pattern="0.7")
    assert not unsaid.warnings


def test_any_torch_module_can_be_pruned():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).train()
    model = nn.Sequential(nn.Linear(16, 32), encoder, nn.Linear(32, 8))
    batches = [torch.randn(4, 10, 16) for _ in range(5)]
    report = tp.prune_module(model, batches, method="sparsegpt", pattern="2:4", skip=["^2$"])
    names = {layer.name for layer in report.layers}
    assert "0" in names and "1.linear1" in names and "2" not in names
    assert tp.NM(2, 4).holds(model[0].weight != 0)
    with pytest.raises(tp.CalibrationError, match="no batches"):
        tp.prune_module(model, [])


def test_inputs_of_any_module_are_those_of_evaluation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    evaluated, before, x = copy.deepcopy(model).eval(), copy.deepcopy(model.state_dict()), 3 + torch.randn(64, 8)
    for given in (model, evaluated):
        tp.prune_module(given, [x], method="sparsegpt", pattern="2:4")
    assert torch.equal(model[2].weight, evaluated[2].weight) and model[1].training and not evaluated[1].training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_layer_of_any_module_that_no_pattern_fits_can_be_skipped():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    with pytest.raises(tp.PatternError, match="skip this layer"):
        tp.prune_module(model, [torch.randn(4, 6)], method="magnitude")
    report = tp.prune_module(model, [torch.randn(4, 6)], method="magnitude", skip=["^0$"])
    assert [layer.name for layer in report.layers] == ["1"]


def test_conv1d_is_seen_transposed():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 4)
    matrix = Matrix("c", layer, transposed=True)
    assert matrix.shape == (6, 4)
    matrix.assign(torch.ones(6, 4))
    assert torch.equal(layer.weight, torch.ones(4, 6))


def test_errors_of_solvers_name_the_layer_once():
    model = tiny.tiny_model()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(1e30)
    with pytest.raises(
        tp.NumericalError, match=r"layer model\.layers\.1\.self_attn\.q_proj.*Wanda: NaN or Inf in the Gram"
    ):
        tp.prune(model, method="wanda", calibration=tiny.tiny_tokens(4, 16))
