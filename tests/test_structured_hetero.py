"""Layers of different size, missing sublayers, fewer blocks: the smaller model computes what the masked one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from structured_checks import check, kinds_of, random_scores
from transformers import AutoConfig
from transformers.models.llama import modeling_llama as llama

import topiarist as tp
from topiarist.models.families import FAMILIES
from topiarist.structured import choose, units_of
from topiarist.structured.block_configs import ARCHITECTURE, block_configs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_hetero(family: str, tmp_path: Path):
    model = tiny.tiny_model(family)
    groups = units_of(model, kinds_of(family, "hetero"))
    check(model, groups, choose(groups, random_scores(groups), 0.6), "hetero", tmp_path)


DEPTH = {"num_hidden_layers": 3}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fewer_blocks(family: str, tmp_path: Path):
    """Numbers, layer indices and lists of layers agree: cached generation would show one that is off."""
    depth = {"n_layer": 3} if family == "gpt2" else DEPTH
    if family == "gemma3_text":
        depth = {**depth, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    model = tiny.tiny_model(family, **depth)
    groups = units_of(model, ("block",))
    kept = {group.key: torch.tensor([group.block != 0]) for group in groups}
    check(model, groups, kept, "uniform", tmp_path)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sublayers_leave_without_a_trace(family: str, tmp_path: Path):
    """The first attention goes too: a cache that counts tokens there must still count."""
    model = tiny.tiny_model(family)
    groups = units_of(model, ("attention", "ffn"))
    kept = {group.key: torch.tensor([(group.kind == "attention") == (group.block == 1)]) for group in groups}
    check(model, groups, kept, "hetero", tmp_path)


def test_a_copy_of_the_code_opens_heterogeneous_layers_without_topiarist(tmp_path: Path):
    from topiarist.models import modeling_pruned

    imports = [
        line for line in Path(modeling_pruned.__file__).read_text().splitlines() if line.startswith(("import", "from"))
    ]
    assert not any("topiarist" in line for line in imports)


def deci_model(folder: Path) -> torch.nn.Module:
    """A plain Llama-like reading of `block_configs` and of tensor names, as vLLM's DeciLMForCausalLM has it: every layer is
    built from its entry alone, and every tensor of the files must find its place."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    plain = llama.LlamaConfig(**{k: v for k, v in config.to_dict().items() if k not in ("model_type", "pruned")})
    model = llama.LlamaForCausalLM(plain)
    for layer, block in zip(model.model.layers, config.block_configs, strict=True):
        assert plain.num_attention_heads // block.attention.n_heads_in_group == plain.num_key_value_heads
        if block.attention.no_op:
            layer.self_attn = layer.input_layernorm = None
        if block.ffn.no_op:
            layer.mlp = layer.post_attention_layernorm = None
        else:
            assert not hasattr(block.ffn, "ffn_mult")
            own = llama.LlamaConfig(**{**plain.to_dict(), "intermediate_size": block.ffn.intermediate_size})
            layer.mlp = llama.LlamaMLP(own)
    state = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def deci_logits(model, tokens: torch.Tensor) -> torch.Tensor:
    hidden, positions = model.model.embed_tokens(tokens), torch.arange(tokens.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers:
        if layer.self_attn is not None:
            hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), rotary, None)[0]
        if layer.mlp is not None:
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


@pytest.mark.parametrize(
    ("units", "fits"), [(("channels",), True), (("attention", "ffn"), True), (("kv_groups", "channels"), False)]
)
def test_block_configs_say_what_vllm_needs_to_build_the_same_model(units, fits, tmp_path: Path):
    dense, out, tokens = tmp_path / "dense", tmp_path / "out", tiny.tiny_tokens(2, 12)
    tiny.tiny_model("llama", num_hidden_layers=3).save_pretrained(dense)
    options = {"method": "random", "keep": 0.6, "units": units, "round_to": 1, "seed": 0}
    tp.shrink(dense, out, layout="hetero", data=tiny.tiny_tokens(4, 16), **options)
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"] == [ARCHITECTURE]) == fits == ("block_configs" in config)
    if fits:
        with torch.no_grad():
            expected = tp.load_pruned(out)(tokens).logits
        torch.testing.assert_close(deci_logits(deci_model(out), tokens), expected, rtol=1e-5, atol=1e-5)


def test_no_block_configs_where_vllm_could_not_run_them():
    """It starts its residual stream in the first attention."""
    model = tiny.tiny_model("llama")
    groups = units_of(model, ("attention",))
    for gone, fits in ((0, False), (1, True)):
        units = {group.key: int(group.block != gone) for group in groups}
        assert (block_configs(model.config, groups, units, ()) is not None) == fits
        assert block_configs(tiny.tiny_model("qwen2").config, groups, units, ()) is None
