"""Pruning one block, given its inputs: Grams, corrections, feed-forward networks as a whole, refinement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from topiarist.core.errors import TopiaristError
from topiarist.core.patterns import Pattern
from topiarist.models.families import Matrix
from topiarist.pipelines.common.hidden_states import HiddenStates
from topiarist.pipelines.common.slot_sums import WindowShare
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.pruning.correct import Correct, Corrector
from topiarist.pipelines.pruning.ffn_joint import JointSolver, Network
from topiarist.pipelines.pruning.groups import GroupSolver
from topiarist.pipelines.pruning.refine import Refine, refine_block
from topiarist.pipelines.pruning.sparsellm import Method, SparseLLM
from topiarist.pipelines.training.processes import Processes
from topiarist.results.report import BlockRefinement, JointBlock, LayerReport


@dataclass
class BlockPruner(GroupSolver):
    """Prunes blocks, and remembers what was done to them."""

    refine: Refine | None = None
    correct: Correct | None = None
    joint: SparseLLM | None = None
    """Prunes feed-forward networks as a whole; `solver` is then its local solver."""
    by_attention: bool = False
    """In the Grams of values tokens count by the attention that they are given; not where losses are made good."""
    refined: list[BlockRefinement] = field(default_factory=list)
    joined: list[JointBlock] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        method: Method,
        patterns: Mapping[str, Pattern | None],
        refine: Refine | None = None,
        correct: Correct | None = None,
        *,
        sequential: bool = False,
        processes: Processes | None = None,
    ) -> BlockPruner:
        """For anything that `METHODS` holds. Raises TopiaristError on what contradicts itself."""
        processes = processes or Processes()
        if not isinstance(method, SparseLLM):
            return cls(method, patterns, refine=refine, correct=correct, processes=processes)
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
        return cls(method.local, patterns, refine=refine, joint=method, processes=processes)

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
                    early = all(m.expert is None for m in stage)
                    groups = stream.grams(index, block, stage, stop_early=early, by_attention=self.by_attention)
            layers += self.solve(groups, stage, path)
        if stream.attention_unseen:
            why = "the model does not compute attention where it can be seen (sdpa)"
            self.warn(f"tokens count alike in the matrices of values: {why}", UserWarning)
        if network is not None:
            layers += self._prune_jointly(stream, index, block, network, before, path)
        if self.refine is not None and targets is not None:
            with self.meter.timed("refine"):
                self.refined.append(refine_block(self.refine, stream, index, block, wanted, targets.values, path))
        return layers

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
            share = WindowShare(stream.num_all_windows, stream.slot_windows, stream.processes)
            solver = JointSolver(
                self.joint,
                network,
                now.values,
                targets.values,
                partial(self._solved, path=path),
                stream.new_states,
                share,
            )
            self._warn_of_thin(solver.groups, network.matrices, path)
            solutions, record = solver.run(path, self.warn)
            errors = solver.errors(solutions)
        self.joined.append(record)
        tokens = [group.gram.tokens for group in solver.groups for _ in group.matrices]
        return [
            self._take(path, matrix, replace(solution, error=error), seen)
            for matrix, solution, error, seen in zip(network.matrices, solutions, errors, tokens, strict=True)
        ]
