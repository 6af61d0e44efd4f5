"""Perplexity against a plain loop; the audit against what was written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch

import topiarist as tp
from topiarist.evaluation.perplexity import compare


def test_perplexity_agrees_with_a_plain_loop():
    model, tokens = tiny.tiny_model(), tiny.tiny_tokens(5, 24)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in tokens:
            log_probabilities = model(row[None]).logits[0].double().log_softmax(-1)
            for position in range(len(row) - 1):
                total -= float(log_probabilities[position, row[position + 1]])
                count += 1
    result = tp.perplexity(model, tokens, batch_size=2)
    assert result.value == pytest.approx(math.exp(total / count), rel=1e-5)
    assert (result.window, result.tokens, result.dtype) == (24, count, "float32")


def test_compare_puts_dense_first_and_finds_the_base(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_checkpoint(Path("base"))
    text = tp.text_files(tiny.tiny_text(tmp_path))
    tp.prune("base", "out", method="magnitude", pattern="0.5", calibration=tiny.tiny_tokens(4, 16))
    rows = compare(["out"], [text], window=32, max_windows=3)
    assert [(row.model, row.dense) for row in rows] == [("base", True), ("out", False)]
    assert len(rows[0].results) == 1 and rows[0].results[0].tokens == 3 * 31
    assert [row.model for row in compare(["out"], [text], window=32, max_windows=1, reference=False)] == ["out"]
    assert [row.model for row in compare(["out", "base"], [text], window=32, max_windows=1)] == ["base", "out"]


def test_audit_sees_a_broken_pattern(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune(tmp_path / "base", tmp_path / "out", method="magnitude", calibration=tiny.tiny_tokens(4, 16))
    name = "model.layers.1.mlp.up_proj.weight"
    shard = next(p for p in (tmp_path / "out").glob("*.safetensors") if name in load_file(p))
    tensors = load_file(shard)
    tensors[name][0] = 1.0
    save_file(tensors, shard, metadata={"format": "pt"})
    _, matrices = tp.audit(tmp_path / "out")
    assert [m.name for m in matrices if not m.holds] == [name.removesuffix(".weight")]
    _, dense = tp.audit(tmp_path / "base")
    assert all(m.holds is None and m.pattern is None and m.sparsity == 0 for m in dense)
