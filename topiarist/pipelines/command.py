"""The command line that repeats a call of `prune`, for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from topiarist.data import TextFiles
from topiarist.pipelines.refine import Refine
from topiarist.pipelines.sparsellm import METHODS, Method, SparseLLM
from topiarist.solvers import SOLVERS, Solver


def prune_command(
    model: Any,
    *,
    calibration: Any,
    solver: Method,
    pattern: str,
    allocation: str | Path | Mapping[str, str | None] | None,
    skip: Sequence[str],
    refine: Refine | None,
    num_samples: int,
    window: int,
    seed: int,
    batch_size: int,
    true_sequential: bool,
) -> tuple[list[str], list[str]]:
    """The words of the command, and what in the call no command can say: those have a placeholder in capitals.

    Settings of a method are named where they are not its defaults; the window always, for its default is the model's.
    """
    unsaid: list[str] = []

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
    method = next((name for name, cls in METHODS.items() if type(solver) is cls), None)
    words += ["--method", said(method, "METHOD", f"the solver {type(solver).__name__}")]
    if isinstance(solver, SparseLLM) and isinstance(solver.local, Solver):
        # The command line takes a local solver by its name alone.
        if solver.local not in [cls() for cls in SOLVERS.values()]:
            unsaid.append(f"the settings of the local solver {solver.local_name}")
        solver = replace(solver, local=solver.local_name if solver.local_name in SOLVERS else "sparsegpt")
    words += _settings(solver, "--set")
    if allocation is None:
        words += ["--pattern", pattern]
    else:
        named = str(allocation) if isinstance(allocation, str | Path) else None
        words += ["--allocation", said(named, "ALLOCATION", "an allocation given as a dictionary")]
    for expression in skip:
        words += ["--skip", expression]
    if isinstance(calibration, TextFiles):
        for path in calibration.paths:
            words += ["--calibration", str(path)]
    else:
        words += ["--calibration", said(None, "TEXT", "calibration text given in memory")]
    words += [
        "--samples",
        str(num_samples),
        "--window",
        str(window),
        "--seed",
        str(seed),
        "--batch-size",
        str(batch_size),
    ]
    words += ["--true-sequential"] if true_sequential else []
    if refine is not None:
        words += ["--refine", *_settings(refine, "--refine-set")]
    return words, unsaid


def _settings(value: Any, option: str) -> list[str]:
    """`option name=value` for every field that is not at its default."""
    words: list[str] = []
    for entry in fields(value):
        current = getattr(value, entry.name)
        if current != entry.default:
            words += [option, f"{entry.name}={str(current).lower() if isinstance(current, bool) else current}"]
    return words
