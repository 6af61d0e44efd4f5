"""Structural pruning end to end: plan, score, choose, refit, cut, recover, save."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from topiarist.checkpoints.writing import OutputFolder
from topiarist.core.errors import TopiaristError, UnsupportedModel
from topiarist.core.meter import Meter, reset_peak_memory
from topiarist.core.options import given_or_made, plain, takes
from topiarist.core.registry import name_of
from topiarist.data import Windows
from topiarist.models.derive import has_row
from topiarist.pipelines.common.dense import NO_UNIT, left_by_training, left_dense
from topiarist.pipelines.common.options import Progress
from topiarist.pipelines.common.reproduce import command, recipe
from topiarist.pipelines.common.setup import open_for, windows_of
from topiarist.pipelines.shrinking.decide import decide
from topiarist.pipelines.shrinking.distill import bytes_due, trained_names
from topiarist.pipelines.shrinking.files import write_shrunk
from topiarist.pipelines.shrinking.latency import best_within
from topiarist.pipelines.shrinking.options import Search, ShrinkOptions
from topiarist.pipelines.shrinking.report import ShrinkReport
from topiarist.pipelines.shrinking.run import ShrinkRun, frozen, parameter_counts
from topiarist.pipelines.shrinking.search import SplitSearch
from topiarist.results.result import chained
from topiarist.structured import METHODS, PruneSpec, default_kinds, units_of
from topiarist.structured.derived import tried

SAID = ("method", "keep", "layout", "units", "seed")
"""Settings that the command says even at their defaults."""


@takes(ShrinkOptions)
def shrink(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    options: ShrinkOptions | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> ShrinkReport:
    """Cut heads, channels, hidden channels, experts, sublayers or blocks out of a causal language model: a smaller dense model.

    model: a folder or hub id (`out` is needed), or a model object (which stays as it is, but for layout "masked"; the
    smaller one is the report's `result`). The whole model is in memory. options: all settings as one value, instead of
    single ones. progress: is told what goes on.

    The same call on the same `out` resumes a run that was killed, and returns the report of one that is finished.
    Raises a TopiaristError for everything a user can mend, before any work where that can be known before.
    """
    options = given_or_made(ShrinkOptions, options, settings)
    meter = Meter()
    reset_peak_memory()
    scorer, layout, recovery, round_to = options.chosen_method, options.layout, options.recover, options.round_to
    opened = open_for(options, model)
    opened.check_output(out)
    name, in_place = opened.name, opened.in_place
    notes: list[str] = []
    decided = decide(opened, options, notes)
    kinds, scope, cuts, splits, keep, refit = (
        decided.kinds, decided.scope, decided.cuts, decided.splits, decided.keep, decided.refit,
    )  # fmt: skip
    if recovery is not None and layout == "masked" and in_place:
        raise TopiaristError(
            "a model object that is masked in place cannot teach itself: give its folder, or another layout"
        )
    windows = windows_of(options, opened) if options.data is not None else None
    if windows is not None:
        options.check_windows(windows.tokens)
    calibration = _calibration(windows, options.seed, options.batch_size)
    resolved = replace(
        options, method=scorer, keep=None if options.searches else keep, units=kinds, refit=refit,
        scope=None if layout == "uniform" else scope,
        num_windows=calibration.get("num_windows", options.num_windows), window_tokens=calibration.get("window_tokens"),
    )  # fmt: skip
    words, unsaid = command("shrink", opened.said, resolved, always=SAID)
    report = ShrinkReport(
        method=name_of(METHODS, scorer), settings=plain(scorer), keep=keep, layout=layout, units=list(kinds), scope=scope,
        model=name, base_digest=opened.digest(), calibration=calibration, command=words, not_in_command=unsaid,
        recipe=recipe("shrink", opened.said, resolved, always=SAID),
    )  # fmt: skip
    output, source, digest, chain = None, None, report.base_digest, chained(opened.folder)
    if out is not None:
        asked = {field: entry for field, entry in plain(resolved).items() if field != "data"}
        fingerprint = {
            **asked,
            "model": digest,
            "method": {"name": report.method, **report.settings},
            "calibration": calibration,
        }
        output = OutputFolder(Path(out), fingerprint)
    if not has_row(opened.model) and not (output and output.complete):  # refused, if at all, before anything is written
        source = opened.whole()
        with frozen(source.model):
            cuts = [replace(cut, groups=tried(source.model, kinds, layout)) for cut in cuts]
    with ExitStack() as held:
        if output is not None:
            held.enter_context(output)
            if output.complete:
                return ShrinkReport.from_folder(output.folder)
            output.begin(bytes_due(opened, recovery))
        source = source or opened.whole()
        dense, dense_bytes, where = _numel(source.model), _nbytes(source.model), source.device
        run = ShrinkRun(
            source,
            scorer,
            output,
            windows,
            options.batch_size,
            options.seed,
            progress or (lambda *_: None),
            notes,
            meter,
        )
        with frozen(source.model):
            if splits is not None:
                search = SplitSearch(run, splits, options.search or Search(), round_to, options.target_latency)
                if (limit := options.target_latency) is None:
                    cuts, _ = search.best()
                else:
                    cuts, splits = best_within(search, limit)
                report.splits, keep = search.tried, splits.target / splits.dense
                report.share_kept(keep)
            done = [run.cut(cut, options, refit, restore=in_place and layout != "masked") for cut in cuts]
        small = run.source.model
        if recovery is not None:
            del source  # a folder's dense model is loaded again, as it was before anything was refit
            report.recovered = run.recover(small, opened.whole().model, recovery)
        report.layers = [layer for one in done for layer in one.layers]
        report.merged = {name: taken for one in done for name, taken in one.merged.items()}
        report.parameters = parameter_counts(dense, done, _numel(small))
        kept = {key: known for one in done for key, known in one.indices().items()}
        spec = PruneSpec(
            name, digest, report.method, report.settings, keep, scope, layout, kinds, report.parameters, kept,
            options.rotate,
        )  # fmt: skip
        cut = {part.parameter for one in done for group in one.groups for part in group.parts}
        report.dense = left_dense(opened, cut, {}, otherwise=NO_UNIT)
        if recovery is not None:
            report.dense = left_by_training(report.dense, opened, trained_names(opened, recovery))
        report.blocks, report.warnings = spec.by_block(), notes
        report.tensor_parallel = _tensor_parallel(opened.model, report.blocks)
        dtype = str(opened.dtype).removeprefix("torch.")
        report.weights = {"before": dense_bytes, "after": _nbytes(small), "dtype": dtype, **chain}
        report.output, report.result = None if out is None else str(out), small if in_place else None
        report.run = meter.run(where)
        if output is not None:
            write_shrunk(output, opened, small, spec, report, windows)
        return report


def _calibration(windows: Windows | None, seed: int, batch_size: int) -> dict[str, Any]:
    if windows is None:
        return {"seed": seed}
    return {
        "num_windows": len(windows.tokens),
        "window_tokens": windows.window,
        "seed": seed,
        "digest": windows.digest,
        "batch_size": batch_size,
    }


def _tensor_parallel(model: Any, rows: Sequence[dict[str, Any]]) -> list[int]:
    """Degrees up to 8 that divide the heads and channels of every layer as it is stored, those that were not cut too."""
    if not has_row(model):
        return []
    stored = {f"{row['name']}:{row['kind']}": row["slots"] for row in rows}
    try:
        groups = units_of(model, default_kinds(model))
    except UnsupportedModel:  # heads that cannot be told apart
        return []
    counts = {stored.get(group.key, group.count) for group in groups}
    return [degree for degree in range(1, 9) if all(count % degree == 0 for count in counts)]


def _numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _nbytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())
