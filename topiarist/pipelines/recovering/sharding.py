"""A recovery whose student and teacher FSDP2 divides: every process has its rows of weights, masters, moments and masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from topiarist.core.errors import UnsupportedModel
from topiarist.models.opened import ObjectModel, OpenedModel, shell
from topiarist.pipelines.recovering.inputs import check_dense, held_masks
from topiarist.pipelines.recovering.options import RecoverOptions
from topiarist.pipelines.recovering.trainee import Trainee, in_float32
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.sharding import ShardedWeights, rows_of, shard

HALVES = (torch.bfloat16, torch.float16)


class Divided:
    """A student and its teacher, divided among the processes, and what is trained of the student.

    The main process reads one model after the other and hands out its rows; the others never hold a whole one. Raises
    what reading the models raises, in every process.
    """

    def __init__(
        self, opened: OpenedModel, dense: OpenedModel | None, options: RecoverOptions, processes: Processes
    ) -> None:
        self.opened, self.processes = opened, processes
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        wide = in_float32(options.dtype, device)
        self.teacher: ObjectModel | None = None
        if dense is not None:  # first: what the student needs beside its weights is not there yet
            self.teacher = self._whole(dense, check_dense)
            if wide:
                _widen(self.teacher.model)
            shard(self.teacher.model, self.teacher.block_names, processes)
        names: list[str] = []
        self.student = self._whole(opened, lambda model: names.extend(held_masks(model)))
        names = processes.on_main(lambda: names)
        parameters = dict(self.student.model.named_parameters())
        stored = processes.on_main(lambda: {name: parameter.dtype for name, parameter in parameters.items()})
        if not wide and len(kinds := {dtype for dtype in stored.values() if dtype.is_floating_point}) > 1:
            found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in kinds))
            raise UnsupportedModel(
                f"{opened.name} has weights in {found}, and shards are gathered in one dtype: use --dtype float32, or leave "
                "--shard out"
            )
        computes = None if wide else next((dtype for dtype in stored.values() if dtype in HALVES), None)
        _widen(self.student.model)
        shard(self.student.model, self.student.block_names, processes, computes=computes)
        parameters = dict(self.student.model.named_parameters())
        masks = {name: (rows_of(parameters[name]) != 0).detach() for name in names}  # of this process' rows
        self.trainee = Trainee(self.student, masks, options, weights=partial(ShardedWeights, stored=stored))

    def _whole(self, opened: OpenedModel, check: Callable[[ObjectModel], Any]) -> ObjectModel:
        """A model that the main process has read and checked; in the others its modules alone."""
        found: list[ObjectModel] = []

        def read() -> None:
            found.append(opened.whole())
            check(found[0])

        self.processes.on_main(read)
        return found[0] if found else shell(opened)

    @property
    def held(self) -> int:
        """Zeros that are held, in all processes."""
        return int(self.processes.all_reduce(torch.tensor(self.trainee.held)))

    def result(self) -> tuple[Any, dict[str, nn.Parameter]]:
        """(a model without memory but for what was trained, its trained parameters by name) in the main process.

        All processes must call it; the others get (None, {}).
        """
        weights = self.trainee.weights
        assert isinstance(weights, ShardedWeights)
        values = weights.whole(self.processes)
        if not self.processes.is_main:
            return None, {}
        model = shell(self.opened).model
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
        model.tie_weights()  # what was one parameter is one again
        return model, {name: model.get_parameter(name) for name in values}


def _widen(model: nn.Module) -> None:
    """Put 16-bit parameters into fp32."""
    for parameter in model.parameters():
        if parameter.dtype in HALVES:
            parameter.data = parameter.data.float()
