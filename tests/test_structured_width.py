"""The width of the residual stream: what is cut with a hidden channel, and what stays the same function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from killing import Killed, contents
from transformers import AutoModelForCausalLM

import topiarist as tp
from topiarist.models.families import FAMILIES
from topiarist.pipelines.shrinking.refit_width import Pairs
from topiarist.pipelines.shrinking.splits import Splits
from topiarist.structured import PruneSpec, Task, audit_shrunk, choose, plan_layout, shrunk, units_of
from topiarist.structured.activation import Activation
from topiarist.structured.rotation import check_rotation, principal_axes, readers_of, rotated

TOKENS = tiny.tiny_tokens(2, 12)
TEXT = tiny.tiny_tokens(16, 32)
ALL = ["hidden", "kv_groups", "channels"]
WITHOUT = {"opt", "gpt2", "gpt_neox", "stablelm", "olmoe"}
"""Their configs state no size of a head beside the width."""
CENTRED = {"cohere", "starcoder2"}
"""Layer norms: fewer channels have another mean."""


def without_channels(model, kept: torch.Tensor):
    """Zeros in everything that is written to the channels that go."""
    (group,) = units_of(model, ("hidden",))
    width = len(kept)
    with torch.no_grad():
        for part in group.parts:
            parameter = model.get_parameter(part.parameter)
            if not part.parameter.endswith("norm.weight"):
                parameter.index_fill_(part.axis, (~kept).nonzero().flatten(), 0.0)
    assert group.count == width
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WITHOUT - CENTRED))
def test_channels_of_zeros_leave_nothing_missing(family: str, tied: bool, tmp_path: Path):
    eps = {"layer_norm_eps": 1e-12} if family == "phi" else {"rms_norm_eps": 1e-12}
    model = tiny.tiny_model(family, tie_word_embeddings=tied, **eps)
    kept = torch.arange(32) % 4 != 1
    without_channels(model, kept)
    (group,) = groups = units_of(model, ("hidden",))
    plan = plan_layout(model, groups, {group.key: kept}, "uniform")
    small = shrunk(model, groups, {group.key: kept}, plan)
    with torch.no_grad():
        expected = model(TOKENS).logits
        torch.testing.assert_close(small(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
        small.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert again.config.hidden_size == 24
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in again.parameters()) == parameters - 8 * group.cost


@pytest.mark.parametrize("family", sorted(CENTRED))
def test_layer_norms_are_told_of(family: str):
    model = tiny.tiny_model(family)
    (group,) = groups = units_of(model, ("hidden",))
    assert not group.exact
    kept = choose(groups, {group.key: torch.rand(32)}, 0.6, scope="per_layer")
    small = shrunk(model, groups, kept, plan_layout(model, groups, kept, "uniform"))
    assert torch.isfinite(small(TOKENS).logits).all() and small.config.hidden_size == int(kept[group.key].sum())


@pytest.mark.parametrize(
    ("family", "units", "message"),
    [*((family, ALL, "layer norms from counting") for family in sorted(CENTRED)), ("mixtral", ["experts"], "a router")],
)
def test_zeros_that_are_not_the_cut_are_refused(family: str, units: list[str], message: str, tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", family)
    run(base, tmp_path / "out", method="activation" if units == ALL else "reap", units=units, keep=0.75, refit=False)
    model, spec = AutoModelForCausalLM.from_pretrained(base).eval(), PruneSpec.load(tmp_path / "out")
    with pytest.raises(tp.UnsupportedModel, match=f"zeros do not keep {message}"):
        spec.apply(model)
    before = tiny.tiny_model(family).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", sorted(WITHOUT))
def test_configs_whose_heads_follow_the_width_are_refused(family: str):
    with pytest.raises(tp.UnsupportedModel, match=rf"no {family} config can hold .* would be"):
        units_of(tiny.tiny_model(family), ("hidden",))


@torch.no_grad()
def outputs_of(model, name: str, tokens: torch.Tensor) -> torch.Tensor:
    seen = []
    with_hook = model.get_submodule(name).register_forward_hook(lambda _, __, out: seen.append(out.double()))
    model(tokens)
    with_hook.remove()
    return torch.cat(seen)


def test_activations_are_those_of_the_paper():
    """Mean of |x| over the tokens of a window, 2-norm over windows; hidden channels: the sum over all norms."""
    model, tokens = tiny.tiny_model(), tiny.tiny_tokens(5, 16)
    kinds = ("kv_groups", "channels")
    task = Task(model, [*units_of(model, ("hidden",)), *units_of(model, kinds)], tokens, 0.5, batch_size=2)
    scores = Activation().scores(task)
    names = [f"model.layers.{i}.{norm}" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")]
    expected = sum(
        outputs_of(model, name, tokens).abs().mean(1).square().sum(0).sqrt() for name in [*names, "model.norm"]
    )
    torch.testing.assert_close(scores["model:hidden"], expected, rtol=1e-5, atol=1e-6)
    mean = Activation(over_windows="mean").scores(task)["model:hidden"]
    expected = sum(outputs_of(model, name, tokens).abs().mean(1).sum(0) for name in [*names, "model.norm"])
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    mlp, ups = model.model.layers[1].mlp, []
    hook = mlp.down_proj.register_forward_pre_hook(lambda _, args: ups.append(args[0].double()))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    torch.testing.assert_close(
        scores["model.layers.1.mlp.down_proj:channels"],
        ups[0].abs().mean(1).square().sum(0).sqrt(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_map_is_the_least_squares_optimum():
    torch.manual_seed(0)
    x = torch.randn(500, 8) @ torch.randn(8, 8)
    y = x[:, :5] + 0.1 * torch.randn(500, 5)
    pairs = Pairs.of(8, 5, torch.device("cpu"))
    for rows in (slice(0, 200), slice(200, 500)):
        pairs.add(x[rows], y[rows])
    S = torch.eye(8)[:, :5]
    expected = torch.linalg.lstsq(y, x).solution.T
    torch.testing.assert_close(pairs.best_map(S, damping=0.0), expected, rtol=1e-3, atol=1e-3)
    W = torch.randn(3, 8)
    error = (x @ W.T - y @ (W @ S).T).square().sum() / (x @ W.T).square().sum()
    assert abs(pairs.error(W, W @ S) - float(error)) < 1e-4


def run(base, out, **options) -> tp.ShrinkReport:
    share = {} if "target_params" in options else {"keep": 0.7}
    return tp.shrink(base, out, **({"method": "activation", "data": TEXT, "batch_size": 4} | share | options))


@pytest.mark.parametrize("units", [["hidden"], ALL])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_a_refit_brings_the_narrower_model_nearer(family: str, units: list[str]):
    units = [unit for unit in units if family != "qwen3_moe" or unit != "kv_groups"]
    model = tiny.tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def distance(report: tp.ShrinkReport) -> float:
        with torch.no_grad():
            return float((report.result(TEXT).logits - model(TEXT).logits).square().mean())

    refit, plain = run(model, None, units=units), run(model, None, units=units, refit=False)
    assert distance(refit) < distance(plain)
    assert all(layer.error <= layer.error_without + 1e-6 for layer in refit.layers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert refit.parameters["stored"] <= 0.7 * refit.parameters["dense"]
    assert refit.counts()["hidden"][1] == 32


def test_files_and_papers(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    report = run(base, tmp_path / "out", units=ALL, refit=False)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert opened.config.hidden_size == report.counts()["hidden"][0]
    audit = audit_shrunk(tmp_path / "out")
    assert audit is not None and audit.holds
    assert {unit.kind for unit in audit.units} == set(ALL)
    masked = PruneSpec.load(tmp_path / "out").apply(AutoModelForCausalLM.from_pretrained(base).eval())
    with torch.no_grad():
        torch.testing.assert_close(opened(TOKENS).logits, masked(TOKENS).logits, rtol=1e-3, atol=1e-3)
    again = run(base, tmp_path / "out", units=ALL, refit=False)
    assert again.to_dict() == json.loads(json.dumps(report.to_dict()))
    assert "hidden" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2", "qwen3_moe", "mixtral", "granite", "phi3"])
def test_a_rotation_changes_nothing_by_itself(family: str):
    model = tiny.tiny_model(family, tie_word_embeddings=False)
    (group,) = units_of(model, ("hidden",))
    check_rotation(model, group)
    readers = readers_of(model, group, TOKENS)
    Q, energies = principal_axes(model, group, TOKENS, 2, lambda *_: None)
    torch.testing.assert_close(Q.T @ Q, torch.eye(32, dtype=Q.dtype))
    assert bool((energies.diff() <= 0).all())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    turned = rotated(model, group, readers, Q)
    with torch.no_grad():
        torch.testing.assert_close(turned(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(turned.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_norms_after_a_sublayer_cannot_be_rotated(family: str):
    with pytest.raises(tp.UnsupportedModel, match="does not stand between"):
        run(tiny.tiny_model(family, tie_word_embeddings=False), None, units=["hidden"], rotate=True)


def test_hidden_states_of_few_directions_are_cut_without_loss(tmp_path: Path):
    """Everything that is written lies in 24 directions, none of them a channel: only a rotation finds them."""
    model = tiny.tiny_model(rms_norm_eps=1e-12)
    basis = torch.linalg.qr(torch.randn(32, 24)).Q
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.copy_(parameter @ basis @ basis.T)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.copy_(basis @ basis.T @ parameter)
    options = {"units": ["hidden"], "refit": False, "keep": 24.1 / 32, "round_to": 8}
    found = run(model, None, rotate=True, **options)
    assert found.result.config.hidden_size == 24
    with torch.no_grad():
        torch.testing.assert_close(found.result(TOKENS).logits, model(TOKENS).logits, rtol=1e-3, atol=1e-3)
        plain = run(model, None, **options).result(TOKENS).logits
        assert float((plain - model(TOKENS).logits).abs().max()) > 0.1
    model.save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    run(tmp_path / "base", tmp_path / "out", rotate=True, **options)
    assert PruneSpec.load(tmp_path / "out").rotated
    with pytest.raises(tp.CheckpointError, match="rotated"):
        PruneSpec.load(tmp_path / "out").apply(model)


@pytest.mark.parametrize("target", [None, 20_000])
def test_a_killed_run_ends_in_the_same_bytes(target: int | None, tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=3)
    options = {"units": ALL} if target is None else {"units": [*ALL, "block"], "target_params": target}
    run(base, tmp_path / "whole", **options)

    def kill_at(step: int):
        steps = iter(range(step + 1))

        def progress(*_: object) -> None:
            if next(steps, None) is None:
                raise Killed

        return progress

    for step in (1, 6, 11, 16):
        try:
            run(base, tmp_path / "killed", progress=kill_at(step), **options)
        except Killed:
            continue
    run(base, tmp_path / "killed", **options)
    whole, killed = (contents(tmp_path / name) for name in ("whole", "killed"))
    assert whole["model.safetensors"] == killed["model.safetensors"]
    assert whole["config.json"] == killed["config.json"]


def test_a_target_is_reached_by_the_split_of_lowest_loss():
    model = tiny.tiny_model(num_hidden_layers=4, intermediate_size=128)
    dense = sum(p.numel() for p in model.parameters())
    target = int(0.6 * dense)
    report = run(model, None, units=[*ALL, "block"], target_params=target, search={"values": 3})
    stored = sum(p.numel() for p in report.result.parameters())
    assert 0.9 * target < stored <= target and stored == report.parameters["stored"]
    assert len(report.splits) >= 3 and all(row["parameters"] <= target for row in report.splits)
    best = min(report.splits, key=lambda row: row["loss"])
    assert stored == best["parameters"]
    assert report.result.config.hidden_size == best["hidden"]
    assert report.result.config.num_hidden_layers == best["block"]
    assert report.result.config.intermediate_size == best["channels"]


def test_every_planned_split_has_the_parameters_that_it_says():
    model = tiny.tiny_model(num_hidden_layers=4, tie_word_embeddings=True)
    target = int(0.7 * sum(p.numel() for p in model.parameters()))
    splits = Splits(model, [*ALL, "block"], target, None)
    for hidden in splits.axes["hidden"]:
        for blocks in splits.axes["block"]:
            cuts = splits.cuts({"hidden": hidden, "block": blocks, "kv_groups": 2})
            small = model
            for cut in cuts or ():
                scores = {group.key: torch.rand(group.count) for group in cut.groups}
                kept = choose(cut.groups, scores, cut.keep, scope=cut.scope, counts=cut.counts)
                small = shrunk(small, cut.groups, kept, plan_layout(small, cut.groups, kept, "uniform"))
            if cuts:
                assert 0.9 * target < sum(p.numel() for p in small.parameters()) <= target


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"units": ["hidden"], "layout": "hetero"}, "needs --layout uniform"),
        ("llama", {"units": ["hidden", "block"]}, "shrink twice"),
        ("llama", {"units": ["hidden"], "method": "wanda-sp"}, "wanda-sp cannot score hidden"),
        ("opt", {"units": ["hidden"]}, "no opt config can hold"),
        ("llama", {"units": ALL, "keep": 0.02}, "leaves"),
        ("llama", {"target_params": 10**9}, "no more than the target"),
        ("llama", {"target_params": 100}, "no split over"),
        ("llama", {"target_params": 10_000, "keep": 0.8}, "keep and target_params both say how much stays"),
        ("llama", {"target_params": 20_000, "units": ["hidden"]}, "needs channels"),
        ("llama", {"target_params": 20_000, "layout": "hetero"}, "needs --layout uniform"),
        ("llama", {"target_params": 20_000, "scope": "global"}, "scope global needs --layout hetero"),
        ("llama", {"target_params": 20_000, "units": ["kv_groups", "channels", "ffn"]}, "leave ffn out of the units"),
        ("llama", {"target_params": 20_000, "data": TEXT[:3]}, "too few to hold some out"),
        ("llama", {"search": {"values": 3}}, "no target_params"),
        ("llama", {"rotate": True}, "add hidden"),
        ("llama", {"rotate": True, "target_params": 20_000}, "leave rotate out"),
        ("gemma", {"rotate": True, "units": ["hidden"]}, "one matrix"),
        ("cohere", {"rotate": True, "units": ["hidden"], "tied": False}, "no RMS norm"),
    ],
)
def test_refused_before_any_work(family: str, options, message: str, tmp_path: Path, monkeypatch):
    tied = {"tie_word_embeddings": options.pop("tied")} if "tied" in (options := dict(options)) else {}
    tiny.tiny_checkpoint(tmp_path / "base", family, **tied)
    monkeypatch.setattr(
        "topiarist.models.folder.FolderModel.whole", lambda *_, **__: pytest.fail("weights were loaded")
    )
    with pytest.raises(tp.TopiaristError, match=message):
        run(tmp_path / "base", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
