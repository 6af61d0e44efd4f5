"""REAM: experts that go are averaged into experts that stay, channel by matching channel.

count  experts of a layer      s  REAP's score (count,)      y_j(x) = p_j(x) E_j(x)  output of expert j times its probability

1. The kept experts, best first, each take up to `group_size` of those that go and are most like it.
2. Likeness of two experts: the mean of the cosine of their outputs y and the cosine of their router logits, over tokens.
3. The channels of an expert that goes are put in the order of the kept one's that they match best: the assignment
   that maximises the sum of cosines of their activations and of their weights.
4. The kept expert becomes the mean of its group, weighted by s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topiarist.core.errors import UnsupportedModel
from topiarist.models.mixtures import expert_output

JOINED, INTERLEAVED = "joined", "interleaved"
"""How the rows of gate and up stand in one matrix: all of gate before all of up, or in turns."""
SAME = 0.02
"""Relative difference of two outputs of bf16 weights that are the same but for rounding."""


def likeness(
    outputs: Sequence[Float[Tensor, "tokens width"]], logits: Float[Tensor, "tokens count"]
) -> Float[Tensor, "count count"]:
    """Of every two experts of a layer, from -1 to 1. outputs: of every expert for the same tokens, at weight 1."""
    shares = logits.double().softmax(-1)
    gated = torch.stack([(share[:, None] * y.double()).flatten() for share, y in zip(shares.T, outputs, strict=True)])
    return (_cosines(gated, gated) + _cosines(logits.double().T, logits.double().T)) / 2


def assigned(
    score: Float[Tensor, " count"], kept: Bool[Tensor, " count"], likeness: Float[Tensor, "count count"], size: int
) -> dict[int, list[int]]:
    """{kept expert: experts that it takes in}. Best kept first, each up to `size` of the most like it that are left.

    What is left when every kept expert has taken `size` goes to the most like of all. Ties: the lower number.
    """
    stay = [int(e) for e in torch.argsort(-score, stable=True) if kept[e]]
    left = [int(e) for e in (~kept).nonzero().flatten()]
    taken: dict[int, list[int]] = {}
    for keeper in stay:
        nearest = sorted(left, key=lambda e: (-float(likeness[keeper, e]), e))[:size]
        taken[keeper] = nearest
        left = [e for e in left if e not in nearest]
    for expert in left:
        taken[max(stay, key=lambda keeper: float(likeness[keeper, expert]))].append(expert)
    return {keeper: experts for keeper, experts in taken.items() if experts}


@dataclass(frozen=True)
class Channels:
    """Where the channels of an expert lie in its tensors, all of one expert."""

    axes: Mapping[str, int]
    """Tensor -> the axis of its channels. Tensors that have none (a bias of the output) are left out."""
    order: str = JOINED

    def of(self, expert: Mapping[str, Tensor], channels: int) -> Float[Tensor, "channels numbers"]:
        """All numbers of each channel, gate, up and down."""
        rows = []
        for name, axis in self.axes.items():
            tensor = expert[name].double().movedim(axis, 0)
            halves = len(tensor) // channels
            split = (halves, channels) if self.order == JOINED or halves == 1 else (channels, halves)
            stacked = tensor.reshape(*split, -1)
            rows.append((stacked.transpose(0, 1) if split[0] == halves else stacked).reshape(channels, -1))
        return torch.cat(rows, 1)

    def permuted(self, expert: Mapping[str, Tensor], order: Int[Tensor, " channels"]) -> dict[str, Tensor]:
        """The expert with channel order[i] at place i: the same function."""
        channels, result = len(order), dict(expert)
        for name, axis in self.axes.items():
            halves = expert[name].shape[axis] // channels
            start = torch.arange(halves)
            if self.order == JOINED or halves == 1:
                rows = (start[:, None] * channels + order).flatten()
            else:
                rows = (order[:, None] * halves + start).flatten()
            result[name] = expert[name].index_select(axis, rows.to(expert[name].device))
        return result


def matching(
    kept: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    activations: tuple[Float[Tensor, "tokens channels"], Float[Tensor, "tokens channels"]],
    channels: Channels,
) -> Int[Tensor, " channels"]:
    """For every channel of the kept expert, the one of the other that takes its place: the best sum of cosines.

    activations: inputs of the down projection of both, for the same tokens.
    """
    from scipy.optimize import linear_sum_assignment

    mine, theirs = (x.double().T for x in activations)
    width = len(mine)
    alike = _cosines(mine, theirs) + _cosines(channels.of(kept, width), channels.of(other, width))
    return torch.from_numpy(linear_sum_assignment(alike.cpu().numpy(), maximize=True)[1])


def merged(experts: Sequence[Mapping[str, Tensor]], weights: Float[Tensor, " group"]) -> dict[str, Tensor]:
    """The mean of experts whose channels match, in the dtype that they have. Without any weight: the first as it is."""
    if not float(weights.sum()) > 0:
        return dict(experts[0])
    shares = (weights / weights.sum()).double()
    return {
        name: sum(share * expert[name].double() for share, expert in zip(shares, experts, strict=True)).to(tensor.dtype)  # pyright: ignore
        for name, tensor in experts[0].items()
    }


def _cosines(a: Float[Tensor, "n numbers"], b: Float[Tensor, "m numbers"]) -> Float[Tensor, "n m"]:
    return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T


def channels_of(experts: Any, transposed: bool) -> Channels:
    """Where the channels of one expert lie in the tensors of the module of all experts, tried on its first expert.

    transposed: whether its matrices are (expert, in, out). Raises UnsupportedModel if no known order leaves its output.
    """
    tensors = dict(experts.named_parameters(recurse=False))
    down = {name for name in tensors if "down" in name}
    axes = {
        name: int(not transposed) if name in down else int(transposed and tensor.ndim == 3)
        for name, tensor in tensors.items()
        if tensor.ndim == 3 or name not in down
    }
    matrix = next(tensors[name] for name in down if tensors[name].ndim == 3)
    width, inputs = matrix.shape[2 - transposed], matrix.shape[1 + transposed]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(8, inputs, generator=generator).to(matrix.device, matrix.dtype)
    before = {name: tensor.data[0].clone() for name, tensor in tensors.items()}
    expected = expert_output(experts, 0, probe)
    for order in (JOINED, INTERLEAVED):
        channels = Channels(axes, order)
        write_expert(experts, 0, channels.permuted(before, torch.arange(width).flip(0)))
        error = (expert_output(experts, 0, probe) - expected).abs().max() / expected.abs().max()
        write_expert(experts, 0, before)
        if bool(error < SAME):
            return channels
    raise UnsupportedModel(
        f"experts of {type(experts).__name__} keep their channels in an order that is not known: leave merge out"
    )


def read_expert(experts: Any, expert: int) -> dict[str, Tensor]:
    """The tensors of one expert, as they are stored."""
    return {name: tensor.detach()[expert] for name, tensor in experts.named_parameters(recurse=False)}


@torch.no_grad()
def write_expert(experts: Any, expert: int, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite one expert in place."""
    for name, tensor in tensors.items():
        getattr(experts, name).data[expert] = tensor
