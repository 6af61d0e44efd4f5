"""Mixtures of experts as seen from the modules of a block: the experts, their router, and what else has an entry for each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_EXPERTS = re.compile(r"xpert")
_SHARED = re.compile(r"shared", re.IGNORECASE)
_COUNT = re.compile(r"((num|n)_(local_|routed_)?|moe_num_)experts")
_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")


@dataclass(frozen=True)
class Mixture:
    """The routed experts of one block. Names are relative to the block."""

    module: str
    """The module of all experts: takes tokens, the experts of each and their weights, and gives the weighted sum."""
    count: int
    stacked: tuple[str, ...]
    """Its parameters (expert, ...), matrices and biases."""
    router: str = ""
    """The module that chooses the experts of a token."""
    per_token: int = 1
    """Experts of a token."""
    groups: int = 1
    """Stretches of equal length that experts lie in; a token goes to experts of few of them (DeepSeek-V3)."""
    groups_per_token: int = 1
    routed: tuple[tuple[str, int], ...] = ()
    """Tensors of the router and beside it with an entry for each expert, buffers too, and the axis of these entries."""
    why: str = ""
    """What keeps experts from being cut; empty where nothing does."""

    @property
    def down(self) -> list[str]:
        """Those of `stacked` that make the output: zeros in them switch the experts off."""
        return [name for name in self.stacked if "down" in name.rpartition(".")[2]]

    @property
    def vectors(self) -> list[str]:
        """Those of `routed` that hold one number for each expert."""
        return [name for name, _ in self.routed if name.rpartition(".")[2] != "weight"]

    @property
    def floor(self) -> int:
        """Experts that must stay in each of the `groups`: enough for a token, and two where groups are ranked by two."""
        enough = -(-self.per_token // self.groups_per_token)
        return enough if self.groups == 1 else max(2, enough)


def mixture_of(block: nn.Module) -> Mixture | None:
    """The routed experts of a block, None for a block that has none; of parameters without memory too."""
    found = [name for name, module in block.named_modules() if _holds_experts(name, module)]
    if not found:
        return _separate(block)
    name, experts = found[0], block.get_submodule(found[0])
    stacked = tuple(f"{name}.{key}" for key, parameter in experts.named_parameters(recurse=False))
    sizes = {len(parameter) for parameter in experts.parameters(recurse=False)}
    count = min(sizes)
    if len(found) > 1 or len(sizes) > 1:
        why = (
            "the matrices of an expert lie in several modules"
            if len(found) > 1
            else "some of its experts have no weights"
        )
        return Mixture(name, count, stacked, why=why)
    around = name.rpartition(".")[0]
    mixer = block.get_submodule(around)
    routers = [
        path
        for path, module in mixer.named_children()
        if f"{around}.{path}".lstrip(".") != name
        and not _SHARED.search(path)
        and any(_axis(t, count) is not None and t.ndim == 2 for t in _tensors(module).values())
    ]
    if len(routers) != 1:
        return Mixture(
            name, count, stacked, why=f"no router with one output for each of {count} experts is seen beside them"
        )
    router = mixer.get_submodule(routers[0])
    tensors = {f"{routers[0]}.{key}": tensor for key, tensor in _tensors(router).items()}
    tensors |= {key: tensor for key, tensor in _tensors(mixer, recurse=False).items()}
    if table := next((key for key, tensor in tensors.items() if not tensor.is_floating_point()), None):
        return Mixture(name, count, stacked, why=f"{table} assigns experts to tokens by a table")
    routed = {key: axis for key, tensor in tensors.items() if (axis := _axis(tensor, count)) is not None}
    prefix = f"{around}." if around else ""
    groups = int(getattr(router, "num_group", None) or 1)
    return Mixture(
        name,
        count,
        stacked,
        prefix + routers[0],
        int(getattr(router, "top_k", None) or getattr(mixer, "top_k", None) or 1),
        groups,
        int(getattr(router, "topk_group", None) or 1) if groups > 1 else 1,
        tuple((prefix + key, axis) for key, axis in routed.items()),
        ""
        if _takes_choices(experts)
        else "its experts are not called with the experts of each token and their weights",
    )


@dataclass(frozen=True)
class Choices:
    """What the module of all experts is called with."""

    hidden: Float[Tensor, "tokens width"]
    experts: Int[Tensor, "tokens per_token"]
    weights: Float[Tensor, "tokens per_token"]
    """What the output of each expert is multiplied by."""

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Choices:
        """The call that a hook saw."""
        hidden, *others = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        experts = next(value for value in others if not value.is_floating_point())
        weights = next(value for value in others if value.is_floating_point() and value.shape == experts.shape)
        return cls(hidden.reshape(-1, hidden.shape[-1]), experts, weights)

    def of_expert(self, expert: int) -> tuple[Float[Tensor, "routed width"], Float[Tensor, " routed"]]:
        """The tokens that go to one expert, and its weight for each."""
        token, place = (self.experts == expert).nonzero(as_tuple=True)
        return self.hidden[token], self.weights[token, place]


def expert_output(experts: Any, expert: int, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
    """What one expert makes of these tokens, by the module's own forward, at weight 1; no hook sees it."""
    chosen = torch.full((len(hidden), 1), expert, device=hidden.device)
    return experts.forward(hidden, chosen, torch.ones(len(hidden), 1, device=hidden.device, dtype=hidden.dtype))


def count_fields(config: Any, count: int) -> list[str]:
    """What a config calls the number of routed experts: every field of such a name that holds it."""
    return [key for key, value in config.to_dict().items() if _COUNT.fullmatch(key) and value == count]


def width_field(config: Any, width: int) -> str | None:
    """What a config calls the channels of an expert: the first field of such a name that holds their number."""
    return next((key for key in _WIDTHS if getattr(config, key, None) == width), None)


def _holds_experts(name: str, module: nn.Module) -> bool:
    """Whether all parameters of a module itself are (expert, ...), some of them matrices, and it is no shared expert."""
    parameters = dict(module.named_parameters(recurse=False))
    routed = hasattr(module, "has_gate") or _EXPERTS.search(f"{name} {type(module).__name__}")
    return bool(routed) and not _SHARED.search(name) and any(p.ndim == 3 for p in parameters.values())


def _separate(block: nn.Module) -> Mixture | None:
    for name, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and _EXPERTS.search(name) and not _SHARED.search(name):
            return Mixture(name, len(module), (), why="its experts are modules of their own, not stacked matrices")
    return None


def _tensors(module: nn.Module, recurse: bool = True) -> Mapping[str, Tensor]:
    """Parameters and stored buffers."""

    def all_of() -> Iterator[tuple[str, Tensor]]:
        yield from module.named_parameters(recurse=recurse)
        stored = module.state_dict(keep_vars=True)
        yield from ((name, b) for name, b in module.named_buffers(recurse=recurse) if name in stored)

    return dict(all_of())


def _axis(tensor: Tensor, count: int) -> int | None:
    """The axis with an entry for each expert: the first of vectors and matrices, the last of a vector kept as a row."""
    if tensor.ndim and tensor.shape[0] == count:
        return 0
    return 1 if tensor.ndim == 2 and tuple(tensor.shape) == (1, count) else None


def _takes_choices(experts: nn.Module) -> bool:
    code = type(experts).forward.__code__
    return code.co_argcount >= 4 or hasattr(type(experts).forward, "__wrapped__")
