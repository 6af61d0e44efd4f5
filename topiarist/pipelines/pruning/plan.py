"""What a one-shot run will need, from the shapes and a short probe of one block."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Int
from torch import Tensor

from topiarist.allocate import ALLOCATIONS, Search
from topiarist.checkpoints.writing import bytes_to_write
from topiarist.core.errors import CalibrationError
from topiarist.core.meter import duration, peak_memory_bytes, resident_bytes
from topiarist.core.patterns import Pattern
from topiarist.core.registry import name_of
from topiarist.core.slots import SLOTS, check_slots
from topiarist.data import Windows
from topiarist.models.families import Matrix
from topiarist.models.opened import at_rest
from topiarist.pipelines.allocating.allocation import fixed_patterns
from topiarist.pipelines.allocating.search import divided
from topiarist.pipelines.common.grams import GramGroup, owners
from topiarist.pipelines.common.hidden_states import check_spill
from topiarist.pipelines.common.integer_blocks import packed_bytes
from topiarist.pipelines.common.setup import open_for, windows_of
from topiarist.pipelines.common.stream import BlockStream, check_flow
from topiarist.pipelines.pruning.block import BlockPruner
from topiarist.pipelines.pruning.companion import check_modules
from topiarist.pipelines.pruning.correct import Correct
from topiarist.pipelines.pruning.onto_grid import grid_of, solver_of
from topiarist.pipelines.pruning.options import PruneOptions
from topiarist.pipelines.pruning.refine import Refine
from topiarist.pipelines.pruning.sparsellm import Method, SparseLLM
from topiarist.pipelines.pruning.walk import WalkOptions
from topiarist.pipelines.training.processes import Processes
from topiarist.quantization import Grid

PROBE_WINDOWS = 2
GRAM_COPIES = 1 + SLOTS.bit_length() // 2
"""Squares a Gram: the sum of a slot, and sums of slots that wait for their neighbours, half a square each."""


@dataclass(frozen=True)
class Plan:
    """Needs of a run on this machine, as measured a moment ago; seconds assume that it stays as busy as it is."""

    blocks: int
    matrices: int
    peak_memory_bytes: int
    disk_bytes: int
    forward_seconds: float
    solver_seconds: float
    processes: int = 1
    """That divide the run; memory is that of one of them."""
    spilled_bytes: int = 0
    """Of hidden states in files, of all processes."""
    measured: str = ""
    """The rule of an allocation that is measured first; what that takes is not in the plan."""

    def lines(self) -> list[tuple[str, str]]:
        """(what, how much) of every need, in words."""
        return [
            ("blocks x matrices", f"{self.blocks} x {self.matrices}"),
            *[("processes", f"{self.processes}")] * (self.processes > 1),
            ("peak memory, about", f"{self.peak_memory_bytes / 1e9:.2f} GB" + " each" * (self.processes > 1)),
            ("disk", f"{self.disk_bytes / 1e9:.2f} GB"),
            *[("spilled hidden states, at most", f"{self.spilled_bytes / 1e9:.2f} GB")] * (self.spilled_bytes > 0),
            ("forward passes and Grams, about", duration(self.forward_seconds)),
            ("solver, about", duration(self.solver_seconds)),
            ("in all, about", duration(self.forward_seconds + self.solver_seconds)),
            *[("beside it", f"allocation {self.measured}, of which `allocate --plan` tells")] * bool(self.measured),
        ]


def plan_prune(model: str | Path, options: PruneOptions) -> Plan:
    """Probe one block with two windows and extrapolate. Writes nothing. Under `torchrun`, for so many processes.

    Raises what the run would before any work, ProcessError for one that so many cannot divide.
    """
    processes = Processes.join()
    joint = options.method if isinstance(options.method, SparseLLM) else None
    options.check_text()
    source = open_for(options, model)
    patterns, _ = fixed_patterns(options, source)
    grid = grid_of(options, source, patterns, None)
    windows = windows_of(options, source)
    if options.low_rank is not None:
        check_modules(source, patterns)
    if isinstance(options.rule, Search):
        divided(options.rule, windows.tokens)  # refuses too few
    plan = plan_walk(
        source,
        solver_of(options, grid),
        patterns,
        windows,
        options,
        processes,
        grid=grid,
        refine=options.refine,
        joint=joint,
    )
    if (rule := options.rule) is not None and rule.measured_by:
        plan = replace(plan, measured=str(name_of(ALLOCATIONS, rule)))
    return plan


class PlannedOptions(WalkOptions, Protocol):
    """What a plan asks of the options of its command."""

    @property
    def correct(self) -> Correct | None:
        """Error correction, if it is asked for."""


def plan_walk(
    source: Any,
    solver: Method,
    patterns: Mapping[str, Pattern | None],
    windows: Windows,
    options: PlannedOptions,
    processes: Processes,
    *,
    grid: Grid | None = None,
    refine: Refine | None = None,
    joint: SparseLLM | None = None,
) -> Plan:
    """What a walk over the blocks will need; without windows its solver does without data. grid: of a result that is packed.

    Raises ProcessError for a run that so many processes cannot divide, TopiaristError for one that contradicts itself.
    """
    pruner = BlockPruner.of(
        solver, patterns, refine, options.correct, sequential=options.true_sequential, processes=processes
    )
    if processes.size > 1:
        check_slots(-(-len(windows.tokens) // options.windows_a_forward), processes.size)
    if options.spill is not None:
        check_spill(Path(options.spill))
    if not len(windows.tokens):
        return _plan_without_data(source, solver, patterns, grid)
    check_flow(source, windows.tokens, pruner.needs_states, spills=options.spill is not None)
    probe = probe_block(source, solver, patterns, windows.tokens[:PROBE_WINDOWS])
    groups, blocks = probe.groups, len(source.block_names)
    solves = sum(g.work for g in groups)
    if joint is not None:  # as if all of a block were its feed-forward network, which is most of it
        solves *= 1 + joint.down_refit + joint.epochs
    passes = (2.0 if options.true_sequential else 1.0) * probe.gram_seconds + probe.advance_seconds
    if options.correct is not None:  # the dense block beside, stage by stage and once whole; sums of two inputs
        passes += 2.0 * probe.gram_seconds + 3.0 * probe.advance_seconds
    if refine is not None:  # a step costs about three forwards, a check one
        passes += probe.advance_seconds * (1 + 4 * refine.epochs)
    if joint is not None:  # a round in fp32 does the work of about three forwards, a refit that of one
        passes += probe.advance_seconds * (2 + joint.down_refit + 3 * joint.epochs)
    own = -(-len(windows.tokens) // processes.size)
    load = [0.0] * processes.size
    for group, owner in zip(groups, owners([g.work for g in groups], processes.size), strict=True):
        load[owner] += group.work
    states = _hidden_bytes(source, windows.window, groups, options, refine, joint)
    spilled = options.spill is not None
    working_set = _working_set(source, groups, solver, options, refine) + (0 if spilled else own * states)
    return Plan(
        blocks=blocks,
        matrices=probe.matrices,
        peak_memory_bytes=probe.resident_bytes + working_set,
        disk_bytes=_disk_bytes(source, patterns, grid),
        forward_seconds=blocks * passes * own,
        solver_seconds=blocks * probe.solver_rate * solves * max(load) / sum(load),
        processes=processes.size,
        spilled_bytes=len(windows.tokens) * states if spilled else 0,
    )


@dataclass(frozen=True)
class Probe:
    """What a few windows through one block took on this machine, and what is in memory with them."""

    groups: Sequence[GramGroup]
    matrices: int
    gram_seconds: float
    """Of a window, its Grams included."""
    advance_seconds: float
    """Of a window through the block once more."""
    solver_rate: float
    """Seconds a unit of `GramGroup.work`."""
    resident_bytes: int


def probe_block(
    source: Any, solver: Method, patterns: Mapping[str, Pattern | None], tokens: Int[Tensor, "num window"]
) -> Probe:
    """Run the windows through the first block that is changed, and solve for its smallest input.

    Raises CalibrationError if the text reaches nothing that is to be changed.
    """
    with at_rest(source.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a probe of two windows is thin by design
        stream = BlockStream.of(source, tokens, batch_size=len(tokens))
        for index in range(len(source.block_names)):
            block, matrices = source.load(index), _wanted(source, patterns, index)
            start = time.perf_counter()
            groups = stream.grams(index, block, matrices) if matrices and stream.reaches(index) else []
            gram_seconds = time.perf_counter() - start
            if groups:
                break
            stream.advance(index, block)
            source.release(index)
        else:
            raise CalibrationError("the text reaches no matrix that is to be changed: leave fewer dense by --skip")
        start = time.perf_counter()
        stream.advance(index, block)
        advance_seconds = time.perf_counter() - start
        smallest = min(groups, key=lambda g: g.work)
        start = time.perf_counter()
        BlockPruner.of(solver, patterns).solve([smallest], smallest.matrices, source.block_names[index])
        rate = (time.perf_counter() - start) / smallest.work
    return Probe(
        groups,
        len(matrices),
        gram_seconds / len(tokens),
        advance_seconds / len(tokens),
        rate,
        resident_bytes(),
    )


def _wanted(source: Any, patterns: Mapping[str, Pattern | None], index: int) -> list[Matrix]:
    """The matrices of a block that are changed."""
    return [m for m in source.matrices(index) if patterns[f"{source.block_names[index]}.{m.name}"] is not None]


def _disk_bytes(source: Any, patterns: Mapping[str, Pattern | None], grid: Grid | None) -> int:
    """Of the result and of what stands beside it while it is written."""
    weights = source.nbytes
    if grid is not None:
        for name, shape in source.shapes().items():
            if patterns[name] is not None:
                weights += packed_bytes(shape, grid, source.dtype) - shape[0] * shape[1] * source.dtype.itemsize
    return bytes_to_write(weights)


def _plan_without_data(source: Any, solver: Method, patterns: Mapping[str, Pattern | None], grid: Grid | None) -> Plan:
    """From the first block that is changed, pruned: blocks are all alike, and one is in memory at a time."""
    index = next(index for index in range(len(source.block_names)) if _wanted(source, patterns, index))
    block, matrices = source.load(index), _wanted(source, patterns, index)
    start = time.perf_counter()
    layers = BlockPruner.of(solver, patterns).prune_without_data(block, matrices, source.block_names[index])
    seconds = time.perf_counter() - start
    return Plan(
        blocks=len(source.block_names),
        matrices=len(layers),
        peak_memory_bytes=peak_memory_bytes(),
        disk_bytes=_disk_bytes(source, patterns, grid),
        forward_seconds=0.0,
        solver_seconds=len(source.block_names) * seconds,
    )


def _hidden_bytes(
    source: Any,
    window: int,
    groups: Sequence[GramGroup],
    options: PlannedOptions,
    refine: Refine | None,
    joint: SparseLLM | None,
) -> int:
    """Bytes of hidden states and what goes with them, a window: in memory, or in files."""
    width = source.text_config.hidden_size
    states = hidden = window * width * source.dtype.itemsize
    if joint is not None:  # inputs and fp32 outputs of a network, and its fp32 auxiliaries if rounds follow one another
        rows = max(sum(m.shape[0] for m in g.matrices) for g in groups) if joint.epochs > 1 else 0
        hidden += (1 + joint.needs_dense_inputs) * states + 4 * window * (width + rows)
    if options.correct is not None or (refine is not None and refine.target == "dense"):
        hidden += 2 * states  # the dense model's, on both sides of a block
    if refine is not None and refine.target == "current":  # targets
        hidden += states
    return hidden


def _working_set(
    source: Any, groups: Sequence[GramGroup], solver: Method, options: PlannedOptions, refine: Refine | None
) -> int:
    """Bytes that come on top of the process and its hidden states, the most of what follows one another: sums of Grams, the
    whole Grams with a solver's copies, a block in training, the embeddings.
    """
    grams = sum(4 * g.gram.in_features**2 for g in groups)
    if options.correct is not None:  # the block as it was, and sums over two inputs beside the Grams
        grams += grams + sum(m.tensor.numel() * m.tensor.element_size() for g in groups for m in g.matrices)
    local = solver.local if isinstance(solver, SparseLLM) else solver
    squares, weights = local.most_copies
    solving = 0
    for group in groups:  # a solver first works on the Gram, then on the weights
        gram, own = 4 * group.gram.in_features**2, 4 * sum(m.weight.numel() for m in group.matrices)
        solving = max(solving, squares * gram + 3 * own, min(2, squares) * gram + weights * own)
    embeddings = sum(p.numel() * p.element_size() for p in source.embedding_parameters())
    trained = sum(m.weight.numel() for g in groups for m in g.matrices) * (16 + 2) if refine is not None else 0
    return max(GRAM_COPIES * grams, grams + solving, trained, embeddings)
