"""Quantising: block by block, Grams -> grid -> packed shard on disk -> next block, which sees the quantised ones."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from topiarist import allocate
from topiarist.checkpoints.dequantised import QUANTIZATION
from topiarist.checkpoints.reading import Checkpoint, locate
from topiarist.checkpoints.references import reference, resolved
from topiarist.checkpoints.writing import OutputFolder
from topiarist.core.errors import CheckpointError, QuantizationError, UnsupportedModel
from topiarist.core.meter import Meter, reset_peak_memory
from topiarist.core.options import given_or_made, plain, takes
from topiarist.core.patterns import Pattern, Unstructured
from topiarist.data import Windows
from topiarist.models.folder import FolderModel
from topiarist.models.opened import OpenedModel, at_rest
from topiarist.pipelines.common.dense import left_dense, why_dense
from topiarist.pipelines.common.finish import finish, weights_of
from topiarist.pipelines.common.integer_blocks import head_name, quantized_config
from topiarist.pipelines.common.options import Progress
from topiarist.pipelines.common.reproduce import command, recipe
from topiarist.pipelines.common.setup import open_for, open_output, windows_of
from topiarist.pipelines.pruning.block import BlockPruner
from topiarist.pipelines.pruning.walk import calibration_of
from topiarist.pipelines.quantizing.options import QuantizeOptions
from topiarist.pipelines.quantizing.report import QuantizeReport
from topiarist.pipelines.quantizing.walk import QuantizingWalk
from topiarist.pipelines.training.processes import Processes
from topiarist.quantization import METHODS, Grid
from topiarist.solvers.quantized import Quantized

PACKED, DENSE = "pack-quantized", "dense"


@takes(QuantizeOptions)
def quantize(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    options: QuantizeOptions | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> QuantizeReport:
    """Put the weights of a causal language model, pruned or not, on a grid of 8 or 4 bits. Zeros stay exactly zero.

    model: a folder or hub id (read block by block, never whole; written to `out` as compressed-tensors' `pack-quantized`,
    which transformers and vLLM open), or a model object (its weights become what a reader of such a file would compute; `out`
    is None). options: all settings as one value, instead of single ones. progress: is told what goes on.

    A matrix that no calibration token reaches is rounded, with a warning. The same call on the same `out` resumes a run
    that was killed, and returns the report of one that is finished. Raises a TopiaristError for everything a user can mend.
    """
    options = given_or_made(QuantizeOptions, options, settings)
    meter = Meter()
    reset_peak_memory()
    processes = Processes.join()
    source, patterns, unmatched, grid = opened_for(options, model, out)
    source.check_output(out)
    if options.head and out is None:
        raise CheckpointError("the head of a model object stays as it is: save the model, and give its folder")
    windows = windows_of(options, source)
    solver = Quantized(method=options.chosen_method, grid=grid)
    pruner = BlockPruner.of(
        solver, patterns, None, options.correct, sequential=options.true_sequential, processes=processes
    )
    pruner.meter, pruner.by_attention = meter, options.attention
    for expression in unmatched:
        pruner.warn(f"--skip {expression!r} matches no layer", UserWarning)
    report = _report(options, source, grid, windows, packs=out is not None)
    walk = QuantizingWalk(source, pruner, windows.tokens, options, progress or (lambda *_: None), head=options.head)
    reasons = why_dense(patterns, options.skip)
    with at_rest(source.model), ExitStack() as held:
        output = open_output(out, _fingerprint(options, report), source.device, processes, held)
        if output is not None and output.complete:
            return QuantizeReport.from_folder(output.folder)
        report.layers = walk.run(output)
        changed = {layer.name for layer in report.layers}
        if options.head:
            changed.add(f"{head_name(source.as_folder())}.weight")
        report.dense = left_dense(source, changed, reasons)
        report.warnings, report.output = pruner.warned, None if out is None else str(out)
        report.run = {**pruner.meter.run(source.device), "processes": processes.size}
        if output is not None:
            processes.on_main(lambda: _finish(output, source.as_folder(), report, options, grid, windows))
    return report


def opened_for(
    options: QuantizeOptions, model: str | Path | nn.Module, out: str | Path | None = None
) -> tuple[OpenedModel, dict[str, Pattern | None], list[str], Grid]:
    """The model, a pattern that keeps all of every matrix (None: skipped), expressions of `skip` that match nothing, the grid.

    Raises a TopiaristError for what cannot be quantised.
    """
    options.check_text()
    _refuse_quantised(model)
    source = open_for(options, model)
    shapes = source.shapes()
    patterns, unmatched = allocate.without(dict.fromkeys(shapes, Unstructured(0.0)), options.skip)
    wanted = {name: shapes[name] for name, pattern in patterns.items() if pattern is not None}
    if not wanted:
        raise QuantizationError("skip leaves no matrix to quantise: skip fewer")
    grid = Grid.fitting(options.bits, options.group, wanted)
    source.check_packed(wanted, out)
    return source, patterns, unmatched, grid


def _refuse_quantised(model: str | Path | nn.Module) -> None:
    if isinstance(model, nn.Module):
        return
    folder = locate(model)
    if folder.is_dir() and QUANTIZATION in Checkpoint(folder).config:
        raise UnsupportedModel(f"{model} is quantised already: quantise the weights that it was made from")


def _report(
    options: QuantizeOptions, source: OpenedModel, grid: Grid, windows: Windows, *, packs: bool
) -> QuantizeReport:
    """What is known before any work."""
    resolved = options
    if options.data is not None:
        resolved = replace(options, num_windows=len(windows.tokens), window_tokens=windows.window)
    said = ["bits", *["num_windows", "window_tokens", "seed"] * (options.data is not None)]
    words, unsaid = command("quantize", source.said, resolved, always=said)
    method = plain(options.chosen_method, METHODS)
    return QuantizeReport(
        method=method.pop("name"),
        settings=method,
        pattern=str(grid),
        bits=grid.bits,
        group=grid.group,
        format=PACKED if packs else DENSE,
        model=source.name,
        base_digest=source.digest(),
        calibration=calibration_of(options, windows),
        command=words,
        not_in_command=unsaid,
        recipe=recipe("quantize", source.said, resolved, always=said),
        weights=weights_of(source),
        pruned=source.stored_config.get("pruning_config", {}),
    )


def _fingerprint(options: QuantizeOptions, report: QuantizeReport) -> dict[str, Any]:
    """All that the bytes of the result depend on."""
    return {
        "model": report.base_digest,
        "method": {"name": report.method, **report.settings},
        "grid": [report.bits, report.group, report.format],
        "head": options.head,
        "skip": list(options.skip),
        "calibration": report.calibration,
        "correct": plain(options.correct),
        "attention": options.attention,
    }


def _finish(
    output: OutputFolder,
    source: FolderModel,
    report: QuantizeReport,
    options: QuantizeOptions,
    grid: Grid,
    windows: Windows,
) -> None:
    sizes = output.tensor_bytes()
    report.weights = {**report.weights, "after": sum(sizes.values())}
    config = quantized_config(source, grid, sizes, head=options.head)
    if report.pruned:  # it names its dense model as seen from its own folder
        dense = resolved(str(report.pruned.get("base_model", "")), source.checkpoint.folder)
        report.pruned = {**report.pruned, "base_model": reference(dense, output.folder)}
    finish(output, report, source, text=windows, config=config)
