"""A model with learned masks in place of its matrices, and its way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor, nn
from torch.nn.utils import parametrize

from topiarist.core.errors import PatternError
from topiarist.core.patterns import Pattern
from topiarist.masklearn import (
    Annealing,
    LearnedMask,
    MaskedLinear,
    Prior,
    dense,
    mask_parameter,
    relaxation_for,
    set_draws,
)
from topiarist.models.families import Matrix, block_names
from topiarist.models.opened import ObjectModel
from topiarist.pipelines.training.recompute import recomputed, wrapping


@dataclass(frozen=True)
class Target:
    """One parameter that gets a mask: the weight of a linear layer, or all experts of a fused parameter."""

    name: str
    """Of the parameter, as in `model.named_parameters()`; mask files use it too."""
    matrices: tuple[Matrix, ...]
    pattern: Pattern

    @property
    def module_path(self) -> str:
        """Name of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def parameter_itself(self) -> Tensor:
        """What the module holds, as FSDP and autograd see it."""
        return getattr(self.matrices[0].module, self.matrices[0].parameter)

    @property
    def parameter(self) -> Tensor:
        """The stored weight, outside autograd."""
        return self.parameter_itself.detach()

    @property
    def transposed(self) -> bool:
        """Whether the parameter is stored as (..., in, out)."""
        return self.matrices[0].transposed

    @property
    def label(self) -> str:
        """How the layer is called in reports: without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def matrix_names(self) -> list[str]:
        """Full names of its matrices, as reports and audits of a pruned checkpoint call them."""
        experts = [m.expert for m in self.matrices]
        return [self.label] if experts == [None] else [f"{self.label}.{e}" for e in experts]

    @property
    def in_place(self) -> bool:
        """Whether the module stays, because it does more with the parameter than a linear layer: experts, grouped rows."""
        return not self.matrices[0].is_plain

    @property
    def rows_shape(self) -> tuple[int, int]:
        """Shape of `rows` of the parameter."""
        shape = self.parameter.shape
        width = shape[-2] if self.transposed else shape[-1]
        return shape.numel() // width, width

    def rows(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "rows in"]:
        """A tensor in the parameter's shape as the (rows, in) matrix whose rows the groups run along."""
        return (tensor.transpose(-1, -2) if self.transposed else tensor).flatten(0, -2)

    def unrows(self, rows: Shaped[Tensor, "rows in"]) -> Shaped[Tensor, "*shape"]:
        """The inverse of `rows`."""
        shape = self.parameter.shape
        if not self.transposed:
            return rows.view(shape)
        return rows.view(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).contiguous()

    def packed(self, mask: Bool[Tensor, "..."]) -> np.ndarray:
        """A mask at one bit a weight: (rows, bytes)."""
        return np.packbits(self.rows(mask).contiguous().cpu().numpy(), axis=1)

    def unpacked(self, bits: UInt8[Tensor, "rows bytes"]) -> Bool[Tensor, "*shape"]:
        """The inverse of `packed`: a mask in the parameter's shape."""
        return self.unrows(torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=self.rows_shape[1])).bool())

    def whole(self, masks: Mapping[str, Tensor], path: str) -> Tensor:
        """The mask in the parameter's shape, from masks (out, in) by matrix name."""
        found = [masks[f"{path}.{m.name}"] for m in self.matrices]
        mask = found[0] if self.matrices[0].expert is None else torch.stack(found)
        return mask.transpose(-1, -2).contiguous() if self.transposed else mask


def targets(source: ObjectModel, patterns: Mapping[str, Pattern | None]) -> list[list[Target]]:
    """The parameters to mask, block by block. Raises PatternError if the experts of one parameter do not agree."""
    found: list[list[Target]] = []
    for index, path in enumerate(source.block_names):
        stages: dict[str, list[Matrix]] = {}
        for matrix in source.matrices(index):
            stages.setdefault(matrix.stage, []).append(matrix)
        block: list[Target] = []
        for stage, matrices in stages.items():
            wanted = {patterns[f"{path}.{m.name}"] for m in matrices}
            if len(wanted) > 1:
                raise PatternError(f"the experts of {path}.{stage} share one parameter: skip all of them or none")
            pattern = wanted.pop()
            if pattern is not None:
                name = f"{path}.{stage}" + (".weight" if matrices[0].expert is None else "")
                block.append(Target(name, tuple(matrices), pattern))
        found.append(block)
    return found


class MaskedModel:
    """A loaded model whose targets are masked layers until `restore`. Only their logits have gradients.

    masks: the prior's, by parameter name and in its shape, bool, True = kept. relaxation: by name; None: what fits each
    pattern. dtype: of the logits. Raises PatternError that names the layer whose mask does not fit.
    """

    def __init__(
        self,
        source: ObjectModel,
        wanted: Sequence[Target],
        masks: Mapping[str, Tensor],
        *,
        relaxation: str | None,
        prior: Prior,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self._trained = {name: p.requires_grad for name, p in source.model.named_parameters()}
        self._was_training = source.model.training
        self.model: Any = source.model.requires_grad_(False).eval()
        self.source, self.targets = source, list(wanted)
        self.layers: list[LearnedMask] = []
        self.prior_bits = [target.packed(masks[target.name]) for target in self.targets]
        self._originals: dict[str, nn.Module] = {}
        try:
            for index, target in enumerate(self.targets):
                options = {"index": index, "prior": prior, "seed": seed, "dtype": dtype}
                kind = relaxation_for(target.pattern, relaxation)
                mask = masks[target.name].to(target.parameter.device)
                try:
                    layer = self._mask(target, kind, mask, options)
                except PatternError as error:
                    raise PatternError(f"layer {target.label}: {error}") from error
                self.layers.append(layer.to(target.parameter.device))
        except BaseException:
            self.restore()
            raise

    def _mask(self, target: Target, relaxation: Any, mask: Tensor, options: dict[str, Any]) -> LearnedMask:
        matrix = target.matrices[0]
        if target.in_place:
            return mask_parameter(
                matrix.module, matrix.parameter, relaxation, mask, transposed=target.transposed, **options
            )
        layer = MaskedLinear.from_module(matrix.module, relaxation, mask, **options)
        self._originals[target.module_path] = matrix.module
        self.model.set_submodule(target.module_path, layer)
        return layer

    def masks(self, bits: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Masks by parameter name, in the parameters' shapes, on the CPU; `bits` packed as by `Target.packed`."""
        return {t.name: t.unpacked(torch.from_numpy(b)) for t, b in zip(self.targets, bits, strict=True)}

    def train(self, mode: bool = True) -> None:
        """Soft masks (True) or hard ones. Only the masks change mode: dropout of the frozen model stays off."""
        for layer in self.layers:
            layer.train(mode)

    @property
    def device(self) -> torch.device:
        """Where the tokens have to be."""
        return self.source.device

    @property
    def sharded(self) -> bool:
        """Whether a process holds some rows of every layer, and not all (sharding.py)."""
        return False

    def set_draws(self, annealing: Annealing, step: int, total: int, **sample: int) -> None:
        """Every layer's draw for a step (and micro-batch), see masklearn.set_draws."""
        set_draws(self.layers, annealing, step, total, **sample)

    def dense(self) -> AbstractContextManager[None]:
        """Inside, the model runs with its dense weights: a teacher in the same memory."""
        return dense(self.layers)

    def collect(self) -> None:
        """After a backward pass: the optimiser has what it needs. Here the layers have told it themselves."""

    @contextmanager
    def running(self, *, recompute: bool) -> Iterator[None]:
        """Inside, a block computes the masks of its fused experts once a forward, and with `recompute` keeps nothing
        but its input for backward (activation checkpointing).
        """
        blocks = [self.model.get_submodule(name) for name in block_names(self.model, self.source.family)]
        with wrapping(blocks, lambda forward: _wrapped(forward, recompute)):
            yield

    def restore(self) -> None:
        """The model as it came: its own modules and dense weights."""
        for path, module in self._originals.items():
            self.model.set_submodule(path, module)
        for target in self.targets:
            matrix = target.matrices[0]
            if target.in_place and parametrize.is_parametrized(matrix.module, matrix.parameter):
                parametrize.remove_parametrizations(matrix.module, matrix.parameter, leave_parametrized=False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trained[name])
        self.model.train(self._was_training)


def _wrapped(forward: Any, recompute: bool) -> Any:
    def cached(*args: Any, **kwargs: Any) -> Any:
        # An expert loop reads the parameter once an expert; within one forward the mask is the same.
        with parametrize.cached():
            return forward(*args, **kwargs)

    return recomputed(cached) if recompute else cached
