"""What stays as it was is said, with its reason: with what a run changed it is every matrix of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

import topiarist as tp
from topiarist.models.opened import open_model
from topiarist.pipelines.common.dense import left_dense, why_dense


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_changed_and_left_are_all_matrices(family: str):
    source = open_model(tiny.tiny_model(family))
    shapes = source.shapes()
    tied = getattr(source.model, "all_tied_weights_keys", None) or {}
    whole = sum(p.numel() for n, p in source.model.named_parameters() if p.ndim > 1 and n not in tied)
    reasons = why_dense({name: None for name in shapes if "0." in name}, ["attn"])
    for changed in (set(shapes), {name for name in shapes if ".1." in name}, set()):
        rows = left_dense(source, changed, reasons)
        weights = sum(out * width for name, (out, width) in shapes.items() if name in changed)
        assert weights + sum(row["weights"] for row in rows) == whole
        assert rows == sorted(rows, key=lambda row: -row["weights"]) and all(row["why"] for row in rows)
    why = {row["why"] for row in rows}
    assert {"embeddings", "skipped by the user", "dense in the allocation", "not called for this text"} <= why
    assert ("a router" in why) == (family == "mixtral")


def test_the_table_is_printed_and_kept(tmp_path: Path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_checkpoint(tmp_path / "model")
    code, printed, _ = command("prune", "model", "out", "--method", "magnitude", "--skip", "v_proj")
    assert code == 0 and "left as it was" in printed and "skipped by the user" in printed
    rows = json.loads((tmp_path / "out" / "pruning_report.json").read_text())["dense"]
    assert {(row["what"], row["matrices"]) for row in rows if row["why"] == "skipped by the user"} == {
        ("self_attn.v_proj", 2)
    }
    assert "What stayed as it was" in (tmp_path / "out" / "pruning_report.html").read_text()
    folder = tp.prune("model", "again", method="magnitude", skip=["v_proj"])
    assert folder.dense == rows == tp.prune(tiny.tiny_model(), method="magnitude", skip=["v_proj"]).dense


def test_a_run_that_would_prune_nothing_is_refused(tmp_path: Path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_checkpoint(tmp_path / "model")
    code, _, error = command("prune", "model", "out", "--method", "magnitude", "--skip", ".*")
    assert code == 2 and "nothing is left to prune" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "embeddings"), [("full", True), ("full", False), ("lora", False)])
def test_what_a_training_changed_did_not_stay(kind: str, embeddings: bool, tmp_path: Path):
    tp.prune(tiny.tiny_checkpoint(tmp_path / "model"), tmp_path / "pruned", method="magnitude", skip=["v_proj"])
    text = {"data": tiny.tiny_tokens(20, 32), "tokens": 64, "sequences": 2, "held_out": 2}
    tp.recover(tmp_path / "pruned", tmp_path / "out", kind=kind, embeddings=embeddings, **text)
    rows = json.loads((tmp_path / "out" / "pruning_report.json").read_text())["dense"]
    assert {row["what"] for row in rows} == (set() if embeddings else {"lm_head", "model.embed_tokens"})
    cut = {"method": "magnitude", "units": ["channels"], "data": tiny.tiny_tokens(8, 32)}
    rows = tp.shrink(tmp_path / "model", tmp_path / "small", recover={"kind": kind, "steps": 1}, **cut).dense
    assert {row["what"] for row in rows} == {"lm_head", "model.embed_tokens"}
