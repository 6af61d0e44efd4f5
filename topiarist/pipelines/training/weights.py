"""Parameters that a model reads in its own dtype while they learn in fp32, some of them under a mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from topiarist.core.errors import NumericalError
from topiarist.pipelines.training.processes import Processes

STATE_BYTES = 12
"""Bytes a trained weight takes in a saved state: fp32 weights and Adam's two moments."""


class TrainedWeights:
    """Parameters of a module in training. The module runs as it is: it reads its own parameters, in their own dtype.

    The optimiser steps on fp32 masters: a copy, or the parameter itself where that is fp32. A pruned weight is zero in
    both and its gradient is cut, so Adam's moments stay zero there and its step leaves zero: the pattern is exact at
    every step. Resident bytes a weight: 2 + 16 (a bf16 parameter; master, gradient and two moments) or 4 + 12 (an fp32
    one, its own master); one more where there is a mask.

    parameters: by name, in the order in which the gradient's norm is summed. masks: by name, True where a weight is kept.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Bool[Tensor, "..."]] | None = None
    ) -> None:
        self.parameters = dict(parameters)
        self._kept: dict[str, Tensor] = {}
        self.masters: dict[str, nn.Parameter] = {}
        for name, parameter in self.parameters.items():
            if masks and name in masks:
                self._kept[name] = masks[name].to(parameter.device)
                # Multiplying by a mask would leave -0.0.
                parameter.data.masked_fill_(~self._kept[name], 0.0)
            own = parameter.dtype == torch.float32
            self.masters[name] = parameter if own else nn.Parameter(parameter.detach().float())

    @contextmanager
    def training(self, module: nn.Module) -> Iterator[None]:
        """Let gradients of these parameters, and of no others of `module`, flow to the masters while inside."""
        others = [p for p in module.parameters() if p.requires_grad]
        module.requires_grad_(False)
        handles = []
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(True)
            parameter.grad = None  # what lies there from before is of another loss
            if self.masters[name] is not parameter:
                handles.append(parameter.register_post_accumulate_grad_hook(self._hand_on(self.masters[name])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None
            for parameter in others:
                parameter.requires_grad_(True)

    @staticmethod
    def _hand_on(master: nn.Parameter):
        """A hook that adds a parameter's gradient to its master's, in fp32, and frees it."""

        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

        return hook

    def take_gradients(self) -> list[Tensor | None]:
        """The masters' gradients, which go from there; None where no token reached one."""
        grads = [master.grad for master in self.masters.values()]
        for master in self.masters.values():
            master.grad = None
        return grads

    def put_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Give the masters gradients in the form in which `take_gradients` gave them."""
        for master, grad in zip(self.masters.values(), grads, strict=True):
            master.grad = grad

    def finish_gradients(self, processes: Processes) -> None:
        """Sum the masters' gradients over processes, and cut them where weights are pruned."""
        for name, master in self.masters.items():
            if master.grad is None:  # no token reached it
                master.grad = torch.zeros_like(master)
            grad = self._over_processes(master.grad, processes)
            if name in self._kept:
                # Seven times as fast as a fill, and twice as fast as by bools; -0.0 does no harm here.
                grad.mul_(self._kept[name].view(torch.uint8))

    def typical_size(self, parameters: Iterable[Shaped[Tensor, "..."]], processes: Processes) -> float:
        """Median over the matrices among `parameters` of the root mean square of their weights, zeros included.

        With them a matrix is of about the size that it had before it was pruned, however many of its weights went.
        What a learning rate has to be seen against: Adam moves every weight by about the rate, and one model's weights are
        ten times as large as another's (compare Adafactor's relative step: Shazeer and Stern 2018, section 8). Raises
        NumericalError if all are zero.
        """
        matrices = (self.rows(parameter.detach()) for parameter in parameters if parameter.ndim > 1)
        sums = []
        for matrix in matrices:  # one at a time, for they may be made when they are asked for
            norm = torch.linalg.vector_norm(matrix, dtype=torch.float32)
            sums.append(torch.stack([norm.square(), torch.tensor(float(matrix.numel()), device=norm.device)]))
        squares, counts = self._over_rows(torch.stack(sums), processes).T
        if not squares.any():
            raise NumericalError("all weights of the model's matrices are zero, and training starts from what is there")
        return float((squares / counts)[squares > 0].sqrt().median())

    def rows(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """What this process holds of a parameter, or of what the optimiser has of it: here all of it."""
        return tensor

    def whole_norm(self, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The norm of all gradients, from what torch makes of them."""
        return norm

    def _over_processes(self, grad: Tensor, processes: Processes) -> Tensor:
        """Sum a gradient over processes, in place; what this process holds of it."""
        return processes.all_reduce(grad)

    def _over_rows(self, sums: Tensor, processes: Processes) -> Tensor:
        """Sums over the rows of all processes, from those over this one's."""
        return sums

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters to what the module reads."""
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)

    @property
    def resident_bytes(self) -> float:
        """Bytes in memory a weight, gradients and Adam's moments counted."""
        total = 0
        for name, master in self.masters.items():
            own = self.parameters[name]
            copies = own.nbytes + (0 if own is master else master.nbytes) + 3 * master.nbytes
            total += copies + (self._kept[name].nbytes if name in self._kept else 0)
        return total / sum(master.numel() for master in self.masters.values())

    def snapshot(self) -> dict[str, Shaped[Tensor, "..."]]:
        """Copy what the module reads now, by name."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def restore(self, values: Mapping[str, Shaped[Tensor, "..."]]) -> None:
        """Let the module read the values of a snapshot; the masters stay as they are."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(values[name])
