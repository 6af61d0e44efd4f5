"""The documents as tests read them: their links, the names they use, and the commands and Python lines in them, which run."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import tiny

import topiarist as tp

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
HUB_ID = "HuggingFaceTB/SmolLM2-135M"


def pages() -> dict[str, str]:
    """Text of README and of every page below docs/, by its path from the root."""
    files = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, lines) of every fenced block that is to be run."""
    return ((match[1], match[2]) for match in FENCE.finditer(text) if match[1] in ("bash", "python"))


def commands(block: str) -> list[list[str]]:
    """Words of every `topiarist` command of a block; comments end a line, a backslash continues it."""
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] == "topiarist"]


def furnish(folder: Path, text: str) -> None:
    """What the commands of a page find: a dense model under the names that pages give one, texts, and the pruned folder
    OUT where the page uses one that it does not make.

    `text.jsonl` is long enough for the default 128 windows of the tiny model's 64 tokens.
    """
    for name in ("MODEL", HUB_ID):
        tiny.tiny_checkpoint(folder / name)
    shell = [block for language, block in blocks(text) if language == "bash"]
    made = {words[3] for block in shell for words in commands(block) if len(words) > 3}
    if "OUT" not in made and re.search(r"\bOUT\b", "".join(shell)):
        tp.prune(folder / "MODEL", folder / "OUT", method="magnitude", pattern="2:4")
    words = tiny.tiny_text(folder, "raw.txt", paragraphs=140).read_text()
    (folder / "text.jsonl").write_text(json.dumps({"text": words}))
    (folder / "domain.txt").write_text(words[len(words) // 2 :])
    tiny.tiny_text(folder, "heldout.txt", seed=1)


def run_page(text: str, folder: Path, monkeypatch, capsys) -> None:
    """Run the bash and Python blocks of a page in their order, in `folder`; the Python ones share their names."""
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for language, block in blocks(text):
        if language == "bash":
            for words in commands(block):
                run_command(words, monkeypatch, capsys)
        elif language == "python":
            exec(compile(block, "<page>", "exec", dont_inherit=True), names)


def run_command(words: list[str], monkeypatch, capsys) -> None:
    """Run one command of the command line in this process; fails with what it printed."""
    from topiarist import cli

    # The tiny model sees 64 tokens; the default of 1,024 is for real ones.
    short = ["--window", "64"] if words[1] == "eval" and "--window" not in words else []
    monkeypatch.setattr(sys, "argv", [*words, *short])
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, f"{shlex.join(words)}: {capsys.readouterr().err}"
