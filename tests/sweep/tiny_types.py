"""Tiny random models of any model type: a default config, its numbers shrunk by what they are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from sweep.exceptions import EXCEPTIONS, OWN_CONFIG

VOCAB = 256
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
AUTO = {"causal": AutoModelForCausalLM, "image-text": AutoModelForImageTextToText}
NAMES = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "image-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}

Rule = int | Callable[[Any], Any]


def _if_count(new: int) -> Callable[[Any], Any]:
    return lambda value: new if isinstance(value, int) else value


# Whole names of config fields (regular expressions) -> their tiny value; the first that matches counts.
_SIZES: dict[str, Rule] = {
    r"(\w*_)?vocab_size(_per_layer_input)?|token_embedding_size": VOCAB,
    r"(attention_|text_|encoder_|out_)?hidden_size|(d_|model_|n_)(model|embd)|(embed|hidden|projection|emb|model)_dim|d_embed"
    r"|embedding_size|word_embed_proj_dim|lru_width|width|dim": 64,
    r"(\w*_)?intermediate_size(_mlp)?|(\w*_)?ffn_dim|n_inner|d_ff|d_inner|(dim_ff|ff_dim|inner_dim|mlp_dim|block_ff_dim)"
    r"|ffn_hidden_size|feed_forward(_proj_dim|_size)": lambda value: 128,
    r"(num_(hidden_|encoder_|decoder_|global_)?|n_|encoder_|decoder_|vision_)?(layers?|blocks)|depth"
    r"|num_hidden_layers_vision": 2,
    r"(num|n)_(\w*attention_|global_)?heads?|(en|de)coder_attention_heads|vision_heads|attn_heads"
    r"|linear_num_value_heads|index(er)?_n_heads": 4,
    r"linear_num_key_heads": 2,
    r"(\w*_)?(num|n)_(global_)?(key_value|kv|head_kv)(_heads)?|kv_heads": lambda v: v if v in (None, 1) else 2,
    r"(\w*_)?head_dim|v_head_dim|linear_(key|value)_head_dim|kv_channels|rotary_dim": 16,
    r"(\w*_)?lora_rank|dt_rank|time_step_rank": _if_count(32),
    r"(num|n)_(local_|routed_)?experts|(moe|ffn)_num_experts": 4,
    r"(num_)?(top_k_)?experts(_per_tok(en)?|_per_topk)?|moe_(top)?k|moe_top_k|moe_router_topk|num_experts_per_\w+": 2,
    r"(moe_)?n_group|topk_group|num_expert_group": 1,
    r"max_position_embeddings|n_positions|n_ctx|(max_)?seq(uence)?_len(gth)?|max_(sequence|seq)_length|block_size": 128,
    r"sliding_window(_size)?|(attention_|local_)?window(_size)?"
    r"|local_(attention|window_size)|attention_chunk_size": _if_count(16),
    r"(mamba_|ssm_)?(d_state|state_size|state_dim)|conv_L_cache": lambda v: min(v, 16),
    r"mamba_(n|num)_heads|n_mamba_heads": lambda v: 8 if v > 1 else 1,
    r"mamba_(d_head|head_dim|headdim)": _if_count(16),
    r"mamba_d_ssm": 128,
    r"(mamba_)?n_?groups": 1,
    r"(mamba_)?chunk_size": 16,
    r"codebook_size|num_embeddings": 64,
    r"(n|num|moe_num)_shared_experts|first_k_dense_replace|num_dense_layers|(first_)?num_(first_)?dense_layers"
    r"|moe_layer_start_index": lambda v: min(v, 1) if isinstance(v, int) else v,
    r"hidden_size_per_layer_input|laurel_rank|ple_dim": 16,
}
_NARROW = re.compile(r"(moe_intermediate_size|(expert|moe)_(ffn_hidden_size|dim)|moe_latent_size)\Z")
_RULES = [(re.compile(rf"(?:{pattern})\Z"), rule) for pattern, rule in _SIZES.items()]


def tiny_config(model_type: str, **fields: Any) -> Any:
    """A config of the type with two layers, or one of each kind of layer; `fields` as they are given."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_merged(_shrunk(kind()), EXCEPTIONS.get(model_type, {})) | fields)


def tiny_folder(folder: Path, model_type: str, mapping: str = "causal", **fields: Any) -> Path:
    """Save `tiny_model`."""
    tiny_model(model_type, mapping, **fields).save_pretrained(folder)
    return folder


def tiny_model(model_type: str, mapping: str = "causal", **fields: Any) -> Any:
    """A random model of the type, stored buffers included, with a deterministic seed."""
    build = AUTO[mapping].from_config
    if model_type in OWN_CONFIG:
        build = getattr(transformers, NAMES[mapping][model_type])._from_config
        model_type = OWN_CONFIG[model_type]
    config = tiny_config(model_type, **fields)
    with init_empty_weights(include_buffers=False):  # some code reads its buffers while it is built
        size = sum(p.numel() for p in build(config).parameters())
    if size > 30_000_000:
        raise ValueError(f"the tiny model has {size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = build(config, dtype=torch.float32).eval()
    stored = model.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif parameter.is_floating_point():
                parameter.copy_(0.08 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point() and any(part.isdigit() for part in name.split(".")):
                noise = 0.2 * torch.rand_like(buffer) * (1 if buffer.numel() > 1 else 0.5)
                buffer.add_(noise * buffer if buffer.any() else noise)  # zeros among others may be a mask
    return model


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """Keyword arguments that make a config of this class tiny."""
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    tiny: dict[str, Any] = {}
    if {"vocab_size", "text_config"} & fields.keys() and not hasattr(
        config, "pad_token_id"
    ):  # which 5.0 reads all the same
        tiny["pad_token_id"] = 0
    for key, value in fields.items():
        if key == "qk_head_dim" and "qk_nope_head_dim" in fields:  # the sum of two
            continue
        if isinstance(value, PretrainedConfig):
            tiny[key] = {**_shrunk(value), "model_type": value.model_type}
        elif re.search(r"token_(id|index)\Z|_id\Z", key):
            tiny |= _special_token(key, value)
        elif value is not None and not isinstance(value, bool | dict):
            rule = 32 if _NARROW.match(key) else next((rule for name, rule in _RULES if name.match(key)), None)
            if rule is not None:
                tiny[key] = rule(value) if callable(rule) else rule
    if isinstance(fields.get("kv_lora_rank"), int) and "num_key_value_heads" in tiny:
        tiny["num_key_value_heads"] = 4  # latent attention has one each
    return tiny | _layer_lists(fields) | _rotary_sections(fields, tiny)


def _special_token(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, list | tuple):
        return {key: 2}
    if isinstance(value, bool) or not isinstance(value, int) or value < VOCAB:
        return {}
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "sep_token_id": 2}
    return {key: known.get(key, 250)}


def _layer_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of lists with an entry a layer, one layer of each combination stays."""
    total = next((fields[key] for key in LAYER_COUNTS if isinstance(fields.get(key), int)), 0)
    lists = {
        key: value
        for key, value in fields.items()
        if isinstance(value, list | tuple) and len(value) == total > 1 and not isinstance(value[0], PretrainedConfig)
    }
    if not lists:
        return {}
    first: dict[tuple[str, ...], int] = {}
    for layer in range(total):
        first.setdefault(tuple(str(value[layer]) for value in lists.values()), layer)
    chosen = sorted(first.values())[:6]
    chosen += [min(chosen[0] + 1, total - 1)] if len(chosen) == 1 else []
    counts = {key: len(chosen) for key in LAYER_COUNTS if isinstance(fields.get(key), int)}
    return counts | {key: [value[layer] for layer in chosen] for key, value in lists.items()}


def _rotary_sections(fields: Mapping[str, Any], tiny: Mapping[str, Any]) -> dict[str, Any]:
    rotary = fields.get("rope_parameters")
    if not isinstance(rotary, dict) or "mrope_section" not in rotary:
        return {}
    share = rotary.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    half = int((tiny.get("head_dim") or 16) * share) // 2
    first = half // 4
    second = (half - first) // 2
    return {"rope_parameters": {**rotary, "mrope_section": [first, second, half - first - second]}}


def _merged(fields: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(fields)
    for key, value in own.items():
        if value is ...:  # the class's own default
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result
