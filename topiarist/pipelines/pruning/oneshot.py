"""One-shot pruning: block by block, Grams -> solver -> new weights -> shard on disk -> next block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist import allocate
from topiarist.allocate import Rule, recipe
from topiarist.checkpoints.writing import OutputFolder
from topiarist.core.errors import CalibrationError, UnsupportedModel
from topiarist.core.meter import Meter, reset_peak_memory
from topiarist.core.patterns import Pattern, parse_pattern
from topiarist.core.registry import name_of, resolve
from topiarist.data import TextFiles
from topiarist.models.families import matrices_of
from topiarist.models.hooks import watch_inputs
from topiarist.models.opened import eager_experts, open_model
from topiarist.pipelines.allocating.allocation import allocated, fixed_patterns
from topiarist.pipelines.common.finish import dense_digest, finish, weights_of, write_model
from topiarist.pipelines.common.stream import GramCollector
from topiarist.pipelines.pruning.block import BlockPruner, check_finite
from topiarist.pipelines.pruning.command import prune_command
from topiarist.pipelines.pruning.correct import Correct
from topiarist.pipelines.pruning.options import Progress, PruneOptions
from topiarist.pipelines.pruning.refine import Refine
from topiarist.pipelines.pruning.sparsellm import METHODS, Method, SparseLLM, settings_of
from topiarist.pipelines.pruning.walk import Walk
from topiarist.results.report import Report


def prune(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    calibration: TextFiles | Tensor | Sequence[str] | None = None,
    method: str | Method = "alps",
    pattern: str | float | Pattern | None = None,
    allocation: str | Path | Rule | Mapping[str, str | None] | None = None,
    allocation_work: str | Path | None = None,
    skip: Sequence[str] = (),
    num_samples: int = 128,
    window: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    true_sequential: bool = False,
    correct: Correct | bool = False,
    refine: Refine | bool = False,
    device: str | torch.device | None = None,
    spill: str | Path | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Prune a causal language model, block by block.

    model: a folder or hub id (read block by block, never whole; `out` is needed), or a model object (pruned in place;
    written to `out` if given). calibration: text files, a list of documents, or token windows (num, window);
    None only for `magnitude`, which then runs nothing through the model.
    pattern: for every layer ("2:4" if not given), or how many weights the allocation keeps in all. allocation: a rule of
    `tp.allocate.ALLOCATIONS` (its name, or a value such as `tp.allocate.Owl(threshold=7)`), or {layer: pattern} or its
    JSON file, which must agree with `pattern` if that is given. allocation_work: folder for what a rule takes long to
    get; `search` needs one and takes `OUT.search` by default.
    skip: regular expressions of layer names that stay dense. true_sequential: later matrices of a block see the already
    pruned earlier ones.
    correct: ask every matrix for what the dense model has at its place, and so for what the matrices before it lost; matrices
    are then pruned as with true_sequential. The error reported is that of the corrected weight.
    refine: after a block is pruned, train its kept weights towards the dense model's hidden states (True: defaults).
    spill: folder for hidden states that do not fit in memory. batch_size: windows a forward (8; 1 if refined, for
    a step of refinement is one forward).

    The same call on the same `out` resumes a run that was killed, and returns the report of one that is finished.
    Raises a TopiaristError for everything a user can mend.
    """
    options = PruneOptions(
        calibration=calibration,
        method=method,
        pattern=pattern,
        allocation=allocation,
        allocation_work=allocation_work,
        skip=skip,
        num_samples=num_samples,
        window=window,
        seed=seed,
        batch_size=batch_size,
        true_sequential=true_sequential,
        correct=correct,
        refine=refine,
        device=device,
        spill=spill,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )
    return prune_with(options, model, out, progress=progress)


def prune_with(
    options: PruneOptions,
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    progress: Progress | None = None,
) -> Report:
    """`prune`, its options as one value."""
    meter = Meter()
    reset_peak_memory()
    solver, correction, refinement, rule = options.solver, options.correction, options.refinement, options.rule
    source = options.opened(model)
    source.check_output(out)
    checkpoint, name = source.checkpoint, source.name
    progress = progress or (lambda *_: None)
    # Of a rule only the shapes are checked yet; its patterns are found when it is clear that the run is not finished.
    patterns, unmatched = fixed_patterns(options, source)
    windows = options.windows(source)
    command, unsaid = prune_command(model, options, windows)
    report = Report(
        method=name_of(METHODS, solver),
        settings=settings_of(solver),
        pattern="mixed" if options.allocation is not None else str(options.base_pattern),
        model=name,
        calibration={}
        if options.calibration is None
        else {
            "samples": len(windows.tokens),
            "window": windows.window,
            "seed": options.seed,
            "digest": windows.digest,
            "batch_size": options.windows_a_forward,
            "true_sequential": options.true_sequential,
        },
        command=command,
        not_in_command=unsaid,
        weights=weights_of(source),
    )
    pruner = BlockPruner.of(solver, patterns, refinement, correction, sequential=options.true_sequential)
    pruner.meter = meter
    for expression in unmatched:
        pruner.warn(f"--skip {expression!r} matches no layer", UserWarning)
    report.base_digest = source.digest() if out is None else dense_digest(source, Path(out))
    output = None
    with ExitStack() as held:
        if out is not None:
            fingerprint = {
                "model": report.base_digest,
                "method": {"name": report.method, **report.settings},
                "patterns": {k: None if p is None else str(p) for k, p in patterns.items()},
                "calibration": report.calibration,
                "refine": None if refinement is None else asdict(refinement),
                **({} if correction is None else {"correct": asdict(correction)}),
                **({} if rule is None else {"allocation": recipe(rule)}),
            }
            output = held.enter_context(OutputFolder(Path(out), fingerprint))
            if output.complete:
                if checkpoint is None:  # the object becomes what the first call made of it
                    source.model.load_state_dict(open_model(output.folder, device="cpu").whole().model.state_dict())
                return Report.from_folder(output.folder)
            if checkpoint is None:
                output.begin(source.nbytes)
        if rule is not None:
            pruner.patterns, report.allocation = allocated(options, rule, source, windows, output, progress)
        walk = Walk(source, pruner, windows.tokens, options, progress)
        with eager_experts(source.model):
            if checkpoint is None or output is None:
                report.layers = walk.in_memory()
            else:
                report.layers = walk.streamed(checkpoint, output)
        report.warnings, report.refined, report.joint = pruner.warned, pruner.refined, pruner.joined
        report.output = None if out is None else str(out)
        report.run = pruner.meter.run(source.device)
        if checkpoint is not None and output is not None:
            finish(output, report, source, text=windows)
        elif output is not None:
            report.result_digest = source.digest()
            written = write_model(output, source.model, source.loaded_tokenizer)
            finish(output, report, source, text=windows, written=written)
        return report


def prune_module(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str | Method = "alps",
    pattern: str | float | Pattern = "2:4",
    skip: Sequence[str] = (),
) -> Report:
    """Prune every Linear of any torch module in place (an encoder, a vision transformer), from one pass over `batches`.

    A batch is a tensor, a tuple of positional or a dict of keyword arguments. All Grams are of the dense model and in
    memory at once. Raises CalibrationError if there is no batch.
    """
    solver, base_pattern = resolve(METHODS, method), parse_pattern(pattern)
    if isinstance(solver, SparseLLM):
        raise UnsupportedModel(
            "sparsellm has to know where feed-forward networks are; give any module its local solver"
        )
    check_finite(model, "")
    matrices = matrices_of(model)
    patterns, _ = allocate.without(allocate.uniform({m.name: m.shape for m in matrices}, base_pattern), skip)
    wanted = [m for m in matrices if patterns[m.name] is not None]
    collector, count = GramCollector(wanted), 0
    pruner = BlockPruner(solver, patterns)
    with torch.no_grad(), watch_inputs(wanted, collector.on_input), pruner.meter.timed("forward"):
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
        settings=asdict(solver),
        pattern=str(base_pattern),
        model=type(model).__name__,
        calibration={"batches": count},
    )
    report.layers, report.warnings = layers, pruner.warned
    report.run = {"seconds_by_activity": dict(pruner.meter.seconds)}
    return report
