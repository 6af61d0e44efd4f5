"""Which models can be written as GGUF, and how llama.cpp calls what is in them. Families are rows of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from topiarist.core.errors import UnsupportedModel


@dataclass(frozen=True)
class Architecture:
    """A family of models of which llama.cpp has an implementation that computes the same."""

    name: str
    """What GGUF calls it."""
    pairs_rows: bool = False
    """Rotary positions turn neighbouring rows of a head there, rows half a head apart in transformers."""
    full_width: bool = False
    """llama.cpp takes the heads of a layer to be as wide together as the hidden state."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the config that llama.cpp takes for granted; one that a config has not counts as it is here."""


_LLAMA = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
ARCHITECTURES = {
    "llama": Architecture("llama", pairs_rows=True, settings=_LLAMA),
    "mistral": Architecture("llama", pairs_rows=True, settings=_LLAMA),
    "mixtral": Architecture("llama", pairs_rows=True, settings=_LLAMA),
    "qwen2": Architecture("qwen2", full_width=True, settings=_LLAMA),
    "qwen3": Architecture("qwen3", settings=_LLAMA),
    "qwen3_moe": Architecture(
        "qwen3moe", settings={**_LLAMA, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    ),
    "olmo2": Architecture("olmo2", full_width=True, settings=_LLAMA),
    "phi3": Architecture("phi3", full_width=True, settings=_LLAMA),
}
CUT = {"qwen2": Architecture("llama", pairs_rows=True, settings=_LLAMA)}
"""What stands for a family of `full_width` whose heads are narrower or wider: llama's biases may be there or not."""


def architecture_of(config: Any) -> Architecture:
    """The row of a model's config. Raises UnsupportedModel for types, and settings of known types, that have no counterpart."""
    kind = str(config.model_type)
    if kind.startswith("pruned_"):
        raise UnsupportedModel(
            f"{kind}: its layers differ in size, which GGUF has no place for: shrink with uniform widths to export"
        )
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(f"models of type {kind!r} are not written as GGUF; {', '.join(ARCHITECTURES)} are")
    scaling = rope(config).get("rope_type", "default")
    if scaling not in ("default", "llama3", "linear"):
        raise UnsupportedModel(
            f"rotary positions of type {scaling!r} are not written as GGUF; default, linear and llama3 are"
        )
    architecture, heads = ARCHITECTURES[kind], int(config.num_attention_heads)
    if architecture.full_width and heads * head_size(config) != config.hidden_size:
        if kind not in CUT:
            raise UnsupportedModel(
                f"{kind} with {heads} heads of {head_size(config)} at width {config.hidden_size} is not written as GGUF: "
                "llama.cpp takes them to be as wide together; keep all heads, and cut channels or blocks"
            )
        architecture = CUT[kind]
    for name, taken in architecture.settings.items():
        if (own := getattr(config, name, taken)) != taken:
            raise UnsupportedModel(f"{kind} with {name} {own!r} is not written as GGUF: llama.cpp computes {taken!r}")
    return architecture


def rope(config: Any) -> dict[str, Any]:
    """The settings of rotary positions."""
    return dict(getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", 10000.0)})


def head_size(config: Any) -> int:
    """Channels of an attention head: `head_dim` of the config, else the width divided by the heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def write_settings(writer: Any, config: Any, architecture: Architecture) -> None:
    """The numbers that llama.cpp builds the model from."""
    import gguf

    writer.add_block_count(config.num_hidden_layers)
    # llama.cpp attends to everything in these architectures: within one window that is what a sliding one does
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    size, about = head_size(config), rope(config)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(about.get("rope_theta", 10000.0))
    writer.add_key_length(size)
    writer.add_value_length(size)
    turned = about.get("partial_rotary_factor", 1.0) if config.model_type == "phi3" else 1.0  # others heed none
    writer.add_rope_dimension_count(int(size * turned))
    if count := getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if about.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(about["factor"])


def extra_tensors(config: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that llama.cpp reads where transformers computes: what llama3's scaling divides each frequency by."""
    about = rope(config)
    if about.get("rope_type") != "llama3":
        return
    size, base = head_size(config), about.get("rope_theta", 10000.0)
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    low, high = about.get("low_freq_factor", 1.0), about.get("high_freq_factor", 4.0)
    factor, length = about.get("factor", 8.0), about.get("original_max_position_embeddings", 8192)
    wavelength = 2 * math.pi / frequencies
    smooth = ((length / wavelength - low) / (high - low)).clamp(0.0, 1.0)  # 0: divide by the factor, 1: leave
    yield "rope_freqs.weight", 1.0 / ((1 - smooth) / factor + smooth)


def name_map(architecture: Architecture, config: Any) -> Callable[[str], str]:
    """From a name in the checkpoint to that in GGUF, by the gguf package's own table. Raises UnsupportedModel for others."""
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def found(name: str) -> str:
        renamed = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise UnsupportedModel(f"tensor {name} has no counterpart in GGUF's {architecture.name}")
        return renamed

    return found


def paired_rows(rows: Shaped[Tensor, "out ..."], heads: int) -> Shaped[Tensor, "out ..."]:
    """Rows of a query or key matrix, each head's halves interleaved."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
