"""`block_configs`: how DeciLM's config states layers that differ, and what vLLM builds its DeciLMForCausalLM from.

vLLM (model_executor/models/nemotron_nas.py) takes of every block the size of its network and whether its attention or its
network is missing, along with the norm before it. All attentions have the query heads of the config, and the first one has
to be there. A cut of channels and sublayers of a Llama model fits; one of heads does not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from topiarist.structured.units import UnitGroup

ARCHITECTURE = "DeciLMForCausalLM"
FAMILIES = ("llama", "mistral")
KINDS = {"channels", "attention", "ffn"}


def block_configs(
    config: Any, groups: Sequence[UnitGroup], units: Mapping[str, int], biased: Collection[str]
) -> list[dict[str, dict[str, Any]]] | None:
    """One entry a block for `config.block_configs`; None if the cut does not fit. units: {group key: units that stay}."""
    changed = {group.kind for group in groups if units[group.key] != group.count}
    window = getattr(config, "sliding_window", None)
    if config.model_type not in FAMILIES or not changed <= KINDS or biased or window:
        return None
    query, kv = config.num_attention_heads, config.num_key_value_heads
    blocks: list[dict[str, dict[str, Any]]] = [
        {
            "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": query // kv},
            "ffn": {"no_op": False, "replace_with_linear": False, "intermediate_size": config.intermediate_size},
        }
        for _ in range(config.num_hidden_layers)
    ]
    for group in groups:
        block = blocks[group.block]
        if group.kind == "channels":
            block["ffn"]["intermediate_size"] = units[group.key]
        elif group.kind in ("attention", "ffn") and not units[group.key]:
            block[group.kind]["no_op"] = True
    return None if blocks[0]["attention"]["no_op"] else blocks
