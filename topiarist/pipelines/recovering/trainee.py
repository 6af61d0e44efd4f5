"""A pruned model in memory and the weights of it that learn, all or through low-rank updates."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from topiarist.checkpoints.writing import SavedState
from topiarist.core.linalg import search_dtype
from topiarist.models.opened import ObjectModel, evaluated
from topiarist.pipelines.recovering.inputs import trained_parameters
from topiarist.pipelines.recovering.objective import Objective
from topiarist.pipelines.recovering.options import RecoverOptions
from topiarist.pipelines.recovering.scales import scales_of
from topiarist.pipelines.training.batches import Batches, micro_batch_size
from topiarist.pipelines.training.loop import RATE, FineTuning, History, Progress
from topiarist.pipelines.training.low_rank import RANK, LowRankUpdate, adding, updatable
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.recompute import blocks_of, recomputing
from topiarist.pipelines.training.sharded_state import ShardedState
from topiarist.pipelines.training.weights import TrainedWeights

SHORT, SHORT_RATE = 200_000, RATE / 2
"""Tokens below which `full` has this rate instead: a short training ends before a high rate's noise has fallen, a long one
goes further by it."""


class Trainee:
    """A pruned model in memory and the weights of it that learn.

    masks: by parameter name, True = kept; what they drop stays zero. weights: of what kind they are while they learn.
    """

    def __init__(
        self,
        model: ObjectModel,
        masks: Mapping[str, Bool[Tensor, "..."]],
        options: RecoverOptions,
        weights: Callable[..., TrainedWeights] = TrainedWeights,
    ) -> None:
        self.model, self.masks, self.options = model, masks, options
        self.notes: list[str] = []
        wanted = trained_parameters(model.model, options)
        self.scales = scales_of(model)
        """Of the weights that are quantised, by the weights' names."""
        self.changed: dict[str, nn.Parameter] = {n: p for n, p in wanted.items() if n not in self.scales}
        """Parameters of the model that are other ones at the end, by name."""
        self.updates: list[LowRankUpdate] = []
        parameters = self.changed | {scale.name: scale.log for name, scale in self.scales.items() if name in wanted}
        if options.kind == "lora":
            self._add_updates(masks, parameters)
        self.weights = weights(parameters, masks)

    def _add_updates(self, masks: Mapping[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
        named = {id(p): name for name, p in self.model.model.named_parameters()}
        generator = torch.Generator().manual_seed(self.options.seed)
        rank = self.options.rank or RANK
        places = {matrix: path for i, path in enumerate(self.model.block_names) for matrix in self.model.matrices(i)}
        taking, self.notes = updatable(self.model.model, list(places))
        for matrix in taking:
            parameter = getattr(matrix.module, matrix.parameter)
            name = named[id(parameter)]
            mask = masks.get(name)
            if mask is not None and matrix.transposed:
                mask = mask.T
            update = LowRankUpdate.of(matrix, rank, generator, mask)
            self.updates.append(update)
            self.changed[name] = parameter
            parameters |= {f"{places[matrix]}.{matrix.name} {part}": getattr(update, part) for part in "AB"}
        cut = sum(len(update.A) < rank for update in self.updates)
        if self.options.rank and cut:
            self.notes.append(
                f"rank {rank} is more than {cut} of the matrices have: their updates have the matrix's own"
            )
        for note in self.notes:
            warnings.warn(note, UserWarning, stacklevel=4)

    @property
    def held(self) -> int:
        """Zeros that are held."""
        return sum(int((~mask).sum()) for mask in self.masks.values())

    @property
    def count(self) -> int:
        """Weights that learn."""
        return sum(parameter.numel() for parameter in self.weights.parameters.values())

    def learning_rate(self, processes: Processes) -> float:
        """The peak that was asked for, or what suits the size of the model's weights."""
        options = self.options
        share = SHORT_RATE if options.kind == "full" and options.tokens < SHORT else RATE
        return options.learning_rate or share * self._typical_size(processes)

    def _typical_size(self, processes: Processes) -> float:
        on_grids = (scale.weight for scale in self.scales.values() if scale.name in self.weights.parameters)
        return self.weights.typical_size(itertools.chain(self.changed.values(), on_grids), processes)

    def _factors(self, processes: Processes) -> list[float] | None:
        """Of the learning rate: scales move by as large a share of themselves as weights of the typical size."""
        if not self.scales:
            return None
        logs = {scale.name for scale in self.scales.values()}
        size = self._typical_size(processes)
        return [1 / size if name in logs else 1.0 for name in self.weights.masters]

    def train(
        self,
        objective: Objective,
        rate: float,
        steps: int,
        sequences: int,
        processes: Processes,
        progress: Progress,
        state: SavedState | ShardedState,
    ) -> History:
        """Train the model in place, so many sequences a step; low-rank updates are merged at the end, whatever ends it."""
        options, module = self.options, self.model.model
        size = micro_batch_size(sequences // processes.size, options.batch_size)
        batches = Batches(len(objective.tokens), sequences, options.seed)
        tuning = FineTuning(
            steps=steps,
            learning_rate=rate,
            scales=self._factors(processes),
            warmup=round(options.warmup * steps),
            evaluate_every=options.steps_between_looks(steps, sequences, len(objective.held_out)),
            progress=progress,
            processes=processes,
            state=state,
        )
        with (
            evaluated(module, objective.teacher),
            adding(module, self.updates),
            recomputing(blocks_of(self.model), options.activation_checkpointing),
        ):
            try:
                return tuning.run(
                    module,
                    self.weights,
                    lambda step: batches.micro_batches(step, size),
                    objective.loss,
                    objective.held_out_loss,
                )
            finally:  # also where an error ends it: the best state is in the updates too
                for update in self.updates:
                    update.merge()


@contextmanager
def computing_in(dtype: str, *models: ObjectModel | None) -> Iterator[None]:
    """Let 16-bit models compute in fp32 inside, where `RecoverOptions.dtype` says so; their dtypes come back at the end."""
    stored: list[tuple[nn.Parameter, torch.dtype]] = []
    for model in models:
        if model is None or not in_float32(dtype, model.device):
            continue
        for parameter in model.model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                stored.append((parameter, parameter.dtype))
                parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, own in stored:
            parameter.data = parameter.data.to(own)


def in_float32(dtype: str, device: torch.device) -> bool:
    """Whether `RecoverOptions.dtype` lets 16-bit models compute in fp32 there."""
    return dtype == "float32" or (dtype == "auto" and device.type == "cpu" and search_dtype(device) == torch.float32)
