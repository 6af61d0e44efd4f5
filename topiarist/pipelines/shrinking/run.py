"""The stages of a structural run on a model in memory: choose, plan, refit, cut. Each goes on from what was saved."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from topiarist.checkpoints.writing import OutputFolder, SavedState
from topiarist.core.errors import UnsupportedModel
from topiarist.core.meter import Meter
from topiarist.data import Windows
from topiarist.models.opened import ObjectModel, evaluated
from topiarist.pipelines.shrinking.cuts import Cut, remember, scorer_of
from topiarist.pipelines.shrinking.distill import Distill, distill
from topiarist.pipelines.shrinking.merge import Merged, merge_experts
from topiarist.pipelines.shrinking.options import ShrinkOptions
from topiarist.pipelines.shrinking.refit_consumers import Saved, refit_consumers
from topiarist.pipelines.shrinking.refit_width import refit_readers
from topiarist.pipelines.shrinking.report import Refitted
from topiarist.structured import (
    Kept,
    Method,
    Plan,
    PruneSpec,
    Scores,
    Task,
    UnitGroup,
    choose,
    mask_in_place,
    plan_layout,
    predicted_parameters,
    shrunk,
)
from topiarist.structured.reap import Reap
from topiarist.structured.rotation import principal_axes, readers_of, rotated
from topiarist.structured.units import HIDDEN

Progress = Callable[[str, int, int], None]
LOGGED = 20
"""Losses of a recovery in the report, about."""


@dataclass(frozen=True)
class Done:
    """A cut that was made."""

    groups: Sequence[UnitGroup]
    kept: Kept
    slots: Mapping[str, int]
    layers: list[Refitted]
    merged: dict[str, dict[str, list[int]]]

    def indices(self) -> dict[str, dict[str, Any]]:
        """The units that stay, as a PruneSpec has them."""
        return PruneSpec.indices(self.groups, self.kept, self.slots)


def parameter_counts(dense: int, done: Sequence[Done], stored: int) -> dict[str, int]:
    """Parameters of the whole model: dense, kept (without padding), stored, and biases where the method added any."""
    if len(done) > 1:  # what the first cut leaves is the dense model of the next; such cuts are not padded
        return {"dense": dense, "kept": stored, "stored": stored}
    predicted = predicted_parameters(dense, done[0].groups, done[0].kept, done[0].slots)
    biases = stored - predicted["stored"]
    return {**predicted, "stored": stored, **({"biases": biases} if biases else {})}


class ShrinkRun:
    """Cuts, one after the other, of a model in memory: `source` is the model as the last one left it.

    output: where states are saved, None for nowhere. windows: the calibration text, None without. notes: the report's, to
    which warnings are added.
    """

    def __init__(
        self,
        source: ObjectModel,
        method: Method,
        output: OutputFolder | None,
        windows: Windows | None,
        batch_size: int,
        seed: int,
        progress: Progress,
        notes: list[str],
        meter: Meter,
    ) -> None:
        self.source, self.method, self.output = source, method, output
        self.groups: Sequence[UnitGroup] = ()
        self.tokens = torch.zeros(0, 0, dtype=torch.int64) if windows is None else windows.tokens
        self.batch_size, self.seed, self.progress, self.notes = batch_size, seed, progress, notes
        self.meter = meter

    def state(self, name: str) -> SavedState:
        """A state of that name in the output folder; one that keeps nothing where there is no folder."""
        kind = self.groups[0].kind if self.groups else ""
        prefix = f"{kind}-" if kind in (HIDDEN, "block") else ""
        return SavedState() if self.output is None else self.output.state(f"{prefix}{name}")

    def cut(self, cut: Cut, options: ShrinkOptions, refit: bool, *, restore: bool) -> Done:
        """Choose units, refit what read them, and go on with the smaller model. restore: the caller's model stays as it is."""
        self.groups = cut.groups
        scored = self.rotate() if options.rotate and cut.groups[0].kind == HIDDEN else None
        kept, biases = self.choice(cut, options.round_to, scored, with_biases=not refit)
        plan = self.plan(kept, options.layout, options.max_waste, biases)
        if cut.groups[0].kind == HIDDEN:
            small, merged = self.smaller(kept, plan, biases), {}
            layers = self.refit_width(small, kept) if refit else []
        else:
            with self.consumers_restored(restore):
                merged = self.merge(kept)
                layers = self.refit(kept) if refit else []
                small = self.smaller(kept, plan, biases)
        self.source = ObjectModel(small)
        return Done(cut.groups, kept, plan.slots, layers, merged)

    def rotate(self) -> Scores:
        """Turn the hidden states to their principal axes; returns the energy of each."""
        (group,) = self.groups
        model, saved = self.source.model, self.state("axes")
        readers = readers_of(model, group, self.tokens)
        with self.meter.timed("rotation"):
            if (found := saved.load()) is None:
                Q, energies = principal_axes(model, group, self.tokens, self.batch_size, self.progress)
                saved.save({"Q": Q.contiguous(), "energies": energies.contiguous()}, {})
            else:
                Q, energies = found[0]["Q"], found[0]["energies"]
            self.source = ObjectModel(rotated(model, group, readers, Q.to(self.source.device)))
        return {group.key: energies.cpu()}

    def choice(
        self, cut: Cut, round_to: int | None, scored: Scores | None = None, *, with_biases: bool
    ) -> tuple[Kept, dict[str, Tensor]]:
        """What stays, and the method's biases, from its scores; those of an earlier try if it got so far.

        scored: scores to take instead of the method's.
        """
        saved = self.state("kept")
        if (found := saved.load()) is not None:
            self.notes += [note for note in json.loads(found[1]["notes"]) if note not in self.notes]
            kept = {group.key: found[0][group.key] for group in self.groups}
            return kept, {name: bias for name, bias in found[0].items() if name not in kept}
        task = Task(
            self.source.model, self.groups, self.tokens, cut.keep, cut.scope, cut.counts, round_to, self.batch_size,
            self.seed, self.progress, self.state("method"),
        )  # fmt: skip
        with self.meter.timed("scores"), _caught(self.notes):
            method = scorer_of(self.method, self.groups[0].kind)
            scores = scored or method.scores(task)
            kept = choose(self.groups, scores, cut.keep, scope=cut.scope, round_to=round_to, counts=cut.counts)
            biases = method.biases(task, kept) if with_biases else {}
        saved.save({**kept, **biases}, {"notes": json.dumps(self.notes)})
        return kept, biases

    def plan(self, kept: Kept, layout: str, max_waste: float, biases: dict[str, Tensor]) -> Plan:
        """The layout; without the biases, and a warning, where the family has no room for them."""
        model = self.source.model
        fused = {group.consumer for group in self.groups if group.parts[-1].expert is not None}
        if held := sorted(fused & biases.keys()):
            remember(self.notes, "the biases that make up for what was cut of experts are left out: experts hold none")
        for consumer in held:
            del biases[consumer]
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

    @contextmanager
    def consumers_restored(self, wanted: bool) -> Iterator[None]:
        """At the end, the weights that a refit or a merge changes are put back into the caller's model, if wanted."""
        names = {group.parts[-1].parameter for group in self.groups if group.width and wanted}
        if merges(self.method) and wanted:
            names |= {part.parameter for group in self.groups if group.kind == "experts" for part in group.parts}
        before = {name: self.source.model.get_parameter(name).data.clone() for name in names}
        try:
            yield
        finally:
            for name, weight in before.items():
                self.source.model.get_parameter(name).data = weight

    def merge(self, kept: Kept) -> dict[str, dict[str, list[int]]]:
        """Merge experts that go into those that stay, if the method says so; {layer: {expert: those it took in}}."""
        method = self.method
        if not merges(method):
            return {}

        def load(index: int) -> Merged | None:
            found = self.state(f"merge-{index:05d}").load()
            return None if found is None else (found[0], {int(k): v for k, v in json.loads(found[1]["taken"]).items()})

        def save(index: int, done: Merged) -> None:
            tensors = {name: tensor.cpu() for name, tensor in done[0].items()}
            self.state(f"merge-{index:05d}").save(tensors, {"taken": json.dumps(done[1])})

        with self.meter.timed("merge"):
            return merge_experts(
                self.source, self.groups, kept, method, self.tokens,
                batch_size=self.batch_size, load=load, save=save, progress=self.progress,
            )  # fmt: skip

    def refit(self, kept: Kept) -> list[Any]:
        """Refit what reads the kept units on the calibration text, layer by layer; one report a layer."""
        with self.meter.timed("refit"):
            layers, notes = refit_consumers(
                self.source, self.groups, kept, self.tokens,
                batch_size=self.batch_size, load=self._load_refit, save=self._save_refit, progress=self.progress,
            )  # fmt: skip
        self.notes += notes
        return layers

    def refit_width(self, narrow: Any, kept: Kept) -> list[Any]:
        """Refit what reads the hidden states of the narrower model, block by block; one report a matrix."""
        (group,) = self.groups
        with self.meter.timed("refit"):
            layers, notes = refit_readers(
                self.source, ObjectModel(narrow), group, kept[group.key], self.tokens,
                batch_size=self.batch_size, load=self._load_refit, save=self._save_refit, progress=self.progress,
            )  # fmt: skip
        self.notes += notes
        return layers

    def _load_refit(self, index: int) -> Saved | None:
        found = self.state(f"refit-{index:05d}").load()
        return None if found is None else (found[0], json.loads(found[1]["rows"]))

    def _save_refit(self, index: int, done: Saved) -> None:
        weights = {name: weight.cpu().contiguous() for name, weight in done[0].items()}
        self.state(f"refit-{index:05d}").save(weights, {"rows": json.dumps(done[1])})

    def smaller(self, kept: Kept, plan: Plan, biases: Mapping[str, Tensor]) -> Any:
        """The model without the units that go; under the layout `masked` with zeros in their place."""
        model = self.source.model
        with self.meter.timed("cut"):
            if plan.layout != "masked":
                return shrunk(model, self.groups, kept, plan, biases)
            mask_in_place(model, self.groups, kept)
            everything = {key: torch.ones_like(mask) for key, mask in kept.items()}
            return shrunk(model, self.groups, everything, plan, biases) if biases else model

    def recover(self, small: Any, teacher: Any, settings: Distill) -> list[dict[str, float]]:
        """Train the small model in place; some of the losses on the way."""
        with self.meter.timed("recovery"):
            losses = distill(
                small, teacher, settings, self.tokens,
                batch_size=self.batch_size, seed=self.seed, progress=self.progress, state=self.state("recovery"),
                on_note=lambda note: remember(self.notes, note),
            )  # fmt: skip
        every = max(1, len(losses) // LOGGED)
        shown = [step for step in range(1, len(losses) + 1) if step % every == 0 or step == len(losses)]
        return [{"step": step, "loss": losses[step - 1]} for step in shown]


def merges(method: Method) -> TypeGuard[Reap]:
    """Whether a method changes the weights of experts that stay."""
    return isinstance(method, Reap) and method.merge


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards as it was."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with evaluated(model):
            yield
    finally:
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
