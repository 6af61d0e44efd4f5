"""What finding an allocation will need, from the shapes and a short probe of one block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from topiarist.allocate import Search, Sensitivity, without
from topiarist.allocate.evolve import START_WIDTHS
from topiarist.core.meter import duration, resident_bytes
from topiarist.core.patterns import Pattern
from topiarist.data import Windows
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.allocating.allocation import check_divides, check_rule
from topiarist.pipelines.allocating.options import AllocateOptions
from topiarist.pipelines.allocating.search import database_solver, divided, levels_of
from topiarist.pipelines.common.probe import window_seconds
from topiarist.pipelines.common.setup import open_for, windows_of
from topiarist.pipelines.pruning.options import PruneOptions
from topiarist.pipelines.pruning.plan import plan_walk
from topiarist.pipelines.training.processes import Processes

BACKWARD = 3
"""Forwards that a forward with its backward pass counts for."""
FP32_COPIES = 3
"""Of the weights, where curvature is measured: the model, its gradients, its matrices."""


def plan_allocate(model: str | Path, options: AllocateOptions) -> list[tuple[str, str]]:
    """Take a window through the first block, and say what the rule's measuring will need. Writes nothing.

    Under `torchrun` every process does so by itself, and times are those of one. Raises what the run would before it
    measures.
    """
    rule = options.rule
    options.check_text()
    processes = Processes.join()
    source = open_for(options, model)
    check_rule(rule, source, options.base_pattern, options.skip)
    if not rule.measured_by:
        return [("measuring", "none: the rule looks at shapes alone")]
    windows = windows_of(options, source)
    patterns, _ = without(dict.fromkeys(source.shapes(), options.base_pattern), options.skip)
    if all(pattern is None for pattern in patterns.values()):
        return [("measuring", "none: every layer is skipped")]
    check_divides(options, windows, processes)
    num, one = len(windows.tokens), windows.tokens[:1]
    if isinstance(rule, Search):
        return _plan_search(source, rule, options, patterns, windows)
    memory = resident_bytes() + source.nbytes // len(source.block_names)
    if isinstance(rule, Sensitivity):
        one = one[:, : rule.tokens]
        forwards = min(rule.sequences, num)
        if rule.estimate != "input_trace":
            forwards *= BACKWARD * (2 * rule.probes if rule.estimate == "hutchinson" else 1)
            memory = resident_bytes() + FP32_COPIES * 4 * source.nbytes // source.dtype.itemsize
    else:
        forwards = num
    memory += num * one.shape[1] * source.text_config.hidden_size * source.dtype.itemsize
    return [
        ("windows, forwards of one", f"{num} x {one.shape[1]} tokens, {forwards}"),
        ("peak memory, about", f"{memory / 1e9:.2f} GB"),
        ("measuring, about", duration(forwards * window_seconds(source, one))),
    ]


def _plan_search(
    source: OpenedModel,
    rule: Search,
    options: AllocateOptions,
    patterns: Mapping[str, Pattern | None],
    windows: Windows,
) -> list[tuple[str, str]]:
    """Every level of every layer solved as `prune` would, then candidates judged by forwards of the whole model."""
    levels = [level for level in levels_of(rule, options.base_pattern) if level is not None]
    solver, (grams, _) = database_solver(rule, options.method), divided(rule, windows.tokens)
    about = PruneOptions(method=solver, data=grams, batch_size=options.batch_size)
    walk = plan_walk(source, solver, patterns, Windows(grams, "", frozenset()), about, Processes())
    judged = len(START_WIDTHS) * rule.sequences
    judged += rule.generations * (rule.children + rule.finalists * (rule.sequences - 1))
    kept = sum(1 - level.sparsity_of((2**10, 2**10)) for level in levels)
    seconds = walk.forward_seconds + len(levels) * walk.solver_seconds
    # The dense predictions of all windows, and those of a candidate on one, with a copy.
    logits = (rule.sequences + 2) * windows.window * source.vocabulary * source.dtype.itemsize
    searching = min(judged * window_seconds(source, windows.tokens[:1]), rule.seconds or float("inf"))
    return [
        ("levels, candidates x windows", f"{len(levels)}, {judged} at most"),
        (
            "peak memory, about",
            f"{max(walk.peak_memory_bytes, resident_bytes() + 2 * source.nbytes + logits) / 1e9:.2f} GB",
        ),
        ("disk, about", f"{kept * source.nbytes / 1e9:.2f} GB"),
        ("solving every level, about", duration(seconds)),
        ("searching, at most about", duration(searching)),
        ("in all, at most about", duration(seconds + searching)),
    ]
