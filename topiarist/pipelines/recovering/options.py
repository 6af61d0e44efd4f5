"""The settings of `recover`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from topiarist.core.errors import CalibrationError, TopiaristError
from topiarist.core.options import About, options
from topiarist.pipelines.common.options import HOW, DataOptions, count
from topiarist.pipelines.training.low_rank import check_rank

WINDOW, MOST_SEQUENCES, FEWEST_STEPS = 512, 8, 500
"""Tokens of a sequence, sequences of a step, steps of a run, if nothing is said."""
LOOKS, SHARE = 10, 0.1
"""At the held-out loss, if nothing is said: so many, but no more than this share of the training's cost."""


@options
class RecoverOptions(DataOptions):
    """What is trained, towards what, on what text, for how long."""

    tokens: Annotated[int, BeforeValidator(count), Field(gt=0)] = 1_000_000
    """Budget: tokens trained on, such as 300k or 1M. Text that is shorter is repeated, each time in another order."""
    kind: Literal["full", "lora"] = "full"
    """`full`: every weight outside the embeddings, 18 bytes each in bf16; `lora`: low-rank updates of the blocks'
    matrices, merged at the end."""
    loss: Literal["kl", "kl+hidden", "lm"] = "kl"
    """`kl`: divergence from the teacher's predictions; `kl+hidden`: that and the normalised squared error of every
    block's output; `lm`: next tokens of the text, no teacher."""
    hidden_weight: Annotated[float | None, Field(gt=0)] = None
    """Of the mean error of the blocks' outputs, in `kl+hidden`; default: 1."""
    rank: Annotated[int | None, Field(gt=0)] = None
    """Of the low-rank updates of `lora`; default: 16."""
    norms: bool = True
    """Norms and biases are trained too."""
    embeddings: bool = False
    """Embeddings and head are trained too, in `full`."""
    window_tokens: Annotated[int | None, About(flag="window"), Field(gt=1)] = None
    """Tokens a sequence; default: 512, or the model's limit where that is less."""
    sequences: Annotated[int | None, Field(gt=0)] = None
    """Sequences a step; default: 8, or fewer so that the budget makes 500 steps."""
    batch_size: Annotated[int, Field(gt=0)] = 4
    """Sequences a forward, at most."""
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    """Peak; falls to zero along a cosine. Default: 0.0016 times the size of the model's weights (the median over its matrices
    of their root mean square, zeros included), half of it in `full` below 200,000 tokens."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the learning rate climbs to its peak."""
    held_out: Annotated[int, Field(gt=0)] = 16
    """Sequences of the text that are not trained on and choose the best state; at most a tenth of the text."""
    evaluate_every: Annotated[int | None, Field(gt=0)] = None
    """Steps between two looks at them; default: a tenth of all, or so many that looking takes a tenth of the training."""
    dtype: Literal["auto", "float32", "stored"] = "auto"
    """Of the products while it trains; weights are written as they were stored. `auto`: as stored, but float32 on a CPU
    that multiplies it faster than bf16."""
    activation_checkpointing: Annotated[bool, HOW] = False
    """A third more time, far less memory."""
    shard: bool = False
    """Under torchrun, divide the weights of both models, masters and optimiser too (FSDP2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank, self.kind)
        if self.hidden_weight is not None and self.loss != "kl+hidden":
            raise TopiaristError("hidden_weight weighs the blocks' outputs: leave it out, or use loss kl+hidden")
        self.check_budget(self.sequences or 1, self.window_tokens or 0)
        if self.kind == "lora" and self.embeddings:
            raise TopiaristError(
                "kind lora cannot train embeddings: a tied matrix is read in two ways and takes no low-rank update; "
                "use kind full, or leave embeddings out"
            )

    def check_budget(self, sequences: int, window: int) -> None:
        """Raise CalibrationError unless the budget makes one step of so many sequences of `window` tokens."""
        if self.tokens < sequences * window:
            raise CalibrationError(
                f"a budget of {self.tokens:,} tokens is below one step of {sequences} x {window} = "
                f"{sequences * window:,}: raise --tokens, or lower {'--sequences' if sequences > 1 else '--window'}"
            )

    def sequences_a_step(self, window: int, processes: int) -> int:
        """Sequences of `window` tokens that a step takes, at least one a process if nothing was said.

        Where tokens are few, many small steps lower the loss faster than few large ones.
        """
        if self.sequences is not None:
            return self.sequences
        fitting = min(MOST_SEQUENCES, self.tokens // (FEWEST_STEPS * window))
        return max(1, fitting // processes) * processes

    def steps_between_looks(self, steps: int, sequences: int, held_out: int) -> int:
        """Steps of `sequences` between two looks at `held_out` sequences.

        A look is forwards alone, about half of what training on as many tokens costs.
        """
        if self.evaluate_every is not None:
            return self.evaluate_every
        affordable = 2 * SHARE * steps * sequences / held_out
        return max(1, steps // max(1, min(LOOKS, int(affordable))))

    def check_asked(self, teacher: object) -> None:
        """Raise TopiaristError for a teacher that the loss does not ask."""
        if teacher is not None and not self.needs_teacher:
            raise TopiaristError("loss lm asks no teacher: leave the teacher out, or use loss kl")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss asks a dense model."""
        return self.loss != "lm"
