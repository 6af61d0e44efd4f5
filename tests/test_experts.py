"""Experts as units: REAP's scores and REAM's merges against literal references, and cuts of every kind of mixture."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import structured_checks
import tiny
import torch
from killing import assert_kills_change_nothing
from reference import reap as reference
from sweep.tiny_types import tiny_folder
from transformers import AutoModelForCausalLM

import topiarist as tp
from topiarist.models.derive import family_of
from topiarist.models.mixtures import expert_output, mixture_of
from topiarist.models.opened import ObjectModel
from topiarist.pipelines.shrinking.merge import merge_experts
from topiarist.structured import choose, gates, reap, units_of
from topiarist.structured.merging import (
    INTERLEAVED,
    JOINED,
    Channels,
    assigned,
    channels_of,
    likeness,
    matching,
    merged,
    read_expert,
    write_expert,
)
from topiarist.structured.methods import Task
from topiarist.structured.reap import Reap

TOKENS = tiny.tiny_tokens(16, 32).clamp(max=249)
CUT = ["afmoe", "deepseek_v3", "ernie4_5_moe", "gpt_oss", "granitemoe", "minimax_m2", "nemotron_h", "phimoe"]
CUT += [
    "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v32", "dots1",
    "dots3_note_text", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text", "jamba", "kimi_linear",
    "kolibri1", "laguna", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m3_vl_text", "mixtral", "olmoe",
    "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp", "qwen4_exp_text", "solar_open",
]  # fmt: skip
REFUSED = {
    "deepseek_v4": "assigns experts to tokens by a table",
    "inkling_text": "no router with one output for each of 4 experts",
    "jetmoe": "lie in several modules",
    "llama4_text": "not called with the experts of each token",
    "longcat_flash": "some of its experts have no weights",
    "zaya": "no router with one output for each of 4 experts",
}


def task_of(model, **options) -> Task:
    return Task(model, units_of(model, ("experts",)), TOKENS, 0.5, "per_layer", **options)


def inputs_of(module, model) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


@pytest.mark.filterwarnings("ignore::topiarist.core.errors.CalibrationWarning")
@pytest.mark.parametrize("batch_size", [3, 16])
def test_reap_is_the_mean_of_weight_times_norm(batch_size: int):
    model = tiny.tiny_model("mixtral", num_local_experts=6)
    scores = Reap().scores(task_of(model, batch_size=batch_size))
    for index, block in enumerate(model.model.layers):
        expected, _ = reference.reap(block.mlp, inputs_of(block.mlp, model))
        torch.testing.assert_close(scores[f"model.layers.{index}.mlp.gate:experts"], expected, rtol=1e-4, atol=1e-6)


def test_layers_whose_experts_saw_few_tokens_are_named():
    task = task_of(tiny.tiny_model("mixtral"))
    task.tokens = TOKENS[:1]
    with pytest.warns(
        tp.errors.CalibrationWarning, match=r"64 calibration.*layers\.1\.mlp\.experts \(4 of 4, the fewest \d"
    ):
        Reap().scores(task)


@pytest.mark.filterwarnings("ignore::topiarist.core.errors.CalibrationWarning")
@torch.no_grad()
def test_an_expert_that_adds_nothing_goes_first_and_leaves_the_rest(tmp_path: Path):
    """The router of the cut model renormalises: the logits are those of a router that never chooses the expert."""
    model = tiny.tiny_model("qwen3_moe")
    for block in model.model.layers:
        block.mlp.experts.down_proj[1] = 0
    report = tp.shrink(model, tmp_path / "out", method="reap", units=["experts"], keep=0.75, data=TOKENS)
    assert [row["kept"] for row in report.blocks] == [3, 3]
    with gates(model, units_of(model, ("experts",))) as masks:
        for mask in masks.values():
            mask[1] = 0
        expected = model(TOKENS[:2]).logits
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert small.config.num_experts == 3
    torch.testing.assert_close(small(TOKENS[:2]).logits, expected, rtol=1e-5, atol=1e-5)


def test_experts_are_scored_by_reap_unless_told_otherwise(tmp_path: Path):
    model = tiny.tiny_model("mixtral")
    report = tp.shrink(model, units=["experts"], keep=0.5, data=TOKENS)
    assert report.method == "reap" and report.settings["merge"] is False
    with pytest.raises(tp.errors.TopiaristError, match="reap cannot score channels"):
        tp.shrink(model, method="reap", units=["channels"], keep=0.5, data=TOKENS)
    assert tp.shrink(model, method="reap", keep=0.5, data=TOKENS).units == ["experts"]


def test_a_merge_without_scipy_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(reap, "find_spec", lambda _: None)
    with pytest.raises(tp.errors.TopiaristError, match=r"needs scipy: pip install 'topiarist\[merge\]'"):
        Reap(merge=True)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_a_router_keep_as_many_experts(groups: int, tmp_path: Path):
    fields = {"n_group": groups, "topk_group": 2, "n_routed_experts": 16, "num_experts_per_tok": 3}
    tiny_folder(tmp_path / "base", "deepseek_v3", **fields)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval().requires_grad_(False)
    units = units_of(model, ("experts",))
    assert len(units) == groups and units[0].count == 16 // groups and units[0].floor == 2
    kept = choose(units, structured_checks.random_scores(units), 0.76, scope="per_layer")
    assert {int(mask.sum()) for mask in kept.values()} == {12 // groups}
    structured_checks.check(model, units, kept, "uniform", tmp_path / "out", tokens=TOKENS[:2, :12])
    report = tp.shrink(model, units=["experts"], keep=0.5, data=TOKENS)
    assert report.result.config.n_routed_experts == 8


@pytest.mark.parametrize("kind", CUT)
@torch.no_grad()
def test_mixtures_of_every_type_lose_experts(kind: str, tmp_path: Path):
    """The stored model has the logits of the dense one whose router never chooses the experts that went."""
    tiny_folder(tmp_path / "base", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval().requires_grad_(False)
    units = units_of(model, ("experts",))
    scores = Reap().scores(Task(model, units, TOKENS, 0.75, "per_layer"))
    assert all(bool((score > 0).all()) for score in scores.values())
    kept = choose(units, scores, 0.75, scope="per_layer")
    expected = structured_checks.masked_logits(model, units, kept, TOKENS[:2])
    report = tp.shrink(tmp_path / "base", tmp_path / "out", units=["experts"], keep=0.75, data=TOKENS, device="cpu")
    assert {row["kept"] for row in report.blocks} == {3}
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(small(TOKENS[:2], use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", REFUSED)
def test_mixtures_that_cannot_lose_experts_say_why(kind: str, tmp_path: Path):
    tiny_folder(tmp_path / "base", kind)
    with pytest.raises(tp.UnsupportedModel, match=REFUSED[kind]):
        tp.shrink(tmp_path / "base", tmp_path / "out", units=["experts"], keep=0.75, data=TOKENS)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_likeness_is_the_mean_of_two_cosines():
    model = tiny.tiny_model("mixtral")
    mixer = model.model.layers[0].mlp
    hidden = inputs_of(mixer, model)[:20]
    outputs = [expert_output(mixer.experts, e, hidden) for e in range(4)]
    found = likeness(outputs, hidden @ mixer.gate.weight.T)
    torch.testing.assert_close(found, reference.likeness(mixer, hidden), rtol=1e-5, atol=1e-6)


def test_the_best_experts_take_the_most_like_first():
    score = torch.tensor([1.0, 5.0, 3.0, 0.5, 0.1, 0.2])
    kept = torch.tensor([False, True, True, False, False, False])
    alike = torch.zeros(6, 6)
    alike[1, [3, 4]], alike[2, [3, 0]] = torch.tensor([0.9, 0.8]), torch.tensor([1.0, 0.5])
    assert assigned(score, kept, alike, 2) == {1: [3, 4], 2: [0, 5]}
    assert assigned(score, kept, alike, 1) == {1: [3, 4, 5], 2: [0]}
    assert assigned(score, kept, alike, 16) == {1: [3, 4, 0, 5]}


@pytest.mark.parametrize(("kind", "order"), [("mixtral", JOINED), ("gpt_oss", INTERLEAVED), ("nemotron_h", JOINED)])
@torch.no_grad()
def test_channels_in_another_order_are_the_same_expert(kind: str, order: str, tmp_path: Path):
    tiny_folder(tmp_path / "base", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    family = family_of(model)
    block = next(b for b in model.get_submodule(family.blocks) if mixture_of(b))
    mixture = mixture_of(block)
    experts = block.get_submodule(mixture.module)
    channels = channels_of(experts, family.experts[mixture.down[0]])
    width = experts.down_proj.shape[1 if family.experts[mixture.down[0]] else 2]
    assert channels.order == order
    x, shuffled = (
        torch.randn(5, experts.down_proj.shape[2 - (not family.experts[mixture.down[0]])]),
        torch.randperm(width),
    )
    expected, before = expert_output(experts, 2, x), {k: v.clone() for k, v in read_expert(experts, 2).items()}
    other = channels.permuted(before, shuffled)
    write_expert(experts, 2, other)
    torch.testing.assert_close(expert_output(experts, 2, x), expected, rtol=1e-4, atol=1e-5)
    inner = torch.randn(7, width)
    assert torch.equal(shuffled[matching(before, other, (inner, inner[:, shuffled]), channels)], torch.arange(width))


def test_matching_is_the_best_of_all_orders():
    torch.manual_seed(0)
    experts = torch.nn.Module()
    experts.gate_up_proj, experts.down_proj = (
        torch.nn.Parameter(torch.randn(2, 8, 3)),
        torch.nn.Parameter(torch.randn(2, 3, 4)),
    )
    kept, other = ({k: p.detach()[e] for k, p in experts.named_parameters()} for e in range(2))
    channels = Channels({"gate_up_proj": 0, "down_proj": 1})
    inner = torch.randn(6, 4), torch.randn(6, 4)

    def value(order) -> float:
        total = 0.0
        for i, j in enumerate(order):
            a = torch.cat([kept["gate_up_proj"][i], kept["gate_up_proj"][i + 4], kept["down_proj"][:, i]])
            b = torch.cat([other["gate_up_proj"][j], other["gate_up_proj"][j + 4], other["down_proj"][:, j]])
            total += float(torch.cosine_similarity(a, b, dim=0))
            total += float(torch.cosine_similarity(inner[0][:, i], inner[1][:, j], dim=0))
        return total

    found = matching(kept, other, inner, channels).tolist()
    assert found == list(max(permutations(range(4)), key=value))


def test_a_merge_is_the_weighted_mean():
    experts = [{"a": torch.full((2, 2), float(v))} for v in (1, 3)]
    assert torch.equal(merged(experts, torch.tensor([3.0, 1.0]))["a"], torch.full((2, 2), 1.5))
    assert torch.equal(merged(experts, torch.zeros(2))["a"], torch.ones(2, 2))


@torch.no_grad()
def test_an_expert_merges_with_its_copy_without_loss():
    """Expert 3 is expert 0, the one that adds most, with its channels in another order."""
    model = tiny.tiny_model("mixtral")
    groups = units_of(model, ("experts",))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for block in model.model.layers:
        experts = block.mlp.experts
        experts.down_proj[0] *= 10
        write_expert(experts, 3, channels_of(experts, False).permuted(read_expert(experts, 0), order))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taken = merge_experts(
        ObjectModel(model),
        groups,
        {group.key: torch.tensor([True, True, True, False]) for group in groups},
        Reap(merge=True),
        TOKENS,
        batch_size=8,
        load=lambda _: None,
        save=lambda *_: None,
        progress=lambda *_: None,
    )
    assert taken == {f"model.layers.{i}.mlp.experts": {"0": [3]} for i in range(2)}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::topiarist.core.errors.CalibrationWarning")
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_merged_models_open_and_differ_from_cut_ones(kind: str, tmp_path: Path):
    tiny_folder(tmp_path / "base", kind)
    cut, mixed = (
        tp.shrink(
            tmp_path / "base", tmp_path / merge, method=f"reap:merge={merge}", units=["experts"], keep=0.5, data=TOKENS
        )
        for merge in ("false", "true")
    )
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / merge).eval() for merge in ("false", "true")]
    logits = [model(TOKENS[:1]).logits for model in models]
    assert torch.isfinite(logits[1]).all() and not torch.equal(*logits)
    assert not cut.merged and {len(x) for taken in mixed.merged.values() for x in taken.values()} == {2}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::topiarist.core.errors.CalibrationWarning")
def test_a_killed_merge_resumes_to_the_same_bytes(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", "qwen3_moe", num_hidden_layers=4)
    options = {"method": "reap:merge=true", "units": ["experts"], "keep": 0.5, "data": TOKENS, "batch_size": 4}
    assert_kills_change_nothing(lambda out: tp.shrink(base, out, **options), tmp_path, kills=4, each=2)
