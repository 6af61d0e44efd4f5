"""Pruning and quantising in one walk: the mask of a solver, the values of GPTQ within it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from topiarist.core.patterns import Pattern
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.pruning.options import PruneOptions
from topiarist.pipelines.pruning.sparsellm import Method, SparseLLM
from topiarist.quantization import Grid
from topiarist.solvers.quantized import Quantized


def grid_of(
    options: PruneOptions, source: OpenedModel, patterns: Mapping[str, Pattern | None], out: str | Path | None
) -> Grid | None:
    """The grid that `bits` asks for; None if it asks for none.

    Raises QuantizationError for groups that do not fit, UnsupportedModel for matrices that the packed format has no place for,
    CheckpointError for the folder of a model object, which stays in its own dtype.
    """
    if options.bits is None:
        return None
    wanted = {name: shape for name, shape in source.shapes().items() if patterns[name] is not None}
    source.check_packed(wanted, out)
    return Grid.fitting(options.bits, options.group, wanted)


def solver_of(options: PruneOptions, grid: Grid | None) -> Method:
    """The method, its weights put on the grid if there is one."""
    if grid is None or isinstance(options.method, SparseLLM):  # which `bits` is refused with
        return options.method
    return Quantized(solver=options.method, method=options.quantizer, grid=grid)
