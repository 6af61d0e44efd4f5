"""The arguments of `learn`, checked and resolved before any work is done."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from topiarist.core.errors import CalibrationError, PatternError, TopiaristError
from topiarist.core.patterns import Pattern
from topiarist.masklearn import PRESETS, Preset, Relaxation, relaxation_for
from topiarist.masklearn.eight_bit import check_installed
from topiarist.models.derive import check_has_text_loss
from topiarist.models.opened import ObjectModel, shell
from topiarist.pipelines.common.setup import open_for, resolve_patterns
from topiarist.pipelines.learning.masking import Target, targets
from topiarist.pipelines.learning.options import LearnOptions
from topiarist.pipelines.training.batches import check_sequences, micro_batch_size
from topiarist.pipelines.training.loop import Progress
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.text import Sequences, TrainingText, training_text


@dataclass(frozen=True)
class Job:
    """What is to be learned and from what, checked before any work is done."""

    recipe: Preset
    patterns: Mapping[str, Pattern | None]
    blocks: list[list[Target]]
    text: TrainingText
    training: Sequences
    held_out: Tensor
    batch_size: int
    notes: list[str]

    @property
    def targets(self) -> list[Target]:
        """The targets of all blocks, in order."""
        return [target for block in self.blocks for target in block]


def prepare(
    source: ObjectModel,
    options: LearnOptions,
    processes: Processes,
    held: ExitStack,
    *,
    sharded: bool,
    out: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Job:
    """Resolve the options of `learn`.

    held: keeps the text's file open. sharded: whether the processes divide the weights. out: beside which the text's
    tokens stand.
    Raises a TopiaristError for every option that does not fit.
    """
    recipe, skip = _recipe(options), list(options.skip)
    if options.last_block_dense:
        skip.append(f"^{re.escape(source.block_names[-1])}\\.")
    patterns, unmatched = resolve_patterns(source, options.base_pattern, None, skip)
    blocks = targets(source, patterns)
    for target in (target for block in blocks for target in block):  # refused here, not after the prior
        relaxation = relaxation_for(target.pattern, options.relaxation)
        if sharded:
            _check_divisible(target, relaxation, processes.size)
    if options.eight_bit:
        check_installed()
    size = _batch_size(options.batch_size, recipe.sequences, processes.size)
    notes = [f"--skip {expression!r} matches no layer" for expression in unmatched]
    num = recipe.steps * recipe.sequences + options.held_out
    text = held.enter_context(
        training_text(
            source, options.data, window_tokens=recipe.length, num_windows=num, seed=options.seed, tokenizer=options.tokenizer,
            bos=options.bos, out=out, processes=processes, progress=progress,
        )
    )  # fmt: skip
    training, evaluated = text.split(options.held_out)
    if text.window < recipe.length and not isinstance(options.data, Tensor):
        notes.append(f"sequences of {text.window} tokens, the model's limit, instead of the preset's {recipe.length}")
    recipe = replace(recipe, length=text.window)
    if len(training) < recipe.sequences:
        raise CalibrationError(
            f"training text holds {len(training)} sequences of {text.window} tokens beside the {len(evaluated)} that "
            f"are held out, a step takes {recipe.sequences}: add text"
        )
    if options.recover is not None and len(training) < options.recover.sequences:
        raise CalibrationError(
            f"training text holds {len(training)} sequences, a step of the recovery takes {options.recover.sequences}: add "
            "text, or lower its sequences"
        )
    return Job(recipe, patterns, blocks, text, training, evaluated, size, notes)


def _recipe(options: LearnOptions) -> Preset:
    preset = options.preset
    recipe = PRESETS[preset] if isinstance(preset, str) else preset
    if options.steps is not None:
        named = isinstance(preset, str)
        recipe = shortened(recipe, options.steps) if named else replace(recipe, steps=options.steps)
    if options.eight_bit:
        recipe = replace(recipe, moments="8-bit")
    return replace(recipe, second_moment="group") if options.lean else recipe


def shortened(recipe: Preset, steps: int) -> Preset:
    """A preset with another number of steps. With a deterministic prior the learning rate follows as 1 / sqrt(steps): noise
    then moves a logit by the same part of the prior's gap, and a shorter run still comes far enough to change a mask.
    """
    if recipe.gap is None:
        return replace(recipe, steps=steps)
    factor = math.sqrt(recipe.steps / steps)
    lr = replace(recipe.lr, start=recipe.lr.start * factor, end=recipe.lr.end * factor)
    return replace(recipe, steps=steps, lr=lr)


def open_whole(model: str | Path | nn.Module, options: LearnOptions, device: str | None) -> ObjectModel:
    """The whole model in memory, on `device` or the accelerator of this process."""
    local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    opened = open_for(replace(options, device=device or local), model)
    check_has_text_loss(opened.model, "learning masks")
    return opened.whole()


def open_shell(model: str | Path | nn.Module, options: LearnOptions) -> ObjectModel:
    """A model folder without its weights, for a process that gets its share of them from another."""
    return shell(open_for(replace(options, device="cpu"), model))


def divides(options: LearnOptions, processes: Processes, model: str | Path | nn.Module) -> bool:
    """Whether weights and logits are divided among processes. Raises TopiaristError where they cannot be."""
    is_object = isinstance(model, nn.Module)
    if not (processes.size > 1 and not is_object if options.shard is None else options.shard):
        return False
    if processes.size == 1:
        raise TopiaristError("shards need several processes: start with torchrun --nproc-per-node N -m topiarist learn")
    if is_object:
        raise TopiaristError("a model object cannot be sharded and given back: pass its folder, or shard=False")
    if options.recover:
        raise TopiaristError("recovery trains whole weights in every process: leave it out, or use --no-shard")
    return True


def _check_divisible(target: Target, relaxation: Relaxation, processes: int) -> None:
    shape = tuple(target.parameter.shape)
    along = shape[1] if target.transposed and len(shape) == 2 else shape[0]
    if along % processes:
        raise PatternError(
            f"layer {target.label}: {along} rows cannot be divided among {processes} processes; use another number, or a "
            "whole copy in each (--no-shard)"
        )
    if not relaxation.by_row:
        raise PatternError(f"relaxation {relaxation.name} looks at whole matrices, which shards are not: --no-shard")


def _batch_size(asked: int | None, sequences: int, processes: int) -> int:
    check_sequences(sequences, processes, "take a preset with more a step")
    share = sequences // processes
    if asked is None:
        return micro_batch_size(share, 2)
    if asked < 1 or share % asked:
        raise CalibrationError(f"batch size {asked} does not divide the {share} sequences of a step and process")
    return asked
