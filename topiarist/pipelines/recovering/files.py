"""The recovered checkpoint: the pruned folder's files with trained weights in place of the old ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from topiarist.checkpoints.dequantised import QUANTIZATION
from topiarist.checkpoints.writing import MASKS, OutputFolder
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.common.finish import finish
from topiarist.pipelines.recovering.report import RecoverReport
from topiarist.pipelines.training.text import TrainingText
from topiarist.structured.spec import SPEC


def bytes_of(opened: OpenedModel) -> int:
    """Bytes of the weights as they will be written, which are those of the files: a quantised folder stays quantised."""
    return opened.nbytes if opened.checkpoint is None else opened.checkpoint.as_stored.weight_bytes()


def write_recovered(
    output: OutputFolder,
    opened: OpenedModel,
    model: Any,
    trained: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    report: RecoverReport,
    text: TrainingText,
) -> None:
    """Write the whole checkpoint and its papers.

    opened: the pruned model as it was opened. model: the same in memory, trained. trained: its changed parameters, by
    name. scales: those of a quantised folder, by their names there; it stays quantised. Raises CheckpointError if the disk
    is full; the trained state is then kept.
    """
    written = opened.write_changed(output, model, trained, scales)
    for name in (MASKS, SPEC):
        if (path := opened.beside(name)) is not None:
            shutil.copyfile(path, output.folder / name)
    config = None
    if scales:
        assert opened.checkpoint is not None
        config = {**opened.stored_config, QUANTIZATION: opened.checkpoint.as_stored.config[QUANTIZATION]}
        size = sum(output.tensor_bytes().values())
        report.weights = {**report.weights, "before": size, "after": size}
    finish(output, report, opened, text=text, written=written, config=config)
