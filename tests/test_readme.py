"""The README's commands and Python lines work as they stand there, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import tiny
import torch

import topiarist as tp
from topiarist import cli
from topiarist.models.families import FAMILIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("topiarist ", "make "))]


def calibration_file(folder: Path) -> None:
    """text.jsonl, long enough for the default 128 windows of the tiny model's 64 tokens."""
    text = tiny.tiny_text(folder, "raw.txt", paragraphs=140).read_text()
    (folder / "text.jsonl").write_text(json.dumps({"text": text}))
    (folder / "domain.txt").write_text(text[len(text) // 2 :])


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_commands_run(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_checkpoint(tmp_path / "MODEL")
    calibration_file(tmp_path)
    tiny.tiny_text(tmp_path, "heldout.txt", seed=1)
    lines = [line for line in commands() if line.startswith("topiarist ")]
    assert {line.split()[1] for line in lines} >= {"prune", "eval", "inspect", "learn", "apply"}
    for line in lines:
        # The tiny model sees 64 tokens, the commands' default of 1024 is for real ones.
        extra = ["--window", "64"] if line.split()[1] == "eval" else []
        monkeypatch.setattr(sys, "argv", [*shlex.split(line), *extra])
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code, f"{line}: {capsys.readouterr().err}"


def test_python_lines_run(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_checkpoint(tmp_path / "path" / "or" / "hub-id")
    calibration_file(tmp_path)
    gram = tp.Gram(16)
    gram.add(torch.randn(64, 16))
    names = {"weight": torch.randn(8, 16), "gram": gram}
    for block in blocks("python"):
        exec(block, names)
    assert tp.NM(2, 4).holds(names["solution"].mask)
    assert names["report"].sparsity == names["learned"].sparsity == 0.5


def test_families_are_listed():
    assert all(f"`{family}`" in README for family in FAMILIES)
