"""What the tables of learned masks share: texts, and cells that are finished once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import topiarist as tp
from benchmarks.quality import documents
from demo.assets import model_dir, text_dir
from topiarist.data import Windows, evaluation_windows, load_tokenizer, read_documents


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """Cells by name: one JSON object a line."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {cell["name"]: cell for cell in map(json.loads, lines)}


def cell(path: Path, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The cell of that name, made and written down if it is not there yet."""
    found = finished(path).get(name)
    if found is None:
        started = time.process_time()
        values = dict(make())
        found = {"name": name, **values, "cpu_seconds": round(time.process_time() - started)}
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
    return found


def windows(texts: Any, count: int, length: int = 1024) -> Windows:
    """The first windows of some text, tokenised as the demo model wants it."""
    return evaluation_windows(texts, load_tokenizer(model_dir()), window=length, max_windows=count)


def demo_training_text() -> list[str]:
    return list(read_documents(tp.text_files(text_dir() / "calibration.jsonl")))


def demo_windows(count: int) -> dict[str, Windows]:
    names = ("c4", "wikipedia")
    return {name: windows(tp.text_files(text_dir() / f"heldout_{name}.jsonl"), count) for name in names}


def wikipedia(data: Path, *, held_out: bool) -> list[str]:
    return documents(data / "train" / "wikipedia.jsonl.gz", held_out=held_out)


def web(data: Path) -> list[str]:
    return [d for n in ("openwebtext", "c4") for d in documents(data / "train" / f"{n}.jsonl.gz", held_out=False)]


def books(folder: Path) -> list[str]:
    """Every .txt of a folder, by name, with the line breaks inside its paragraphs undone."""
    texts = [f.read_text(encoding="utf-8") for f in sorted(folder.glob("*.txt"))]
    return ["\n\n".join(" ".join(p.split()) for p in text.split("\n\n") if p.strip()) for text in texts]
