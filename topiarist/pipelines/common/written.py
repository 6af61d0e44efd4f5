"""What a one-shot run leaves beside the weights: report, page, card, config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from topiarist import __about__
from topiarist.checkpoints.reading import Checkpoint
from topiarist.checkpoints.streaming import SHARD_BYTES
from topiarist.checkpoints.writing import REPORT, OutputFolder
from topiarist.core.errors import CheckpointError
from topiarist.data import Windows
from topiarist.models.opened import OpenedModel
from topiarist.results.pages import PAGE, Result, model_card, report_page
from topiarist.results.report import Report

RESULT_DIGEST = "result_digest"
"""Of a model object after it was pruned, in its report."""


def finish(output: OutputFolder, checkpoint: Checkpoint, report: Report, windows: Windows) -> None:
    for name, text in _side_texts(report, windows).items():
        output.write_text(name, text)
    config = {**checkpoint.config, "pruning_config": report.pruning_config(__about__.__version__)}
    output.finish(config, report.to_dict(), side_files=checkpoint.folder)


@contextmanager
def saved_beside(
    model: Any, tokenizer: Any, folder: Path, *, named: Path | None = None, cure: str = ""
) -> Iterator[None]:
    """save_pretrained into `folder`, where nothing stays if that, or what follows inside, finds no room.

    Raises CheckpointError that says so, of `named` if the user knows the folder by another name.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        yield
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(f"cannot write {named or folder}: {error}{cure}") from error


def dense_digest(source: OpenedModel, out: Path) -> str:
    """The digest of a model; of an object that an earlier call pruned to `out`, the one it had before."""
    digest = source.digest()
    if source.checkpoint is None and (out / REPORT).is_file():
        written = json.loads((out / REPORT).read_text(encoding="utf-8"))
        if written.get(RESULT_DIGEST) == digest:
            return written["fingerprint"]["model"]
    return digest


def save_loaded(source: OpenedModel, tokenizer: Any, output: OutputFolder, report: Report, windows: Windows) -> None:
    """A model object and its papers. transformers knows names and ties, so it writes, and the files are moved."""
    written = output.states / "written"
    with saved_beside(source.model, tokenizer, written, named=output.folder):
        config = Checkpoint(written).config
    output.take_files(written)
    for name, text in _side_texts(report, windows).items():
        output.write_text(name, text)
    config = {**config, "pruning_config": report.pruning_config(__about__.__version__)}
    output.finish(config, {**report.to_dict(), RESULT_DIGEST: source.digest()}, side_files=written)


def weights_of(model: nn.Module, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Size and dtype of the dense model, for the report."""
    if checkpoint is not None:
        return {"bytes": checkpoint.weight_bytes(), "dtype": str(checkpoint.dtype()).removeprefix("torch.")}
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {"bytes": sum(p.nbytes for p in model.parameters()), "dtype": str(dtype).removeprefix("torch.")}


def _side_texts(report: Report, windows: Windows) -> dict[str, str]:
    # Without the timings, so that the same run writes the same page; `topiarist report` shows them.
    result = Result(report.to_dict(), __about__.__version__)
    return {
        "README.md": model_card(result),
        PAGE: report_page(result),
        "pruning_run.json": json.dumps(report.run, indent=2) + "\n",
        "pruning_calibration.json": windows.record(),
    }
