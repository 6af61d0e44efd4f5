"""The width of the residual stream as a unit: a channel of the hidden states, with all that writes it and all that reads it.

Which axes of which parameters hold one number a channel is asked of transformers: the model is built without memory from
its config with another `hidden_size`, and the axes that change are those. Norms and scaled embeddings depend on the
width by themselves; what they would do differently is made up for in their weights.

d  hidden size      k  channels that stay
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from topiarist.core.errors import UnsupportedModel
from topiarist.models.derive import structure_of
from topiarist.structured.configs import REFUSALS, head_dim, with_type
from topiarist.structured.units import HIDDEN, Part, UnitGroup


@dataclass(frozen=True)
class WidthConfig:
    """What states another hidden size."""

    config: Any
    parts: tuple[Part, ...]
    """Every axis of a parameter that holds one number a channel."""
    warnings: list[str]


def width_config(model: Any, channels: int) -> WidthConfig:
    """The config of the same model with `channels` hidden channels; the family's own, or of the type that it may be saved as.

    model: its parameters may be without memory. Raises UnsupportedModel, with transformers' reason, if no config states it.
    """
    family, reasons = structure_of(model), []
    for target in filter(None, (model.config.model_type, family.relabel)):
        try:
            config = _edited(model, channels, target)
            parts = _changed_axes(model, empty_model(config), channels)
        except REFUSALS as error:
            reasons.append(f"{target}: {' '.join(str(error).split())}")
            continue
        same = target == model.config.model_type
        note = (
            f"saved as {target}, which computes the same: a {model.config.model_type} config refuses width {channels}"
        )
        return WidthConfig(config, parts, [] if same else [note])
    raise UnsupportedModel(
        f"no {model.config.model_type} config can hold {channels} {HIDDEN} channels ({'; '.join(reasons)}): choose other "
        "--units"
    )


def _edited(model: Any, channels: int, target: str) -> Any:
    config = copy.deepcopy(model.config)
    config.hidden_size, config.head_dim = channels, head_dim(model, structure_of(model))
    return with_type(config, target)


def accepts(model: Any, channels: int) -> bool:
    """Whether a config with so many hidden channels can be made; whether the model is then the same, `width_config` sees."""
    for target in filter(None, (model.config.model_type, structure_of(model).relabel)):
        with suppress(*REFUSALS):
            _edited(model, channels, target)
            return True
    return False


def hidden_group(model: Any) -> UnitGroup:
    """The hidden channels of a model as one group of units. Raises UnsupportedModel if no fewer can be stated."""
    width, heads = int(model.config.hidden_size), int(model.config.num_attention_heads)
    found = width_config(model, width - (heads if width % heads == 0 else 1))
    norms = residual_norms(model, found.parts)
    shapes = {name: parameter.shape for name, parameter in _parameters(model).items()}
    cost = sum(shapes[part.parameter].numel() // width for part in found.parts)
    root = structure_of(model).blocks.rpartition(".")[0]
    key = f"{root}:{HIDDEN}"
    exact = not any(norm_of(module).centres for module in norms.values())
    return UnitGroup(key, HIDDEN, -1, width, cost, root, 0, 0, found.parts, f":{HIDDEN}", key, exact=exact)


def empty_model(config: Any) -> Any:
    """A causal language model without memory."""
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


def _changed_axes(model: Any, narrow: Any, channels: int) -> tuple[Part, ...]:
    """The axes that went from the hidden size to `channels`. Raises ValueError for a parameter that changed otherwise."""
    width, found = int(model.config.hidden_size), []
    before, after = _parameters(model), _parameters(narrow)
    for name, parameter in before.items():
        shape = after[name].shape if name in after else None
        if shape is None or len(shape) != parameter.ndim:
            raise ValueError(f"{name} would be {shape and tuple(shape)}, not {tuple(parameter.shape)}")
        axes = [axis for axis in range(len(shape)) if shape[axis] != parameter.shape[axis]]
        if len(axes) > 1 or any((parameter.shape[axis], shape[axis]) != (width, channels) for axis in axes):
            raise ValueError(f"{name} would be {tuple(shape)}: more than its side of the hidden states changes")
        found += [Part(name, axis, 0, 1) for axis in axes]
    if extra := sorted(after.keys() - before.keys()):
        raise ValueError(f"{extra[0]} would be there")
    return tuple(found)


def _parameters(model: Any) -> dict[str, Tensor]:
    """All parameters by name, those that are another's under a second name left out: a model without memory ties none."""
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in tied_names(model)}


def parameter_count(model: Any) -> int:
    """Parameters of a model, tied ones once, with memory or without."""
    return sum(parameter.numel() for parameter in _parameters(model).values())


def tied_names(model: Any) -> dict[str, str]:
    """{name of a parameter: the name of the one that it is}."""
    return getattr(model, "all_tied_weights_keys", None) or {}


@dataclass(frozen=True)
class Norm:
    """What a norm does, as far as its width matters."""

    centres: bool
    """It takes the mean away: a LayerNorm."""
    offset: float
    """Its gain is this plus its weight: 1 in Gemma's, 0 elsewhere."""


def residual_norms(model: Any, parts: tuple[Part, ...]) -> dict[str, Any]:
    """The modules by name that hold one gain a channel and no matrix."""
    names = {part.parameter.rpartition(".")[0] for part in parts if part.parameter.endswith(".weight")}
    return {name: m for name, m in model.named_modules() if name in names and m.weight.ndim == 1}


@torch.no_grad()
def norm_of(module: nn.Module) -> Norm:
    """Ask a norm, on the CPU and with weights of a copy: constant inputs show whether it centres, no weight its offset."""
    probe: Any = copy.deepcopy(module).to_empty(device="cpu").float()
    for parameter in probe.parameters():
        parameter.zero_()
    width = len(probe.weight)
    offset = float(probe(torch.arange(1.0, width + 1)[None]).abs().max() > 1e-3)
    probe.weight.fill_(1.0 - offset)
    return Norm(bool(probe(torch.ones(1, width)).abs().max() < 0.5), offset)


@torch.no_grad()
def rescale(
    state: dict[str, Tensor], model: Any, narrow: Any, parts: tuple[Part, ...], width: int, channels: int
) -> dict[str, Tensor]:
    """The cut tensors, with what depends on the width made up for.

    RMS norms divide by sqrt(sum x² / d): of k channels by sqrt(sum x² / k), and their gains grow by sqrt(d / k). What an
    embedding is multiplied by beside its weight goes into the weight; where the head is the same tensor, out of it again by
    the gain of the last norm.
    state: the cut model's tensors by name. narrow: the model that they go into, without memory.
    """
    family, changed, tied = structure_of(model), dict(state), tied_names(model)
    grown = _embedding_scale(model) / _embedding_scale(narrow)
    embedding = next(name for name, p in _parameters(model).items() if p is model.get_input_embeddings().weight)
    changed[embedding] = state[embedding] * grown if grown != 1 else state[embedding]
    for name, module in residual_norms(model, parts).items():
        norm, last = norm_of(module), not name.startswith(f"{family.blocks}.")
        factor = (1.0 if norm.centres else (width / channels) ** 0.5) / (grown if tied and last else 1.0)
        weight = state[f"{name}.weight"]
        changed[f"{name}.weight"] = ((weight.double() + norm.offset) * factor - norm.offset).to(weight.dtype)
    return changed | {name: changed[first] for name, first in tied.items()}


def _embedding_scale(model: Any) -> float:
    """What the embedding module multiplies its rows by."""
    return float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))
