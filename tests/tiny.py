"""Tiny random models of every family, made on the spot, and a byte-level tokenizer."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()  # of saving: it would stand in what a test reads of a command
VOCAB = 260
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OLD = {key: value for key, value in _BASE.items() if key != "num_key_value_heads"}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "mistral": _BASE | {"sliding_window": 16},
    "ministral": _BASE | {"head_dim": 8},
    "qwen2": _BASE,
    "qwen3": _BASE | {"head_dim": 8},
    "gemma": _BASE | {"head_dim": 8},
    "gemma2": _BASE | {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": _BASE | {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _BASE,
    "olmo2": _BASE,
    "granite": _BASE,
    "smollm3": _BASE,
    "starcoder2": _BASE,
    "cohere": _BASE,
    "stablelm": _BASE,
    "opt": _OLD | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _OLD,
    "mixtral": _BASE | {"num_local_experts": 4},
    "qwen2_moe": _BASE
    | {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": _BASE | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    "olmoe": _BASE | {"num_experts": 4, "num_experts_per_tok": 2},
}


_MODELS: dict[str, tuple[Any, torch.Tensor]] = {}
"""Models made so far in this process, and the random state behind each: tests get copies, which cost less."""
_FOLDERS: dict[str, tuple[str, torch.Tensor]] = {}
"""The same of saved ones."""


def tiny_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random model whose biases and norms are not at their defaults, so that losing one is seen."""
    key = repr((family, seed, dtype, sorted(overrides.items())))
    if key not in _MODELS:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **(CONFIGS[family] | overrides))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
        _MODELS[key] = model, torch.get_rng_state()
    model, state = _MODELS[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def model_with_uncalled_block() -> Any:
    """Three blocks, the second of which looks at images alone: text goes past it."""
    from transformers import MllamaForCausalLM
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    torch.manual_seed(0)
    return MllamaForCausalLM(MllamaTextConfig(**_BASE | {"num_hidden_layers": 3}, cross_attention_layers=[1])).eval()


def tiny_tokens(num: int = 8, window: int = 32, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (num, window), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {char: i + 3 for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny_checkpoint(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A saved tiny model with its tokenizer."""
    key = repr((family, sorted(options.items())))
    if key not in _FOLDERS:
        made = tempfile.mkdtemp(prefix="tiny-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        tiny_model(family, **options).save_pretrained(made)
        tiny_tokenizer().save_pretrained(made)
        _FOLDERS[key] = made, torch.get_rng_state()
    made, state = _FOLDERS[key]
    torch.set_rng_state(state)
    shutil.copytree(made, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return folder


def tiny_text(folder: Path, name: str = "text.txt", *, paragraphs: int = 40, seed: int = 0) -> Path:
    """Random words, one document."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(paragraphs):
        words = torch.randint(97, 123, (20, 5), generator=generator).tolist()
        lines.append(" ".join("".join(map(chr, word)) for word in words))
    path = folder / name
    path.write_text("\n".join(lines))
    return path


def logits_error(model: Any, dense: Any, tokens: torch.Tensor) -> float:
    """Relative squared error of the logits."""
    with torch.no_grad():
        wanted, got = dense(tokens).logits, model(tokens).logits
    return float((wanted - got).square().sum() / wanted.square().sum())
