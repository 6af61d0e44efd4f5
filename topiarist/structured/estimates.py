"""Two estimates of what the loss loses with a unit, from one backward pass a window: fine (every weight) and coarse.

g  gradient of a window's mean loss      F  mean of g^2 over windows, the diagonal Fisher in the Hessian's place
e = g w - 1/2 F w^2   the loss to first and second order when a weight w goes; of a slice (a row of a matrix that makes
                      units, a column of the one that consumes them):
fine    sum over the slice of |e|            coarse    |sum over the slice of e|, where signs may cancel
A unit has the sum over its slices in all matrices that it is part of (LLM-Pruner, arXiv 2305.11627, its `element` and
`vector`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from topiarist.core.errors import NumericalError, TopiaristError
from topiarist.core.losses import next_token_loss
from topiarist.models.opened import at_rest
from topiarist.structured.methods import Task
from topiarist.structured.units import Part, UnitGroup

ORDERS = ("first", "second", "mix")


@dataclass
class Estimates:
    """Group key -> (windows, count); one row where the gradients of all windows were pooled."""

    fine: dict[str, Tensor]
    coarse: dict[str, Tensor]


def terms(
    gradient: Float[Tensor, "*shape"], weight: Float[Tensor, "*shape"], fisher: Float[Tensor, "*shape"], order: str
) -> Float[Tensor, "*shape"]:
    """e of every weight. first: g w. second: F w^2. mix: g w - 1/2 F w^2."""
    if order == "second":
        return fisher * weight.square()
    first = gradient * weight
    return first if order == "first" else first - 0.5 * fisher * weight.square()


def part_scores(
    e: Float[Tensor, "..."], part: Part, count: int
) -> tuple[Float[Tensor, " count"], Float[Tensor, " count"]]:
    """(fine, coarse) of the units of one part, from e in the shape of its parameter (of its one expert)."""
    others = [axis for axis in range(e.ndim) if axis != part.axis]
    stretch = e.narrow(part.axis, part.start, count * part.size)
    fine = stretch.abs().sum(others) if others else stretch.abs()
    coarse = stretch.sum(others).abs() if others else stretch.abs()
    return fine.view(count, part.size).sum(1), coarse.view(count, part.size).sum(1)


def taylor_estimates(
    task: Task, tokens: Int[Tensor, "num window"], *, order: str = "mix", pooled: bool = False
) -> Estimates:
    """Estimates from the windows `tokens` (num, window), one backward pass each.

    Gradients live one parameter at a time: hooks use them and free them as the backward pass makes them. pooled: g and F
    are means over all windows (LLM-Pruner), kept on the CPU: eight bytes a weight. Otherwise every window gives an
    estimate of its own, whose F is its own g^2, and nothing is kept but a number a unit.
    Raises NumericalError if a loss or an estimate is not finite.
    """
    if order not in ORDERS:
        raise TopiaristError(f"unknown order {order!r}; choose one of {', '.join(ORDERS)}")
    owners: dict[str, list[tuple[UnitGroup, Part]]] = {}
    for group in task.groups:
        for part in group.parts:
            owners.setdefault(part.parameter, []).append((group, part))
    rows: dict[str, list[Tensor]] = {"fine": [], "coarse": []}
    counts = [group.count for group in task.groups]
    starts = {group.key: sum(counts[:i]) for i, group in enumerate(task.groups)}
    pool: dict[str, tuple[Tensor, Tensor]] = {}

    def reduce(name: str, parameter: Tensor, gradient: Tensor, fisher: Tensor) -> None:
        e = terms(gradient, parameter.detach().to(gradient), fisher, order)
        for group, part in owners[name]:
            scores = part_scores(e if part.expert is None else e[part.expert], part, group.count)
            for row, score in zip((rows["fine"][-1], rows["coarse"][-1]), scores, strict=True):
                row[starts[group.key] : starts[group.key] + group.count] += score.double().cpu()

    def use(name: str, parameter: Tensor) -> None:
        gradient = parameter.grad.float()  # pyright: ignore[reportOptionalMemberAccess]
        parameter.grad = None
        if pooled:
            gradient = gradient.cpu()
            if name not in pool:
                pool[name] = (torch.zeros_like(gradient), torch.zeros_like(gradient))
            pool[name][0].add_(gradient, alpha=1 / len(tokens))
            pool[name][1].addcmul_(gradient, gradient, value=1 / len(tokens))
        else:
            reduce(name, parameter, gradient, gradient.square())

    def new_row() -> None:
        for found in rows.values():
            found.append(torch.zeros(sum(counts), dtype=torch.float64))

    with _watched(task.model, owners, use), at_rest(task.model):
        for number, window in enumerate(tokens):
            task.progress("gradients", number, len(tokens))
            if not pooled:
                new_row()
            batch = window[None].to(task.model.device)
            loss = next_token_loss(task.model(input_ids=batch, use_cache=False).logits, batch)
            if not bool(torch.isfinite(loss)):
                raise NumericalError(
                    "the model's loss on the calibration text is not finite: check its weights and dtype"
                )
            loss.backward()
    if pooled:
        new_row()
        for name, (gradient, fisher) in pool.items():
            reduce(name, task.model.get_parameter(name).cpu(), gradient, fisher)
    found = {kind: torch.stack(values) for kind, values in rows.items()}
    if not all(bool(torch.isfinite(values).all()) for values in found.values()):
        raise NumericalError("a gradient is not finite: load the model in bfloat16 or float32")
    split = {kind: dict(zip(starts, values.split(counts, 1), strict=True)) for kind, values in found.items()}
    return Estimates(split["fine"], split["coarse"])


@contextmanager
def _watched(model: nn.Module, names: Any, use: Any) -> Iterator[None]:
    """Only the named parameters get gradients, each of which `use(name, parameter)` sees and frees."""
    wanted = dict.fromkeys(names)
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    hooks = []
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
            if name in wanted:
                hooks.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: use(name, p)))
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None if not required else parameter.grad
