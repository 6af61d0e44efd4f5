"""The end of every run: an ordinary model folder with its report, page and card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from topiarist.checkpoints.reading import read_json
from topiarist.checkpoints.references import reference
from topiarist.checkpoints.writing import OutputFolder
from topiarist.data.record import RECORD, record, recorded_passages
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.common.reproduce import RECIPE, as_yaml
from topiarist.results.papers import write_papers
from topiarist.results.report import RunReport
from topiarist.results.result import chained


@runtime_checkable
class Recorded(Protocol):
    """Text that can say what it was."""

    def record(self, earlier: frozenset[int] = frozenset()) -> str:
        """Return digests of its passages, and of those of earlier texts, as JSON."""
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
    text: what calibrated or trained; its digests are kept with those that the source has, so that a later evaluation can
    refuse it.
    written: of a model object, the folder by `models.saving`, for its config and side files.
    config: instead of the one that was read.
    texts: more files, by name.
    Raises CheckpointError if the disk cannot hold them; what is done stays for the same call to go on with.
    """
    folder = source.folder or written
    assert folder is not None, "a model object is written first"
    # As it was opened: a config that misstates the tie of the head, or the quantisation of what is read dense, is mended.
    found = config or source.stored_config or read_json(folder / "config.json")
    report.base_model = report.base_model or base_model(source, output.folder)
    if source.intermediate:  # which goes; nobody can hold its files against a digest
        report.base_digest = ""
    more = dict(texts or {})
    earlier = recorded_passages(source.beside(RECORD))
    if text is not None or earlier:
        more[RECORD] = record("", earlier) if text is None else text.record(earlier)
    if report.recipe:
        more[RECIPE] = as_yaml(report.recipe)
    write_papers(output, report, found, side_files=folder, texts=more)


def base_model(source: OpenedModel, out: Path) -> str:
    """How `out` refers to the dense model; nothing for an object that has no name."""
    return reference(source.address, out) if source.address else ""


def weights_of(before: OpenedModel, after: nn.Module | None = None) -> dict[str, Any]:
    """Bytes of all weights before and after, their dtype, and the start of the chain, for the report.

    after: None if they stay as many.
    """
    left = before.nbytes if after is None else sum(p.nbytes for p in after.parameters())
    dtype = str(before.dtype).removeprefix("torch.")
    return {"before": before.nbytes, "after": left, "dtype": dtype, **chained(before.folder)}
