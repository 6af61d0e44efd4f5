"""What a recovery did."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from topiarist.core.errors import CheckpointError
from topiarist.results.report import RunReport
from topiarist.results.result import RECOVERY

LOGGED = 20
"""Training losses in the report, about."""


@dataclass(kw_only=True)
class RecoverReport(RunReport):
    """The result of `recover`. Its file is the pruned model's report, which still holds, with this one in a part of it."""

    pipeline: ClassVar[str] = "recover"
    derived: ClassVar[tuple[str, ...]] = ("best",)

    method: str = "recover"
    pattern: str = ""
    """Of the pruned model."""
    model: str
    """The pruned model."""
    teacher: str | None
    """The dense model whose predictions were the target; None for next tokens."""
    steps: int
    tokens: int
    """Trained on, repeated ones counted again."""
    learning_rate: float = 0.0
    """Its peak."""
    losses: list[dict[str, float]] = field(default_factory=list)
    """Step and training loss in nats: first, last, and some between."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Step and held-out loss in nats; step 0 is the pruned model as it came."""
    pruned: Mapping[str, Any] = field(default_factory=dict)
    """The report of the pruned model."""
    claims: Mapping[str, Any] = field(default_factory=dict)
    """The `pruning_config` of the pruned model: its zeros and shapes are those of the result."""

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> RecoverReport:
        """Read a report back from the file of a recovered model. Raises CheckpointError for another model's."""
        if RECOVERY not in plain:
            raise CheckpointError("this is no report of a recovery: name a folder that `recover` wrote")
        pruned = {key: value for key, value in plain.items() if key not in (RECOVERY, "files", "fingerprint")}
        return super().from_dict({**plain[RECOVERY], "pruned": pruned})

    @property
    def before(self) -> float:
        """Held-out loss of the pruned model as it came, in nats."""
        return self.evaluations[0]["loss"]

    @property
    def best(self) -> Mapping[str, float]:
        """Step and held-out loss of the state that was kept."""
        return min(self.evaluations, key=lambda entry: entry["loss"])

    def note_if_useless(self) -> None:
        """Warn, and keep the warning, if no state was better than the pruned model as it came."""
        if self.best["step"] == 0:
            note = (
                f"no state was better than the pruned model, which the result is: try another learning rate than "
                f"{self.learning_rate:.2g}, mostly a lower one, or a larger budget"
            )
            self.warnings = [*self.warnings, note]
            warnings.warn(note, UserWarning, stacklevel=3)

    def log(self, losses: list[float]) -> None:
        """Keep the first, the last and about LOGGED of the training losses."""
        every = max(1, len(losses) // LOGGED)
        shown = [step for step in range(1, len(losses) + 1) if step in (1, len(losses)) or step % every == 0]
        self.losses = [{"step": step, "loss": losses[step - 1]} for step in shown]

    def to_dict(self) -> dict[str, Any]:
        """The pruned model's report with this one in it."""
        own = super().to_dict()
        own = {key: value for key, value in own.items() if key not in ("pruned", "claims")}
        result = {"result_digest": self.result_digest} if self.result_digest else {}
        return {**self.pruned, "base_model": self.base_model, **result, RECOVERY: own}

    def pruning_config(self, version: str) -> dict[str, Any]:
        """What the model was pruned to stays said; how it was recovered stands beside it."""
        own = {
            "teacher": self.teacher,
            "settings": dict(self.settings),
            "calibration": dict(self.calibration),
            "held_out_loss": [self.before, self.best["loss"]],
        }
        return {"version": version, **self.claims, "base_model": self.base_model, RECOVERY: own}
