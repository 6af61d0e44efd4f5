"""A shrink killed at any moment resumes with the same call and ends in the same bytes; its folder needs no topiarist."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import tiny
import torch

import topiarist as tp

TOKENS = tiny.tiny_tokens(16, 32)


def run(base: Path, out: Path, **options) -> tp.ShrinkReport:
    return tp.shrink(base, out, method="magnitude", keep=0.6, data=TOKENS, batch_size=4, layout="hetero", **options)


def contents(folder: Path) -> dict[str, str]:
    """Hashes of every file; only the timings may differ between runs."""
    files = (path for path in sorted(folder.iterdir()) if path.name != "pruning_run.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_killed_anywhere_resumes_to_the_same_bytes(tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=4)
    options = {"recover": tp.Distill(kind="lora", steps=4)}
    run(tmp_path / "base", tmp_path / "warm-up", **options)
    started = time.perf_counter()
    run(tmp_path / "base", tmp_path / "whole", **options)
    duration = time.perf_counter() - started
    expected = contents(tmp_path / "whole")
    generator, kills = random.Random(0), 0
    for number in range(3):
        out = tmp_path / f"killed-{number}"
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                try:
                    run(tmp_path / "base", out, **options)
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            time.sleep(generator.uniform(0.02, 0.9) * duration)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "a resumed run failed"
            kills += os.WIFSIGNALED(status)
        run(tmp_path / "base", out, **options)
        assert contents(out) == expected
    assert kills >= 2


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
