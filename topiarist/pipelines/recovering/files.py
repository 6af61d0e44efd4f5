"""The recovered checkpoint: the pruned folder's files with trained weights in place of the old ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from topiarist import __about__
from topiarist.checkpoints.reading import read_json
from topiarist.checkpoints.references import reference, resolved
from topiarist.checkpoints.streaming import tensor_bytes
from topiarist.checkpoints.writing import MASKS, REPORT, OutputFolder
from topiarist.core.errors import CheckpointError
from topiarist.models.folder import FolderModel
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.common.finish import CALIBRATION, write_model
from topiarist.pipelines.common.reproduce import RECIPE, as_yaml
from topiarist.pipelines.recovering.report import SECTION, RecoverReport
from topiarist.pipelines.training.text import TrainingText
from topiarist.results.card import with_measurements
from topiarist.results.first_version import renewed
from topiarist.results.pages import PAGE, Result, report_page
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
        _write_papers(output, written, read_json(written / "config.json"), report, text)
        return
    checkpoint, changed = opened.checkpoint, _on_disk(opened, model, trained)
    output.done()
    output.write_files(
        {name: checkpoint.stored(name) for name in checkpoint.files},
        lambda name: [tensor_bytes(changed[name])] if name in changed else checkpoint.chunks(name),
    )
    _write_papers(output, checkpoint.folder, checkpoint.config, report, text)


def _on_disk(opened: FolderModel, model: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters as the folder stores them: its names, its dtypes, experts one by one, ties under each name."""
    wanted = {id(parameter) for parameter in trained.values()}
    values = dict(model.named_parameters(remove_duplicate=False))
    names = {name for name, parameter in values.items() if id(parameter) in wanted and name in opened.names}
    if lacking := sorted(set(trained) - names):
        raise CheckpointError(f"{opened.checkpoint.folder} has no {lacking[0]}: it is not the folder that was trained")
    whole = {target for name in names for target in opened.names.group(name).targets}
    return opened.stored({name: values[name].detach() for name in sorted(whole)})


def _write_papers(
    output: OutputFolder, folder: Path, config: Mapping[str, Any], report: RecoverReport, text: TrainingText
) -> None:
    """Write the report, card and config of the pruned model again, with what the recovery did."""
    stated = json_if_any(folder / REPORT)
    before = {key: value for key, value in stated.items() if key not in ("fingerprint", "files")}
    provenance = {"version": __about__.__version__, **config.get("pruning_config", {})}
    dense = resolved(provenance.get("base_model") or report.teacher or report.model, folder)
    provenance |= {"base_model": reference(dense, output.folder), SECTION: report.provenance()}
    whole = {**renewed({"model": dense, **provenance, **before}), SECTION: report.to_dict()}
    result = Result(whole, __about__.__version__)
    card = folder / "README.md"
    about = card.read_text(encoding="utf-8") if card.is_file() else f"# {result.name}\n"
    output.write_text("README.md", f"{with_measurements(about, result).rstrip()}\n\n{report.card()}")
    output.write_text(PAGE, report_page(result))
    output.write_text(RECIPE, as_yaml(report.recipe))
    output.write_text("pruning_run.json", json.dumps(report.run, indent=2) + "\n")
    seen = frozenset(int(passage, 16) for passage in json_if_any(folder / CALIBRATION).get("passages", []))
    output.write_text(CALIBRATION, replace(text, passages=seen | text.passages).record())
    for name in (MASKS, SPEC):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output.folder / name)
    output.finish({**config, "pruning_config": provenance}, whole, side_files=folder)
