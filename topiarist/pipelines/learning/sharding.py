"""Learned masks on a model that FSDP2 shards: every process holds its rows of each weight and of its logits.

What FSDP gathers for a forward is W * M itself: each process draws the mask of its own rows from its own logits (noise
is keyed by the global row), writes the product into its shard of the parameter, and FSDP moves 2 bytes a weight, as for
any model. Its reduce-scatter brings d loss / d(W * M) of those rows, summed in fp32, back to where the logits are. So
the logits never travel, and the arithmetic of a layer is the same as in one process.

Between steps a process holds 1 / processes of: the weight, W * M, logits and moments; 16 bytes a masked weight in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from topiarist.masklearn import Annealing, LearnedMask, Prior, kernels, relaxation_for, set_draws
from topiarist.models.families import block_names
from topiarist.models.opened import ObjectModel
from topiarist.pipelines.learning.masking import MaskedModel, Target
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.sharding import shard


class MaskShard(LearnedMask):
    """The learned mask of some rows of a weight; `parameter` is FSDP's shard of it and holds W * M."""

    def __init__(
        self, parameter: DTensor, rows: Tensor, transposed: bool, relaxation: Any, mask: Tensor, **options: Any
    ) -> None:
        super().__init__(relaxation, mask, **options)
        self.parameter = [parameter]  # in a list: it stays registered where it was
        self.rows, self.transposed = rows, transposed

    @property
    def matrix(self) -> Float[Tensor, "rows in"]:
        """The dense rows of this process."""
        return self.rows

    @torch.no_grad()
    def write(self, *, dense: bool = False) -> None:
        """Put the current W * M, or W, where FSDP gathers from."""
        rows = self.rows if dense else kernels.effective(self.relaxation, self.rows, self.logits, self.current_draw)
        place = _matrices(self.parameter[0].to_local(), self.transposed)
        place.copy_(rows.view(place.shape))

    def hand_over(self) -> None:
        """Give d loss / d(W * M) of these rows, which FSDP has summed, to the optimiser."""
        grad = self.parameter[0].grad
        if grad is None:
            return
        assert isinstance(grad, DTensor) and self.sink is not None and self.current_draw is not None
        self.sink(_matrices(grad.to_local(), self.transposed).reshape(self.rows.shape), self.current_draw)
        self.parameter[0].grad = None


def _matrices(tensor: Tensor, transposed: bool) -> Tensor:
    """A view whose last axes are (out, in), in whatever form the module stores them."""
    return tensor.transpose(-1, -2) if transposed else tensor


class ShardedModel(MaskedModel):
    """A model under FSDP2, one group a block, whose weights the main process has and hands out.

    The model is used up: what remains of it is the result's files.
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
        processes: Processes,
    ) -> None:
        self.model = source.model.requires_grad_(False).eval()
        self.source, self.targets, self.processes = source, list(wanted), processes
        kinds = [relaxation_for(target.pattern, relaxation) for target in wanted]
        turned = {id(t.parameter_itself) for t in wanted if t.transposed and t.matrices[0].expert is None}
        for target in wanted:
            target.parameter_itself.requires_grad_(True)
        self.mesh = shard(
            self.model,
            block_names(self.model, source.family),
            processes,
            # Always along the mask's rows: no group is cut, and logits are sharded like their weight.
            placement=lambda parameter: Shard(1) if id(parameter) in turned else Shard(0),
        )
        self.layers, self.prior_bits = [], []
        for index, (target, kind) in enumerate(zip(wanted, kinds, strict=True)):
            parameter = target.parameter_itself
            assert isinstance(parameter, DTensor)
            rows = _matrices(parameter.to_local().detach(), target.transposed).flatten(0, -2)
            rows = rows.clone(memory_format=torch.contiguous_format)
            first = processes.rank * len(rows)
            mask = target.rows(masks[target.name])[first : first + len(rows)]
            layer = MaskShard(
                parameter, rows, target.transposed, kind, mask.contiguous().to(rows.device),
                index=index, prior=prior, seed=seed, dtype=dtype, first_row=first,
            )  # fmt: skip
            self.layers.append(layer.to(rows.device))
            self.prior_bits.append(np.packbits(mask.contiguous().cpu().numpy(), axis=1))

    @property
    def device(self) -> torch.device:
        """Where this process's shards are."""
        return self.layers[0].matrix.device

    @property
    def sharded(self) -> bool:
        """True: every process holds some rows of every layer."""
        return True

    def set_draws(self, annealing: Annealing, step: int, total: int, **sample: int) -> None:
        """Set every layer's draw, and write its W * M where FSDP gathers from."""
        set_draws(self.layers, annealing, step, total, **sample)
        self._write()

    def _write(self, *, dense: bool = False) -> None:
        for layer in self.layers:
            assert isinstance(layer, MaskShard)
            layer.write(dense=dense)

    def train(self, mode: bool = True) -> None:
        """Soft masks (True), which the next `set_draws` writes, or hard ones, written at once."""
        super().train(mode)
        if not mode:
            self._write()

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside, FSDP gathers the dense weights; afterwards W * M stands in their place again."""
        self._write(dense=True)
        try:
            yield
        finally:
            self._write()  # before backward, which gathers again

    def collect(self) -> None:
        """After a backward pass: hand d loss / d(W * M), which FSDP has put in its shards, to the optimiser."""
        for layer in self.layers:
            assert isinstance(layer, MaskShard)
            layer.hand_over()

    def masks(self, bits: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Whole masks by parameter name, on the CPU, from the `bits` of every process's rows. All must call it."""
        whole = [self._whole(torch.from_numpy(b).to(self.device)).full_tensor().cpu().numpy() for b in bits]
        return super().masks(whole)

    def restore(self) -> None:
        """Nothing: FSDP's modules stay what they are."""

    def _whole(self, shard: Tensor) -> DTensor:
        return DTensor.from_local(shard, self.mesh, [Shard(0)])
