"""Structural pruning end to end: plan, score, choose, refit, cut, recover, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.checkpoints.writing import OutputFolder
from topiarist.core.errors import CalibrationError, TopiaristError
from topiarist.core.meter import Meter, reset_peak_memory
from topiarist.core.registry import name_of, resolve
from topiarist.data import TextFiles, Windows
from topiarist.models.opened import open_model
from topiarist.pipelines.common.setup import read_windows
from topiarist.pipelines.shrinking.distill import Distill, disk_bytes
from topiarist.pipelines.shrinking.files import write_shrunk
from topiarist.pipelines.shrinking.plan import plan_choice, refuse_pruned
from topiarist.pipelines.shrinking.report import ShrinkReport, shrink_command
from topiarist.pipelines.shrinking.run import ShrinkRun, frozen
from topiarist.structured import (
    METHODS,
    Method,
    Plan,
    PruneSpec,
    UnitGroup,
    predicted_parameters,
)
from topiarist.structured.layout import MAX_WASTE
from topiarist.structured.units import COLUMN_KINDS, DEPTH_KINDS

Progress = Callable[[str, int, int], None]


def shrink(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    method: str | Method = "hybrid",
    keep: float = 0.8,
    data: TextFiles | Tensor | Sequence[str] | None = None,
    layout: str = "uniform",
    units: Sequence[str] | None = None,
    scope: str | None = None,
    round_to: int | None = None,
    refit: bool = True,
    recover: str | Distill | None = None,
    num_samples: int = 128,
    window: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    max_waste: float = MAX_WASTE,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ShrinkReport:
    """Cut heads, channels, experts, sublayers or blocks out of a causal language model: a smaller dense model.

    model: a folder or hub id (`out` is needed), or a model object (which stays as it is, but for layout "masked"; the
    smaller one is the report's `result`). The whole model is in memory. method: a name in METHODS, or a method.
    keep: share of the units' parameters that stays, never exceeded. data: text for scores, refit and recovery.
    layout: uniform (the default: opens everywhere), padded, hetero, masked. units: kinds of units; heads and channels
    by default. scope: global, parameters or per_layer (the only one for uniform). round_to: channels go in multiples of
    it; 64, less for narrow layers. refit: least squares for the matrices that consumed the units. recover: "lora",
    "full" or a `Distill`: afterwards, train towards the dense model's predictions. max_waste: limit of padding.

    The same call on the same `out` resumes a run that was killed, and returns the report of one that is finished.
    Raises a TopiaristError for everything a user can mend, before any work where that can be known before.
    """
    meter = Meter()
    reset_peak_memory()
    scorer = resolve(METHODS, method)
    recovery = Distill(kind=recover) if isinstance(recover, str) else recover
    opened = open_model(model, device=device, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
    opened.check_output(out)
    checkpoint, name = opened.checkpoint, opened.name
    refuse_pruned(opened.config, name)
    notes: list[str] = []
    groups, counts, scope = plan_choice(opened.model, scorer, keep, layout, units, scope, round_to, notes)
    if recovery is not None and layout == "masked" and checkpoint is None:
        raise TopiaristError(
            "a model object that is masked in place cannot teach itself: give its folder, or another layout"
        )
    refit = refit and any(group.kind in COLUMN_KINDS for group in groups)
    windows = None
    if data is not None:
        windows = read_windows(opened, data, tokenizer, num_samples, window, seed)
    else:
        _refuse_without_text(scorer, refit, recovery)
    calibration = _calibration(windows, seed, batch_size)
    kinds = tuple(dict.fromkeys(group.kind for group in groups))
    said = {
        "keep": keep, "layout": layout, "units": kinds, "scope": None if layout == "uniform" else scope,
        "round-to": round_to, "refit": refit, "samples": calibration.get("samples"), "window": calibration.get("window"),
        "seed": seed, "batch-size": batch_size, "max-waste": max_waste if layout == "padded" else None,
    }  # fmt: skip
    command, unsaid = shrink_command(model, data, scorer, said, recovery)
    report = ShrinkReport(
        method=name_of(METHODS, scorer), settings=asdict(scorer), keep=keep, layout=layout, units=list(kinds), scope=scope,
        model=name, base_digest=opened.digest(), calibration=calibration, command=command, not_in_command=unsaid,
    )  # fmt: skip
    output = None
    with ExitStack() as held:
        digest = report.base_digest
        if out is not None:
            fingerprint = {
                "model": digest,
                "method": {"name": report.method, **report.settings},
                **{key: list(value) if isinstance(value, tuple) else value for key, value in said.items()},
                "calibration": calibration,
                "recover": None if recovery is None else asdict(recovery),
            }
            output = held.enter_context(OutputFolder(Path(out), fingerprint))
            if output.complete:
                return ShrinkReport.from_folder(output.folder)
            states = 0 if recovery is None else disk_bytes(opened.model, recovery)
            output.begin(int(1.1 * opened.nbytes) + states)
        source = opened.whole()
        run = ShrinkRun(
            source, groups, scorer, output, windows, batch_size, seed, progress or (lambda *_: None), notes, meter
        )
        with frozen(source.model):
            kept, biases = run.choice(keep, scope, counts, round_to, with_biases=not refit)
            plan = run.plan(kept, layout, max_waste, biases)
            with run.consumers_restored(checkpoint is None and layout != "masked"):
                if refit:
                    report.layers = run.refit(kept)
                small = run.cut(kept, plan, biases)
        dense, dense_bytes, where = _numel(source.model), _nbytes(source.model), source.device
        if recovery is not None:
            if checkpoint is not None:
                del source, run.source  # the dense model again, before anything was refit
                teacher = opened.whole().model
            else:
                teacher = model
            report.recovered = run.recover(small, teacher, recovery)
        report.parameters = {**predicted_parameters(dense, groups, kept, plan.slots), "stored": _numel(small)}
        spec = PruneSpec(
            name, digest, report.method, report.settings, keep, scope, layout, kinds, report.parameters,
            PruneSpec.indices(groups, kept, plan.slots),
        )  # fmt: skip
        report.blocks, report.warnings = spec.by_block(), notes
        report.tensor_parallel = _tensor_parallel(groups, plan)
        dtype = str(opened.dtype).removeprefix("torch.")
        report.weights = {"before": dense_bytes, "after": _nbytes(small), "dtype": dtype}
        report.output, report.result = None if out is None else str(out), None if checkpoint else small
        report.run = meter.run(where)
        if output is not None:
            write_shrunk(output, opened, small, spec, report, windows)
        return report


def _refuse_without_text(scorer: Method, refit: bool, recovery: Distill | None) -> None:
    if recovery:
        what, cure = "recovery", ""
    elif scorer.needs_data:
        what, cure = f"method {name_of(METHODS, scorer)}", ""
    elif refit:
        what, cure = "the refit", ", or --no-refit"
    else:
        return
    raise CalibrationError(f"{what} needs text: name --data FILE{cure}")


def _calibration(windows: Windows | None, seed: int, batch_size: int) -> dict[str, Any]:
    if windows is None:
        return {"seed": seed}
    return {
        "samples": len(windows.tokens),
        "window": windows.window,
        "seed": seed,
        "digest": windows.digest,
        "batch_size": batch_size,
    }


def _tensor_parallel(groups: Sequence[UnitGroup], plan: Plan) -> list[int]:
    """Degrees up to 8 that divide every count of the stored model."""
    counts = {plan.slots[g.key] for g in groups if g.kind not in DEPTH_KINDS}
    return [degree for degree in range(1, 9) if counts and all(count % degree == 0 for count in counts)]


def _numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _nbytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())
