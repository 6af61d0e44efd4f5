"""The arguments of `learn`, checked and resolved before any work is done."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.core.errors import CalibrationError, TopiaristError
from topiarist.core.patterns import Pattern
from topiarist.core.registry import look_up
from topiarist.data import TextFiles
from topiarist.masklearn import PRESETS, Preset
from topiarist.models.opened import ObjectModel, open_model
from topiarist.pipelines.common.setup import resolve_patterns
from topiarist.pipelines.learning.masking import Target, targets
from topiarist.pipelines.training.text import Sequences, TrainingText, training_text


@dataclass(frozen=True)
class Job:
    """What is to be learned and from what, checked before any work is done."""

    recipe: Preset
    patterns: Mapping[str, Pattern | None]
    blocks: list[list[Target]]
    text: TrainingText
    training: Sequences
    watching: Tensor
    batch_size: int
    notes: list[str]

    @property
    def targets(self) -> list[Target]:
        return [target for block in self.blocks for target in block]


def prepare(
    source: ObjectModel,
    *,
    data: TextFiles | Tensor | Sequence[str],
    pattern: Pattern,
    preset: str | Preset,
    steps: int | None,
    lean: bool,
    eight_bit: bool,
    skip: Sequence[str],
    last_block_dense: bool,
    batch_size: int | None,
    held_out: int,
    processes: int,
    tokenizer: Any,
) -> Job:
    """Resolve the arguments of `learn`. Raises a TopiaristError for every one that does not fit."""
    recipe = _recipe(preset, steps, lean, eight_bit)
    names = source.block_names
    dense = [*skip, f"^{re.escape(names[-1])}\\."] if last_block_dense else list(skip)
    patterns, unmatched = resolve_patterns(source, pattern, None, dense)
    blocks = targets(source, patterns)
    if not any(blocks):
        raise TopiaristError("every layer is skipped: nothing to learn")
    notes = [f"--skip {expression!r} matches no layer" for expression in unmatched]
    num = recipe.steps * recipe.sequences + held_out
    with training_text(source, data, window_tokens=recipe.length, num_windows=num, seed=0, tokenizer=tokenizer) as text:
        training, watching = text.split(held_out)
    if text.window < recipe.length and not isinstance(data, Tensor):
        notes.append(f"sequences of {text.window} tokens, the model's limit, instead of the preset's {recipe.length}")
    recipe = replace(recipe, length=text.window)
    size = _batch_size(batch_size, recipe.sequences, processes)
    if len(training) < recipe.sequences:
        raise CalibrationError(
            f"training text holds {len(training)} sequences of {text.window} tokens beside the {len(watching)} that "
            f"are held out, a step takes {recipe.sequences}: add text"
        )
    return Job(recipe, patterns, blocks, text, training, watching, size, notes)


def _recipe(preset: str | Preset, steps: int | None, lean: bool, eight_bit: bool) -> Preset:
    recipe = look_up(PRESETS, preset, "preset") if isinstance(preset, str) else preset
    if steps is not None:
        if steps < 1:
            raise TopiaristError(f"learning takes at least one step, got {steps}")
        recipe = shortened(recipe, steps) if isinstance(preset, str) else replace(recipe, steps=steps)
    if eight_bit:
        recipe = replace(recipe, moments="8-bit")
    return replace(recipe, second_moment="group") if lean else recipe


def shortened(recipe: Preset, steps: int) -> Preset:
    """A preset with another number of steps. With a deterministic prior the learning rate follows as 1 / sqrt(steps): noise
    then moves a logit by the same part of the prior's gap, and a shorter run still comes far enough to change a mask.
    """
    if recipe.gap is None:
        return replace(recipe, steps=steps)
    factor = math.sqrt(recipe.steps / steps)
    lr = replace(recipe.lr, start=recipe.lr.start * factor, end=recipe.lr.end * factor)
    return replace(recipe, steps=steps, lr=lr)


def open_whole(
    model: str | Path | nn.Module, device: str | torch.device | None, trust_remote_code: bool
) -> ObjectModel:
    """The whole model in memory, on the accelerator of this process."""
    local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return open_model(model, device=device or local, trust_remote_code=trust_remote_code).whole()


def _batch_size(asked: int | None, sequences: int, processes: int) -> int:
    if sequences % processes:
        raise CalibrationError(f"{sequences} sequences a step cannot be divided among {processes} processes")
    share = sequences // processes
    if asked is None:
        return math.gcd(share, 2)
    if asked < 1 or share % asked:
        raise CalibrationError(f"batch size {asked} does not divide the {share} sequences of a step and process")
    return asked
