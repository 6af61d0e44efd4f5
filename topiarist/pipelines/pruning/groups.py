"""Solving for the matrices of one block: every warning and error gets its layer's name here, once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from topiarist.core.errors import CalibrationWarning, NumericalWarning, TopiaristError
from topiarist.core.gram import Gram
from topiarist.core.meter import Meter, return_freed_memory
from topiarist.core.patterns import Pattern
from topiarist.models.families import Matrix
from topiarist.pipelines.common.grams import GramGroup
from topiarist.pipelines.pruning.companion import Companion
from topiarist.pipelines.training.processes import Processes
from topiarist.results.report import LayerReport
from topiarist.solvers import Solution, Solver
from topiarist.solvers.low_rank import LowRank

Said = list[tuple[str, type[Warning]]]
"""Warnings that wait to be told."""
Outcome = tuple[list[Solution], Said, list[LowRank]]
"""What solving a group gives: solutions, warnings, low-rank companions if they are asked for."""


@dataclass
class GroupSolver:
    """A solver, a pattern for every layer (None = dense), and the processes that solve groups at the same time."""

    solver: Solver
    patterns: Mapping[str, Pattern | None]
    uncalled: Literal["magnitude", "dense"] = "magnitude"
    """What becomes of a linear layer that no forward called: attention to another model's states, say."""
    on_solution: Callable[[str, Solution], None] = lambda *_: None
    """Sees every solution with its layer's name: a mask is not always where the weight is not zero."""
    companion: Companion | None = None
    """Gathers a low-rank update for what each matrix lost."""
    warned: list[str] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)
    processes: Processes = field(default_factory=Processes)
    """Those that solve the groups of a block at the same time."""

    def warn(self, message: str, category: type[Warning]) -> None:
        """Once for each message, so that the rounds of a joint solve do not repeat themselves."""
        if message in self.warned:
            return
        self.warned.append(message)
        warnings.warn(message, category, stacklevel=2)

    def prune_without_data(self, block: nn.Module, matrices: Sequence[Matrix], path: str) -> list[LayerReport]:
        """Prune the matrices of a block in place by their weights alone."""
        layers = []
        with self.meter.timed("solver"):
            for matrix in matrices:
                name = _join(path, matrix.name)
                if (pattern := self.patterns[name]) is not None:
                    said: Said = []
                    with self._named([matrix], [name], said):
                        solution = self.solver.without_data(matrix.weight, pattern)
                    for message, category in said:
                        self.warn(message, category)
                    layers.append(self._take(path, matrix, solution, 0))
        return layers

    def solve(self, groups: Sequence[GramGroup], matrices: Sequence[Matrix], path: str) -> list[LayerReport]:
        """Solve every group on its Gram; matrices in no group saw no token and are pruned by magnitude, loudly."""
        reached = {m for group in groups for m in group.matrices}
        if self.uncalled == "dense":
            matrices = self._called(matrices, reached, path)
        self._warn_of_thin(groups, matrices, path)
        unseen = [
            GramGroup(
                [m],
                Gram.from_matrix(torch.eye(m.shape[1], device=m.tensor.device), tokens=0),
                owner=number % self.processes.size,
            )
            for number, m in enumerate(m for m in matrices if m not in reached)
        ]
        layers: dict[Matrix, LayerReport] = {}
        return_freed_memory()
        with self.meter.timed("solver"):
            for group, solutions in self._solved([*groups, *unseen], path):
                for matrix, solution in zip(group.matrices, solutions, strict=True):
                    layers[matrix] = self._take(path, matrix, solution, group.gram.tokens)
        return [layers[m] for m in matrices]

    def _solved(self, groups: Sequence[GramGroup], path: str) -> Iterator[tuple[GramGroup, list[Solution]]]:
        """Every group with its solutions, in order: each process solves the groups that it owns and hands them round."""
        rank = self.processes.rank
        outcomes = (self._outcome(group, path) for group in groups if group.owner == rank)
        if self.processes.size > 1:  # all solve at once: nobody waits for another's solution before its own are there
            outcomes = iter(list(outcomes))
        for group in groups:
            outcome: Any = next(outcomes) if group.owner == rank else None
            solutions, said, companions = self.processes.share(outcome, group.owner)
            for message, category in said:
                self.warn(message, category)
            if self.companion is not None and self.processes.is_main:
                for matrix, companion in zip(group.matrices, companions, strict=True):
                    self.companion.add(_join(path, matrix.name), matrix, companion)
            yield group, solutions

    def _outcome(self, group: GramGroup, path: str) -> Outcome | TopiaristError:
        """A group's solutions with what else its Gram is needed for, or the error that ended it, for all processes."""
        weights = [m.weight for m in group.matrices] if group.asked is None else group.asked
        names, said, companions = [_join(path, m.name) for m in group.matrices], Said(), list[LowRank]()
        try:
            with self._named(group.matrices, names, said):
                solutions = self.solver.together(weights, group.gram, [self.patterns[name] for name in names])  # pyright: ignore[reportArgumentType]
                if (companion := self.companion) is not None:
                    companions = [companion.of(W, s, group.gram) for W, s in zip(weights, solutions, strict=True)]
        except TopiaristError as error:
            return error
        return solutions, said, companions

    def _called(self, matrices: Sequence[Matrix], reached: set[Matrix], path: str) -> list[Matrix]:
        """The matrices without the linear layers that were never called: no text says anything about those."""
        never = [m.name for m in matrices if m not in reached and m.expert is None]
        if never:
            self.warn(f"{path}: never called for this text, so dense: {', '.join(never)}", CalibrationWarning)
        return [m for m in matrices if m.name not in never]

    def _take(self, path: str, matrix: Matrix, solution: Solution, tokens: int) -> LayerReport:
        """Put a solution into the model."""
        name = _join(path, matrix.name)
        matrix.assign(solution.weight)
        self.on_solution(name, solution)
        zeros = 1.0 - float((solution.weight != 0).float().mean(dtype=torch.float64))
        return LayerReport(name, matrix.shape, str(self.patterns[name]), zeros, solution.error, tokens)

    @contextmanager
    def _named(self, matrices: Sequence[Matrix], names: Sequence[str], said: Said) -> Iterator[None]:
        """Put the layers' names before errors, and before warnings, which go to `said`."""
        shapes = " and ".join(sorted({f"{m.shape[0]}x{m.shape[1]}" for m in matrices}))
        context = f"layer {', '.join(names)} ({shapes}), {type(self.solver).__name__}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NumericalWarning)
            warnings.simplefilter("ignore", CalibrationWarning)  # said once for the whole block
            try:
                yield
            except TopiaristError as error:
                raise type(error)(f"{context}: {error}") from error
        said += [(f"{context}: {warning.message}", warning.category) for warning in caught]

    def _warn_of_thin(self, groups: Sequence[GramGroup], matrices: Sequence[Matrix], path: str) -> None:
        thin = {m: g.gram.tokens for g in groups for m in g.matrices if g.gram.tokens < g.gram.in_features}
        reached = {m for group in groups for m in group.matrices}
        thin |= {m: 0 for m in matrices if m not in reached}
        if not thin:
            return
        unseen = "those without any token are pruned by magnitude; " if 0 in thin.values() else ""
        listed = [f"{m.name} ({tokens} tokens, {m.shape[1]} inputs)" for m, tokens in thin.items()]
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        self.warn(
            f"{path or 'model'}: fewer calibration tokens than inputs for {', '.join(listed[:8])}{more}; "
            f"{unseen}add calibration samples",
            CalibrationWarning,
        )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
