"""What single model types need beside the rules of tiny_types.py: fields that depend on each other."""

from __future__ import annotations

from typing import Any


def _rotary(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **more}}


def _text(**fields: Any) -> dict[str, Any]:
    return {"text_config": fields}


_MASKED = ["bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"]
_MASKED += ["rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"]
_SLIDING = ["sliding_attention", "full_attention"] * 2
_GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": _SLIDING,
    "num_kv_shared_layers": 2,
    "intermediate_size": [128] * 4,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}
_GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": _SLIDING,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
    "num_global_key_value_heads": None,
}
_QWEN4 = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "eos_token_id": 2,
    "hc_lowrank": 32,
    "ple_layer_ids": [2],
    "ple_embed_dim": 64,
    "ngram_vocab_size_base": 100,
    "heads_per_ngram": 2,
    "split_ngram_parts": 2,
    "make_ngram_vocab_size_divisible_by": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
_DOTS3 = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "shared_experts_intermediate_size": 32,
    "per_layer_config": {},
    "layer_types": ["indexed_attention"] * 3,
    "use_sliding_window": False,
    "index_n_heads": 4,
    "index_topk": 8,
}
_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4}
_SMALL_VQ = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}
_COMPASS = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
_SECTIONED = ["qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "glm46v", "glm4v", "glmga", "glm_ocr"]

OWN_CONFIG = {"musicgen": "musicgen_decoder", "musicgen_melody": "musicgen_melody_decoder", "evolla": "evolla"}
"""Types that the auto class cannot build, and the type whose config their class takes."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{kind: {"is_decoder": True} for kind in _MASKED},
    **{kind: _text(**_rotary(2, 3, 3)) for kind in _SECTIONED},
    **{kind: {"head_dim": 16} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "apertus1p5": {
        "audio_config": {"codebook_dim": 64},
        "vision_config": {**_SMALL_VQ, "latent_channels": 64},
        "image_token_id": 120,
        "audio_token_id": 121,
        "image_token_offset": 128,
        "audio_token_offset": 192,
    },
    "roc_bert": {
        "is_decoder": True,
        "shape_vocab_size": 64,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 32,
        "pronunciation_embed_dim": 32,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "local"],
        "num_hidden_layers": 2,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "feed_forward_size": 128,
        "attention_head_size": 16,
        "num_buckets": None,
    },
    "dots1": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention"] * 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "gemma3n_text": _GEMMA3N,
    "gemma3n": _text(**_GEMMA3N),
    "gemma4_text": _GEMMA4,
    "gemma4": _text(**_GEMMA4),
    "gemma4_unified_text": _GEMMA4,
    "gemma4_unified": _text(**_GEMMA4),
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": _text(**_QWEN4),
    "cohere_compass_text": _COMPASS,
    "cohere_compass": _text(**_COMPASS),
    "longcat_flash": {"head_dim": 16, "qk_head_dim": 32, "num_key_value_heads": 4},
    "dots3_note_text": _DOTS3,
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
            "mlp_layer_types": ["dense", "sparse"],
            "per_layer_config": {},
        },
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "adapter_rank": 16,
        "kv_channels": 16,
        "num_query_groups": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "ernie4_5_vl_moe": _text(moe_intermediate_size=[32, 16], moe_num_experts=4, **_rotary(3, 3, 2)),
    "mistral4": {"num_key_value_heads": 4, "head_dim": ..., "rope_parameters": ...},
    "llama4": {"vision_config": {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}},
    "hunyuan_vl": _text(head_dim=16, **_rotary(2, 3, 3)),
    "step3p7": _text(sliding_window=16),
    "granite4_vision": {"spatial_target_layers": [], "deepstack_layer_map": [], "downsample_rate": "1/4"},
    "cosmos3_edge": _text(rope_parameters={"mrope_section": [2, 3, 3]}),
    "glm4v_moe": _text(**_rotary(1, 1, 2, partial_rotary_factor=0.5)),
    "glm5_next": _text(qk_rope_head_dim=0, qk_nope_head_dim=16),
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "gemma4_assistant": {"text_config": _GEMMA4 | _ASSISTANT},
    "gemma4_unified_assistant": {"text_config": _GEMMA4 | _ASSISTANT},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "chameleon": {"vocabulary_map": {"<image>": 250, "IMGIMGAZ": 251}, "vq_config": _SMALL_VQ},
    "emu3": {
        "vocabulary_map": {"<image>": 250, "<|extra_200|>": 251, "<|visual token 000000|>": 252},
        "vq_config": {**_SMALL_VQ, "attn_resolutions": [1]},
    },
    "janus": {"vq_config": _SMALL_VQ},
    "deepseek_ocr2": _text(num_experts_per_tok=2, mlp_layer_types=["dense", "sparse"]),
    "diffusion_gemma": _text(num_experts=4, top_k_experts=2, moe_intermediate_size=32),
    "florence2": {
        "vision_config": {
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [32, 64],
            "num_heads": [4, 4],
            "num_groups": [4, 4],
        }
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {"projector_hidden_size": 64, "audio_config": {"hidden_sizes": [16] * 4, "depths": [1] * 4}},
    "nemotron_h_omni": {
        "projector_hidden_size": 64,
        "vision_hidden_size": 64,
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "pix2struct": _text(d_kv=16),
}
