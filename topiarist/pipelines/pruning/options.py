"""What a one-shot run is asked for, as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from topiarist.allocate import ALLOCATIONS, Linear, Rule, Uniform
from topiarist.core.errors import CalibrationError
from topiarist.core.patterns import Pattern, parse_pattern
from topiarist.core.registry import name_of, resolve
from topiarist.data import TextFiles, Windows
from topiarist.models.opened import OpenedModel, open_model
from topiarist.pipelines.common.setup import read_windows
from topiarist.pipelines.pruning.correct import Correct
from topiarist.pipelines.pruning.refine import Refine
from topiarist.pipelines.pruning.sparsellm import METHODS, Method
from topiarist.solvers import Solver

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""(what is going on, steps done, steps in all)"""


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """Everything that `tp.prune` takes beside the model, the output folder and the progress bar; explained there."""

    calibration: TextFiles | Tensor | Sequence[str] | None = None
    method: str | Method = "alps"
    pattern: str | float | Pattern | None = None
    allocation: str | Path | Rule | Mapping[str, str | None] | None = None
    allocation_work: str | Path | None = None
    skip: Sequence[str] = ()
    num_samples: int = 128
    window: int | None = None
    seed: int = 0
    batch_size: int | None = None
    true_sequential: bool = False
    correct: Correct | bool = False
    refine: Refine | bool = False
    device: str | torch.device | None = None
    spill: str | Path | None = None
    tokenizer: Any = None
    trust_remote_code: bool = False

    @property
    def solver(self) -> Method:
        return resolve(METHODS, self.method)

    @property
    def windows_a_forward(self) -> int:
        """`batch_size`, or what suits the run: refinement takes a step a forward, and many small steps beat few large ones."""
        return self.batch_size or (8 if self.refinement is None else 1)

    @property
    def base_pattern(self) -> Pattern:
        return parse_pattern("2:4" if self.pattern is None else self.pattern)

    @property
    def rule(self) -> Rule | None:
        """The allocation if it is a rule, by name or as a value; None if it is a file or a mapping."""
        if isinstance(self.allocation, str) and self.allocation in ALLOCATIONS:
            return ALLOCATIONS[self.allocation]()
        return self.allocation if isinstance(self.allocation, Rule) else None

    @property
    def correction(self) -> Correct | None:
        return _settings(self.correct, Correct)

    @property
    def refinement(self) -> Refine | None:
        return _settings(self.refine, Refine)

    def opened(self, model: str | Path | nn.Module) -> OpenedModel:
        """The model, where and as these options say."""
        return open_model(model, device=self.device, trust_remote_code=self.trust_remote_code, tokenizer=self.tokenizer)

    def windows(self, source: OpenedModel) -> Windows:
        """The calibration windows; none at all if no text was given. Raises CalibrationError if something needs it."""
        if self.calibration is None:
            self._check_without_data()
            return Windows(torch.empty(0, 0, dtype=torch.int64), "", frozenset())
        return read_windows(source, self.calibration, self.tokenizer, self.num_samples, self.window, self.seed)

    def _check_without_data(self) -> None:
        solver, rule, wanting = self.solver, self.rule, ""
        if not isinstance(solver, Solver) or solver.needs_data:
            wanting = name_of(METHODS, solver)
        elif solver.refit:
            wanting = "a refit"
        elif self.correction is not None:
            wanting = "error correction"
        elif self.refinement is not None:
            wanting = "refinement"
        elif rule is not None and not isinstance(rule, Uniform | Linear):
            wanting = f"allocation {name_of(ALLOCATIONS, rule)}"
        if wanting:
            raise CalibrationError(
                f"{wanting} looks at what flows through the model: give calibration text (only magnitude does without)"
            )


def _settings(given: T | bool, kind: type[T]) -> T | None:
    """What was given, the defaults for True, None for False."""
    if isinstance(given, bool):
        return kind() if given else None
    return given
