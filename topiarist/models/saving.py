"""Model objects written by transformers, which knows names and ties, into the folder of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from topiarist.checkpoints.atomic import disk_errors
from topiarist.checkpoints.states import KEPT
from topiarist.checkpoints.streaming import SHARD_BYTES
from topiarist.checkpoints.writing import OutputFolder


def write_model(output: OutputFolder, model: Any, tokenizer: Any = None) -> Path:
    """Write a model object's weights; config and tokenizer stay in the folder that is returned."""
    written = save_model(output, model, tokenizer)
    output.take_files(written)
    return written


def save_model(output: OutputFolder, model: Any, tokenizer: Any = None) -> Path:
    """Let transformers write a model into the states of `output`. Returns its folder.

    Raises CheckpointError, and leaves nothing of it, if the disk cannot hold it.
    """
    written = output.states / "written"
    with disk_errors(f"cannot write to {output.folder}", cure=KEPT):
        try:
            shutil.rmtree(written, ignore_errors=True)
            model.save_pretrained(written, max_shard_size=SHARD_BYTES)
            if tokenizer is not None:
                tokenizer.save_pretrained(written)
        except BaseException:
            shutil.rmtree(written, ignore_errors=True)
            raise
    return written
