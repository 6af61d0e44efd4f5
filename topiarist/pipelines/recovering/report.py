"""What a recovery did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTION = "recovery"
"""Key of this report in pruning_report.json and, shorter, in `pruning_config`: what was pruned before stays there too."""
LOGGED = 20
"""Training losses in the report, about."""


@dataclass
class RecoverReport:
    """The result of `recover`. Seconds and memory, which differ from run to run, stay in `run`."""

    model: str
    """The pruned model."""
    teacher: str | None
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    """Sequences, their length in tokens, held-out sequences, sha256 of all tokens."""
    weights: Mapping[str, int] = field(default_factory=dict)
    """`trained` and `held` (pruned ones among them, kept at zero)."""
    steps: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The recipe of one stage that repeats this run."""
    losses: list[dict[str, float]] = field(default_factory=list)
    """Step and training loss: first, last, and some between."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Step and held-out loss; step 0 is the pruned model as it came."""
    warnings: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    output: str | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> RecoverReport:
        """Read the report of a finished output folder."""
        plain = json.loads((folder / "pruning_report.json").read_text(encoding="utf-8"))[SECTION]
        run = folder / "pruning_run.json"
        known = {name: plain[name] for name in cls.__dataclass_fields__ if name in plain}
        return cls(**known, run=json.loads(run.read_text()) if run.is_file() else {}, output=str(folder))

    @property
    def before(self) -> float:
        """Held-out loss of the pruned model as it came, in nats."""
        return self.evaluations[0]["loss"]

    @property
    def best(self) -> Mapping[str, float]:
        """Step and held-out loss of the state that was kept."""
        return min(self.evaluations, key=lambda entry: entry["loss"])

    def log(self, losses: list[float]) -> None:
        """Keep the first, the last and about LOGGED of the training losses."""
        every = max(1, len(losses) // LOGGED)
        shown = [step for step in range(1, len(losses) + 1) if step in (1, len(losses)) or step % every == 0]
        self.losses = [{"step": step, "loss": losses[step - 1]} for step in shown]

    def to_dict(self) -> dict[str, Any]:
        """Everything that repeats."""
        return {name: value for name, value in vars(self).items() if name not in ("run", "output")}

    def provenance(self) -> dict[str, Any]:
        """What config.json says of the recovery."""
        return {
            "teacher": self.teacher,
            "settings": dict(self.settings),
            "data": dict(self.data),
            "held_out_loss": [self.before, self.best["loss"]],
        }

    def card(self) -> str:
        """A section for the model's card."""
        what = "next-token loss" if self.teacher is None else f"divergence from {Path(self.teacher).name}"
        rows = "\n".join(f"| {entry['step']:.0f} | {entry['loss']:.4f} |" for entry in self.evaluations)
        return f"""## Recovered

{self.weights["trained"]:,} weights were trained after pruning, for {self.steps} steps of
{self.settings["sequences"]} x {self.data["window_tokens"]} tokens; {self.weights["held"]:,} pruned ones stayed zero at every
step. Kept is the state with the least {what} on a held-out slice of the training text:

| step | loss, nats |
|---|---|
{rows}
"""
