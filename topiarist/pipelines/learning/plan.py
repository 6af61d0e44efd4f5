"""What a run of learning will need on this machine, from one real step on one sequence."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from topiarist.core.meter import peak_memory_bytes
from topiarist.masklearn import Prior, resident_bytes
from topiarist.pipelines.learning.files import STATE_BYTES
from topiarist.pipelines.learning.job import open_whole, prepare
from topiarist.pipelines.learning.masking import MaskedModel
from topiarist.pipelines.learning.options import LearnOptions
from topiarist.pipelines.learning.trainer import MaskTrainer
from topiarist.pipelines.training.plan import TrainingPlan
from topiarist.pipelines.training.processes import Processes


class LearnPlan(TrainingPlan):
    """Needs of a run of learning."""

    what = "masked"


def plan_learn(model: str | Path, options: LearnOptions) -> LearnPlan:
    """Load the model, take two micro-batches through it (the first warms up), and extrapolate. Writes nothing.

    Without the prior (a few percent of `quick`) and the evaluations (about a tenth).
    """
    source = open_whole(model, options, options.device)
    with ExitStack() as held:  # the text is in memory and outlives it
        plan = prepare(source, options, Processes(), held, held_out=1)
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
    return LearnPlan(
        weights=weights,
        step_tokens=plan.recipe.tokens // plan.recipe.steps,
        steps=plan.recipe.steps,
        bytes_per_weight=resident_bytes(masked.layers, trainer.optimizer),
        peak_memory_bytes=peak_memory_bytes(),
        disk_bytes=source.nbytes + 2 * STATE_BYTES * weights,
        step_seconds=seconds * plan.recipe.sequences / plan.batch_size,
    )
