"""Models whose layers differ in size. topiarist saves this file beside such weights, so it imports nothing of topiarist.

`from_pretrained(..., trust_remote_code=True)` runs it from the model's folder; `topiarist.load_pruned(path)` runs the
same code from the package. A class is the family's own with other shapes: config.pruned holds

    base        the family's model type
    shapes      {parameter: shape}, where it differs from the config's
    heads       {attention module: [query heads, KV heads]}
    experts     {module: number of experts}
    absent      [[module, what it was: "attention", "ffn" or "inside"]]

Some configs also hold `block_configs`, from which vLLM builds the same model as its DeciLMForCausalLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

PREFIX = "pruned_"
CODE = "modeling_pruned.py"
_classes: dict[str, tuple[Any, Any]] = {}


class LayerConfig:
    """The model's config, but for what is this layer's own."""

    def __init__(self, shared: Any, own: dict[str, Any]) -> None:
        self.__dict__.update(own, _shared=shared)

    def __getattr__(self, name: str) -> Any:
        if name == "_shared":  # while it is copied there is nothing to ask yet
            raise AttributeError(name)
        return getattr(self._shared, name)


class Fields(dict):
    """A dictionary whose entries are attributes too, as vLLM reads those of `block_configs`."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class Absent(nn.Module):
    """Stands where a sublayer was removed: adds nothing to the hidden states.

    kind: "attention", "ffn", or "inside" for a module before the last of either. layer: its index in the cache.
    """

    def __init__(self, kind: str, layer: int) -> None:
        super().__init__()
        self.kind, self.layer = kind, layer

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Zeros for a feed-forward layer, (zeros, None) for attention; its input before the last module of either.

        For attention the cache gets keys of zeros, because it counts tokens in its first layer.
        """
        if self.kind == "inside":
            return hidden_states
        nothing = torch.zeros_like(hidden_states)
        if self.kind == "ffn":
            return nothing
        for value in (*args, *kwargs.values()):
            if hasattr(value, "get_seq_length"):  # the cache counts tokens in its first layer, which this may be
                key = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
                value.update(key, key, self.layer)
        return nothing, None


def reshape(model: nn.Module, pruned: dict[str, Any]) -> None:
    """Give a model the shapes of `pruned`; its weights come afterwards."""
    for name, shape in pruned["shapes"].items():
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        old = getattr(module, leaf) if getattr(module, leaf) is not None else module.weight
        if leaf in module._buffers:
            setattr(module, leaf, old.new_zeros(shape))
            continue
        setattr(module, leaf, nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad))
        if leaf == "weight" and isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif leaf == "weight" and hasattr(module, "nf"):
            module.nx, module.nf = shape
    for path, (query, kv) in pruned["heads"].items():
        module = model.get_submodule(path)
        module.config = LayerConfig(module.config, {"num_attention_heads": query, "num_key_value_heads": kv})
        if hasattr(module, "split_size"):
            module.split_size = query * module.head_dim
        for names, value in (
            (("num_heads", "num_attention_heads"), query),
            (("num_key_value_heads", "num_kv_heads"), kv),
            (("num_key_value_groups",), query // kv),
        ):
            for name in names:
                if hasattr(module, name):
                    setattr(module, name, value)
    for path, count in pruned["experts"].items():
        model.get_submodule(path).num_experts = count  # pyright: ignore[reportArgumentType]
    for path, kind in pruned["absent"]:
        layer = next(int(part) for part in path.split(".") if part.isdigit())
        model.set_submodule(path, Absent(kind, layer))


def code(base: str) -> str:
    """This file as it stands beside weights: transformers finds both classes of the family in it."""
    text = Path(__file__).read_text(encoding="utf-8")
    last = f'\n\nPrunedConfig, PrunedForCausalLM = pruned_classes("{base}")\n'
    return text if text.endswith(last) else text + last


def pruned_classes(base: str) -> tuple[Any, Any]:
    """(config class, model class) of a family with layers of different size."""
    if base not in _classes:
        plain_config = CONFIG_MAPPING[base]
        plain: Any = MODEL_FOR_CAUSAL_LM_MAPPING[plain_config]

        def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            plain.__init__(self, config, *args, **kwargs)
            reshape(self, config.pruned)

        def keep(self: Any, name: str, value: Any) -> None:
            if name == "block_configs":
                value = [Fields({part: Fields(own) for part, own in block.items()}) for block in value]
            plain_config.__setattr__(self, name, value)

        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            plain.save_pretrained(self, save_directory, *args, **kwargs)
            Path(save_directory, CODE).write_text(code(base), encoding="utf-8")

        named = {"model_type": PREFIX + base, "__module__": __name__, "__setattr__": keep}
        config = type("PrunedConfig", (plain_config,), named)
        own = {"config_class": config, "__init__": build, "save_pretrained": save_pretrained, "__module__": __name__}
        _classes[base] = config, type("PrunedForCausalLM", (plain,), own)
    return _classes[base]


def register(config: dict[str, Any]) -> None:
    """Let transformers' auto classes open a folder with this config.json without running code from it."""
    model_type = str(config.get("model_type"))
    if model_type.startswith(PREFIX):
        classes = pruned_classes(model_type.removeprefix(PREFIX))
        AutoConfig.register(model_type, classes[0], exist_ok=True)
        AutoModelForCausalLM.register(*classes, exist_ok=True)
