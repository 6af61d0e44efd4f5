"""The recovered checkpoint: the pruned folder's files with trained weights in place of the old ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from topiarist.checkpoints.streaming import tensor_bytes
from topiarist.checkpoints.writing import MASKS, OutputFolder
from topiarist.core.errors import CheckpointError
from topiarist.models.folder import FolderModel
from topiarist.models.opened import OpenedModel
from topiarist.models.saving import write_model
from topiarist.pipelines.common.finish import CALIBRATION, finish
from topiarist.pipelines.recovering.report import RecoverReport
from topiarist.pipelines.training.text import TrainingText
from topiarist.results.result import json_if_any
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
    if not isinstance(opened, FolderModel):  # transformers knows the names of a model object, so it writes it
        written = write_model(output, model, opened.loaded_tokenizer)
        finish(output, report, opened, text=text, written=written)
        return
    checkpoint, changed = opened.checkpoint, _on_disk(opened, model, trained)
    output.done()
    output.write_files(
        {name: checkpoint.stored(name) for name in checkpoint.files},
        lambda name: [tensor_bytes(changed[name])] if name in changed else checkpoint.chunks(name),
    )
    for name in (MASKS, SPEC):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, output.folder / name)
    seen = json_if_any(checkpoint.folder / CALIBRATION).get("passages", [])
    finish(output, report, opened, text=replace(text, passages=text.passages | {int(found, 16) for found in seen}))


def _on_disk(opened: FolderModel, model: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters as the folder stores them: its names, its dtypes, experts one by one, ties under each name."""
    wanted = {id(parameter) for parameter in trained.values()}
    values = dict(model.named_parameters(remove_duplicate=False))
    names = {name for name, parameter in values.items() if id(parameter) in wanted and name in opened.names}
    if lacking := sorted(set(trained) - names):
        raise CheckpointError(f"{opened.checkpoint.folder} has no {lacking[0]}: it is not the folder that was trained")
    whole = {target for name in names for target in opened.names.group(name).targets}
    return opened.stored({name: values[name].detach() for name in sorted(whole)})
