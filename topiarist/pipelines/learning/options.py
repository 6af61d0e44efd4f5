"""What a run of learned masks is asked for, as one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PositiveInt, SkipValidation
from torch import Tensor

from topiarist.core.options import Settings, Share, options
from topiarist.core.patterns import Pattern, parse_pattern
from topiarist.core.registry import look_up
from topiarist.masklearn import PRESETS, Preset
from topiarist.pipelines.common.options import HOW, DataOptions, OnePattern
from topiarist.pipelines.learning.train_kept import Recover


def _preset(given: Any) -> Any:
    if isinstance(given, str):
        look_up(PRESETS, given, "preset")
    return given


@options
class LearnOptions(DataOptions):
    """Everything that `learn` takes beside the model, the output folder and the progress bar."""

    pattern: OnePattern = None
    """2:4 keeps 2 of 4; any N:M; default 2:4."""
    prior: Annotated[str | Path | Mapping[str, Tensor], SkipValidation] = "wanda"
    """wanda, sparsegpt, magnitude, alps, whose mask on the dense weights is the start; or a masks.safetensors, an .npz, or
    masks by parameter name."""
    preset: Annotated[str | Preset, SkipValidation, BeforeValidator(_preset)] = "quick"
    """quick, standard or paper."""
    steps: PositiveInt | None = None
    """Steps, instead of the preset's."""
    relaxation: Literal["categorical", "topn", "bernoulli"] | None = None
    """categorical, topn or bernoulli; default: what fits the pattern."""
    skip: Sequence[str] = ()
    """Regular expression of layers that stay dense."""
    last_block_dense: bool = False
    """The most sensitive block stays as it is."""
    distill: Share = 0.0
    """Share of the loss that is the divergence from the dense model's predictions."""
    recover: Annotated[Recover | None, Settings(Recover)] = None
    """Then train the kept weights under the final mask (steps=100 sets a field)."""
    batch_size: PositiveInt | None = None
    """Sequences a forward pass."""
    held_out: PositiveInt = 8
    """Sequences of the text that are only looked at."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations and saved states; default a fifth of all, at most 25."""
    stop: bool = True
    """End early once the masks are decided and no longer move."""
    lean: bool = False
    """9 bytes a masked weight instead of 14."""
    eight_bit: bool = False
    """Moments in 8 bits, by torchao: 11 bytes, 7.5 with lean; slow on a CPU."""
    activation_checkpointing: Annotated[bool, HOW] = False
    """A third more time, far less memory."""
    shard: bool | None = None
    """Under torchrun, divide weights and logits too (FSDP2); default: yes, for a model on disk."""
    tensorboard: Annotated[Path | None, HOW] = None
    """Folder for TensorBoard scalars."""

    @property
    def base_pattern(self) -> Pattern:
        """The pattern of every layer that is masked, 2:4 if none was given."""
        return parse_pattern("2:4") if self.pattern is None else self.pattern
