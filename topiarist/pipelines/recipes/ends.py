"""The stages that a recipe may end with: they work on the finished OUT, measure it or pack it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from topiarist.checkpoints.atomic import write_atomically
from topiarist.checkpoints.reading import INDEX
from topiarist.core.errors import TopiaristError
from topiarist.core.options import About, options
from topiarist.data import Bos, Windows, text_files
from topiarist.evaluation import comparison, tasks
from topiarist.models.interface import OpenedModel
from topiarist.pipelines.common.options import Progress, RunOptions
from topiarist.results.pages import save_evaluation
from topiarist.runtime import pack_folder
from topiarist.runtime.manifest import MANIFEST
from topiarist.runtime.packed import GROUP, check_rounding, rounds


def _several(given: Any) -> Any:
    """One entry, or several with commas, as a list of words."""
    return [word.strip() for word in given.split(",") if word.strip()] if isinstance(given, str) else given


Words = Annotated[Sequence[str], BeforeValidator(_several)]


@options
class PackOptions:
    """How the weights of OUT are stored without their zeros."""

    values: Literal["int8", "int4"] | None = None
    """Round the linears to such integers; a quantised model keeps its own."""
    group: Annotated[int, Field(ge=32)] = GROUP
    """Columns that share a scale, with `values`."""
    head: Literal["int8"] | None = None
    """Round the head and the embeddings, a scale a row."""

    def __post_init__(self) -> None:
        check_rounding(self.values, self.group, self.head)

    @property
    def rounds(self) -> bool:
        """Whether the weights are others afterwards."""
        return rounds(self.values, self.head)


@options
class EvalOptions(RunOptions):
    """What OUT and its dense model are measured on."""

    text: Words = ()
    """Files of text that calibrated nothing."""
    text_field: str = "text"
    """Of rows: the field that holds the text."""
    split: str | None = None
    """Of datasets; default test, or validation."""
    tasks: Words = ()
    """Zero-shot tasks of lm-evaluation-harness."""
    task_files: str | None = None
    """Folder with the tasks' items."""
    limit: PositiveInt | None = None
    """Only the first items of each task."""
    window_tokens: Annotated[int, Field(ge=2), About(flag="window")] = 1024
    """Tokens a window."""
    max_windows: PositiveInt | None = None
    """Only the first windows of each text."""
    bos: Bos = "auto"
    """Whether a window begins with the model's start token."""
    batch_size: PositiveInt = 1
    """Windows, or task requests, a forward pass."""

    def __post_init__(self) -> None:
        if not self.text and not self.tasks:
            raise TopiaristError("eval has nothing to measure on: name text or tasks")
        for path in self.text:  # refused before any stage runs
            text_files(path)
        tasks.specs_of(self.tasks, self.task_files, self.limit)
        comparison.check_heeded(
            self.text,
            text_field=self.text_field,
            split=self.split,
            window=self.window_tokens,
            max_windows=self.max_windows,
            bos=self.bos,
        )


def check_eval(source: OpenedModel, options: EvalOptions) -> list[Windows]:
    """The windows of every text, by the model that the recipe starts from, whose tokenizer and positions the result has.

    Raises what measuring would raise, were all stages before it done, as far as it can be known.
    """
    if options.tasks:
        tasks.installed_harness()
    if not options.text:
        return []
    whole = text_files(options.text, field=options.text_field, split=options.split)
    asked: dict[str, Any] = {"window": options.window_tokens, "max_windows": options.max_windows, "bos": options.bos}
    return [comparison.held_out_windows(source, replace(whole, paths=(path,)), **asked) for path in whole.paths]


def run_eval(model: Path | str, place: Path, options: EvalOptions, _: Mapping[str, Any], progress: Progress) -> None:
    """Measure `model` and keep the figures beside it, on its page and in the file `place`.

    Raises what `compare` and `compare_tasks` raise.
    """
    options.use_threads()
    common: dict[str, Any] = {
        "batch_size": options.batch_size, "device": options.device, "trust_remote_code": options.trust_remote_code,
        "progress": progress,
    }  # fmt: skip
    found: dict[str, Any] = {}
    if options.text:
        whole = text_files(options.text, field=options.text_field, split=options.split)
        sources = [replace(whole, paths=(path,)) for path in whole.paths]
        rows = comparison.compare(
            [str(model)],
            sources,
            window=options.window_tokens,
            max_windows=options.max_windows,
            bos=options.bos,
            **common,
        )
        found["perplexity"] = comparison.entries(rows, [Path(path).name for path in options.text])[str(model)]
    if options.tasks:
        scores = tasks.compare_tasks(
            [str(model)], options.tasks, files=options.task_files, limit=options.limit, **common
        )
        found["tasks"] = tasks.entries(scores)[str(model)]
    save_evaluation(model, found)
    write_atomically(place, json.dumps(found) + "\n")


def run_pack(model: Path | str, place: Path, options: PackOptions, _: Mapping[str, Any], progress: Progress) -> None:
    """Put packed weights in the place of the ordinary ones. place: the folder that they are written to first.

    Goes on where a kill left it: the packed folder is whole or not there, its list of contents is moved last, and the
    ordinary weights go after that. Raises what `pack_folder` raises.
    """
    folder = Path(model)
    if not (folder / MANIFEST).is_file():
        progress("packing", 0, 1)
        if not (place / MANIFEST).is_file():
            pack_folder(folder, place, values=options.values, group=options.group, head=options.head)
        for path in sorted(place.iterdir(), key=lambda path: path.name == MANIFEST):
            if path.is_dir():  # the low-rank companion, which OUT has as it is
                shutil.rmtree(path)
            else:
                path.replace(folder / path.name)
    for path in folder.glob("model*.safetensors"):
        path.unlink()
    (folder / INDEX).unlink(missing_ok=True)
