"""A model that FSDP2 divides among processes, one group a block, and the weights of it that are trained there.

The main process has the weights and hands them out. Between steps every process holds its rows of each parameter; in a
forward or backward pass one block at a time is whole. Not imported by what needs one process: what this needs of
torch.distributed takes a quarter of the time that the package takes to import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from topiarist.core.meter import give_back_at_once
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.weights import TrainedWeights


def shard(
    model: nn.Module,
    blocks: Iterable[str],
    processes: Processes,
    *,
    computes: torch.dtype | None = None,
    placement: Callable[[nn.Parameter], Shard | None] | None = None,
) -> DeviceMesh:
    """Divide a model among the processes, in place. All of them call it; only the main one's weights are looked at.

    blocks: names of the modules that are gathered one at a time. computes: dtype that parameters are gathered in; None:
    their own. placement: the axis along which a parameter is cut; by default the first. Gradients are summed in fp32 over
    the processes, as in one process they are over micro-batches.
    """
    give_back_at_once()
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (processes.size,))
    options: dict[str, Any] = {
        "mesh": mesh,
        # A model casts its own inputs, in one process as in many.
        "mp_policy": MixedPrecisionPolicy(param_dtype=computes, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "shard_placement_fn": placement,
        # The outermost group too: what a forward without gradients gathers would stay, and be old after a step.
        "reshard_after_forward": True,
    }
    whole = model.state_dict() if processes.is_main else {}
    for name in blocks:
        fully_shard(model.get_submodule(name), **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a sum, where FSDP would average
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            module.set_reduce_scatter_unused_params(True, recurse=False)
    _hand_out(model, whole, mesh, processes)
    return mesh


def _hand_out(model: nn.Module, whole: dict[str, Any], mesh: DeviceMesh, processes: Processes) -> None:
    """Give every process its rows of the main one's weights, `whole`; the others have none yet."""
    if not processes.is_main:
        buffers = dict(model.named_buffers())  # computed, not stored, so they are here
        model.to_empty(device=mesh.device_type)
        for name, buffer in buffers.items():
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = buffer.to(mesh.device_type)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)


def rows_of(parameter: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """This process' rows of a divided parameter, as a view."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


class ShardedWeights(TrainedWeights):
    """Trained parameters of a divided model. Every process holds and steps its own rows: fp32, their own masters.

    FSDP gathers them rounded to the dtype that the model reads, and brings the gradients back summed in fp32. 16 bytes a
    weight, divided by the number of processes; one more where there is a mask.

    masks: of this process' rows. stored: dtype of each parameter in the result, that its best state is kept in.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Bool[Tensor, "..."]],
        stored: Mapping[str, torch.dtype],
    ) -> None:
        super().__init__(parameters)
        self._stored = stored
        for name, mask in masks.items():
            if name in self.parameters:
                self._kept[name] = mask
                rows_of(self.parameters[name]).detach().masked_fill_(~mask, 0.0)

    def rows(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """This process' rows of a parameter, or of what the optimiser has of it."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def whole_norm(self, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The norm over the rows of all processes."""
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _over_processes(self, grad: Tensor, processes: Processes) -> Tensor:
        """The rows of a gradient: FSDP has summed it."""
        return self.rows(grad)

    def _over_rows(self, sums: Tensor, processes: Processes) -> Tensor:
        """Sums over the rows of all processes."""
        return processes.all_reduce(sums)

    def snapshot(self) -> dict[str, Tensor]:
        """Copy this process' rows of what the module reads now, by name."""
        found = {name: self.rows(parameter).detach() for name, parameter in self.parameters.items()}
        return {name: rows.to(self._stored[name], copy=True) for name, rows in found.items()}

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Let the module read this process' rows of a snapshot; the masters are the same tensors."""
        for name, parameter in self.parameters.items():
            self.rows(parameter).detach().copy_(values[name])

    def whole(self, processes: Processes) -> dict[str, Tensor]:
        """All parameters in the main process, on its host, in the dtypes of the result; {} in the others. All must call it."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            divided = parameter.detach()
            assert isinstance(divided, DTensor)
            value = divided.full_tensor()  # one at a time
            if processes.is_main:
                found[name] = value.to("cpu", self._stored[name])
        return found
