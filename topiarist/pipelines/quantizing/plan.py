"""What a quantising run will need."""

from __future__ import annotations

from pathlib import Path

from topiarist.pipelines.common.setup import windows_of
from topiarist.pipelines.pruning.plan import Plan, plan_walk
from topiarist.pipelines.quantizing.options import QuantizeOptions
from topiarist.pipelines.quantizing.quantize import opened_for
from topiarist.pipelines.training.processes import Processes
from topiarist.solvers.quantized import Quantized


def plan_quantize(model: str | Path, options: QuantizeOptions) -> Plan:
    """Probe the first block with two windows and extrapolate. Writes nothing. Under `torchrun`, for so many processes.

    Raises ProcessError for a run that so many cannot divide.
    """
    processes = Processes.join()
    source, patterns, _, grid = opened_for(options, model)
    solver = Quantized(method=options.chosen_method, grid=grid)
    return plan_walk(source, solver, patterns, windows_of(options, source), options, processes, grid=grid)
