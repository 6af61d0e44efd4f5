"""The end of every run: an ordinary model folder with its report, page and card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from topiarist import __about__
from topiarist.checkpoints.atomic import disk_errors
from topiarist.checkpoints.reading import read_json
from topiarist.checkpoints.references import reference
from topiarist.checkpoints.states import KEPT
from topiarist.checkpoints.streaming import SHARD_BYTES
from topiarist.checkpoints.writing import REPORT, OutputFolder
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.common.reproduce import RECIPE, as_yaml
from topiarist.results.card import model_card
from topiarist.results.pages import PAGE, Result, report_page
from topiarist.results.report import RUN, RunReport

CALIBRATION = "pruning_calibration.json"


@runtime_checkable
class Recorded(Protocol):
    """Text that can say what it was."""

    def record(self) -> str:
        """Return digests of its passages as JSON."""
        ...


def finish(
    output: OutputFolder,
    report: RunReport,
    source: OpenedModel,
    *,
    text: Recorded | None = None,
    written: Path | None = None,
    config: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write what stands beside the weights: report, page, card, side files, config. The weights are there already.

    source: the dense model; side files come from its folder.
    text: what calibrated or trained; its digests are kept, so that a later evaluation can refuse it.
    written: of a model object, the folder by `write_model` or `save_model`, for its config and side files.
    config: instead of the one that was read.
    texts: more files, by name.
    Raises CheckpointError if the disk cannot hold them; what is done stays for the same call to go on with.
    """
    folder = written if source.checkpoint is None else source.checkpoint.folder
    assert folder is not None, "a model object is written first"
    # As it was opened: a config that misstates the tie of the head, or the quantisation of what is read dense, is mended.
    found = config or (read_json(folder / "config.json") if source.checkpoint is None else source.checkpoint.config)
    report.base_model = report.base_model or base_model(source, output.folder)
    # Without the timings, so that the same run writes the same page; `topiarist report` shows them.
    result = Result(report.to_dict(), __about__.__version__)
    more = {CALIBRATION: text.record()} if text is not None else {}
    papers = {"README.md": model_card(result), PAGE: report_page(result), RUN: json.dumps(report.run, indent=2) + "\n"}
    if report.recipe:
        papers[RECIPE] = as_yaml(report.recipe)
    for name, content in {**(texts or {}), **more, **papers}.items():
        output.write_text(name, content)
    about = {**found, "pruning_config": report.pruning_config(__about__.__version__)}
    output.finish(about, report.to_dict(), side_files=folder)


def write_model(output: OutputFolder, model: Any, tokenizer: Any = None) -> Path:
    """Write a model object's weights; config and tokenizer stay in the folder that is returned, for `finish`."""
    written = save_model(output, model, tokenizer)
    output.take_files(written)
    return written


def save_model(output: OutputFolder, model: Any, tokenizer: Any = None) -> Path:
    """Let transformers, which knows names and ties, write a model into the states of `output`. Returns its folder.

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


def base_model(source: OpenedModel, out: Path) -> str:
    """How `out` refers to the dense model; nothing for an object that has no name."""
    name = source.name if source.checkpoint is not None else getattr(source.config, "name_or_path", "")
    return reference(name, out) if name else ""


def dense_digest(source: OpenedModel, out: Path) -> str:
    """The digest of a model; of an object that an earlier call pruned to `out`, the one it had before."""
    digest = source.digest()
    if source.checkpoint is None and (out / REPORT).is_file():
        written = json.loads((out / REPORT).read_text(encoding="utf-8"))
        if written.get("result_digest") == digest:
            return written["fingerprint"]["model"]
    return digest


def weights_of(before: OpenedModel, after: nn.Module | None = None) -> dict[str, Any]:
    """Bytes of all weights before and after, and their dtype, for the report. after: None if they stay as many."""
    left = before.nbytes if after is None else sum(p.nbytes for p in after.parameters())
    return {"before": before.nbytes, "after": left, "dtype": str(before.dtype).removeprefix("torch.")}
