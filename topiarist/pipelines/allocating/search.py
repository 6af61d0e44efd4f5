"""The search for an allocation: candidates from a database of solutions, judged by the whole model's predictions."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from topiarist.allocate import Scores, Search, recipe
from topiarist.allocate.budget import Shapes, budget
from topiarist.allocate.evolve import Genome, mutate, starts
from topiarist.checkpoints.locking import FolderLock
from topiarist.core.errors import CalibrationError, NumericalError
from topiarist.core.losses import divergence
from topiarist.core.options import Registered, plain
from topiarist.core.patterns import NM, Columns, Pattern, TransposableNM, Unstructured
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.allocating.database import Database, fill
from topiarist.pipelines.allocating.measure import layers_of
from topiarist.pipelines.allocating.options import AllocateOptions
from topiarist.pipelines.common.options import Progress
from topiarist.pipelines.pruning.sparsellm import METHODS, SparseLLM
from topiarist.solvers import SOLVERS, Solver


def levels_of(rule: Search, pattern: Pattern) -> list[Pattern | None]:
    """What a unit may get, densest first; None is dense."""
    if choices := rule.options():
        levels = sorted(choices, key=_sparsity)
    elif isinstance(pattern, NM | TransposableNM):
        levels = [None, *(replace(pattern, keep=keep) for keep in range(pattern.of - 1, 0, -1))]
    else:
        assert isinstance(pattern, Unstructured | Columns)
        reach = int(rule.half_width / rule.grid + 1e-9)
        steps = [round(pattern.sparsity + step * rule.grid, 6) for step in range(-reach, reach + 1)]
        levels = [replace(pattern, sparsity=s) if s > 0 else None for s in steps if 0 <= s < 1]
    return [p for p in levels if rule.min_sparsity <= _sparsity(p) <= rule.max_sparsity]


def _sparsity(pattern: Pattern | None) -> float:
    return 0.0 if pattern is None else pattern.sparsity_of((2**10, 2**10))


def search(
    options: AllocateOptions,
    rule: Search,
    source: OpenedModel,
    tokens: Int[Tensor, "num window"],
    shapes: Shapes,
    depths: Mapping[str, int],
    made_of: Mapping[str, Any],
    work: Path | None,
    progress: Progress,
) -> Scores:
    """The density of every layer of the best allocation found. What is in `work` is used and added to.

    made_of: identifies model and text. Raises CheckpointError while another search of the same works there,
    CalibrationError if the windows do not suffice for Grams and selection.
    """
    if len(tokens) <= rule.sequences:
        raise CalibrationError(
            f"{len(tokens)} calibration windows, of which the search keeps {rule.sequences} for selection: give more"
        )
    levels = levels_of(rule, options.base_pattern)
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        chosen = Registered(METHODS, base=(Solver,)).parse(rule.solver) if rule.solver else options.method
        # Solutions of single layers are what is stored, so of a joint method the local solver makes them.
        solver = chosen.local if isinstance(chosen, SparseLLM) else chosen
        method = plain(solver, SOLVERS)
        solved = {**made_of, "method": method, "layers": sorted(shapes), "windows": len(tokens) - rule.sequences}
        database = Database(folder, solved)
        lock = FolderLock(database.folder)
        lock.acquire()
        stack.callback(lock.release)
        grams = tokens[: -rule.sequences]
        wanted = [p for p in levels if p is not None]
        batch = options.batch_size
        fill(database, source, solver, grams, shapes, wanted, batch_size=batch, progress=progress)
        genes = Genes(rule, shapes, depths, levels, options.base_pattern)
        candidates = CandidateModel(source, database, genes, tokens[-rule.sequences :])
        fields = {key: value for key, value in recipe(rule).items() if key not in ("seconds", "generations")}
        journal = Journal(folder, {**solved, "rule": fields, "pattern": str(options.base_pattern)})
        return evolve(rule, options.seed, genes, candidates, journal, progress)


class Genes:
    """Which layers change level together, and how many weights they keep at each.

    depths: layer name -> number of its block. levels: patterns from the densest on, None for dense. pattern: how much
    is kept in all.
    """

    def __init__(
        self,
        rule: Search,
        shapes: Shapes,
        depths: Mapping[str, int],
        levels: Sequence[Pattern | None],
        pattern: Pattern,
    ) -> None:
        units: dict[str | int, list[str]] = {}
        for name in shapes:
            units.setdefault(depths[name] if rule.level == "block" else name, []).append(name)
        self.units, self.levels, self.shapes = list(units.values()), levels, shapes
        self.depths = [depths[unit[0]] for unit in self.units]
        self.sizes = [sum(_kept(None, shapes[name]) for name in unit) for unit in self.units]
        self.kept = [[sum(_kept(level, shapes[n]) for n in unit) for level in levels] for unit in self.units]
        # Every layer of a level is rounded by itself, half a weight at most; the final allocation is exact again.
        self.budget = budget(shapes, pattern) + (len(shapes) if isinstance(pattern, Unstructured) else 0)

    def densities(self, genome: Genome) -> dict[str, float]:
        """The fraction of weights that the genome keeps of every layer."""
        return {
            name: _kept(self.levels[level], self.shapes[name]) / _kept(None, self.shapes[name])
            for unit, level in zip(self.units, genome, strict=True)
            for name in unit
        }


def _kept(pattern: Pattern | None, shape: tuple[int, int]) -> int:
    return shape[0] * shape[1] if pattern is None else pattern.num_kept(shape)


class CandidateModel:
    """The whole model in memory, dressed as one candidate after another, held against its own dense predictions.

    windows (num, window), int64: the text for selection. Its dense logits stay in memory, on the CPU.
    """

    def __init__(self, source: OpenedModel, database: Database, genes: Genes, windows: Tensor) -> None:
        self.database, self.genes, self.windows = database, genes, windows
        self.model = source.fresh()
        self.matrices = layers_of(self.model, source, list(genes.shapes))
        self.assigned: dict[int, int | None] = dict.fromkeys(range(len(genes.units)))
        self.dense = {name: m.weight.clone() for name, m in self.matrices.items()} if None in genes.levels else {}
        self.targets = [self._logits(row).cpu() for row in windows]

    @torch.no_grad()
    def _logits(self, window: Tensor) -> Tensor:
        return self.model(input_ids=window[None].to(next(self.model.parameters()).device), use_cache=False).logits[0]

    def assign(self, genome: Genome) -> None:
        """Give the model the candidate's weights; units that are at their level already are not read again."""
        for unit, level in enumerate(genome):
            if self.assigned[unit] == level:
                continue
            pattern = self.genes.levels[level]
            for name in self.genes.units[unit]:
                matrix = self.matrices[name]
                weight = (
                    self.dense[name]
                    if pattern is None
                    else self.database.read(self.genes.depths[unit], pattern, name, matrix.shape)
                )
                matrix.assign(weight)
            self.assigned[unit] = level

    @torch.no_grad()
    def divergence(self, genome: Genome, row: int) -> float:
        """Mean over a window's tokens of KL(dense || candidate), in nats."""
        self.assign(genome)
        logits = self._logits(self.windows[row])
        mean = float(divergence(logits, self.targets[row].to(logits.device)))
        return mean if mean == mean else float("inf")  # a candidate that overflows loses


class Journal:
    """A line for every generation: the parent that came out of it, its divergence, the seconds it took.

    made_of: JSON values that identify the search; lines of an earlier try of the same one are read.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any]) -> None:
        text = json.dumps(made_of, sort_keys=True)
        self.path = folder / f"search-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self.lines: list[dict[str, Any]] = []
        if self.path.is_file():
            whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")  # a kill may have left half a line
            self.lines = [json.loads(line) for line in whole.splitlines()]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")

    def add(self, **line: Any) -> None:
        """Append a generation, and wait until it is on disk."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    @property
    def seconds(self) -> float:
        """Seconds that all generations in the journal took, those of earlier tries included."""
        return sum(line["seconds"] for line in self.lines)


def evolve(
    rule: Search, seed: int, genes: Genes, candidates: CandidateModel, journal: Journal, progress: Progress
) -> Scores:
    """Generation after generation until time or their number is up; what a generation draws depends on its number only,
    so a search that was stopped goes on as if it had not been.
    """
    rows = range(len(candidates.windows))
    if not journal.lines:
        started = time.perf_counter()
        first = starts(genes.kept, genes.sizes, genes.depths, genes.budget)
        judged = {}
        for number, genome in enumerate(first):
            progress("judging where to start", number, len(first))
            judged[genome] = _mean([candidates.divergence(genome, row) for row in rows])
        best = min(first, key=lambda genome: judged[genome])
        spent = time.perf_counter() - started
        journal.add(genome=best, divergence=judged[best], uniform=judged[first[0]], seconds=spent)
    parent, value = tuple(journal.lines[-1]["genome"]), float(journal.lines[-1]["divergence"])
    limit = float("inf") if rule.seconds is None else rule.seconds
    while len(journal.lines) <= rule.generations and journal.seconds < limit:
        generation, started = len(journal.lines), time.perf_counter()
        share = max(generation / max(rule.generations, 1), journal.seconds / limit)
        progress(f"searching, divergence {value:.4f}", int(1000 * share), 1000)
        draw = random.Random(f"{seed} {generation}")
        children = list(dict.fromkeys(mutate(parent, genes.kept, genes.budget, draw) for _ in range(rule.children)))
        row = generation % len(rows)
        part = {child: candidates.divergence(child, row) for child in children if child != parent}
        for child in sorted(part, key=lambda child: part[child])[: rule.finalists]:
            whole = _mean([part[child] if r == row else candidates.divergence(child, r) for r in rows])
            if whole < value:
                parent, value = child, whole
        journal.add(genome=parent, divergence=value, seconds=time.perf_counter() - started)
    if value == float("inf"):
        raise NumericalError("no candidate gives finite predictions on the selection windows")
    notes = {
        "divergence": value,
        "divergence_uniform": journal.lines[0]["uniform"],
        "generations": len(journal.lines) - 1,
    }
    return Scores(genes.densities(parent), {}, notes)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
