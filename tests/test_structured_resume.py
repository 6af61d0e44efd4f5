"""A shrink killed at any moment resumes with the same call and ends in the same bytes; its folder needs no topiarist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from killing import Kept, Killed, assert_kills_change_nothing

import topiarist as tp
from topiarist.checkpoints.writing import STATES
from topiarist.pipelines.shrinking.distill import distill
from topiarist.pipelines.training import loop

TOKENS = tiny.tiny_tokens(16, 32)


def run(base: Path, out: Path, **options) -> tp.ShrinkReport:
    return tp.shrink(base, out, method="magnitude", keep=0.6, data=TOKENS, batch_size=4, layout="hetero", **options)


@pytest.mark.slow
def test_killed_anywhere_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch):
    base = tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=4)
    monkeypatch.setattr(loop, "SAVED_AFTER", 0.0)
    options = {"recover": tp.Distill(kind="lora", steps=4)}
    assert_kills_change_nothing(lambda out: run(base, out, **options), tmp_path, kills=4, each=2)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_killed_recovery_goes_on_to_the_same_bits(kind: str, monkeypatch):
    monkeypatch.setattr(loop, "SAVED_AFTER", 0.0)
    monkeypatch.setattr(loop, "SHARE", 1e9)
    model, settings, state = tiny.tiny_model(), tp.Distill(kind=kind, steps=8), Kept()

    def distilled(**options: Any) -> tuple[list[float], dict[str, Any]]:
        student = tiny.tiny_model(seed=1)
        return distill(student, model, settings, TOKENS, batch_size=2, seed=0, **options), student.state_dict()

    def kill(_: str, done: int, total: int) -> None:
        if done == 5:
            raise Killed

    steps: list[int] = []
    losses, weights = distilled()
    with pytest.raises(Killed):
        distilled(state=state, progress=kill)
    again, resumed = distilled(state=state, progress=lambda _, done, total: steps.append(done))
    assert steps == [5, 6, 7, 8] and again == losses
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_what_a_kill_after_the_last_file_left_goes(tmp_path: Path):
    base, out = tiny.tiny_checkpoint(tmp_path / "base"), tmp_path / "out"
    run(base, out)
    expected = sorted(path.name for path in tmp_path.rglob("*"))
    (out / STATES).mkdir()
    (out / STATES / "kept.safetensors").touch()
    run(base, out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == expected


def test_remote_code_opens_it_where_topiarist_is_not(tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base")
    run(tmp_path / "base", tmp_path / "out")
    with torch.no_grad():
        expected = tp.load_pruned(tmp_path / "out")(TOKENS[:1]).logits
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import sys, torch
sys.modules["topiarist"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True).eval()
tokens = torch.tensor({TOKENS[:1].tolist()})
torch.testing.assert_close(model(tokens).logits, torch.load({str(tmp_path / "expected.pt")!r}))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
