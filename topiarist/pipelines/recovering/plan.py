"""What a recovery will need on this machine, from real steps of one micro-batch."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from topiarist.checkpoints.writing import SavedState
from topiarist.core.meter import peak_memory_bytes
from topiarist.core.options import given_or_made, takes
from topiarist.pipelines.recovering.files import bytes_of
from topiarist.pipelines.recovering.inputs import check_dense, check_divisible, cut_text, held_masks, text_of
from topiarist.pipelines.recovering.options import RecoverOptions
from topiarist.pipelines.recovering.recover import make_objective, open_pruned, open_teacher
from topiarist.pipelines.recovering.trainee import Trainee, computing_in
from topiarist.pipelines.training.batches import micro_batch_size
from topiarist.pipelines.training.plan import TrainingPlan
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.weights import STATE_BYTES

STEPS = 3
"""That are taken. Held-out sequences are looked at before the first and after the last: the second is a step alone."""


@dataclass(frozen=True, kw_only=True)
class RecoverPlan(TrainingPlan):
    """Needs of a recovery."""

    epochs: float

    def lines(self) -> list[tuple[str, str]]:
        """Return what a person reads: (what, how much)."""
        weights, steps, *rest = super().lines()
        return [weights, steps, ("times through the text", f"{self.epochs:.2f}"), *rest]


@takes(RecoverOptions)
def plan_recover(
    model: str | Path,
    *,
    teacher: str | Path | nn.Module | None = None,
    options: RecoverOptions | None = None,
    **settings: Any,
) -> RecoverPlan:
    """Load the models, take three micro-batches through them (the first warms up), and extrapolate. Writes nothing.

    Without the looks at the held-out loss (about a tenth) and saved states (a twentieth). Under `torchrun` every process
    does so by itself, and a step is one of them all. With `shard`, the memory is that of one of them, as it will be; this
    call itself holds the whole models. Raises what `recover` raises before it trains.
    """
    options = given_or_made(RecoverOptions, options, settings)
    opened = open_pruned(model, replace(options, shard=False))
    dense = open_teacher(opened, teacher, options)
    processes, alone = Processes.join(), Processes()
    check_divisible(opened, dense, options, processes)
    student = opened.whole()
    masks, teacher_model = held_masks(student), None if dense is None else dense.whole()
    if teacher_model is not None:
        check_dense(teacher_model)
    with ExitStack() as held:
        text = held.enter_context(text_of(opened, options, alone))
        held.enter_context(computing_in(options.dtype, student, teacher_model))
        trainee = Trainee(student, masks, replace(options, evaluate_every=STEPS))
        sequences = options.sequences_a_step(text.window, processes.size)
        tokens, held_out, steps = cut_text(text, options, sequences, dense)
        micro_batch = micro_batch_size(sequences // processes.size, options.batch_size)
        objective = make_objective(student, teacher_model, tokens, held_out[:1], options, alone)
        times: list[float] = []
        trainee.train(
            objective,
            trainee.learning_rate(alone),
            STEPS,
            micro_batch,
            alone,
            lambda *_: times.append(time.perf_counter()),
            SavedState(),
        )
    step_tokens = sequences * text.window
    peak = peak_memory_bytes()
    if options.shard:  # divided: both models, and what is kept of trained weights
        divided = trainee.weights.resident_bytes * trainee.count + (dense.nbytes if dense is not None else 0)
        peak -= round(divided * (1 - 1 / processes.size))
    return RecoverPlan(
        weights=trainee.count,
        step_tokens=step_tokens,
        steps=steps,
        epochs=steps * sequences / len(tokens),
        bytes_per_weight=trainee.weights.resident_bytes,
        peak_memory_bytes=peak,
        disk_bytes=bytes_of(opened) + 2 * (STATE_BYTES + 2) * trainee.count,
        step_seconds=(times[1] - times[0]) * sequences / processes.size / micro_batch,
    )
