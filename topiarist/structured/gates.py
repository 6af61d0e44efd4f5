"""Masks that switch units off in a running model, through hooks: no modelling code is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.models.hooks import hooked, products_inside
from topiarist.models.opened import at_rest
from topiarist.structured.units import UnitGroup

Masks = dict[str, Tensor]
Multiply = Callable[[Tensor], Tensor]


@contextmanager
def gates(model: Any, groups: Sequence[UnitGroup]) -> Iterator[Masks]:
    """While inside, every forward multiplies by the masks that the yielded dict holds at that moment.

    It starts with ones, fp32, on the model's device. Replace or overwrite its tensors at will, shape (count,) or
    (batch, count); a mask that requires a gradient gets one. On leaving, the model is as it was.
    """
    device = next(model.parameters()).device
    masks: Masks = {group.key: torch.ones(group.count, device=device) for group in groups}
    consumers: dict[str, list[UnitGroup]] = {}
    for group in groups:
        consumers.setdefault(group.consumer, []).append(group)
    experts: dict[str, dict[Any, Callable[[Tensor], Tensor]]] = {}
    with ExitStack() as stack:
        for consumer, sharing in consumers.items():
            kind, first = sharing[0].kind, sharing[0]
            if kind == "experts":
                router = model.get_submodule(consumer)
                ordered = sorted(sharing, key=lambda g: g.start)
                stack.enter_context(products_inside(router, partial(_route, masks, ordered)))
                stack.enter_context(_never_chosen(model, masks, ordered))
            elif kind == "channels" and first.parts[-1].expert is not None:
                fused = consumer.rpartition(".")[0]
                experts.setdefault(fused, {})[first.parts[-1].expert] = partial(_multiply, masks, sharing)
            elif first.width:
                module = model.get_submodule(consumer)
                hook = partial(_gate_input, masks, sorted(sharing, key=lambda g: g.start))
                stack.enter_context(hooked(module.register_forward_pre_hook(hook)))
            else:
                module = model.get_submodule(consumer)
                hook = partial(_gate_output, masks, first)
                stack.enter_context(hooked(module.register_forward_hook(hook, with_kwargs=True)))
        for fused, multipliers in experts.items():
            path, _, parameter = fused.rpartition(".")
            module = model.get_submodule(path)
            stack.enter_context(products_inside(module, partial(_gate_expert, module, parameter, multipliers)))
        stack.enter_context(at_rest(model))
        yield masks


def _multiply(masks: Masks, groups: Sequence[UnitGroup], x: Tensor) -> Tensor:
    """x (..., width of the consumer's input) times its mask; of (batch, count) masks every sequence has its own."""
    columns = [masks[g.key].to(x.device, x.dtype).repeat_interleave(g.width, -1) for g in groups]
    mask = torch.cat(columns, -1)
    if mask.ndim == 1:
        return x * mask
    return (x.reshape(len(mask), -1, x.shape[-1]) * mask[:, None]).reshape(x.shape)


def _gate_input(masks: Masks, groups: Sequence[UnitGroup], _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_multiply(masks, groups, args[0]), *args[1:])


def _gate_output(
    masks: Masks, group: UnitGroup, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """A sublayer's output times its mask; of a block, what it adds to its input."""
    added = output[0] if isinstance(output, tuple) else output
    mask = masks[group.key].to(added.device, added.dtype)
    # (batch, tokens, width), or tokens of all sequences in one row (OPT)
    mask = mask if mask.ndim == 1 else mask.repeat_interleave(added.shape[:-1].numel() // len(mask), 0)
    mask = mask if mask.ndim == 1 else mask.reshape(*added.shape[:-1], 1)
    if group.kind == "block":
        hidden = args[0] if args else kwargs["hidden_states"]
        added = hidden + mask * (added - hidden)
    else:
        added = added * mask
    return (added, *output[1:]) if isinstance(output, tuple) else added


def _route(masks: Masks, groups: Sequence[UnitGroup], x: Tensor, weight: Tensor, multiply: Multiply) -> Tensor:
    """The router's logits plus log mask: probabilities times the mask, normalised again."""
    logits = multiply(x)
    if logits.shape[-1] != sum(g.count for g in groups):  # another product of the router than the one of its logits
        return logits
    mask = torch.cat([masks[g.key] for g in groups], -1)
    added = mask.to(logits.device).log().to(logits.dtype)
    if mask.ndim == 1:
        return logits + added
    return logits + added.repeat_interleave(logits.shape[:-1].numel() // len(added), 0).reshape(logits.shape)


@contextmanager
def _never_chosen(model: Any, masks: Masks, groups: Sequence[UnitGroup]) -> Iterator[None]:
    """What is added to the scores of experts is -inf where their mask is 0: a sigmoid of -inf alone is a score as well."""
    parts = {part.parameter: part for group in groups for part in (*group.parts, *group.buffers)}
    tensors = {name: model.get_buffer(name) if _is_buffer(model, name) else model.get_parameter(name) for name in parts}
    vectors = {name: tensor for name, tensor in tensors.items() if tensor.numel() == tensor.shape[parts[name].axis]}
    mixer = model.get_submodule(groups[0].parts[0].parameter.rsplit(".", 2)[0])

    def enter(*_: Any) -> None:
        off = torch.cat([masks[g.key].detach() for g in groups], -1) == 0
        for tensor in vectors.values():
            if off.ndim == 1 and bool(off.any()):
                before.append((tensor, tensor.data))
                tensor.data = tensor.data.masked_fill(off.to(tensor.device).reshape(tensor.shape), float("-inf"))

    def leave(*_: Any) -> None:
        while before:
            tensor, data = before.pop()
            tensor.data = data

    before: list[tuple[Tensor, Tensor]] = []
    with hooked(mixer.register_forward_pre_hook(enter), mixer.register_forward_hook(leave, always_call=True)):
        yield


def _is_buffer(model: Any, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(path)._buffers


def _gate_expert(
    module: Any,
    parameter: str,
    multipliers: dict[int, Callable[[Tensor], Tensor]],
    x: Tensor,
    weight: Tensor,
    multiply: Multiply,
) -> Tensor:
    """The product, of the gated input if `weight` is an expert's slice of the fused parameter, or all of it (x is then
    (expert, tokens, in)).
    """
    fused = getattr(module, parameter)
    offset = weight.data_ptr() - fused.data_ptr()
    number, rest = divmod(offset, fused.stride(0) * fused.element_size())
    if rest or not 0 <= number < len(fused):
        return multiply(x)
    if weight.ndim == x.ndim == 3:
        return multiply(torch.stack([multipliers[e](rows) for e, rows in enumerate(x)]))
    return multiply(multipliers[number](x))
