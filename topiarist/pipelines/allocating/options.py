"""What an allocation is asked for, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import PositiveInt

from topiarist.allocate import ALLOCATIONS, Linear, Rule
from topiarist.core.errors import CalibrationError
from topiarist.core.options import Registered, options
from topiarist.core.patterns import Pattern, parse_pattern
from topiarist.core.registry import name_of
from topiarist.pipelines.common.options import HOW, OnePattern, TextOptions
from topiarist.pipelines.pruning.sparsellm import METHODS, Method
from topiarist.solvers import ALPS, Solver


@options
class AllocateOptions(TextOptions):
    """Everything that `allocate` takes beside the model and the file it writes."""

    rule: Annotated[Rule, Registered(ALLOCATIONS, "allocation rule", base=(Rule,))] = Linear()
    """uniform, linear, owl, sensitivity or search; owl:threshold=7,level=matrix sets fields."""
    pattern: OnePattern = None
    """How much is kept in all: 0.7 makes 70 % zeros; 2:4; default 0.5."""
    method: Annotated[Method, Registered(METHODS, base=(Solver,))] = ALPS()
    """Solves the database of search."""
    skip: Sequence[str] = ()
    """Regular expression of layers that stay dense."""
    batch_size: PositiveInt = 8
    """Windows a forward pass."""
    work: Annotated[Path | None, HOW] = None
    """Folder for what takes long to get, to resume and reuse; default OUT.json.work."""

    @property
    def base_pattern(self) -> Pattern:
        """The pattern that says how much is kept in all, 0.5 if none was given."""
        return parse_pattern("0.5") if self.pattern is None else self.pattern

    def check_text(self) -> None:
        """Raise CalibrationError if there is no text and the rule measures something."""
        if self.data is None and self.rule.measured_by:
            raise CalibrationError(
                f"allocation {name_of(ALLOCATIONS, self.rule)} looks at what flows through the model: give calibration text, "
                "--data FILE on the command line and data= in Python (uniform and linear do without)"
            )
