"""A cut tried on a model's own weights: what was derived from shapes alone is used only if it computes the right thing.

The model without some units, as it would be stored, must have the logits of the whole model with those units switched
off. So a matrix that holds its units in another order, or a number that the forward takes from elsewhere, is seen
before anything is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.core.errors import UnsupportedModel
from topiarist.models.building import REFUSALS
from topiarist.models.hooks import hooked
from topiarist.structured.gates import gates
from topiarist.structured.layout import plan_layout, shrunk
from topiarist.structured.units import Kept, UnitGroup

TOKENS = 24
NEAR = {torch.float32: 1e-2, torch.float64: 1e-6}
"""How far logits may be off, as a share of what the cut changes; of shorter types a tenth."""


def proven(model: Any, candidates: Sequence[tuple[list[UnitGroup], int]], layout: str = "uniform") -> list[UnitGroup]:
    """The first candidate whose cut computes what the model does without the units that go.

    candidates: (groups, how many units of each stay). Raises UnsupportedModel if none does.
    """
    reasons: list[str] = []
    tried: list[list[UnitGroup]] = []
    for groups, after in candidates:
        if groups in tried:
            continue
        tried.append(groups)
        rng = torch.Generator().manual_seed(0)
        kept = {g.key: torch.randperm(g.count, generator=rng) < after for g in groups}
        error = _error(model, groups, kept, layout)
        if not error:
            return groups
        reasons.append(error)
    raise UnsupportedModel(
        f"{candidates[0][0][0].kind} of model type {model.config.model_type!r} cannot be cut: {reasons[0]}; choose other "
        "--units, or say where they lie in a row of topiarist.models.FAMILIES"
    )


def without_block(model: Any, groups: Sequence[UnitGroup], index: int) -> None:
    """Raise UnsupportedModel if the type has no config without this block, or computes something else by it.

    On a model without memory the config alone is asked.
    """
    kept = {group.key: torch.tensor([group.block != index]) for group in groups}
    if next(model.parameters()).is_meta:
        plan_layout(model, groups, kept, "uniform")  # raises, and says why
    elif error := _error(model, groups, kept, "uniform"):
        raise UnsupportedModel(
            f"block {index} of model type {model.config.model_type!r} cannot be cut: {error}; choose other --units"
        )


@torch.no_grad()
def _error(model: Any, groups: Sequence[UnitGroup], kept: Kept, layout: str) -> str:
    """Why the cut model is not the masked one; empty if it is."""
    device = next(model.parameters()).device
    tokens = (torch.arange(2 * TOKENS).reshape(2, TOKENS) * 7 % 89 + 5).to(device)
    try:
        plan = plan_layout(model, groups, kept, layout, max_waste=float("inf"))
        small = shrunk(model, groups, kept, plan)
        with _plain_norms(model, groups), _plain_norms(small, groups):
            dense = _logits(model, tokens)
            found = _logits(small, tokens)
            with gates(model, groups) as masks:
                masks.update({key: mask.float().to(device) for key, mask in kept.items()})
                expected = _logits(model, tokens)
    except UnsupportedModel as error:
        return str(error).partition(": choose")[0]
    except REFUSALS as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    if not bool(torch.isfinite(found).all()):
        return "its logits are not finite then"
    change = (expected - dense).norm()
    if not change:
        return "switching them off changes nothing: what they are is not known"
    share = float((found - expected).norm() / change)
    limit = NEAR.get(next(model.parameters()).dtype, 0.1)
    return "" if share < limit else f"without some, it computes something else (off by {share:.0%} of what they do)"


def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits.float()


@contextmanager
def _plain_norms(model: Any, groups: Sequence[UnitGroup]) -> Iterator[None]:
    """Norms that span all units only scale while inside: their statistics are no mistake of the cut."""
    names = {part.parameter for group in groups if not group.exact for part in group.parts[:-1]}
    with ExitStack() as stack:
        for path in {name.rpartition(".")[0] for name in names}:
            module = model.get_submodule(path)
            if "Norm" in type(module).__name__:
                stack.enter_context(hooked(module.register_forward_hook(_scaled)))
        yield


def _scaled(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
    return args[0] * module.get_parameter("weight")
