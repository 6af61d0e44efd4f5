"""The attention that tokens are given, and Grams of values in which they count by it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3MoeConfig

import topiarist as tp
from topiarist.core.gram import Gram
from topiarist.models.attention import received_attention, watch_attention
from topiarist.models.families import Matrix
from topiarist.pipelines.common.grams import GramCollector
from topiarist.quantization import GPTQ, Grid

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "sliding": MistralConfig(**SIZES, sliding_window=5, head_dim=8),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=8),
}


def made(config, **how):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), **how).eval()  # which notes `how` in the config


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_the_models_own_attention_says(name):
    model, eager = made(CONFIGS[name], attn_implementation="sdpa"), made(CONFIGS[name], attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    tokens, seen = torch.randint(0, 97, (3, 12)), []
    with torch.no_grad(), watch_attention(seen.append):
        out = model(tokens).logits
    with torch.no_grad():
        expected = eager(tokens, output_attentions=True)
    assert len(seen) == 2 and torch.allclose(out, expected.logits, atol=1e-5)
    for received, weights in zip(seen, expected.attentions, strict=True):
        assert torch.allclose(received, weights.sum(2).mean(1), atol=1e-5)
        assert torch.allclose(received.mean(1), torch.ones(3), atol=1e-5)
    with torch.no_grad():
        model(tokens)
    assert len(seen) == 2, "nothing is watched any more"


def test_masks_of_numbers_and_pieces(monkeypatch):
    query, key, mask = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.ones(2, 1, 6, 6).tril().bool()
    mask[1, :, :, 0] = False
    mask[1, :, 0, 0] = True
    numbers = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    whole = received_attention(query, key, mask, scaling=0.3, causal=True)
    assert torch.equal(whole, received_attention(query, key, numbers, scaling=0.3, causal=True))
    monkeypatch.setattr("topiarist.models.attention.SCORES", 40)
    assert torch.allclose(whole, received_attention(query, key, mask, scaling=0.3, causal=True))
    scores = (query @ key.repeat_interleave(2, 1).mT * 0.3 + numbers).softmax(-1)
    assert torch.allclose(whole, scores.sum(2).mean(1), atol=1e-5)


def test_a_gram_counts_tokens_by_their_attention():
    x, received = torch.randn(2, 5, 8), torch.rand(2, 5)
    q, v = (Matrix(name, nn.Linear(8, 8)) for name in ("q", "v"))
    collector = GramCollector([q, v], frozenset({"v"}))
    for matrix in (q, v):
        collector.on_input(matrix, x)
    assert collector.waits
    collector.on_attention(received)
    assert not collector.waits
    plain, weighted = (group.gram for group in collector.groups)
    flat = x.flatten(0, 1)
    assert torch.allclose(plain.matrix, flat.T @ flat, atol=1e-4)
    assert torch.allclose(weighted.matrix, flat.T @ (flat * received.flatten()[:, None]), atol=1e-4)
    assert plain.tokens == weighted.tokens == 10
    collector.end_of_forward()
    for matrix in (q, v):
        collector.on_input(matrix, x)
    collector.end_of_forward()  # attention of a kind that is not seen: tokens count alike
    assert torch.allclose(weighted.matrix, flat.T @ (flat * (1 + received.flatten()[:, None])), atol=1e-4)


def test_where_attention_is_not_seen_a_warning_says_so():
    sizes = SIZES | {"head_dim": 8, "sliding_window": 8}
    models = [made(Gemma2Config(**sizes), attn_implementation="eager") for _ in range(2)]
    tokens = torch.randint(0, 97, (8, 16))
    with pytest.warns(UserWarning, match="tokens count alike in the matrices of values"):
        report = tp.quantize(models[0], bits=4, group=32, data=tokens, batch_size=4)
    assert sum("count alike" in warning for warning in report.warnings) == 1
    tp.quantize(models[1], bits=4, group=32, data=tokens, batch_size=4, attention=False)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_values_alone_are_quantised_by_it():
    model = made(CONFIGS["llama"])
    dense = {name: module.weight.clone() for name, module in model.named_modules() if name.endswith("_proj")}
    tokens = torch.randint(0, 97, (8, 16))
    found = {}
    for attention in (True, False):
        one = copy.deepcopy(model)
        tp.quantize(one, bits=4, group=32, data=tokens, attention=attention, batch_size=4)
        found[attention] = {name: module.weight.clone() for name, module in one.named_modules() if name in dense}
    first = "model.layers.0.self_attn."
    differing = {name for name in dense if name.startswith(first) and not found[True][name].equal(found[False][name])}
    assert differing == {f"{first}v_proj"}
    inputs: list[torch.Tensor] = []
    hook = model.get_submodule(first[:-1]).v_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    received: list[torch.Tensor] = []
    with torch.no_grad(), watch_attention(received.append):
        model(tokens)
    hook.remove()
    x, weights = inputs[0].flatten(0, 1), received[0].flatten()[:, None]
    literal = GPTQ()(dense[f"{first}v_proj"], Gram.from_matrix(x.T @ (x * weights), len(x)), Grid(bits=4, group=32))
    assert torch.allclose(found[True][f"{first}v_proj"], literal.dequantized(), atol=1e-6)
