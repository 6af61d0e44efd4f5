"""What a recovery will need on this machine, from two real steps of one micro-batch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from topiarist.checkpoints.writing import SavedState
from topiarist.core.meter import peak_memory_bytes
from topiarist.core.options import given_or_made, takes
from topiarist.pipelines.pruning.plan import duration
from topiarist.pipelines.recovering.inputs import cut_text, held_masks, text_of
from topiarist.pipelines.recovering.options import RecoverOptions
from topiarist.pipelines.recovering.recover import make_objective, open_pruned, open_teacher
from topiarist.pipelines.recovering.trainee import Trainee
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.weights import STATE_BYTES


@dataclass(frozen=True)
class RecoverPlan:
    """Needs of a run, as measured a moment ago; seconds assume that the machine stays as busy as it is."""

    trained: int
    step_tokens: int
    steps: int
    epochs: float
    bytes_per_weight: float
    peak_memory_bytes: int
    disk_bytes: int
    step_seconds: float

    def lines(self) -> list[tuple[str, str]]:
        """Return what a person reads: (what, how much)."""
        return [
            ("trained weights", f"{self.trained:,}"),
            ("tokens a step x steps", f"{self.step_tokens:,} x {self.steps}"),
            ("times through the text", f"{self.epochs:.2f}"),
            ("bytes a trained weight", f"{self.bytes_per_weight:.1f}"),
            ("peak memory, about", f"{self.peak_memory_bytes / 1e9:.2f} GB"),
            ("disk, about", f"{self.disk_bytes / 1e9:.2f} GB"),
            ("a step, about", duration(self.step_seconds)),
            ("all steps, about", duration(self.step_seconds * self.steps)),
        ]


@takes(RecoverOptions)
def plan_recover(
    model: str | Path,
    *,
    teacher: str | Path | nn.Module | None = None,
    options: RecoverOptions | None = None,
    **settings: Any,
) -> RecoverPlan:
    """Load the models, take two micro-batches through them (the first warms up), and extrapolate. Writes nothing.

    Without the looks at the held-out loss (about a tenth) and saved states (a twentieth).
    """
    options = given_or_made(RecoverOptions, options, settings)
    opened = open_pruned(model, options)
    dense = open_teacher(opened, teacher, options)
    student = opened.whole()
    trainee = Trainee(student, held_masks(student), options)
    teacher_model = None if dense is None else dense.whole()
    alone = Processes()
    with text_of(opened, options, alone) as text:
        tokens, held_out, steps = cut_text(text, options, 1)
        objective = make_objective(student, teacher_model, tokens, held_out[:1], options, alone)
        times: list[float] = []
        trainee.train(
            objective,
            2,
            alone,
            lambda *_: times.append(time.perf_counter()),
            SavedState(),
            sequences=options.batch_size,
        )
    step_tokens = options.sequences * text.window
    return RecoverPlan(
        trained=trainee.count,
        step_tokens=step_tokens,
        steps=steps,
        epochs=steps * options.sequences / len(tokens),
        bytes_per_weight=trainee.weights.resident_bytes,
        peak_memory_bytes=peak_memory_bytes(),
        disk_bytes=opened.nbytes + 2 * (STATE_BYTES + 2) * trainee.count,
        step_seconds=(times[1] - times[0]) * options.sequences / options.batch_size,
    )
