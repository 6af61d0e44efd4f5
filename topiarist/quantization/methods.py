"""How a weight gets to its grid. `METHODS` is the one table that command line, tests and docs read."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from topiarist.core.gram import Gram
from topiarist.core.options import options
from topiarist.quantization.gptq import GPTQ
from topiarist.quantization.grid import Grid, QuantizedWeight, round_to_nearest


@options
class Rounding:
    """Every weight to the nearest level of its grid. Enough for 8 bits; at 4 bits GPTQ loses several times less."""

    needs_data: ClassVar[bool] = False
    search: bool = True
    """Choose each scale by the error on the calibration inputs (or of the weights alone, without data); otherwise the
    largest weight of a group is the end of its grid."""

    def prepare(self, gram: Gram) -> Float[Tensor, "in in"]:
        """The Gram's matrix."""
        return gram.matrix

    def quantize(
        self,
        factors: Float[Tensor, "in in"] | None,
        weight: Float[Tensor, "out in"],
        grid: Grid,
        mask: Bool[Tensor, "out in"] | None = None,
        target: Float[Tensor, "out in"] | None = None,
    ) -> QuantizedWeight:
        """Round one weight.

        factors: what `prepare` gave, or None without data. mask: weights allowed to be other than zero. target: plays no part.
        Raises QuantizationError if groups do not fit the row, NumericalError on NaN or Inf.
        """
        kept = weight if mask is None else weight.masked_fill(~mask, 0.0)
        H = None if factors is None else factors.to(weight.device)
        return round_to_nearest(kept, grid, H, search=self.search)


Method = GPTQ | Rounding
METHODS: dict[str, type[GPTQ] | type[Rounding]] = {"gptq": GPTQ, "round": Rounding}
