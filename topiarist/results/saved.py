"""Measurements that come after the run: kept beside the checkpoint, shown on its page and card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topiarist.checkpoints.access import check_readable
from topiarist.checkpoints.atomic import write_atomically
from topiarist.checkpoints.locking import FolderLock
from topiarist.checkpoints.writing import REPORT
from topiarist.core.errors import CheckpointError
from topiarist.results.card import with_measurements
from topiarist.results.pages.render import report_page
from topiarist.results.report import as_written
from topiarist.results.result import BENCHMARK, CARD, EVALUATION, PAGE, Result, json_if_any

WAIT = 60.0
"""Seconds that a writer waits for another one, which takes far less."""


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else changes what stands beside the checkpoint meanwhile: each would write over what the other has added.

    Raises CheckpointError if there is no folder, or if somebody holds it for longer than a moment.
    """
    if not folder.is_dir():
        raise CheckpointError(f"result folder {folder} does not exist")
    lock = FolderLock(folder)
    lock.acquire(wait=WAIT)
    try:
        yield
    finally:
        lock.release()


def refresh(folder: str | Path, others: Sequence[Result] = ()) -> Path:
    """Write the page again, and the measured part of the model card; the rest of the card stays as it is.

    others: results beside it, of which the page names the nearest dense model that was only quantised.
    Returns the page's path. Raises CheckpointError if the folder is no result.
    """
    folder = Path(folder)
    with _alone(folder):
        _refresh(folder, others)
    return folder / PAGE


def _refresh(folder: Path, others: Sequence[Result] = ()) -> None:
    for name, text in renewed_papers(folder, others).items():
        write_atomically(folder / name, text)


def renewed_papers(folder: Path, others: Sequence[Result] = ()) -> dict[str, str]:
    """Return what `refresh` writes, by file. Raises CheckpointError as it does."""
    result, card = Result.from_folder(folder), folder / CARD
    with as_written(folder):
        papers = {PAGE: report_page(result, others)}
        if card.is_file():
            papers[CARD] = with_measurements(_text_of(card), result)
    return papers


def _text_of(card: Path) -> str:
    """The card as it stands, which people edit. Raises CheckpointError if it cannot be read."""
    try:
        return card.read_text(encoding="utf-8")
    except OSError:
        check_readable(card)
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{card} is not UTF-8 ({error.reason}): convert it, or delete it") from error


def save_evaluation(folder: str | Path, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Put measurements beside a checkpoint and show them on its page. What was measured the same way is replaced.

    found: {"perplexity": [...], "tasks": [...]}, each entry with the dense model's figure under "dense".
    """
    path = Path(folder) / EVALUATION
    identity = {
        "perplexity": ("digest", "window", "dtype"),
        "tasks": ("task", "metric", "digest", "num_items", "dtype"),
    }
    merged = {}
    with _alone(path.parent):
        known = json_if_any(path)
        with as_written(path.parent):
            for kind, keys in identity.items():
                every = [*known.get(kind, []), *found.get(kind, [])]
                merged[kind] = list({tuple(entry[k] for k in keys): entry for entry in every}.values())
        _write(path, merged)
    return path


def save_benchmark(folder: str | Path, found: Mapping[str, Any]) -> Path:
    """Put speeds beside a checkpoint (machine, verdict, speeds, ...) and show them on its page."""
    path = Path(folder) / BENCHMARK
    with _alone(path.parent):
        _write(path, found)
    return path


def _write(path: Path, found: Mapping[str, Any]) -> None:
    """Write figures, and show them if there is a report to show them with."""
    write_atomically(path, json.dumps(found, indent=2) + "\n")
    if (path.parent / REPORT).is_file():
        _refresh(path.parent)
