"""Quantised weights in training: their integers stay, what their scales are multiplied by learns.

Integers would begin in the middle of their cells, and a short training moves few of them out; a scale moves at every step.
The result has the files' format, and zeros stay zero (EfficientQAT, arXiv 2407.11062, section 3.3, trains scales alone
after its blocks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn.utils import parametrize

from topiarist.checkpoints.dequantised import DequantisedCheckpoint
from topiarist.models.opened import ObjectModel
from topiarist.quantization.compressed_tensors import SCALE
from topiarist.quantization.grid import QuantizedWeight, dequantize


class _Scaled(nn.Module):
    """A weight as a function of the logarithm of what its scales are multiplied by: positive scales stay positive."""

    q: Int8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]

    def __init__(self, weight: QuantizedWeight, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("q", weight.q.to(like.device), persistent=False)
        self.register_buffer("scale", weight.scale.to(like.device), persistent=False)
        self.dtype = like.dtype

    def forward(self, log: Float[Tensor, "out groups"]) -> Float[Tensor, "out in"]:
        scale = self.scaled(log)
        return dequantize(self.q, scale.to(torch.promote_types(scale.dtype, self.dtype))).to(self.dtype)

    def right_inverse(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out groups"]:
        return torch.zeros_like(self.scale, dtype=weight.dtype)

    def scaled(self, log: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
        """The scales, in the files' dtype."""
        return (self.scale.float() * log.float().exp()).to(self.scale.dtype)


@dataclass
class TrainedScale:
    """The scales of one quantised matrix while they learn."""

    name: str
    """Of the scales in the files."""
    module: nn.Module
    leaf: str
    """The name of the weight in the module."""

    @property
    def log(self) -> nn.Parameter:
        """What learns: (out, groups), zero at the start."""
        return self.module.parametrizations[self.leaf].original  # pyright: ignore

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weights as the module reads them now."""
        with torch.no_grad():
            return getattr(self.module, self.leaf)

    @property
    def scale(self) -> Float[Tensor, "out groups"]:
        """The scales as they are now, in the files' dtype."""
        return self.module.parametrizations[self.leaf][0].scaled(self.log.detach())  # pyright: ignore


def scales_of(model: ObjectModel) -> dict[str, TrainedScale]:
    """Let the quantised matrices of a folder's model be made of their scales from now on; {} if none is quantised.

    By the parameters' names. Raises UnsupportedModel for what `FolderModel.grids` refuses.
    """
    if not isinstance(model.checkpoint, DequantisedCheckpoint):
        return {}
    grids: dict[str, str] = model.as_folder().grids()
    found: dict[str, TrainedScale] = {}
    for name, stored in grids.items():
        path, _, leaf = name.rpartition(".")
        module = model.model.get_submodule(path)
        weight = getattr(module, leaf)
        on_grid = model.checkpoint.quantized(stored)
        assert on_grid is not None  # or `grids` had refused it
        parametrize.register_parametrization(module, leaf, _Scaled(on_grid, weight))
        found[name] = TrainedScale(stored.removesuffix("weight") + SCALE, module, leaf)
    return found
