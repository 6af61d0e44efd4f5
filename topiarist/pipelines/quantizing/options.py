"""What a quantising run is asked for, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import PositiveInt

from topiarist.core.errors import CalibrationError
from topiarist.core.options import About, Registered, Settings, options
from topiarist.pipelines.common.options import HOW, Bits, Group, TextOptions
from topiarist.pipelines.pruning.correct import Correct
from topiarist.quantization import GPTQ, METHODS, Method, Rounding


@options
class QuantizeOptions(TextOptions):
    """Everything that `quantize` takes beside the model, the output folder and the progress bar."""

    bits: Bits = 8
    """Bits a weight: 8 loses next to nothing, 4 halves the file again."""
    group: Group = "auto"
    """Consecutive weights that share a scale; auto: 128, or the largest of 64 and 32 that fits every matrix;
    channel: a whole row."""
    method: Annotated[
        Method | None, Registered(METHODS, other=lambda given: given is None), About(metavar="METHOD")
    ] = None
    """gptq or round; gptq:sweeps=4 sets a field. Default gptq, and round for 8 bits without data."""
    skip: Sequence[str] = ()
    """Regular expression of layers that keep their values."""
    head: bool = False
    """Put the output head on 8 bits as well, a scale a row."""
    batch_size: PositiveInt = 8
    """Windows a forward pass."""
    true_sequential: bool = False
    """Later matrices of a block see the already quantised earlier ones."""
    correct: Annotated[Correct | None, Settings(Correct)] = None
    """Each matrix also makes good what those before it lost of the model as it was (share=0.5 sets a field)."""
    attention: bool = True
    """To a matrix of values a token counts by the attention that it is given; not with correct."""
    spill: Annotated[Path | None, HOW] = None
    """Folder for hidden states that do not fit in memory."""

    @property
    def windows_a_forward(self) -> int:
        """`batch_size`, by the name that the walk over the blocks asks for."""
        return self.batch_size

    @property
    def chosen_method(self) -> Method:
        """`method`, or what suits the run."""
        return self.method or (Rounding() if self.data is None and self.bits == 8 else GPTQ())

    def check_text(self) -> None:
        """Raise CalibrationError if there is no text and something needs it."""
        if self.data is not None:
            return
        if self.chosen_method.needs_data or self.correct is not None:
            what = "error correction" if self.correct is not None else "gptq"
            raise CalibrationError(
                f"{what} looks at what flows through the model: give text with --data FILE (--method round does without)"
            )
