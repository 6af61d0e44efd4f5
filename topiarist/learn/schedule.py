"""How kappa, tau, the regulariser and the learning rate move with the step, and the presets that bundle them.

A schedule is a plain value: `schedule(step, total)` is a Python float, so no step ever waits for a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """From `start` to `end` over the first `until` of all steps, constant after that."""

    start: float
    end: float
    kind: Literal["linear", "exponential", "cosine"] = "linear"
    until: float = 1.0
    """Fraction of the steps after which `end` is reached (RoI anneals over the first 3/4)."""

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "exponential", "cosine"):
            raise ValueError(f"a schedule is linear, exponential or cosine, got {self.kind!r}")
        if self.kind == "exponential" and not (self.start > 0 and self.end > 0):
            raise ValueError(f"an exponential schedule needs positive ends, got {self.start} and {self.end}")
        if not 0 < self.until <= 1:
            raise ValueError(f"until is a fraction of the steps in (0, 1], got {self.until}")

    def __call__(self, step: int, total: int) -> float:
        """The value at `step` of `total`. Step 0 gives `start`, the last step (total - 1) gives `end` if until = 1."""
        t = min(1.0, step / max(1.0, self.until * (total - 1)))
        if self.kind == "linear":
            return self.start + (self.end - self.start) * t
        if self.kind == "exponential":
            return self.start * (self.end / self.start) ** t
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * t))
