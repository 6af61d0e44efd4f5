"""One-shot pruning: block by block, Grams -> solver -> new weights -> shard on disk -> next block."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist import __about__, allocate
from topiarist.data import TextFiles, Windows, calibration_windows, load_tokenizer
from topiarist.errors import CalibrationError, CheckpointError, TopiaristError
from topiarist.models import block_names, matrices_of, watch_inputs
from topiarist.pages import PAGE, Result, model_card, report_page
from topiarist.patterns import Pattern, parse_pattern
from topiarist.pipelines.block import BlockPruner, check_finite
from topiarist.pipelines.command import prune_command
from topiarist.pipelines.refine import Refine
from topiarist.pipelines.stream import BlockStream, GramCollector
from topiarist.report import BlockRefinement, LayerReport, Report, peak_memory_bytes, reset_peak_memory
from topiarist.solvers import SOLVERS, Solver
from topiarist.sources import LoadedModel, StreamedModel, block_matrices, eager_experts
from topiarist.store import Checkpoint, OutputFolder, locate

Progress = Callable[[str, int, int], None]
"""(what is going on, blocks done, blocks in all)"""
OUTER_SHARD_BYTES = 1 << 29
"""Tensors outside the blocks are copied in shards of about this size, so that copying needs little memory."""


def prune(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    calibration: TextFiles | Tensor | Sequence[str],
    method: str | Solver = "alps",
    pattern: str | float | Pattern = "2:4",
    allocation: str | Path | Mapping[str, str | None] | None = None,
    skip: Sequence[str] = (),
    num_samples: int = 128,
    window: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    true_sequential: bool = False,
    refine: Refine | bool = False,
    device: str | torch.device | None = None,
    spill: str | Path | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Prune a causal language model, block by block.

    model: a folder or hub id (read block by block, never whole; `out` is needed), or a model object (pruned in place;
    written to `out` if given). calibration: text files, a list of documents, or token windows (num, window).
    allocation: {layer: pattern} or its JSON file, instead of `pattern` everywhere. skip: regular expressions of layer
    names that stay dense. true_sequential: later matrices of a block see the already pruned earlier ones.
    refine: after a block is pruned, train its kept weights towards the dense block's output (True: the defaults).
    spill: folder for hidden states that do not fit in memory. batch_size: windows a forward.

    The same call on the same `out` resumes a run that was killed, and returns the report of one that is finished.
    Raises a TopiaristError for everything a user can mend.
    """
    started = time.perf_counter()
    reset_peak_memory()
    solver, base_pattern = resolve_method(method), parse_pattern(pattern)
    source, checkpoint, name = open_source(model, out, device, trust_remote_code)
    patterns, unmatched = resolve_patterns(source, base_pattern, allocation, skip)
    windows = read_windows(source, checkpoint, calibration, tokenizer, num_samples, window, seed)
    refinement = (refine or None) if not isinstance(refine, bool) else Refine() if refine else None
    command, unsaid = prune_command(
        model,
        calibration=calibration,
        solver=solver,
        pattern=str(base_pattern),
        allocation=allocation,
        skip=skip,
        refine=refinement,
        num_samples=len(windows.tokens),
        window=windows.window,
        seed=seed,
        batch_size=batch_size,
        true_sequential=true_sequential,
    )
    report = Report(
        method=method_name(solver),
        settings=asdict(solver),
        pattern="mixed" if allocation is not None else str(base_pattern),
        model=name,
        calibration={
            "samples": len(windows.tokens),
            "window": windows.window,
            "seed": seed,
            "digest": windows.digest,
            "batch_size": batch_size,
            "true_sequential": true_sequential,
        },
        command=command,
        not_in_command=unsaid,
        weights=_weights(source.model, checkpoint),
    )
    pruner = BlockPruner(solver, patterns, refinement)
    for expression in unmatched:
        pruner.warn(f"--skip {expression!r} matches no layer", UserWarning)
    run = _Run(source, pruner, windows.tokens, batch_size, true_sequential, spill, progress or (lambda *_: None))
    with eager_experts(source.model):
        if checkpoint is None:
            report.layers = run.in_memory()
        else:
            fingerprint = {
                "model": checkpoint.digest(),
                "method": {"name": report.method, **report.settings},
                "patterns": {k: None if p is None else str(p) for k, p in patterns.items()},
                "calibration": report.calibration,
                "refine": None if pruner.refine is None else asdict(pruner.refine),
            }
            output = OutputFolder(Path(str(out)), fingerprint)
            if output.complete:
                return Report.from_folder(output.folder)
            report.layers = run.streamed(checkpoint, output)
    report.warnings, report.refined = pruner.warned, pruner.refined
    report.output = None if out is None else str(out)
    report.run = {
        "seconds": time.perf_counter() - started,
        "seconds_by_activity": dict(pruner.seconds),
        "peak_memory_bytes": peak_memory_bytes(),
        "threads": torch.get_num_threads(),
        "device": str(source.device),
        "torch": torch.__version__,
    }
    if checkpoint is not None:
        _finish(output, checkpoint, report, windows)  # pyright: ignore[reportPossiblyUnboundVariable]
    elif out is not None:
        _save_loaded(source.model, tokenizer, Path(out), report, windows)
    return report


def prune_module(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str | Solver = "alps",
    pattern: str | float | Pattern = "2:4",
    skip: Sequence[str] = (),
) -> Report:
    """Prune every Linear of any torch module in place (an encoder, a vision transformer), from one pass over `batches`.

    A batch is a tensor, a tuple of positional or a dict of keyword arguments. All Grams are of the dense model and in
    memory at once. Raises CalibrationError if there is no batch.
    """
    solver, base_pattern = resolve_method(method), parse_pattern(pattern)
    check_finite(model, "")
    matrices = matrices_of(model)
    patterns, _ = allocate.without(allocate.uniform({m.name: m.shape for m in matrices}, base_pattern), skip)
    wanted = [m for m in matrices if patterns[m.name] is not None]
    collector, count = GramCollector(wanted), 0
    pruner = BlockPruner(solver, patterns)
    with torch.no_grad(), watch_inputs(wanted, collector.on_input), pruner.timed("forward"):
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
    report = Report(method_name(solver), asdict(solver), str(base_pattern), type(model).__name__, {"batches": count})
    report.layers, report.warnings = layers, pruner.warned
    report.run = {"seconds_by_activity": dict(pruner.seconds)}
    return report


def resolve_method(method: str | Solver) -> Solver:
    """A solver by its name in SOLVERS, or the solver itself."""
    if isinstance(method, Solver):
        return method
    if method not in SOLVERS:
        raise TopiaristError(f"unknown method {method!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[method]()


def method_name(solver: Solver) -> str:
    return next((name for name, cls in SOLVERS.items() if type(solver) is cls), type(solver).__name__)


class _Run:
    """The walk over the blocks, for a checkpoint on disk or a model in memory."""

    def __init__(
        self,
        source: LoadedModel | StreamedModel,
        pruner: BlockPruner,
        tokens: Tensor,
        batch_size: int,
        sequential: bool,
        spill: str | Path | None,
        progress: Progress,
    ) -> None:
        self.source, self.pruner, self.sequential, self.progress = source, pruner, sequential, progress
        self.names = block_names(source.model, source.family)
        spill = None if spill is None else Path(spill)
        self._new_stream = lambda: BlockStream(source, tokens, batch_size=batch_size, device=source.device, spill=spill)

    def _start(self) -> BlockStream:
        self.progress("reading the calibration text", 0, len(self.names))
        with self.pruner.timed("forward"):
            return self._new_stream()

    def _prune_block(self, stream: BlockStream, index: int) -> list[LayerReport]:
        self.progress("pruning", index, len(self.names))
        with self.pruner.timed("read"):
            block = self.source.load(index)
        matrices = block_matrices(self.source, index)
        return self.pruner.prune(stream, index, block, matrices, self.names[index], sequential=self.sequential)

    def _advance(self, stream: BlockStream, index: int) -> None:
        if index + 1 < len(self.names):
            with self.pruner.timed("forward"):
                stream.advance(index, self.source.model.get_submodule(self.names[index]))

    def in_memory(self) -> list[LayerReport]:
        stream, layers = self._start(), []
        for index in range(len(self.names)):
            layers += self._prune_block(stream, index)
            self._advance(stream, index)
        self.progress("done", len(self.names), len(self.names))
        return layers

    def streamed(self, checkpoint: Checkpoint, output: OutputFolder) -> list[LayerReport]:
        """Prune to shards. Blocks that an earlier try finished are read back from its shards and only run forward."""
        assert isinstance(self.source, StreamedModel)
        in_blocks = self.source.names_in_blocks()
        outer = checkpoint.grouped([key for key in checkpoint.files if key not in in_blocks], OUTER_SHARD_BYTES)
        total = len(outer) + len(self.names)
        output.begin(int(checkpoint.weight_bytes() * 1.01))
        for number, names in enumerate(outer):
            if output.shard_is_done(number) is None:
                with self.pruner.timed("write"):
                    output.copy_shard(_shard_name(number, total), checkpoint, names)
        stream, layers = self._start(), []
        for index in range(len(self.names)):
            number = len(outer) + index
            if line := output.shard_is_done(number):
                self.progress("catching up", index, len(self.names))
                with self.pruner.timed("read"):
                    self.source.load(index, Checkpoint.of_shard(output.folder / line["file"]))
                layers += [LayerReport.from_dict(layer) for layer in line["layers"]]
                self.pruner.warned += line["warnings"]
                self.pruner.refined += [BlockRefinement(**refined) for refined in line["refined"]]
            else:
                warned, refined = len(self.pruner.warned), len(self.pruner.refined)
                new = self._prune_block(stream, index)
                layers += new
                info = {
                    "layers": [asdict(layer) for layer in new],
                    "warnings": self.pruner.warned[warned:],
                    "refined": [asdict(done) for done in self.pruner.refined[refined:]],
                }
                with self.pruner.timed("write"):
                    output.write_shard(_shard_name(number, total), self.source.block_on_disk(index), info)
            self._advance(stream, index)
            self.source.release(index)
        self.progress("done", len(self.names), len(self.names))
        return layers


def _shard_name(number: int, total: int) -> str:
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def open_source(
    model: str | Path | nn.Module,
    out: str | Path | None,
    device: str | torch.device | None,
    trust_remote_code: bool,
    *,
    planning: bool = False,
) -> tuple[Any, Checkpoint | None, str]:
    """The model as a source of blocks, its checkpoint if it is on disk, its name."""
    if isinstance(model, nn.Module):
        if out is not None and Path(out).exists():
            raise CheckpointError(f"{out} exists; choose another output for a model that is in memory")
        name = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
        return LoadedModel(model), None, name
    if out is None and not planning:
        raise CheckpointError("pruning a checkpoint needs an output folder")
    checkpoint = Checkpoint(locate(model))
    if out is not None and Path(out).resolve() == checkpoint.folder.resolve():
        raise CheckpointError(f"{out} is the model itself; choose another output folder")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return StreamedModel(checkpoint, device=where, trust_remote_code=trust_remote_code), checkpoint, str(model)


def resolve_patterns(
    source: Any,
    pattern: Pattern,
    allocation: str | Path | Mapping[str, str | None] | None,
    skip: Sequence[str],
) -> tuple[dict[str, Pattern | None], list[str]]:
    """A pattern for every prunable layer, checked against every shape before any work is done."""
    names = block_names(source.model, source.family)
    shapes = {f"{name}.{m.name}": m.shape for i, name in enumerate(names) for m in block_matrices(source, i)}
    if isinstance(allocation, Mapping):
        patterns = allocate.given(shapes, allocation)
    elif allocation is not None:
        patterns = allocate.from_file(shapes, allocation)
    else:
        dense, unmatched = allocate.without(dict.fromkeys(shapes, pattern), skip)
        fitting = allocate.uniform({n: shapes[n] for n, p in dense.items() if p is not None}, pattern)
        return {name: fitting.get(name) for name in shapes}, unmatched
    return allocate.without(patterns, skip)


def read_windows(
    source: Any,
    checkpoint: Checkpoint | None,
    calibration: TextFiles | Tensor | Sequence[str],
    tokenizer: Any,
    num_samples: int,
    window: int | None,
    seed: int,
) -> Windows:
    """The calibration windows, by the model's own tokenizer and within its limits."""
    config = source.model.config
    limit = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)
    if window is not None and window > limit:
        raise CalibrationError(f"window {window} is longer than the model's limit of {limit} tokens")
    if tokenizer is None and not isinstance(calibration, Tensor):
        tokenizer = load_tokenizer(checkpoint.folder if checkpoint else config.name_or_path)
    windows = calibration_windows(
        calibration, tokenizer, num_samples=num_samples, window=window or min(2048, limit), seed=seed
    )
    if int(windows.tokens.max()) >= config.vocab_size:
        raise CalibrationError(
            f"calibration token {int(windows.tokens.max())} is outside the model's vocabulary of {config.vocab_size}: "
            "is this the model's own tokenizer?"
        )
    return windows


def _finish(output: OutputFolder, checkpoint: Checkpoint, report: Report, windows: Windows) -> None:
    for name, text in _side_texts(report, windows).items():
        output.write_text(name, text)
    config = {**checkpoint.config, "pruning_config": report.pruning_config(__about__.__version__)}
    output.finish(checkpoint.folder, config, report.to_dict())


def _save_loaded(model: Any, tokenizer: Any, out: Path, report: Report, windows: Windows) -> None:
    """save_pretrained beside `out`, then one rename: `out` is whole or not there."""
    temporary = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        config = json.loads((temporary / "config.json").read_text())
        config["pruning_config"] = report.pruning_config(__about__.__version__)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (temporary / "pruning_report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        for name, text in _side_texts(report, windows).items():
            (temporary / name).write_text(text)
        temporary.replace(out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write to {out}: {error}") from error


def _weights(model: nn.Module, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Size and dtype of the dense model, for the report."""
    if checkpoint is not None:
        return {"bytes": checkpoint.weight_bytes(), "dtype": str(checkpoint.dtype()).removeprefix("torch.")}
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {"bytes": sum(p.nbytes for p in model.parameters()), "dtype": str(dtype).removeprefix("torch.")}


def _side_texts(report: Report, windows: Windows) -> dict[str, str]:
    # Without the timings, so that the same run writes the same page; `topiarist report` shows them.
    result = Result(report.to_dict(), __about__.__version__)
    return {
        "README.md": model_card(result),
        PAGE: report_page(result),
        "pruning_run.json": json.dumps(report.run, indent=2) + "\n",
        "pruning_calibration.json": json.dumps(
            {"digest": windows.digest, "line_hashes": [f"{h:016x}" for h in sorted(windows.line_hashes)]}
        )
        + "\n",
    }
