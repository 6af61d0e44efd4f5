"""What a training will need on this machine, as measured from a step of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from topiarist.core.meter import duration


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Needs of a run, as measured a moment ago; seconds assume that the machine stays as busy as it is."""

    what: ClassVar[str] = "trained"
    """What its weights are."""

    weights: int
    step_tokens: int
    steps: int
    bytes_per_weight: float
    peak_memory_bytes: int
    disk_bytes: int
    step_seconds: float

    def lines(self) -> list[tuple[str, str]]:
        """Return what a person reads: (what, how much)."""
        return [
            (f"{self.what} weights", f"{self.weights:,}"),
            ("tokens a step x steps", f"{self.step_tokens:,} x {self.steps}"),
            (f"bytes a {self.what} weight", f"{self.bytes_per_weight:.1f}"),
            ("peak memory, about", f"{self.peak_memory_bytes / 1e9:.2f} GB"),
            ("disk, about", f"{self.disk_bytes / 1e9:.2f} GB"),
            ("a step, about", duration(self.step_seconds)),
            ("all steps, about", duration(self.step_seconds * self.steps)),
        ]
