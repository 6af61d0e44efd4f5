"""Pruning the matrices of one block, given its inputs; every warning and error gets its layer's name here, once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from topiarist.core.errors import CalibrationWarning, NumericalError, NumericalWarning, TopiaristError
from topiarist.core.gram import Gram
from topiarist.core.linalg import reconstruction_error
from topiarist.core.meter import Meter, return_freed_memory
from topiarist.core.patterns import Pattern
from topiarist.models.families import Matrix
from topiarist.pipelines.common.stream import BlockStream, GramGroup, HiddenStates
from topiarist.pipelines.pruning.companion import Companion
from topiarist.pipelines.pruning.correct import Correct, Corrector
from topiarist.pipelines.pruning.ffn_joint import JointSolver, Network
from topiarist.pipelines.pruning.refine import Refine, refine_block
from topiarist.pipelines.pruning.sparsellm import Method, SparseLLM
from topiarist.results.report import BlockRefinement, JointBlock, LayerReport
from topiarist.solvers import Solution, Solver


@dataclass
class BlockPruner:
    """A solver, a pattern for every layer (None = dense), and what is remembered of the work."""

    solver: Solver
    patterns: Mapping[str, Pattern | None]
    refine: Refine | None = None
    correct: Correct | None = None
    joint: SparseLLM | None = None
    """Prunes feed-forward networks as a whole; `solver` is then its local solver."""
    uncalled: Literal["magnitude", "dense"] = "magnitude"
    """What becomes of a linear layer that no forward called: attention to another model's states, say."""
    companion: Companion | None = None
    """Gathers a low-rank update for what each matrix lost."""
    on_solution: Callable[[str, Solution], None] = lambda *_: None
    """Sees every solution with its layer's name: a mask is not always where the weight is not zero."""
    refined: list[BlockRefinement] = field(default_factory=list)
    joined: list[JointBlock] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)

    @classmethod
    def of(
        cls,
        method: Method,
        patterns: Mapping[str, Pattern | None],
        refine: Refine | None = None,
        correct: Correct | None = None,
        *,
        sequential: bool = False,
    ) -> BlockPruner:
        """For anything that `METHODS` holds. Raises TopiaristError on what contradicts itself."""
        if not isinstance(method, SparseLLM):
            return cls(method, patterns, refine, correct)
        if correct is not None:
            raise TopiaristError(
                "sparsellm prunes a feed-forward network towards its own target (target=dense), not matrix by matrix; "
                "drop the error correction, or take its local solver as the method"
            )
        if sequential and not method.recompute_after_attention:
            raise TopiaristError(
                "true_sequential takes every input after what comes before it was pruned, recompute_after_attention=false "
                "does not; drop one of them"
            )
        return cls(method.local, patterns, refine, joint=method)

    @property
    def needs_states(self) -> str:
        """What of the work looks at hidden states between blocks; empty if inputs of matrices are all."""
        if self.joint is not None:
            return "sparsellm"
        return "error correction" if self.correct is not None else "refinement" if self.refine is not None else ""

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states are needed beside the pruned one's (`BlockStream.follow_dense`)."""
        return self.correct is not None or (self.refine is not None and self.refine.target == "dense")

    def warn(self, message: str, category: type[Warning]) -> None:
        """Once for each message, so that the rounds of a joint solve do not repeat themselves."""
        if message in self.warned:
            return
        self.warned.append(message)
        warnings.warn(message, category, stacklevel=2)

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
        network = None if self.joint is None else self._network(stream, block, wanted, path)
        alone = [m for m in wanted if network is None or m not in network.matrices]
        before = None
        if network is not None and self.joint is not None and self.joint.needs_dense_inputs:
            with self.meter.timed("forward"):
                before = stream.inputs(index, block, network.first[0])
        stages = [alone] if alone else []
        corrector = None if self.correct is None else Corrector(self.correct, stream, index, block)
        if (sequential or corrector is not None) and alone:
            with self.meter.timed("forward"):
                stages = stream.stages(index, block, alone)
        targets = None
        if self.refine is not None:
            with self.meter.timed("refine"):
                targets = stream.dense if self.refine.target == "dense" else stream.outputs(index, block)
        layers: list[LayerReport] = []
        for stage in stages:
            with self.meter.timed("forward"):
                if corrector is not None:
                    groups = corrector.groups(stage)
                else:
                    groups = stream.grams(index, block, stage, stop_early=all(m.expert is None for m in stage))
            layers += self.solve(groups, stage, path)
        if network is not None:
            layers += self._prune_jointly(stream, index, block, network, before, path)
        if self.refine is not None and targets is not None:
            with self.meter.timed("refine"):
                self.refined.append(refine_block(self.refine, stream, index, block, wanted, targets.values, path))
        return layers

    def prune_without_data(self, block: nn.Module, matrices: Sequence[Matrix], path: str) -> list[LayerReport]:
        """Prune the matrices of a block in place by their weights alone."""
        check_finite(block, path)
        layers = []
        with self.meter.timed("solver"):
            for matrix in matrices:
                name = _join(path, matrix.name)
                if (pattern := self.patterns[name]) is not None:
                    with self._named([matrix], [name]):
                        solution = self.solver.without_data(matrix.weight, pattern)
                    layers.append(self._take(path, matrix, solution, 0))
        return layers

    def solve(self, groups: Sequence[GramGroup], matrices: Sequence[Matrix], path: str) -> list[LayerReport]:
        """Solve every group on its Gram; matrices in no group saw no token and are pruned by magnitude, loudly."""
        reached = {m for group in groups for m in group.matrices}
        if self.uncalled == "dense":
            matrices = self._called(matrices, reached, path)
        self._warn_of_thin(groups, matrices, path)
        unseen = [
            GramGroup([m], Gram.from_matrix(torch.eye(m.shape[1], device=m.tensor.device), tokens=0))
            for m in matrices
            if m not in reached
        ]
        layers: dict[Matrix, LayerReport] = {}
        return_freed_memory()
        with self.meter.timed("solver"):
            for group in [*groups, *unseen]:
                layers.update(self._solve_group(group, path))
        return [layers[m] for m in matrices]

    def _called(self, matrices: Sequence[Matrix], reached: set[Matrix], path: str) -> list[Matrix]:
        """The matrices without the linear layers that were never called: no text says anything about those."""
        never = [m.name for m in matrices if m not in reached and m.expert is None]
        if never:
            self.warn(f"{path}: never called for this text, so dense: {', '.join(never)}", CalibrationWarning)
        return [m for m in matrices if m.name not in never]

    def _solve_group(self, group: GramGroup, path: str) -> dict[Matrix, LayerReport]:
        weights = [m.weight for m in group.matrices] if group.asked is None else group.asked
        solutions = self._solutions(path, group.matrices, weights, group.gram)
        if self.companion is not None:
            for matrix, weight, solution in zip(group.matrices, weights, solutions, strict=True):
                self.companion.add(_join(path, matrix.name), matrix, weight, solution, group.gram)
        return {
            matrix: self._take(path, matrix, solution, group.gram.tokens)
            for matrix, solution in zip(group.matrices, solutions, strict=True)
        }

    def _solutions(
        self, path: str, matrices: Sequence[Matrix], weights: Sequence[Tensor], gram: Gram
    ) -> list[Solution]:
        """The local solver's, for weights that need not be those the matrices hold."""
        names = [_join(path, m.name) for m in matrices]
        with self._named(matrices, names):
            return self.solver.together(weights, gram, [self.patterns[name] for name in names])  # pyright: ignore[reportArgumentType]

    def _take(self, path: str, matrix: Matrix, solution: Solution, tokens: int) -> LayerReport:
        """Put a solution into the model."""
        name = _join(path, matrix.name)
        matrix.assign(solution.weight)
        self.on_solution(name, solution)
        zeros = 1.0 - float((solution.weight != 0).float().mean(dtype=torch.float64))
        return LayerReport(name, matrix.shape, str(self.patterns[name]), zeros, solution.error, tokens)

    def _network(self, stream: BlockStream, block: nn.Module, wanted: Sequence[Matrix], path: str) -> Network | None:
        """The block's feed-forward network, if it can be pruned as a whole; says plainly what cannot."""
        config: Any = stream.source.model.config
        rows, kind = stream.source.family.feed_forward, config.model_type
        network = Network.find(block, rows, wanted)
        name = type(self.solver).__name__
        if any(matrix.expert is not None for matrix in wanted):
            self.warn(f"{kind}: experts are pruned one by one by {name}, not as networks", UserWarning)
        elif network is None:
            parts = {part for row in rows for part in (*row.first, row.down)}
            missing = (
                "stays dense in part"
                if parts & {m.name for m in wanted}
                else f"of {kind} has no row in models.FAMILIES"
            )
            self.warn(
                f"{path}: its feed-forward network {missing}, so {name} prunes its matrices one by one", UserWarning
            )
        return network

    def _prune_jointly(
        self,
        stream: BlockStream,
        index: int,
        block: nn.Module,
        network: Network,
        before: HiddenStates | None,
        path: str,
    ) -> list[LayerReport]:
        """Prune a feed-forward network as a whole. `before`: its inputs before the rest of the block was pruned."""
        assert self.joint is not None
        with self.meter.timed("forward"):
            now = stream.inputs(index, block, network.first[0]) if self.joint.recompute_after_attention else before
            asked = before if self.joint.target == "dense" else now
            assert now is not None and asked is not None
            targets = stream.new_states(network.down.shape[0])
            network.outputs(asked.values, targets.values)
        with self.meter.timed("solver"):
            solver = JointSolver(
                self.joint, network, now.values, targets.values, partial(self._solutions, path), stream.new_states
            )
            groups = [GramGroup(network.first, solver.gram_X), GramGroup([network.down], solver.gram_p)]
            self._warn_of_thin(groups, network.matrices, path)
            solutions, record = solver.run(path, self.warn)
        self.joined.append(record)
        grams = [solver.gram_X] * len(network.first) + [solver.gram_p]
        reports = []
        for matrix, solution, gram in zip(network.matrices, solutions, grams, strict=True):
            # The local solver may have been given a refitted weight: the error told is that against the dense one.
            error = reconstruction_error(matrix.weight, solution.weight, gram)
            reports.append(self._take(path, matrix, replace(solution, error=error), gram.tokens))
        return reports

    @contextmanager
    def _named(self, matrices: Sequence[Matrix], names: Sequence[str]) -> Iterator[None]:
        shapes = " and ".join(sorted({f"{m.shape[0]}x{m.shape[1]}" for m in matrices}))
        context = f"layer {', '.join(names)} ({shapes}), {type(self.solver).__name__}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NumericalWarning)
            warnings.simplefilter("ignore", CalibrationWarning)  # said once for the whole block
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
        unseen = "those without any token are pruned by magnitude; " if 0 in thin.values() else ""
        listed = [f"{m.name} ({tokens} tokens, {m.shape[1]} inputs)" for m, tokens in thin.items()]
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        self.warn(
            f"{path or 'model'}: fewer calibration tokens than inputs for {', '.join(listed[:8])}{more}; "
            f"{unseen}add calibration samples",
            CalibrationWarning,
        )


def check_finite(module: nn.Module, path: str) -> None:
    """Raise NumericalError, naming the first parameter that holds NaN or Inf."""
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericalError(f"NaN or Inf in {_join(path, name)}: the checkpoint is damaged; download it again")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
