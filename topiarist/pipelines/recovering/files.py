"""The recovered checkpoint: the pruned folder's files with trained weights in place of the old ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from topiarist.checkpoints.writing import MASKS, OutputFolder
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.common.finish import finish
from topiarist.pipelines.recovering.report import RecoverReport
from topiarist.pipelines.training.text import TrainingText
from topiarist.structured.spec import SPEC


def write_recovered(
    output: OutputFolder,
    opened: OpenedModel,
    model: Any,
    trained: Mapping[str, Tensor],
    report: RecoverReport,
    text: TrainingText,
) -> None:
    """Write the whole checkpoint and its papers.

    opened: the pruned model as it was opened. model: the same in memory, trained. trained: its changed parameters, by
    name. Raises CheckpointError if the disk is full; the trained state is then kept.
    """
    written = opened.write_changed(output, model, trained)
    for name in (MASKS, SPEC):
        if (path := opened.beside(name)) is not None:
            shutil.copyfile(path, output.folder / name)
    finish(output, report, opened, text=text, written=written)
