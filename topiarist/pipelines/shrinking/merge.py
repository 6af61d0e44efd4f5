"""The walk that merges experts that go into experts that stay, block by block, on inputs from blocks already merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topiarist.models.hooks import EndForward, hooked, products_inside, watch_inputs
from topiarist.models.mixtures import Choices, Mixture, expert_output, mixture_of
from topiarist.models.opened import ObjectModel, at_rest
from topiarist.pipelines.common.stream import BlockStream
from topiarist.structured import Kept, UnitGroup, gates
from topiarist.structured.merging import (
    assigned,
    channels_of,
    likeness,
    matching,
    merged,
    read_expert,
    write_expert,
)
from topiarist.structured.reap import Contributions, Reap, layers_of

Merged = tuple[dict[str, Tensor], dict[int, list[int]]]
"""("number.tensor" of the experts that others were merged into, who took in whom)"""


@dataclass
class Sample:
    """What the experts of a layer were seen to do."""

    contributions: Contributions
    hidden: Float[Tensor, "tokens width"]
    logits: Float[Tensor, "tokens count"]


def merge_experts(
    source: ObjectModel,
    groups: Sequence[UnitGroup],
    kept: Kept,
    settings: Reap,
    tokens: Int[Tensor, "num window"],
    *,
    batch_size: int,
    load: Callable[[int], Merged | None],
    save: Callable[[int, Merged], None],
    progress: Callable[[str, int, int], None],
) -> dict[str, dict[str, list[int]]]:
    """Overwrite the experts that stay by the means of their groups (REAM, see merging.py); who took in whom, by layer.

    load, save: what an earlier try finished, block by block.
    """
    layers = layers_of(list(groups))
    found: dict[str, dict[str, list[int]]] = {}
    count = len(source.block_names)
    with torch.no_grad(), at_rest(source.model), gates(source.model, groups) as masks:
        stream = BlockStream.of(source, tokens, batch_size=batch_size)
        for index in range(count):
            progress("merging experts", index, count)
            for name, own in layers.items():
                if own[0].block != index or all(bool(kept[group.key].all()) for group in own):
                    continue
                done = load(index)
                if done is None:
                    done = _merge_layer(stream, index, name, torch.cat([kept[group.key] for group in own]), settings)
                    save(index, done)
                _write(source.model.get_submodule(name), done[0])
                found[name] = {str(keeper): others for keeper, others in done[1].items()}
                masks.update({group.key: kept[group.key].to(masks[group.key]) for group in own})
            stream.advance(index, source.load(index))
        stream.close()
    progress("merging experts", count, count)
    return found


def _merge_layer(stream: BlockStream, index: int, name: str, kept: Tensor, settings: Reap) -> Merged:
    block, experts = stream.source.block(index), stream.source.model.get_submodule(name)
    mixture = mixture_of(block)
    assert mixture is not None
    seen = _look(stream, index, mixture, settings.merge_tokens)
    outputs = [expert_output(experts, e, seen.hidden) for e in range(len(kept))]
    score = seen.contributions.score
    taken = assigned(score, kept, likeness(outputs, seen.logits), settings.group_size)
    channels = channels_of(experts, stream.source.family.experts[mixture.down[0]])
    changed: dict[str, Tensor] = {}
    for keeper, others in taken.items():
        members = [read_expert(experts, keeper)]
        mine = _activations(stream, index, mixture, keeper, seen.hidden)
        for other in others:
            theirs = _activations(stream, index, mixture, other, seen.hidden)
            tensors = read_expert(experts, other)
            members.append(channels.permuted(tensors, matching(members[0], tensors, (mine, theirs), channels)))
        new = merged(members, score[[keeper, *others]])
        changed |= {f"{keeper}.{key}": tensor.contiguous() for key, tensor in new.items()}
    return changed, taken


def _look(stream: BlockStream, index: int, mixture: Mixture, tokens: int) -> Sample:
    """Run the block over the text: contributions of all tokens, inputs and router logits of evenly spread ones."""
    block = stream.source.load(index)
    contributions = Contributions(mixture.count)
    hidden: list[Tensor] = []
    logits: list[Tensor] = []

    def on_call(module: Any, args: Any, kwargs: Any) -> None:
        choices = Choices.of(args, kwargs)
        contributions.add(module, choices)
        hidden.append(choices.hidden)
        raise EndForward

    def on_product(x: Tensor, weight: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        out = multiply(x)
        if out.shape[-1] == mixture.count:
            logits.append(out.reshape(-1, mixture.count))
        return out

    experts, router = block.get_submodule(mixture.module), block.get_submodule(mixture.router)
    few = max(1, tokens // stream.num_batches)
    with (
        hooked(experts.register_forward_pre_hook(on_call, with_kwargs=True)),
        products_inside(router, on_product),
    ):
        for batch in range(stream.num_batches):
            with suppress(EndForward):
                stream.run_batch(index, block, batch)
            rows = torch.linspace(0, len(hidden[-1]) - 1, min(few, len(hidden[-1]))).long()
            hidden[-1], logits[-1] = hidden[-1][rows], logits[-1][rows]
    return Sample(contributions, torch.cat(hidden), torch.cat(logits))


def _activations(stream: BlockStream, index: int, mixture: Mixture, expert: int, hidden: Tensor) -> Tensor:
    """What the down projection of an expert reads for these tokens."""
    down = {f"{name}.{expert}" for name in mixture.down}
    matrices = [m for m in stream.source.matrices(index) if m.name in down]
    seen: list[Tensor] = []
    with watch_inputs(matrices, lambda _, x: seen.append(x)):
        expert_output(stream.source.block(index).get_submodule(mixture.module), expert, hidden)
    return seen[0]


def _write(experts: Any, changed: dict[str, Tensor]) -> None:
    by_expert: dict[int, dict[str, Tensor]] = {}
    for key, tensor in changed.items():
        expert, _, name = key.partition(".")
        by_expert.setdefault(int(expert), {})[name] = tensor
    for expert, tensors in by_expert.items():
        write_expert(experts, expert, tensors)
