"""Structural pruning end to end: plan, score, choose, refit, cut, recover, save."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.data import TextFiles, Windows
from topiarist.errors import CalibrationError, TopiaristError, UnsupportedModel
from topiarist.evaluate import load_model
from topiarist.pipelines.distill import Distill, distill
from topiarist.pipelines.learn_files import model_digest
from topiarist.pipelines.refitting import Saved, refit_consumers
from topiarist.pipelines.setup import open_source, read_windows
from topiarist.pipelines.shrink_files import FolderState, write_shrunk
from topiarist.pipelines.shrink_plan import method_name, plan_choice, refuse_pruned, remember, resolve_method
from topiarist.pipelines.shrink_report import ShrinkReport, shrink_command
from topiarist.report import peak_memory_bytes, reset_peak_memory
from topiarist.sources import LoadedModel
from topiarist.store import OutputFolder
from topiarist.structured import (
    Kept,
    Method,
    Plan,
    PruneSpec,
    Task,
    UnitGroup,
    choose,
    mask_in_place,
    plan_layout,
    predicted_parameters,
    shrunk,
)
from topiarist.structured.layout import MAX_WASTE
from topiarist.structured.units import DEPTH_KINDS

Progress = Callable[[str, int, int], None]
LOGGED = 20
"""Losses of a recovery in the report, about."""


def shrink(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    method: str | Method,
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
    started = time.perf_counter()
    reset_peak_memory()
    scorer = resolve_method(method)
    recovery = Distill(kind=recover) if isinstance(recover, str) else recover
    # A model object's own folder may be there: it resumes too.
    target = None if isinstance(model, nn.Module) else out
    source, checkpoint, name = open_source(model, target, device, trust_remote_code)
    refuse_pruned(source.model.config, name)
    notes: list[str] = []
    groups, counts, scope = plan_choice(source.model, scorer, keep, layout, units, scope, round_to, notes)
    if recovery is not None and layout == "masked" and checkpoint is None:
        raise TopiaristError(
            "a model object that is masked in place cannot teach itself: give its folder, or another layout"
        )
    refit = refit and any(group.kind in ("heads", "query_heads", "channels") for group in groups)
    windows = None
    if data is not None:
        windows = read_windows(source, checkpoint, data, tokenizer, num_samples, window, seed)
    elif scorer.needs_data or refit or recovery:
        what = "recovery" if recovery else "the refit" if not scorer.needs_data else f"method {method_name(scorer)}"
        raise CalibrationError(
            f"{what} needs text: name --data FILE" + (", or --no-refit" if what == "the refit" else "")
        )
    calibration = _calibration(windows, seed, batch_size)
    kinds = tuple(dict.fromkeys(group.kind for group in groups))
    said = {
        "keep": keep, "layout": layout, "units": kinds, "scope": None if layout == "uniform" else scope,
        "round-to": round_to, "refit": refit, "samples": calibration.get("samples"), "window": calibration.get("window"),
        "seed": seed, "batch-size": batch_size, "max-waste": max_waste if layout == "padded" else None,
    }  # fmt: skip
    command, unsaid = shrink_command(model, data, scorer, said, recovery)
    report = ShrinkReport(
        method_name(scorer), asdict(scorer), keep, layout, list(kinds), scope, name, calibration,
        command=command, not_in_command=unsaid,
    )  # fmt: skip
    output = None
    digest = checkpoint.digest() if checkpoint is not None else model_digest(source.model)
    if out is not None:
        fingerprint = {
            "model": digest,
            "method": {"name": report.method, **report.settings},
            **{key: list(value) if isinstance(value, tuple) else value for key, value in said.items()},
            "calibration": calibration,
            "recover": None if recovery is None else asdict(recovery),
        }
        output = OutputFolder(Path(out), fingerprint)
        if output.complete:
            return ShrinkReport.from_folder(output.folder)
        output.begin(int(2.1 * (checkpoint.weight_bytes() if checkpoint else _bytes(source.model))))
    if checkpoint is not None:
        del source
        loaded = load_model(checkpoint.folder, device=_device(device), trust_remote_code=trust_remote_code)
        source = LoadedModel(loaded)
    run = _Run(source, groups, scorer, output, windows, batch_size, seed, progress or (lambda *_: None), notes)
    with _frozen(source.model):
        kept, biases = run.choice(keep, scope, counts, round_to, with_biases=not refit)
        plan = run.plan(kept, layout, max_waste, biases)
        before = {} if checkpoint is not None or layout == "masked" else run.consumers()
        try:
            if refit:
                report.layers = run.refit(kept)
            small = run.cut(kept, plan, biases)
        finally:
            for path, weight in before.items():
                source.model.get_parameter(path).data = weight
    dense, dense_bytes, where = _numel(source.model), _bytes(source.model), source.device
    if recovery is not None:
        if checkpoint is not None:
            del source, run.source  # the dense model again, before anything was refit
            teacher = load_model(checkpoint.folder, device=where, trust_remote_code=trust_remote_code)
        else:
            teacher = model
        with run.timed("recovery"):
            losses = distill(small, teacher, run.tokens, recovery, batch_size, seed, run.progress)
        every = max(1, len(losses) // LOGGED)
        report.recovered = [
            {"step": step, "loss": loss}
            for step, loss in enumerate(losses, 1)
            if step % every == 0 or step == len(losses)
        ]
    report.parameters = {**predicted_parameters(dense, groups, kept, plan.slots), "stored": _numel(small)}
    spec = PruneSpec(
        name, digest, report.method, report.settings, keep, scope, layout, kinds, report.parameters,
        PruneSpec.indices(groups, kept, plan.slots),
    )  # fmt: skip
    report.blocks, report.warnings = spec.by_block(), notes
    report.tensor_parallel = _tensor_parallel(groups, plan)
    report.weights = {"dense": dense_bytes, "bytes": _bytes(small), "dtype": _dtype(small)}
    report.output, report.result = None if out is None else str(out), None if checkpoint else small
    report.run = {
        "seconds": time.perf_counter() - started,
        "seconds_by_activity": dict(run.seconds),
        "peak_memory_bytes": peak_memory_bytes(),
        "threads": torch.get_num_threads(),
        "device": str(where),
        "torch": torch.__version__,
    }
    if output is not None:
        write_shrunk(output, checkpoint, small, tokenizer, spec, report, windows)
    return report


class _Run:
    """The stages, for a model in memory."""

    def __init__(
        self,
        source: LoadedModel,
        groups: Sequence[UnitGroup],
        method: Method,
        output: OutputFolder | None,
        windows: Windows | None,
        batch_size: int,
        seed: int,
        progress: Progress,
        notes: list[str],
    ) -> None:
        self.source, self.groups, self.method, self.output = source, groups, method, output
        self.tokens = torch.zeros(0, 0, dtype=torch.int64) if windows is None else windows.tokens
        self.batch_size, self.seed, self.progress, self.notes = batch_size, seed, progress, notes
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + time.perf_counter() - start

    def choice(
        self, keep: float, scope: str, counts: Mapping[str, int] | None, round_to: int | None, *, with_biases: bool
    ) -> tuple[Kept, dict[str, Tensor]]:
        """What stays, and the method's biases, from its scores; those of an earlier try if it got so far."""
        saved = None if self.output is None else FolderState(self.output, "kept")
        if saved is not None and (found := saved.load()) is not None:
            self.notes += [note for note in json.loads(found[1]["notes"]) if note not in self.notes]
            kept = {group.key: found[0][group.key] for group in self.groups}
            return kept, {name: bias for name, bias in found[0].items() if name not in kept}
        task = Task(
            self.source.model, self.groups, self.tokens, keep, scope, counts, round_to, self.batch_size, self.seed,
            self.progress,
        )  # fmt: skip
        if self.output is not None:
            task.state = FolderState(self.output, "method")
        with self.timed("scores"), _caught(self.notes):
            scores = self.method.scores(task)
            kept = choose(self.groups, scores, keep, scope=scope, round_to=round_to, counts=counts)
            biases = self.method.biases(task, kept) if with_biases else {}
        if saved is not None:
            saved.save({**kept, **biases}, {"notes": json.dumps(self.notes)})
        return kept, biases

    def plan(self, kept: Kept, layout: str, max_waste: float, biases: dict[str, Tensor]) -> Plan:
        """The layout; without the biases, and a warning, where the family has no room for them."""
        model = self.source.model
        try:
            plan = plan_layout(model, self.groups, kept, layout, max_waste=max_waste, biased=list(biases))
        except UnsupportedModel as error:
            if not biases:
                raise
            plan = plan_layout(model, self.groups, kept, layout, max_waste=max_waste)
            remember(self.notes, f"the biases that make up for what was cut are left out: {error}")
            biases.clear()
        for note in plan.warnings:
            remember(self.notes, note)
        return plan

    def consumers(self) -> dict[str, Tensor]:
        """The weights that a refit changes, to be put back into the caller's model."""
        names = {group.parts[-1].parameter for group in self.groups if group.width}
        return {name: self.source.model.get_parameter(name).data.clone() for name in names}

    def refit(self, kept: Kept) -> list[Any]:
        def load(index: int) -> Saved | None:
            found = None if self.output is None else FolderState(self.output, f"refit-{index:05d}").load()
            return None if found is None else (found[0], json.loads(found[1]["rows"]))

        def save(index: int, done: Saved) -> None:
            if self.output is not None:
                weights = {name: weight.cpu().contiguous() for name, weight in done[0].items()}
                FolderState(self.output, f"refit-{index:05d}").save(weights, {"rows": json.dumps(done[1])})

        with self.timed("refit"):
            layers, notes = refit_consumers(
                self.source, self.groups, kept, self.tokens,
                batch_size=self.batch_size, load=load, save=save, progress=self.progress,
            )  # fmt: skip
        self.notes += notes
        return layers

    def cut(self, kept: Kept, plan: Plan, biases: Mapping[str, Tensor]) -> Any:
        model = self.source.model
        with self.timed("cut"):
            if plan.layout != "masked":
                return shrunk(model, self.groups, kept, plan, biases)
            mask_in_place(model, self.groups, kept)
            everything = {key: torch.ones_like(mask) for key, mask in kept.items()}
            return shrunk(model, self.groups, everything, plan, biases) if biases else model


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards as it was."""
    training, wanted = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _caught(notes: list[str]) -> Iterator[None]:
    """Warnings of a method are told, and noted for the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        remember(notes, str(warning.message), warning.category)


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


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _dtype(model: nn.Module) -> str:
    return str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
