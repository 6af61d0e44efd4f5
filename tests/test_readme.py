"""The README's commands and Python lines work as they stand there, and so do the cells of the notebook, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import documents
import pytest
from documents import ROOT

README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) < 90


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"\bmake ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text())
    assert {"demo", "test", "docs"} <= set(named)
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)


@pytest.mark.slow
def test_commands_and_lines_run(tmp_path: Path, monkeypatch, capsys):
    documents.furnish(tmp_path, README)
    documents.run_page(README, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch, capsys):
    """Its code cells in their order, on a local file in windows as short as the tiny model's."""
    documents.furnish(tmp_path, "")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            code = "".join(cell["source"]).replace('"window_tokens": 512', '"window_tokens": 64')
            code = re.sub(r'"hub:[^"]*"', '"text.jsonl"', code)
            exec(compile(code, "<cell>", "exec", dont_inherit=True), names)
    printed = capsys.readouterr().out
    assert "50% zeros" in printed and "dense" in printed and "parameters" in printed
