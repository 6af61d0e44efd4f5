"""What a run of learning will need on this machine, from one real step on one sequence."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from topiarist.checkpoints.writing import SavedState
from topiarist.core.meter import duration, peak_memory_bytes
from topiarist.masklearn import Prior, resident_bytes
from topiarist.models.opened import ObjectModel
from topiarist.pipelines.learning.files import bytes_due, summary_writer
from topiarist.pipelines.learning.job import Job, divides, open_whole, prepare
from topiarist.pipelines.learning.masking import MaskedModel
from topiarist.pipelines.learning.options import LearnOptions
from topiarist.pipelines.learning.priors import given_masks, prior_identity
from topiarist.pipelines.learning.train_kept import Recover, recover_weights
from topiarist.pipelines.learning.trainer import MaskTrainer
from topiarist.pipelines.training.batches import micro_batch_size
from topiarist.pipelines.training.plan import TrainingPlan
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.recompute import blocks_of


@dataclass(frozen=True, kw_only=True)
class LearnPlan(TrainingPlan):
    """Needs of a run of learning."""

    what = "masked"
    recovery_seconds: float | None = None
    """Of the training of kept weights at the end, if there is one."""

    def lines(self) -> list[tuple[str, str]]:
        """Return what a person reads: (what, how much)."""
        after = [] if self.recovery_seconds is None else [("recovery after it, about", duration(self.recovery_seconds))]
        return [*super().lines(), *after]


def plan_learn(model: str | Path, options: LearnOptions) -> LearnPlan:
    """Load the model, take two micro-batches through it (the first warms up), and extrapolate. Writes nothing.

    A recovery takes two of its own. Without the prior (a few percent of `quick`) and the evaluations (about a tenth).
    Under `torchrun`, the time is that of so many processes; each holds the whole model here, whatever the run will hold.
    What the options get wrong is refused as the run refuses it.
    """
    processes = Processes.join()
    prior_identity(options.prior)
    if options.tensorboard is not None:
        summary_writer()
    sharded = divides(options, processes, model)
    source = open_whole(model, options, options.device)
    with ExitStack() as held:  # the text is in memory and outlives it
        plan = prepare(source, options, processes, held, sharded=sharded)
    given_masks(options.prior, plan.targets)
    masks = {}
    for target in plan.targets:  # any mask of the pattern costs the same
        masks[target.name] = target.unrows(target.pattern.mask(target.rows(target.parameter.abs().float())))
    dtype = torch.bfloat16 if options.lean else torch.float32
    masked = MaskedModel(
        source, plan.targets, masks, relaxation=options.relaxation, prior=Prior(), seed=options.seed, dtype=dtype
    )  # fmt: skip
    one = replace(plan.recipe, sequences=plan.batch_size)
    trainer = MaskTrainer(
        masked,
        plan.training,
        plan.held_out,
        one,
        batch_size=plan.batch_size,
        seed=options.seed,
        distill=options.distill,
    )
    seconds = 0.0
    with masked.running(recompute=options.activation_checkpointing):
        for _ in range(2):
            started = time.perf_counter()
            float(trainer.run_step())
            seconds = time.perf_counter() - started
    weights = sum(target.parameter.numel() for target in plan.targets)
    each = resident_bytes(masked.layers, trainer.optimizer)
    masked.restore()
    del trainer, masked
    gc.collect()  # as the run does before it recovers
    recovery = None if options.recover is None else _recovery_seconds(source, plan, masks, options, options.recover)
    return LearnPlan(
        weights=weights,
        step_tokens=plan.recipe.tokens // plan.recipe.steps,
        steps=plan.recipe.steps,
        bytes_per_weight=each,
        peak_memory_bytes=peak_memory_bytes(),
        disk_bytes=bytes_due(source.nbytes, plan.targets, options.relaxation, recovers=options.recover is not None),
        step_seconds=seconds * plan.recipe.sequences / plan.batch_size / processes.size,
        recovery_seconds=recovery,
    )


def _recovery_seconds(
    source: ObjectModel, job: Job, masks: Mapping[str, Tensor], options: LearnOptions, settings: Recover
) -> float:
    """Of all steps of a recovery, from the second of two on one micro-batch."""
    size = micro_batch_size(settings.sequences, job.batch_size)
    times: list[float] = []
    recover_weights(
        source.model, masks, replace(settings, steps=2, sequences=size), job.training,
        batch_size=size, seed=options.seed, progress=lambda *_: times.append(time.perf_counter()), processes=Processes(),
        state=SavedState(), recompute=blocks_of(source) if options.activation_checkpointing else (),
    )  # fmt: skip
    return (times[1] - times[0]) * settings.steps * settings.sequences / size
