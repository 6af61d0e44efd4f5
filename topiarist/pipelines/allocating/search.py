"""The search for an allocation: candidates from a database of solutions, judged by the whole model's predictions.

Several processes divide the solving and the judging; the main one writes, and its clock counts.
"""

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
from topiarist.checkpoints.atomic import write_atomically
from topiarist.checkpoints.journal import sealed, unsealed_text
from topiarist.checkpoints.locking import LOCK, FolderLock
from topiarist.core.errors import CalibrationError, NumericalError
from topiarist.core.losses import divergence
from topiarist.core.options import Registered, plain
from topiarist.core.patterns import NM, Columns, Pattern, TransposableNM, Unstructured
from topiarist.models.derive import check_has_text_loss
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.allocating.database import Database, fill
from topiarist.pipelines.allocating.measure import layers_of
from topiarist.pipelines.allocating.options import AllocateOptions
from topiarist.pipelines.common.options import Progress
from topiarist.pipelines.pruning.sparsellm import METHODS, Method, SparseLLM
from topiarist.pipelines.training.processes import Processes
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


def database_solver(rule: Search, method: Method) -> Solver:
    """What solves the database; of a joint method its local solver, for solutions of single layers are what is stored."""
    chosen = Registered(METHODS, base=(Solver,)).parse(rule.solver) if rule.solver else method
    return chosen.local if isinstance(chosen, SparseLLM) else chosen


def divided(
    rule: Search, tokens: Int[Tensor, "num window"]
) -> tuple[Int[Tensor, "grams window"], Int[Tensor, "selection window"]]:
    """The windows that make Grams, and those that select. Raises CalibrationError if they do not suffice for both."""
    if len(tokens) <= rule.sequences:
        raise CalibrationError(
            f"{len(tokens)} calibration windows, of which the search keeps {rule.sequences} for selection: give more"
        )
    return tokens[: -rule.sequences], tokens[-rule.sequences :]


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
    processes: Processes,
) -> Scores:
    """The density of every layer of the best allocation found. What is in `work` is used and added to.

    made_of: identifies model and text. Raises CheckpointError while another search of the same works there,
    CalibrationError if the windows do not suffice for Grams and selection, ProcessError if `work` is not the same folder
    for all processes.
    """
    grams, selection = divided(rule, tokens)
    levels = levels_of(rule, options.base_pattern)
    with ExitStack() as stack:
        folder = processes.on_main(lambda: work or Path(stack.enter_context(tempfile.TemporaryDirectory())))
        solver = database_solver(rule, options.method)
        method = plain(solver, SOLVERS)
        solved = {**made_of, "method": method, "layers": sorted(shapes), "windows": len(grams)}

        def begin() -> Database:
            database = Database(folder, solved)
            lock = FolderLock(database.folder)
            lock.acquire()
            stack.callback(lock.release)
            return database

        database = processes.on_main(begin)
        processes.check_shared((database.folder / LOCK).read_text, str(folder))
        wanted = [p for p in levels if p is not None]
        fill(
            database, source, solver, grams, shapes, wanted,
            batch_size=options.batch_size, progress=progress, processes=processes,
        )  # fmt: skip
        genes = Genes(rule, shapes, depths, levels, options.base_pattern)
        candidates = CandidateModel(source, database, genes, selection, processes)
        fields = {key: value for key, value in recipe(rule).items() if key not in ("seconds", "generations")}
        about = {**solved, "rule": fields, "pattern": str(options.base_pattern)}
        journal = Journal(folder, about, processes)
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
    processes: each has a whole model and judges its share of the candidates.
    """

    def __init__(
        self, source: OpenedModel, database: Database, genes: Genes, windows: Tensor, processes: Processes
    ) -> None:
        self.database, self.genes, self.windows, self.processes = database, genes, windows, processes
        check_has_text_loss(source.model, "a search")
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

    def divergences(self, judged: Sequence[tuple[Genome, int]]) -> list[float]:
        """Those of (candidate, window) pairs, in order, in all processes; pairs of one candidate stand together."""
        first, last = (
            len(judged) * rank // self.processes.size for rank in (self.processes.rank, self.processes.rank + 1)
        )
        own = [self.divergence(genome, row) for genome, row in judged[first:last]]
        return [value for its in self.processes.gather(own) for value in its]


class Journal:
    """A line for every generation: the parent that came out of it, its divergence, the seconds it took.

    made_of: JSON values that identify the search, but for its length; lines of an earlier try of the same one are read, up
    to the first that is not what was written, and `take` gives them out again: a longer search goes on from a shorter one,
    and a shorter one ends where it would have.
    processes: all have the lines of the main one, which writes them.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any], processes: Processes) -> None:
        text = json.dumps(made_of, sort_keys=True)
        self.path = folder / f"search-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self.processes = processes
        self.lines: list[dict[str, Any]] = []
        """Of this search, so far."""
        self._known: list[dict[str, Any]] = processes.on_main(self._read)

    def _read(self) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        if self.path.is_file():
            for raw in self.path.read_bytes().split(b"\n"):
                if (line := unsealed_text(raw)) is None:  # a kill may have left half a line
                    break
                lines.append(line)
            write_atomically(self.path, "".join(sealed(line) + "\n" for line in lines))
        return lines

    def take(self) -> bool:
        """Go on by the next generation as an earlier try found it; False if none did."""
        known = self._known[len(self.lines) :][:1]
        self.lines += known
        return bool(known)

    def add(self, **line: Any) -> None:
        """Append a generation, and wait until it is on disk."""

        def write() -> dict[str, Any]:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(sealed(line) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            return line

        self.lines.append(self.processes.on_main(write))

    @property
    def best(self) -> tuple[Genome, float]:
        """The parent that came out of the last generation, and its divergence."""
        return tuple(self.lines[-1]["genome"]), float(self.lines[-1]["divergence"])

    @property
    def seconds(self) -> float:
        """Seconds that all its generations took, those of earlier tries included."""
        return sum(line["seconds"] for line in self.lines)


def evolve(
    rule: Search, seed: int, genes: Genes, candidates: CandidateModel, journal: Journal, progress: Progress
) -> Scores:
    """Generation after generation until time or their number is up; what a generation draws depends on its number only,
    so a search that was stopped goes on as if it had not been.
    """
    rows = range(len(candidates.windows))
    if not journal.take():
        started = time.perf_counter()
        first = starts(genes.kept, genes.sizes, genes.depths, genes.budget)
        progress("judging where to start", 0, len(first))
        found = candidates.divergences([(genome, row) for genome in first for row in rows])
        judged = {genome: _mean(found[n * len(rows) : (n + 1) * len(rows)]) for n, genome in enumerate(first)}
        best = min(first, key=lambda genome: judged[genome])
        spent = time.perf_counter() - started
        journal.add(genome=best, divergence=judged[best], uniform=judged[first[0]], seconds=spent)
    limit = float("inf") if rule.seconds is None else rule.seconds
    while len(journal.lines) <= rule.generations and journal.seconds < limit:
        if journal.take():
            continue
        parent, value = journal.best
        generation, started = len(journal.lines), time.perf_counter()
        share = max(generation / max(rule.generations, 1), journal.seconds / limit)
        progress(f"searching, divergence {value:.4f}", int(1000 * share), 1000)
        draw = random.Random(f"{seed} {generation}")
        children = list(dict.fromkeys(mutate(parent, genes.kept, genes.budget, draw) for _ in range(rule.children)))
        row = generation % len(rows)
        children = [child for child in children if child != parent]
        part = dict(zip(children, candidates.divergences([(child, row) for child in children]), strict=True))
        finalists = sorted(part, key=lambda child: part[child])[: rule.finalists]
        others = [(child, r) for child in finalists for r in rows if r != row]
        found = dict(zip(others, candidates.divergences(others), strict=True))
        for child in finalists:
            whole = _mean([part[child] if r == row else found[child, r] for r in rows])
            if whole < value:
                parent, value = child, whole
        journal.add(genome=parent, divergence=value, seconds=time.perf_counter() - started)
    parent, value = journal.best
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
