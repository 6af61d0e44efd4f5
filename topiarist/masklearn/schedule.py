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
    kind: str = "linear"
    """linear, exponential or cosine."""
    until: float = 1.0
    """Fraction of the steps after which `end` is reached (RoI anneals over the first 3/4)."""
    warmup: int = 0
    """Steps over which the value climbs from zero to the curve. Adam's first steps have its rate's size in every logit,
    whatever the gradient."""

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "exponential", "cosine"):
            raise ValueError(f"a schedule is linear, exponential or cosine, got {self.kind!r}")
        if self.kind == "exponential" and not (self.start > 0 and self.end > 0):
            raise ValueError(f"an exponential schedule needs positive ends, got {self.start} and {self.end}")
        if not 0 < self.until <= 1:
            raise ValueError(f"until is a fraction of the steps in (0, 1], got {self.until}")

    def __call__(self, step: int, total: int) -> float:
        """The value at `step` of `total`. Step 0 gives `start` (without warm-up), the last step gives `end` if until = 1."""
        climbed = min(1.0, (step + 1) / (self.warmup + 1))
        return climbed * self._curve(step, total)

    def _curve(self, step: int, total: int) -> float:
        t = min(1.0, step / max(1.0, self.until * (total - 1)))
        if self.kind == "linear":
            return self.start + (self.end - self.start) * t
        if self.kind == "exponential":
            return self.start * (self.end / self.start) ** t
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * t))


# The constants of the paper (table 7). Its code anneals lambda to zero, which the text does not say.
KAPPA = Schedule(100.0, 500.0)
TAU = Schedule(4.0, 0.05)
LAMBDA = Schedule(1e-5, 0.0)


@dataclass(frozen=True)
class Preset:
    """All the constants of a run but the model, the data and the prior."""

    steps: int
    sequences: int
    """Sequences of one optimiser step, over all processes and micro-batches."""
    length: int
    """Tokens of a sequence."""
    lr: Schedule
    kappa: Schedule = KAPPA
    tau: Schedule = TAU
    lam: Schedule = LAMBDA
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float | None = 1.0
    gap: float | None = 0.03
    """Deterministic prior: the first logits' gap between the prior's mask and one that shares all but one."""
    alpha: float = 3.0
    """Strength of the paper's random prior, used while gap is None."""
    std: float = 0.01
    second_moment: Literal["logit", "group", "row"] = "logit"
    moments: Literal["bf16", "8-bit"] = "bf16"
    sample: Literal["step", "micro-batch"] = "step"
    """How often noise is drawn. Per step the mask is converted once, whatever the number of micro-batches."""
    prior_samples: int = 32
    """Sequences that a one-shot prior is computed from."""
    prior_sweeps: int = 0
    """Passes of descent that fit a one-shot N:M prior to weights that are not updated (descent.py); 0: its own mask."""
    source: str = ""

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run, repeats included."""
        return self.steps * self.sequences * self.length


PRESETS: dict[str, Preset] = {
    "quick": Preset(
        steps=80,
        sequences=4,
        length=512,
        lr=Schedule(1.3e-3, 0.0, "cosine", warmup=4),
        tau=Schedule(1.0, 0.05, "exponential"),
        lam=Schedule(0.0, 0.0),
        max_norm=None,
        prior_sweeps=3,
        source="a 135M model, 164 k tokens; docs/results/learned-masks.md",
    ),
    "standard": Preset(
        steps=220,
        sequences=8,
        length=512,
        lr=Schedule(8e-4, 0.0, "cosine", warmup=8),
        tau=Schedule(1.0, 0.05, "exponential"),
        lam=Schedule(0.0, 0.0),
        max_norm=None,
        prior_samples=64,
        prior_sweeps=3,
        source="a 135M model, 901 k tokens; docs/results/learned-masks.md",
    ),
    "paper": Preset(
        steps=2000,
        sequences=256,
        length=4096,
        lr=Schedule(5e-4, 5e-5, "cosine"),
        gap=None,
        sample="micro-batch",
        prior_samples=128,
        source="Fang et al. 2024, table 7: 2.1 billion tokens; eps 1e-5 in the LLaMA-2 runs, 1e-8 in the LLaMA-3 ones",
    ),
}
