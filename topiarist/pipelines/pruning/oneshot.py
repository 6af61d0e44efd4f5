"""One-shot pruning: block by block, Grams -> solver -> new weights -> shard on disk -> next block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from topiarist import allocate
from topiarist.allocate import ALLOCATIONS
from topiarist.checkpoints.writing import OutputFolder
from topiarist.core.errors import CalibrationError, CheckpointError, UnsupportedModel
from topiarist.core.meter import Meter, reset_peak_memory
from topiarist.core.options import Registered, given_or_made, plain, takes
from topiarist.core.patterns import Pattern, parse_pattern
from topiarist.core.registry import name_of
from topiarist.data import Windows
from topiarist.models.checks import check_finite
from topiarist.models.families import matrices_of
from topiarist.models.hooks import watch_inputs
from topiarist.models.opened import OpenedModel, at_rest
from topiarist.pipelines.allocating.allocation import allocated, fixed_patterns
from topiarist.pipelines.common.dense import left_dense, why_dense
from topiarist.pipelines.common.finish import finish, weights_of
from topiarist.pipelines.common.grams import GramCollector
from topiarist.pipelines.common.integer_blocks import quantized_config
from topiarist.pipelines.common.options import Progress
from topiarist.pipelines.common.reproduce import command, recipe
from topiarist.pipelines.common.setup import open_for, open_output, windows_of
from topiarist.pipelines.pruning.block import BlockPruner
from topiarist.pipelines.pruning.companion import Companion, check_modules
from topiarist.pipelines.pruning.onto_grid import grid_of, solver_of
from topiarist.pipelines.pruning.options import PruneOptions
from topiarist.pipelines.pruning.packing_walk import PackingWalk
from topiarist.pipelines.pruning.sparsellm import METHODS, Method, SparseLLM
from topiarist.pipelines.pruning.walk import Walk, calibration_of
from topiarist.pipelines.training.processes import Processes
from topiarist.quantization import METHODS as QUANTIZERS
from topiarist.quantization import Grid
from topiarist.results.report import Report
from topiarist.solvers import Solver

FEW_ZEROS, MANY_ZEROS = 0.001, 0.2
"""Shares of zeros above which a model is taken for pruned: of one that says so, and of any; rounding to 4 bits makes some."""


@takes(PruneOptions)
def prune(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    options: PruneOptions | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Prune a causal language model, block by block.

    model: a folder or hub id (read block by block, never whole; `out` is needed), or a model object (pruned in place;
    written to `out` if given). options: all settings as one value, instead of single ones. progress: is told what goes on.

    The error reported of a corrected matrix is that of the corrected weight. The same call on the same `out` resumes a run that
    was killed, and returns the report of one that is finished. Under `torchrun` the windows and the solving are divided among
    the processes, to the same bytes. Raises a TopiaristError for everything a user can mend.
    """
    options = given_or_made(PruneOptions, options, settings)
    meter = Meter()
    reset_peak_memory()
    options.check_text()
    processes = Processes.join()
    source = open_for(options, model)
    source.check_output(out)
    tell = progress or (lambda *_: None)
    # Of a rule only the shapes are checked yet; its patterns are found when it is clear that the run is not finished.
    patterns, unmatched = fixed_patterns(options, source)
    grid = grid_of(options, source, patterns, out)
    windows = windows_of(options, source)
    report = _report(options, source, windows, grid)
    report.base_digest = source.digest_before(out)
    pruner = BlockPruner.of(
        solver_of(options, grid),
        patterns,
        options.refine,
        options.correct,
        sequential=options.true_sequential,
        processes=processes,
    )
    pruner.meter = meter
    pruner.companion = _companion(options, source, patterns, out)
    for expression in unmatched:
        pruner.warn(f"--skip {expression!r} matches no layer", UserWarning)
    fingerprint = _fingerprint(options, report, patterns)
    with ExitStack() as held:
        output = open_output(out, fingerprint, source.device, processes, held)
        if output is not None and output.complete:
            source.become(output.folder)
            return Report.from_folder(output.folder)
        walk = (Walk if grid is None else PackingWalk)(source, pruner, windows.tokens, options, tell)
        if (rule := options.rule) is not None:
            found = allocated(options, rule, source, windows, output, tell, processes)
            pruner.patterns, report.allocation = found
        if note := _zeros_before(source, pruner.patterns):
            pruner.warn(note, UserWarning)
        with at_rest(source.model):
            report.layers = walk.run(output)
        reasons = why_dense(pruner.patterns, options.skip)
        report.dense = left_dense(source, {layer.name for layer in report.layers}, reasons)
        report.warnings, report.refined, report.joint = pruner.warned, pruner.refined, pruner.joined
        if (companion := pruner.companion) is not None and (folder := output) is not None:
            report.companion = processes.on_main(lambda: companion.write(folder, len(source.block_names)))
        report.output = None if out is None else str(out)
        report.run = {**pruner.meter.run(source.device), "processes": processes.size}
        if output is not None:
            processes.on_main(lambda: _finish(output, report, source, windows, grid, walk.written))
        return report


def _finish(
    output: OutputFolder, report: Report, source: OpenedModel, windows: Windows, grid: Grid | None, written: Path | None
) -> None:
    """Make a model of what was written."""
    config = None
    if grid is not None:
        sizes = output.tensor_bytes()
        report.weights = {**report.weights, "after": sum(sizes.values())}
        config = quantized_config(source.as_folder(), grid, sizes)
    report.result_digest = source.result_digest()
    finish(output, report, source, text=windows, config=config, written=written)


def _zeros_before(source: OpenedModel, patterns: Mapping[str, Pattern | None]) -> str:
    """What of the model is zeros already, as its first block tells; nothing of a dense one."""
    known = getattr(source.config, "pruning_config", None) or {}
    source.load(0)
    weights = [m.weight for m in source.matrices(0) if patterns[f"{source.block_names[0]}.{m.name}"] is not None]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    source.release(0)
    if zeros <= (FEW_ZEROS if known else MANY_ZEROS) * total:
        return ""
    by = f", by {known.get('method', 'pruning')} {known.get('pattern', '')}".rstrip() if known else ""
    return (
        f"the model is pruned already: {zeros / total:.1%} of the first block's weights are zeros{by}. They count: the result "
        "has the zeros that are asked for in all, not on top"
    )


def _companion(
    options: PruneOptions, source: OpenedModel, patterns: Mapping[str, Pattern | None], out: str | Path | None
) -> Companion | None:
    """What gathers the low-rank companion, if one is asked for.

    Raises UnsupportedModel for experts, CheckpointError without an output folder.
    """
    if options.low_rank is None:
        return None
    if out is None:
        raise CheckpointError("low_rank writes an adapter beside the pruned model: give an output folder")
    check_modules(source, patterns)
    return Companion(options.low_rank, source.dtype)


def _report(options: PruneOptions, source: OpenedModel, windows: Windows, grid: Grid | None) -> Report:
    """What is known before any work."""
    resolved = options
    if options.data is not None:
        resolved = replace(
            options, num_windows=len(windows.tokens), window_tokens=windows.window, batch_size=options.windows_a_forward
        )
    said = ["method", *["pattern"] * (options.allocation is None or options.rule is not None)]
    said += ["num_windows", "window_tokens", "seed", "batch_size"] * (options.data is not None)
    resolved = replace(resolved, pattern=_said_pattern(options))
    words, unsaid = command("prune", source.said, resolved, always=said)
    method = plain(options.method, METHODS)
    return Report(
        method=method.pop("name"),
        settings=method,
        pattern="mixed" if options.allocation is not None else str(options.base_pattern),
        model=source.name,
        calibration=calibration_of(options, windows),
        command=words,
        not_in_command=unsaid,
        recipe=recipe("prune", source.said, resolved, always=said),
        weights=weights_of(source),
        quantized={}
        if grid is None
        else {"bits": grid.bits, "group": grid.group, "method": plain(options.quantizer, QUANTIZERS)},
    )


def _fingerprint(options: PruneOptions, report: Report, patterns: Mapping[str, Pattern | None]) -> dict[str, Any]:
    """All that the bytes of the result depend on."""
    return {
        "model": report.base_digest,
        "method": {"name": report.method, **report.settings},
        "patterns": {name: None if pattern is None else str(pattern) for name, pattern in patterns.items()},
        "calibration": report.calibration,
        "refine": plain(options.refine),
        "correct": plain(options.correct),
        "allocation": plain(options.rule, ALLOCATIONS) if options.rule else None,
        **({"quantized": report.quantized} if report.quantized else {}),
        **({"low_rank": options.low_rank} if options.low_rank else {}),
    }


def _said_pattern(options: PruneOptions) -> Pattern | None:
    """With a file of patterns only one that was given: it is a budget then, which the file is held to."""
    fixed = options.allocation is not None and options.rule is None
    return options.pattern if fixed else options.base_pattern


def prune_module(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str | Method = "alps",
    pattern: str | float | Pattern = "2:4",
    skip: Sequence[str] = (),
) -> Report:
    """Prune every Linear of any torch module in place (an encoder, a vision transformer), from one pass over `batches`.

    A batch is a tensor, a tuple of positional or a dict of keyword arguments. All Grams are of the dense model in evaluation
    mode, and in memory at once. Raises CalibrationError if there is no batch.
    """
    solver, base_pattern = Registered(METHODS, base=(Solver,)).parse(method), parse_pattern(pattern)
    if isinstance(solver, SparseLLM):
        raise UnsupportedModel(
            "sparsellm has to know where feed-forward networks are; give any module its local solver"
        )
    check_finite(model)
    matrices = matrices_of(model)
    asked, _ = allocate.without({m.name: base_pattern for m in matrices}, skip)
    fitting = allocate.uniform({m.name: m.shape for m in matrices if asked[m.name] is not None}, base_pattern)
    patterns = {**dict.fromkeys(asked), **fitting}
    wanted = [m for m in matrices if patterns[m.name] is not None]
    collector, count = GramCollector(wanted), 0
    pruner = BlockPruner(solver, patterns)
    watched = watch_inputs(wanted, collector.on_input)
    with torch.no_grad(), at_rest(model), watched, pruner.meter.timed("forward"):
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*batch) if isinstance(batch, tuple | list) else model(batch)
            collector.end_of_forward()
            count += 1
    if not count:
        raise CalibrationError("no batches given: a Gram needs inputs")
    layers = pruner.solve(collector.groups, wanted, "")
    report = Report(
        method=name_of(METHODS, solver),
        settings=plain(solver),
        pattern=str(base_pattern),
        model=type(model).__name__,
        calibration={"batches": count},
    )
    report.layers, report.warnings = layers, pruner.warned
    report.run = {"seconds_by_activity": dict(pruner.meter.seconds)}
    return report
