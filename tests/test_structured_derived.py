"""Types without a row: units found by asking transformers, and tried on the weights before anything is scored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from structured_checks import check, random_scores
from sweep.check import tokens
from sweep.tiny_types import tiny_folder, tiny_model
from transformers import AutoModelForCausalLM

import topiarist as tp
from topiarist.models.opened import open_model
from topiarist.structured import (
    Task,
    audit_shrunk,
    choose,
    default_kinds,
    gates,
    mask_in_place,
    plan_layout,
    proof,
    shrunk,
    units_of,
)
from topiarist.structured.occlusion import Occlusion
from topiarist.structured.proposals import proposals
from topiarist.structured.trial import Prefix, gated_loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SAMPLE = [
    ("qwen3_next", "kv_groups"),  # a gate a head beside the queries; layers without softmax attention
    ("deepseek_v3", "kv_groups"),  # latent attention
    ("deepseek_v3", "channels"),  # dense and shared networks, experts
    ("gpt_oss", "channels"),  # experts stored transposed, gate and up interleaved, with biases
    ("llama4_text", "channels"),  # all experts in one product
    ("glm4", "heads"),
    ("bloom", "block"),
]


def groups_of(model: Any, kind: str, keep: float = 0.6) -> tuple[Any, Any]:
    groups = units_of(model, (kind,))
    return groups, choose(groups, random_scores(groups), keep, scope="per_layer")


@pytest.mark.parametrize(("model_type", "kind"), SAMPLE)
def test_the_cut_model_computes_what_the_masked_one_does(model_type: str, kind: str, tmp_path: Path):
    model = tiny_model(model_type)
    groups, kept = groups_of(model, kind)
    assert not all(bool(mask.all()) for mask in kept.values())
    check(model, groups, kept, "uniform", tmp_path)


@pytest.mark.parametrize(("model_type", "kind"), [case for case in SAMPLE if case[1] != "block"])
def test_cutting_units_of_zero_weights_changes_nothing(model_type: str, kind: str):
    model = tiny_model(model_type)
    groups, kept = groups_of(model, kind)
    masked = copy.deepcopy(model)
    mask_in_place(masked, groups, kept)
    small = shrunk(masked, groups, kept, plan_layout(masked, groups, kept, "uniform"))
    with torch.no_grad():
        torch.testing.assert_close(small(tokens()).logits, masked(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_counts_are_known_without_weights():
    model = tiny_model("deepseek_v3")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    for kind in ("kv_groups", "channels"):
        found, expected = (units_of(m, (kind,)) for m in (empty, model))
        assert [(g.key, g.count, g.cost, g.place) for g in found] == [
            (g.key, g.count, g.cost, g.place) for g in expected
        ]


def test_layers_of_their_own_width(tmp_path: Path):
    model = tiny_model("deepseek_v3")
    groups = units_of(model, ("channels",))
    kept = choose(groups, random_scores(groups), 0.6)
    check(model, groups, kept, "hetero", tmp_path, opened=tp.load_pruned)


def test_a_wrong_order_of_units_in_a_fused_matrix_is_refused():
    model = tiny_model("gpt_oss")
    (stacked,) = proposals(model, "channels", "stacked")
    with pytest.raises(tp.UnsupportedModel, match="it computes something else"):
        proof.proven(model, [(stacked.groups, stacked.after)])


def test_a_trial_of_a_late_block_whose_keys_are_an_earlier_one_s():
    model = tiny_model("gemma4_unified_text")
    groups = units_of(model, ("channels",))
    assert model.config.num_kv_shared_layers and groups[-1].block == model.config.num_hidden_layers - 1
    task, mask = Task(model, groups, tokens(), 0.5), {groups[-1].key: torch.zeros(groups[-1].count)}
    with gates(model, groups) as masks:
        whole = gated_loss(task, masks, mask, tokens())
        with Prefix(model, tokens()) as prefix:
            prefix.begin_at(groups[-1].block)
            assert gated_loss(task, masks, mask, tokens()) == whole
    scores = Occlusion(slices=1).scores(task)
    assert all(bool(torch.isfinite(score).all()) for score in scores.values())


@pytest.mark.parametrize("model_type", ["qwen3_next", "glm_moe_dsa"])  # replayed, and paused at every block
def test_a_folder_is_shrunk_and_opens_by_transformers_alone(model_type: str, tmp_path: Path):
    base = tiny_folder(tmp_path / "base", model_type)
    report = tp.shrink(
        base, tmp_path / "out", method="wanda-sp", units="channels", keep=0.6, data=tokens(), batch_size=4
    )
    again, about = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    assert sum(p.numel() for p in again.parameters()) == report.parameters["stored"] < report.parameters["dense"]
    with torch.no_grad():
        assert bool(torch.isfinite(again(tokens()).logits).all())
    assert all(layer.error <= layer.error_without for layer in report.layers) and report.layers
    audit = audit_shrunk(tmp_path / "out")
    assert audit is not None and audit.holds


@pytest.mark.parametrize(
    ("model_type", "units", "reason"),
    [
        ("mamba", "kv_groups", "cannot be cut"),
        ("bloom", "channels", "no number of its config states them"),
        ("gemma3n_text", "channels", "it computes something else"),  # the largest of all channels stay
        ("hrm_text", "block", r"\(hrm_text: it would have 2 of them\): choose"),
        ("blt", "block", r"\(blt: it would have 2 of them\): choose"),  # another number counts them
        ("minimax", "kv_groups", r"cut: \S+ would be \(1, 4, .*\), and its config asks for \(1, 2, .*\); "),  # a buffer
        ("minicpm3", "block", "residual_scale of block 0 would be"),  # it follows the number of blocks
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason_before_any_work(
    model_type: str, units: str, reason: str, tmp_path: Path
):
    base = tiny_folder(tmp_path / "base", model_type)
    with pytest.raises(tp.UnsupportedModel, match=reason):
        tp.shrink(base, tmp_path / "out", method="magnitude", units=units, refit=False)
    assert not (tmp_path / "out").exists()


def test_default_units_are_those_that_the_config_can_state():
    assert default_kinds(open_model(tiny_model("qwen3_next")).model) == ("kv_groups", "channels")
    with pytest.raises(
        tp.UnsupportedModel, match=r"^kv_groups of model type .mamba2. cannot be cut .*channels of model type"
    ):
        default_kinds(open_model(tiny_model("mamba2")).model)
    assert default_kinds(open_model(tiny_model("bart")).model) == ("channels",)
