"""Measurements that come after the run: kept beside the checkpoint, shown on its page and card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from topiarist.checkpoints.atomic import write_atomically
from topiarist.checkpoints.writing import REPORT
from topiarist.results.card import with_measurements
from topiarist.results.pages.render import report_page
from topiarist.results.report import as_written
from topiarist.results.result import BENCHMARK, CARD, EVALUATION, PAGE, Result, json_if_any


def refresh(folder: str | Path, others: Sequence[Result] = ()) -> Path:
    """Write the page again, and the measured part of the model card; the rest of the card stays as it is.

    others: results beside it, of which the page names the nearest dense model that was only quantised.
    Returns the page's path. Raises CheckpointError if the folder is no result.
    """
    folder = Path(folder)
    for name, text in renewed_papers(folder, others).items():
        write_atomically(folder / name, text)
    return folder / PAGE


def renewed_papers(folder: Path, others: Sequence[Result] = ()) -> dict[str, str]:
    """Return what `refresh` writes, by file. Raises CheckpointError as it does."""
    result, card = Result.from_folder(folder), folder / CARD
    with as_written(folder):
        papers = {PAGE: report_page(result, others)}
        if card.is_file():
            papers[CARD] = with_measurements(card.read_text(encoding="utf-8"), result)
    return papers


def save_evaluation(folder: str | Path, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Put measurements beside a checkpoint and show them on its page. What was measured the same way is replaced.

    found: {"perplexity": [...], "tasks": [...]}, each entry with the dense model's figure under "dense".
    """
    path = Path(folder) / EVALUATION
    known = json_if_any(path)
    identity = {
        "perplexity": ("digest", "window", "dtype"),
        "tasks": ("task", "metric", "digest", "num_items", "dtype"),
    }
    merged = {}
    with as_written(Path(folder)):
        for kind, keys in identity.items():
            entries = {tuple(entry[k] for k in keys): entry for entry in [*known.get(kind, []), *found.get(kind, [])]}
            merged[kind] = list(entries.values())
    write_atomically(path, json.dumps(merged, indent=2) + "\n")
    if (path.parent / REPORT).is_file():
        refresh(folder)
    return path


def save_benchmark(folder: str | Path, found: Mapping[str, Any]) -> Path:
    """Put speeds beside a checkpoint (machine, verdict, speeds, ...) and show them on its page."""
    path = Path(folder) / BENCHMARK
    write_atomically(path, json.dumps(found, indent=2) + "\n")
    if (path.parent / REPORT).is_file():
        refresh(folder)
    return path
