"""Block refinement: closer to the dense block, same zeros, never worse, and part of what a resume remembers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import tiny
import torch

import topiarist as tp
from topiarist.pipelines.pruning.refine import Refine

QUICK = Refine(epochs=4, learning_rate=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("pattern", ["2:4", "0.6"])
@pytest.mark.parametrize("target", ["current", "dense"])
def test_refinement_helps_and_keeps_the_pattern(family: str, pattern: str, target: Literal["current", "dense"]):
    refine = replace(QUICK, target=target)
    tokens, unseen = tiny.tiny_tokens(32, 32), tiny.tiny_tokens(8, 32, seed=9)
    plain, refined, dense = (tiny.tiny_model(family) for _ in range(3))
    tp.prune(plain, method="sparsegpt", pattern=pattern, calibration=tokens, batch_size=4)
    report = tp.prune(refined, method="sparsegpt", pattern=pattern, calibration=tokens, batch_size=4, refine=refine)
    assert len(report.refined) == 2
    assert all(block.after < block.before and block.best_epoch > 0 for block in report.refined)
    # The first block is pruned alike in both, so its zeros must be the same ones.
    for (name, a), b in zip(plain.named_parameters(), refined.parameters(), strict=True):
        if ".0." in name and a.ndim >= 2:
            assert torch.equal(a == 0, b == 0), name
            assert not (torch.signbit(b) & (b == 0)).any()
        if a.ndim == 1:
            assert torch.equal(a, b), f"{name} was trained without being asked for"
    assert tiny.logits_error(refined, dense, unseen) < tiny.logits_error(plain, dense, unseen)
    assert report.sparsity == pytest.approx(0.5 if pattern == "2:4" else 0.6, abs=2e-3)


def test_a_harmful_refinement_is_not_kept():
    plain, other = tiny.tiny_model(), tiny.tiny_model()
    tokens = tiny.tiny_tokens(16, 32)
    options = {"method": "alps", "calibration": tokens, "batch_size": 4}
    tp.prune(plain, **options)
    report = tp.prune(other, refine=Refine(epochs=2, learning_rate=10.0), **options)
    assert [block.best_epoch for block in report.refined] == [0, 0]
    assert all(block.after == block.before for block in report.refined)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_a_step_is_a_window_unless_told_otherwise():
    options, refine = {"method": "wanda", "calibration": tiny.tiny_tokens(8, 16)}, Refine(epochs=1)
    used = [
        tp.prune(tiny.tiny_model(), **options, **more).calibration["batch_size"]
        for more in ({}, {"refine": refine}, {"refine": refine, "batch_size": 4})
    ]
    assert used == [8, 1, 4]


@pytest.mark.parametrize("held_out", [0.0, 0.99])
def test_something_is_left_to_train_on(held_out: float):
    refine = replace(QUICK, held_out=held_out)
    report = tp.prune(
        tiny.tiny_model(), method="wanda", calibration=tiny.tiny_tokens(1, 32).repeat(2, 1), refine=refine
    )
    assert all(block.after < block.before for block in report.refined)


def test_norms_are_trained_when_asked_for():
    model, dense = tiny.tiny_model(), tiny.tiny_model()
    refine = Refine(epochs=4, norms=True)
    tp.prune(model, method="wanda", calibration=tiny.tiny_tokens(16, 32), refine=refine)
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, dense.model.layers[0].input_layernorm.weight)
    assert torch.equal(model.model.norm.weight, dense.model.norm.weight)


def test_bf16_weights_learn_through_fp32_masters():
    tokens = tiny.tiny_tokens(32, 32)
    model = tiny.tiny_model(dtype=torch.bfloat16)
    report = tp.prune(
        model, method="wanda", calibration=tokens, batch_size=4, refine=Refine(epochs=4, learning_rate=0.003)
    )
    assert all(block.after < block.before for block in report.refined)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_the_dense_target_is_the_dense_models_own_hidden_state(monkeypatch):
    import topiarist.pipelines.pruning.block as block

    real, seen = block.refine_block, []

    def keeps_targets(settings, stream, index, module, matrices, targets, name):
        seen.append(targets.clone())
        return real(settings, stream, index, module, matrices, targets, name)

    monkeypatch.setattr(block, "refine_block", keeps_targets)
    tokens, dense = tiny.tiny_tokens(8, 32), tiny.tiny_model()
    refine = replace(QUICK, target="dense", epochs=1)
    tp.prune(tiny.tiny_model(), method="magnitude", calibration=tokens, batch_size=4, refine=refine)
    with torch.no_grad():
        states = dense.model(tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(seen[0], states[1], atol=1e-6)
    normed = dense.model.norm(seen[1])  # the last state that transformers tells has gone through the final norm
    assert torch.allclose(normed, states[2], atol=1e-5)


@pytest.mark.parametrize("target", ["current", "dense"])
def test_a_resumed_run_has_the_same_refinements(target: Literal["current", "dense"], tmp_path: Path, monkeypatch):
    import topiarist.pipelines.pruning.block as block

    tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=3)
    refine = replace(QUICK, target=target)
    options = {"method": "wanda", "calibration": tiny.tiny_tokens(16, 32), "batch_size": 4, "refine": refine}
    whole = tp.prune(tmp_path / "base", tmp_path / "whole", **options)
    real, calls = block.refine_block, []

    def stops_in_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(block, "refine_block", stops_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        tp.prune(tmp_path / "base", tmp_path / "out", **options)
    monkeypatch.setattr(block, "refine_block", real)
    resumed = tp.prune(tmp_path / "base", tmp_path / "out", **options)
    assert resumed.refined == whole.refined and len(resumed.refined) == 3
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    with pytest.raises(tp.CheckpointError, match="refine epochs was"):
        tp.prune(tmp_path / "base", tmp_path / "out", **(options | {"refine": True}))
