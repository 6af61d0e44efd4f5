"""Scores from one look at the activations of the dense model: Wanda-sp, FLAP, block influence.

No unit's score depends on which others go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from topiarist.core.errors import NumericalError
from topiarist.core.options import options
from topiarist.models.derive import family_of
from topiarist.models.families import Matrix, matrices_of
from topiarist.models.hooks import hooked, watch_inputs
from topiarist.models.opened import at_rest
from topiarist.structured.methods import Method, Scores, Task
from topiarist.structured.units import COLUMN_KINDS, Kept, UnitGroup


def consumers(model: Any, groups: Sequence[UnitGroup]) -> dict[str, Matrix]:
    """The matrix that consumes the units of each group, by its full name."""
    family, wanted, found = family_of(model), {group.consumer for group in groups}, {}
    for index, block in enumerate(model.get_submodule(family.blocks)):
        for matrix in matrices_of(block, family):
            name = f"{family.blocks}.{index}.{matrix.name}"
            if name in wanted:
                found[name] = matrix
    return found


def by_unit(columns: Float[Tensor, "*rows in"], group: UnitGroup) -> Float[Tensor, "*rows count width"]:
    """The consumer's columns that belong to each unit."""
    chosen = columns[..., group.start : group.start + group.count * group.width]
    return chosen.reshape(*columns.shape[:-1], group.count, group.width)


class Moments:
    """Mean and variance of every input channel over tokens. Sums are of the distance to the first batch's mean, in fp64."""

    def __init__(self) -> None:
        self.tokens = 0
        self.shift = self.first = self.second = torch.empty(0)

    def add(self, x: Float[Tensor, "*batch in"]) -> None:
        """Count the tokens of one batch."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not self.tokens:
            self.shift = x.mean(0) if len(x) else torch.zeros(x.shape[-1], device=x.device)
            self.first = torch.zeros_like(self.shift, dtype=torch.float64)
            self.second = torch.zeros_like(self.first)
        self.tokens += len(x)
        x = x - self.shift
        self.first += x.sum(0, dtype=torch.float64)
        self.second += x.square().sum(0, dtype=torch.float64)

    @property
    def mean(self) -> Float[Tensor, " in"]:
        """Mean of every channel, fp64."""
        return self.shift.double() + self.first / max(self.tokens, 1)

    @property
    def variance(self) -> Float[Tensor, " in"]:
        """Unbiased; 0 for a single token."""
        spread = self.second - self.first.square() / max(self.tokens, 1)
        return spread.clamp_min(0) / max(self.tokens - 1, 1)

    @property
    def energy(self) -> Float[Tensor, " in"]:
        """Mean square: the squared norm ||x_j||^2 a token."""
        return self.variance * (max(self.tokens - 1, 1) / max(self.tokens, 1)) + self.mean.square()


@torch.inference_mode()
def input_moments(task: Task, matrices: Mapping[str, Matrix]) -> dict[str, Moments]:
    """Moments of the inputs of `matrices` over all calibration tokens, in one pass of the dense model.

    Raises NumericalError, naming the matrix, if an input is not finite.
    """
    names = {matrix: name for name, matrix in matrices.items()}
    moments = {name: Moments() for name in matrices}
    batches = task.tokens.split(task.batch_size)
    with (
        watch_inputs(list(names), lambda matrix, x: moments[names[matrix]].add(x)),
        at_rest(task.model),
    ):
        for number, batch in enumerate(batches):
            task.progress("looking at activations", number, len(batches))
            task.model(input_ids=batch.to(task.model.device), use_cache=False)
    for name, moment in moments.items():
        if moment.tokens and not bool(torch.isfinite(moment.second).all()):
            raise NumericalError(f"NaN or Inf in the input of {name}: check the model's weights and dtype")
        if not moment.tokens:  # an expert that no token reached
            moment.add(torch.zeros(1, matrices[name].shape[1], device=task.model.device))
    return moments


@options
class WandaSP(Method):
    """Wanda for structures: the mean over output rows of |W| ||x_j||, summed over a unit's columns of its consumer.

    Choose it when seconds matter; its scores compare within a layer, so use it with the same count in every layer.
    OpenedModel: Gao et al.'s and FLAP's code (Wanda: arXiv 2306.11695). Cost: one pass over the text.

    Differs from their code in: 1. activations of the dense model, not of one whose earlier layers are already cut.
    """

    kinds: ClassVar[tuple[str, ...]] = COLUMN_KINDS
    scope: ClassVar[str] = "per_layer"

    def scores(self, task: Task) -> Scores:
        """The metric of every unit, from one pass over the text."""
        matrices = consumers(task.model, task.groups)
        moments = input_moments(task, matrices)
        scores: Scores = {}
        for group in task.groups:
            weight = matrices[group.consumer].weight.float().abs().mean(0)
            scores[group.key] = by_unit(weight * moments[group.consumer].energy.sqrt(), group).sum(-1)
        return scores


@options
class Flap(Method):
    """Fluctuation: Var(x_j) ||W_j||^2, the error left when input j is replaced by its mean (An et al., arXiv 2312.11983).

    Standardised within every layer, so that layers compare; the mean of the removed inputs goes into the consumer's
    bias where the family can hold one (`biases`). Choose it when nothing may be trained and layers may differ in
    size. Cost: one pass over the text, and one more for the biases.

    Differs from the authors' code in: 1. the variance over all tokens, not a running one over sequences. 2. The
    standardised channel values of a head are averaged over all its KV group's columns, so that grouped queries work.
    """

    kinds: ClassVar[tuple[str, ...]] = COLUMN_KINDS
    scope: ClassVar[str] = "parameters"
    standardise: bool = True
    """Off: raw errors, the WIFN ablation's neighbour that the paper calls unstable across layers."""

    def scores(self, task: Task) -> Scores:
        """The mean fluctuation of every unit's columns, standardised in its layer unless told otherwise."""
        matrices = consumers(task.model, task.groups)
        moments = input_moments(task, matrices)
        columns: dict[str, Tensor] = {}
        # The KV groups of a layer are several groups of heads, its experts of channels.
        layers: dict[str, list[str]] = {}
        for group in task.groups:
            energy = matrices[group.consumer].weight.double().square().sum(0)
            columns[group.key] = by_unit(energy * moments[group.consumer].variance, group)
            layers.setdefault(group.tie, []).append(group.key)
        for keys in layers.values() if self.standardise else ():
            together = torch.cat([columns[key].flatten() for key in keys])
            spread = together.std(correction=0)
            for key in keys:
                columns[key] = (columns[key] - together.mean()) / torch.where(spread > 0, spread, 1.0)
        return {key: those.mean(-1) for key, those in columns.items()}

    @torch.no_grad()
    def biases(self, task: Task, kept: Kept) -> dict[str, Tensor]:
        """W_removed @ mean of the removed inputs (section 3.4), fp64. Looks at the text a second time."""
        matrices = consumers(task.model, task.groups)
        moments = input_moments(task, matrices)
        grown: dict[str, Tensor] = {}
        for group in task.groups:
            if bool(kept[group.key].all()):  # no bias at all: a config would give one to every matrix beside it
                continue
            weight = by_unit(matrices[group.consumer].weight.double(), group)
            mean = by_unit(moments[group.consumer].mean, group)
            cut = ~kept[group.key].to(weight.device)
            added = (weight[:, cut] * mean[cut]).sum((1, 2))
            grown[group.consumer] = grown.get(group.consumer, 0) + added
        return grown


@options
class BlockInfluence(Method):
    """1 - mean cosine between the hidden states before and after (ShortGPT, arXiv 2403.03853, eq. 1); for attention and
    feed-forward sublayers, before and after what they add. Cost: one pass over the text.
    """

    kinds: ClassVar[tuple[str, ...]] = ("block", "ffn", "attention")

    @torch.inference_mode()
    def scores(self, task: Task) -> Scores:
        """1 - mean cosine over all tokens for every block or sublayer, one number each."""
        model = task.model
        blocks = model.get_submodule(family_of(model).blocks)
        scale = float(getattr(model.config, "residual_multiplier", 1.0))  # Granite scales what a sublayer adds
        totals = {group.key: 0.0 for group in task.groups}
        entered: dict[int, Tensor] = {}
        added: dict[str, Tensor] = {}
        hooks = []

        def enter(index: int, args: Any, kwargs: Any) -> None:
            entered[index] = args[0] if args else kwargs["hidden_states"]

        def leave(group: UnitGroup, output: Any) -> None:
            before, after = entered[group.block], _first(output)
            if group.kind != "block":
                change = scale * added[group.key].reshape(before.shape)
                before, after = (before, before + change) if group.kind == "attention" else (after - change, after)
            alike = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            totals[group.key] += float((1 - alike).double().sum())

        for group in task.groups:
            block = blocks[group.block]
            hooks.append(
                block.register_forward_pre_hook(lambda _, a, k, i=group.block: enter(i, a, k), with_kwargs=True)
            )
            if group.kind != "block":
                module = model.get_submodule(group.consumer)
                hooks.append(
                    module.register_forward_hook(lambda _, __, out, key=group.key: added.update({key: _first(out)}))
                )
            hooks.append(block.register_forward_hook(lambda _, __, out, group=group: leave(group, out)))
        batches = task.tokens.split(task.batch_size)
        with hooked(*hooks):
            for number, batch in enumerate(batches):
                task.progress("looking at hidden states", number, len(batches))
                model(input_ids=batch.to(task.model.device), use_cache=False)
        return {key: torch.tensor([total / task.tokens.numel()]) for key, total in totals.items()}


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
