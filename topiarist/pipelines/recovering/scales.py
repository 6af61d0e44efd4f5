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
from topiarist.core.errors import UnsupportedModel
from topiarist.models.folder import FolderModel
from topiarist.models.opened import ObjectModel, OpenedModel
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


def grids_of(source: OpenedModel) -> dict[str, str]:
    """The parameters that the files hold as symmetric packed integers, and their names there; {} if none is quantised.

    Raises UnsupportedModel if a parameter is quantised in another way, made of several tensors, or of several modules.
    """
    if not isinstance(source.checkpoint, DequantisedCheckpoint):
        return {}
    folder: FolderModel = source.as_folder()
    single = {g.keys[0][0]: g.targets[0] for g in folder.names.groups.values() if g.converter is None}
    shared = {name for pair in (getattr(folder.model, "all_tied_weights_keys", None) or {}).items() for name in pair}
    grids = source.checkpoint.grids()
    for name, symmetric in grids.items():
        if not symmetric:
            how = "has no symmetric packed integers, whose scales alone can learn"
        elif name not in single:
            how = "is one of several that make a parameter, whose scales cannot learn"
        elif single[name] in shared:
            how = "is shared by several layers, whose scales cannot learn"
        else:
            continue
        raise UnsupportedModel(
            f"{source.name} is quantised, and {name} {how}: recover the model that it was made from, then quantise the result"
        )
    return {single[name]: name for name in grids}


def scales_of(model: ObjectModel) -> dict[str, TrainedScale]:
    """Let the quantised matrices of a folder's model be made of their scales from now on; {} if none is quantised.

    By the parameters' names. Raises UnsupportedModel for what `grids_of` refuses.
    """
    if not isinstance(model.checkpoint, DequantisedCheckpoint):
        return {}
    found: dict[str, TrainedScale] = {}
    for name, stored in grids_of(model).items():
        path, _, leaf = name.rpartition(".")
        module = model.model.get_submodule(path)
        weight = getattr(module, leaf)
        on_grid = model.checkpoint.quantized(stored)
        assert on_grid is not None  # or `grids_of` had refused it
        parametrize.register_parametrization(module, leaf, _Scaled(on_grid, weight))
        found[name] = TrainedScale(stored.removesuffix("weight") + SCALE, module, leaf)
    return found
