"""Pruning the matrices of one block, given its inputs; every warning and error gets its layer's name here, once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from topiarist.errors import CalibrationWarning, NumericalError, NumericalWarning, TopiaristError
from topiarist.gram import Gram
from topiarist.models import Matrix
from topiarist.patterns import Pattern
from topiarist.pipelines.refine import Refine, refine_block
from topiarist.pipelines.stream import BlockStream, GramGroup
from topiarist.report import BlockRefinement, LayerReport
from topiarist.solvers import Solution, Solver


@dataclass
class BlockPruner:
    """A solver, a pattern for every layer (None = dense), and what is remembered of the work."""

    solver: Solver
    patterns: Mapping[str, Pattern | None]
    refine: Refine | None = None
    on_solution: Callable[[str, Solution], None] = lambda *_: None
    """Sees every solution with its layer's name: a mask is not always where the weight is not zero."""
    refined: list[BlockRefinement] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def warn(self, message: str, category: type[Warning]) -> None:
        self.warned.append(message)
        warnings.warn(message, category, stacklevel=2)

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + time.perf_counter() - start

    def prune(
        self,
        stream: BlockStream,
        index: int,
        block: nn.Module,
        matrices: Sequence[Matrix],
        path: str,
        *,
        sequential: bool,
    ) -> list[LayerReport]:
        """Prune the matrices of block `index` in place. `path` is the block's full name."""
        check_finite(block, path)
        wanted = [m for m in matrices if self.patterns[f"{path}.{m.name}"] is not None]
        if not wanted:
            return []
        stages = [wanted]
        if sequential:
            with self.timed("forward"):
                stages = stream.stages(index, block, wanted)
        targets = None
        if self.refine is not None:
            with self.timed("refine"):
                targets = stream.outputs(index, block)
        layers: list[LayerReport] = []
        for stage in stages:
            with self.timed("forward"):
                early = all(m.expert is None for m in stage)
                groups = stream.grams(index, block, stage, stop_early=early)
            layers += self.solve(groups, stage, path)
        if self.refine is not None and targets is not None:
            with self.timed("refine"):
                self.refined.append(refine_block(self.refine, stream, index, block, wanted, targets, path))
        return layers

    def solve(self, groups: Sequence[GramGroup], matrices: Sequence[Matrix], path: str) -> list[LayerReport]:
        """Solve every group on its Gram; matrices in no group saw no token and are pruned by magnitude, loudly."""
        self._warn_of_thin(groups, matrices, path)
        reached = {m for group in groups for m in group.matrices}
        unseen = [
            GramGroup([m], Gram.from_matrix(torch.eye(m.shape[1], device=m.tensor.device), tokens=0))
            for m in matrices
            if m not in reached
        ]
        layers: dict[Matrix, LayerReport] = {}
        with self.timed("solver"):
            for group in [*groups, *unseen]:
                layers.update(self._solve_group(group, path))
        return [layers[m] for m in matrices]

    def _solve_group(self, group: GramGroup, path: str) -> dict[Matrix, LayerReport]:
        names = [_join(path, m.name) for m in group.matrices]
        patterns = [self.patterns[name] for name in names]
        with self._named(group, names):
            solutions = self.solver.together([m.weight for m in group.matrices], group.gram, patterns)  # pyright: ignore[reportArgumentType]
        reports = {}
        for matrix, name, pattern, solution in zip(group.matrices, names, patterns, solutions, strict=True):
            matrix.assign(solution.weight)
            self.on_solution(name, solution)
            zeros = 1.0 - float((solution.weight != 0).float().mean(dtype=torch.float64))
            reports[matrix] = LayerReport(name, matrix.shape, str(pattern), zeros, solution.error, group.gram.tokens)
        return reports

    @contextmanager
    def _named(self, group: GramGroup, names: Sequence[str]) -> Iterator[None]:
        shapes = " and ".join(sorted({f"{m.shape[0]}x{m.shape[1]}" for m in group.matrices}))
        context = f"layer {', '.join(names)} ({shapes}), {type(self.solver).__name__}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NumericalWarning)
            try:
                yield
            except TopiaristError as error:
                raise type(error)(f"{context}: {error}") from error
        for warning in caught:
            self.warn(f"{context}: {warning.message}", warning.category)

    def _warn_of_thin(self, groups: Sequence[GramGroup], matrices: Sequence[Matrix], path: str) -> None:
        thin = {m: g.gram.tokens for g in groups for m in g.matrices if g.gram.tokens < g.gram.in_features}
        reached = {m for group in groups for m in group.matrices}
        thin |= {m: 0 for m in matrices if m not in reached}
        if not thin:
            return
        listed = [f"{m.name} ({tokens} tokens, {m.shape[1]} inputs)" for m, tokens in thin.items()]
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        self.warn(
            f"{path or 'model'}: fewer calibration tokens than inputs for {', '.join(listed[:8])}{more}; those without any "
            "token are pruned by magnitude; add calibration samples",
            CalibrationWarning,
        )


def check_finite(module: nn.Module, path: str) -> None:
    """Raise NumericalError, naming the first parameter that holds NaN or Inf."""
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericalError(f"NaN or Inf in {_join(path, name)}: the checkpoint is damaged; download it again")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
