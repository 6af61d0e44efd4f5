"""The command line that repeats a call of `prune`, for its report."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from topiarist.allocate import Rule, recipe
from topiarist.core.registry import key_of
from topiarist.data import TextFiles, Windows
from topiarist.pipelines.pruning.options import PruneOptions
from topiarist.pipelines.pruning.sparsellm import METHODS, SparseLLM
from topiarist.solvers import SOLVERS, Solver


def prune_command(
    model: str | Path | nn.Module,
    options: PruneOptions,
    windows: Windows,
) -> tuple[list[str], list[str]]:
    """The words of the command, and what in the call no command can say: those have a placeholder in capitals.

    Settings of a method are named where they are not its defaults; the window always, for its default is the model's.
    """
    unsaid: list[str] = []
    solver, allocation, calibration = options.solver, options.allocation, options.calibration

    def said(word: str | None, placeholder: str, what: str) -> str:
        if word is None:
            unsaid.append(what)
        return placeholder if word is None else word

    words = [
        "topiarist",
        "prune",
        said(None if isinstance(model, nn.Module) else str(model), "MODEL", "a model object"),
    ]
    words.append("OUT")
    method = key_of(METHODS, solver)
    words += ["--method", said(method, "METHOD", f"the solver {type(solver).__name__}")]
    if isinstance(solver, SparseLLM) and isinstance(solver.local, Solver):
        # The command line takes a local solver by its name alone.
        if solver.local not in [cls() for cls in SOLVERS.values()]:
            unsaid.append(f"the settings of the local solver {solver.local_name}")
        solver = replace(solver, local=solver.local_name if solver.local_name in SOLVERS else "sparsegpt")
    words += _settings(solver, "--set")
    if allocation is None or options.pattern is not None or options.rule is not None:
        words += ["--pattern", str(options.base_pattern)]
    if allocation is not None:
        named = str(allocation) if isinstance(allocation, str | Path) else _rule_text(options.rule)
        words += ["--allocation", said(named, "ALLOCATION", "an allocation given as a dictionary")]
    for expression in options.skip:
        words += ["--skip", expression]
    if calibration is None:
        return words, unsaid
    if isinstance(calibration, TextFiles):
        for path in calibration.paths:
            words += ["--calibration", str(path)]
    else:
        words += ["--calibration", said(None, "TEXT", "calibration text given in memory")]
    words += ["--samples", str(len(windows.tokens)), "--window", str(windows.window), "--seed", str(options.seed)]
    words += ["--batch-size", str(options.windows_a_forward)]
    words += ["--true-sequential"] if options.true_sequential else []
    if options.correction is not None:
        words += ["--correct", *_settings(options.correction, "--correct-set")]
    if options.refinement is not None:
        words += ["--refine", *_settings(options.refinement, "--refine-set")]
    return words, unsaid


def _rule_text(rule: Rule | None) -> str | None:
    """`name:field=value,...`, as --allocation takes it."""
    if rule is None:
        return None
    settings = [word for word in _settings(rule, "") if word]
    return recipe(rule)["name"] + ":" * bool(settings) + ",".join(settings)


def _settings(value: Any, option: str) -> list[str]:
    """`option name=value` for every field that is not at its default."""
    words: list[str] = []
    for entry in fields(value):
        current = getattr(value, entry.name)
        if current != entry.default:
            words += [option, f"{entry.name}={str(current).lower() if isinstance(current, bool) else current}"]
    return words
