"""The cut: for every family and layout the smaller model computes what the masked one does, before and after reload."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from structured_checks import NO_HEADS, ONE_NORM, check, kinds_of, masked_logits, random_scores
from transformers import AutoModelForCausalLM

import topiarist as tp
from topiarist.models.families import FAMILIES
from topiarist.structured import (
    choose,
    holds,
    mask_in_place,
    plan_layout,
    shrunk,
    units_of,
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_uniform(family: str, tmp_path: Path):
    model = tiny.tiny_model(family)
    groups = units_of(model, kinds_of(family, "uniform"))
    check(model, groups, choose(groups, random_scores(groups), 0.6, scope="per_layer"), "uniform", tmp_path)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NO_HEADS - ONE_NORM - {"gemma2", "gemma3_text"}))
def test_head_counts_that_do_not_divide_the_width(family: str, tmp_path: Path):
    """docs/methods/recovery.md says which families take them; llama does as mistral."""
    model = tiny.tiny_model(family, num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    groups = units_of(model, ("kv_groups",))
    kept = choose(groups, random_scores(groups), 0.75, scope="per_layer")
    assert {int(mask.sum()) for mask in kept.values()} == {3}
    check(model, groups, kept, "uniform", tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_masked_weights_compute_what_gates_do(family: str):
    model, tokens = tiny.tiny_model(family), tiny.tiny_tokens(2, 12)
    for kinds in (("kv_groups", "channels"), ("attention", "ffn"), ("block",)):
        groups = units_of(model, kinds)
        kept = choose(groups, random_scores(groups), 0.5)
        expected = masked_logits(model, groups, kept, tokens)
        masked = copy.deepcopy(model)
        mask_in_place(masked, groups, kept)
        with torch.no_grad():
            torch.testing.assert_close(masked(tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_padded(family: str, tmp_path: Path):
    model = tiny.tiny_model(family)
    groups = units_of(model, kinds_of(family, "padded"))
    check(model, groups, choose(groups, random_scores(groups), 0.6), "padded", tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("layout", ["uniform", "hetero"])
def test_experts(family: str, layout: str, tmp_path: Path):
    model = tiny.tiny_model(family)
    groups = units_of(model, ("experts",))
    scope = "per_layer" if layout == "uniform" else "global"
    check(model, groups, choose(groups, random_scores(groups), 0.76, scope=scope), layout, tmp_path)


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("layout", ["uniform", "hetero", "padded"])
def test_query_heads(kv: int, layout: str, tmp_path: Path):
    model = tiny.tiny_model("qwen2", num_attention_heads=8, num_key_value_heads=kv, head_dim=4)
    groups = units_of(model, ("heads", "channels"))
    scope = "per_layer" if layout == "uniform" else "parameters"
    check(model, groups, choose(groups, random_scores(groups), 0.6, scope=scope), layout, tmp_path)


def test_llama_becomes_mistral_where_its_config_refuses(tmp_path: Path):
    model = tiny.tiny_model(num_attention_heads=8, num_key_value_heads=4)
    groups = units_of(model, ("kv_groups", "channels"))
    kept = choose(groups, random_scores(groups), 0.75, scope="per_layer")
    plan = plan_layout(model, groups, kept, "uniform")
    assert plan.config.model_type == "mistral" and "saved as mistral" in plan.warnings[0]
    check(model, groups, kept, "uniform", tmp_path)
    biased = tiny.tiny_model(num_attention_heads=8, num_key_value_heads=4, attention_bias=True)
    with pytest.raises(tp.UnsupportedModel, match="mistral has no biases"):
        plan_layout(
            biased,
            units_of(biased, ("kv_groups",)),
            {g.key: kept[g.key] for g in groups if g.kind == "kv_groups"},
            "uniform",
        )


@pytest.mark.parametrize("family", sorted(NO_HEADS))
def test_configs_without_a_head_size_hold_no_fewer_heads(family: str):
    model = tiny.tiny_model(family)
    groups = units_of(model, ("kv_groups",))
    assert not any(holds(model, groups, count) for count in range(1, groups[0].count))
    assert holds(model, groups, groups[0].count)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_configs_with_a_head_size_hold_fewer_heads(family: str):
    model = tiny.tiny_model(family)
    assert holds(model, units_of(model, ("kv_groups",)), 1)


def test_padding_that_eats_the_gain_is_refused():
    model = tiny.tiny_model()
    groups = units_of(model, ("channels",))
    kept = {group.key: torch.arange(64) < (8 if group.block else 56) for group in groups}
    with pytest.raises(tp.TopiaristError, match="75% more"):
        plan_layout(model, groups, kept, "padded")
    assert set(plan_layout(model, groups, kept, "padded", max_waste=0.8).slots.values()) == {56}


def test_layers_of_different_size_are_no_uniform_layout():
    model = tiny.tiny_model()
    groups = units_of(model, ("channels",))
    kept = {group.key: torch.arange(64) < 32 + group.block for group in groups}
    with pytest.raises(tp.TopiaristError, match="layers differ"):
        plan_layout(model, groups, kept, "uniform")
    for kinds, layout, message in (
        (("attention",), "uniform", "leaves out single sublayers"),
        (("block",), "padded", "nothing to pad"),
        (("kv_groups",), "puffed", "unknown layout"),
    ):
        groups = units_of(model, kinds)
        with pytest.raises(tp.TopiaristError, match=message):
            plan_layout(model, groups, choose(groups, random_scores(groups), 0.6), layout)
    moe = tiny.tiny_model("mixtral")
    groups = units_of(moe, ("experts",))
    with pytest.raises(tp.TopiaristError, match="router"):
        plan_layout(moe, groups, choose(groups, random_scores(groups), 0.8), "masked")


@pytest.mark.parametrize(
    ("family", "layout", "fits"),
    [
        ("llama", "uniform", True), ("llama", "hetero", True), ("llama", "masked", True), ("llama", "padded", True),
        ("mistral", "uniform", False), ("mistral", "hetero", True), ("gpt2", "uniform", True), ("opt", "uniform", True),
    ],
)  # fmt: skip
def test_biases_of_consumers(family: str, layout: str, fits: bool, tmp_path: Path):
    """What the config can hold gets them, zeros fill the biases that come along; the rest is refused."""
    model, tokens = tiny.tiny_model(family), tiny.tiny_tokens(2, 12)
    groups = units_of(model, ("channels",))
    kept = choose(groups, random_scores(groups), 0.5, scope="per_layer")
    biases = {group.consumer: torch.randn(32) for group in groups}
    if not fits:
        with pytest.raises(tp.UnsupportedModel, match=r"bias would be None"):
            plan_layout(model, groups, kept, layout, biased=biases)
        return
    expected = copy.deepcopy(model)
    mask_in_place(expected, groups, kept)
    hooks = [
        expected.get_submodule(name).register_forward_hook(lambda m, args, out, bias=bias: out + bias)
        for name, bias in biases.items()
    ]
    plan = plan_layout(model, groups, kept, layout, biased=biases)
    everything = {key: torch.ones_like(mask) for key, mask in kept.items()}
    small = shrunk(
        expected if layout == "masked" else model, groups, everything if layout == "masked" else kept, plan, biases
    )
    with torch.no_grad():
        wanted = expected(tokens).logits
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(small(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
        small.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(tokens).logits, wanted, rtol=1e-4, atol=1e-5)


def test_one_norm_over_all_heads_is_cut_with_them(tmp_path: Path):
    model = tiny.tiny_model("olmo2")
    groups = units_of(model, ("kv_groups",))
    assert not any(group.exact for group in groups)
    kept = choose(groups, random_scores(groups), 0.5, scope="per_layer")
    small = shrunk(model, groups, kept, plan_layout(model, groups, kept, "uniform"))
    assert small.model.layers[0].self_attn.q_norm.weight.shape == (16,)
    assert torch.isfinite(small(tiny.tiny_tokens(2, 8)).logits).all()
