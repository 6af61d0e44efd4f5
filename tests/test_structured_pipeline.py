"""tp.shrink end to end: files, resume, refit, recovery, refusals before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import topiarist as tp
from topiarist.checkpoints.writing import STATES
from topiarist.structured import PruneSpec, audit_shrunk, gates, units_of
from topiarist.structured.refit import refit_columns

TOKENS = tiny.tiny_tokens(16, 32)


def run(base, out, **options) -> tp.ShrinkReport:
    return tp.shrink(base, out, **({"method": "magnitude", "keep": 0.6, "data": TOKENS, "batch_size": 4} | options))


@pytest.mark.parametrize("layout", ["uniform", "hetero", "padded", "masked"])
def test_the_folder_opens_and_says_what_it_is(layout: str, tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base")
    report = run(tmp_path / "base", tmp_path / "out", layout=layout, refit=False, max_waste=1.0)
    opened = tp.load_pruned(tmp_path / "out")
    assert sum(p.numel() for p in opened.parameters()) == report.parameters["stored"]
    if layout != "hetero":
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "pruning_spec.json",
        "pruning_report.html",
        "README.md",
        "tokenizer.json",
        "generation_config.json",
    } <= names
    assert ("modeling_pruned.py" in names) == (layout == "hetero")
    assert STATES not in names

    spec = PruneSpec.load(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    groups = units_of(base, spec.units)
    with torch.no_grad(), gates(base, groups) as masks:
        masks.update({key: mask.float() for key, mask in spec.masks(groups).items()})
        expected = base(TOKENS[:2]).logits
    with torch.no_grad():
        torch.testing.assert_close(opened(TOKENS[:2]).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(spec.apply(base)(TOKENS[:2]).logits, expected, rtol=1e-5, atol=1e-5)
    audit = audit_shrunk(tmp_path / "out")
    assert audit is not None and audit.holds and audit.parameters == report.parameters["stored"]
    again = run(tmp_path / "base", tmp_path / "out", layout=layout, refit=False, max_waste=1.0)
    assert again.to_dict() == json.loads(json.dumps(report.to_dict()))


def test_a_spec_of_the_first_version_is_read_in_todays_words(tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base")
    run(tmp_path / "base", tmp_path / "out", refit=False)
    spec = PruneSpec.load(tmp_path / "out")
    old = {**json.loads(spec.to_json()), "format": 1, "method": "hybrid", "units": ["heads", "channels"]}
    old["kept"] = {key.replace(":kv_groups", ":heads"): known for key, known in old["kept"].items()}
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.warns(UserWarning, match="'heads' is 'kv_groups' today"):
        found = PruneSpec.load(tmp_path / "old.json")
    assert (found.units, found.kept, found.method) == (("kv_groups", "channels"), spec.kept, "taylor")


def test_a_spec_of_a_search_that_left_an_axis_whole_applies(tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base")
    run(tmp_path / "base", tmp_path / "out", refit=False)
    spec = PruneSpec.load(tmp_path / "out")
    expected, found = (
        wanted.apply(tiny.tiny_model()).state_dict() for wanted in (spec, replace(spec, units=("hidden", *spec.units)))
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(tp.CheckpointError, match=r"cannot read .*odd\.json as a PruneSpec"):
        PruneSpec.load(tmp_path / "odd.json")


def test_the_audit_sees_columns_that_came_back(tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base")
    run(tmp_path / "base", tmp_path / "out", layout="masked", refit=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(1.0)
    model.save_pretrained(tmp_path / "out")
    audit = audit_shrunk(tmp_path / "out")
    assert audit is not None and not audit.holds
    assert [unit.name for unit in audit.units if not unit.holds] == ["model.layers.1.mlp.down_proj"]


def test_refit_is_the_least_squares_optimum():
    torch.manual_seed(0)
    x, W = torch.randn(400, 12) @ torch.randn(12, 12), torch.randn(5, 12)
    keep = torch.arange(12) % 3 != 0
    exact = torch.linalg.lstsq(x[:, keep], x @ W.T).solution.T
    found = refit_columns(W, x.T @ x, keep, damping=0.0)
    torch.testing.assert_close(found[:, keep], exact, rtol=1e-3, atol=1e-3)
    assert not found[:, ~keep].any()
    torch.testing.assert_close(refit_columns(W, x.T @ x, torch.ones(12, dtype=torch.bool)), W)
    scaled = torch.rand(12) + 0.5  # scaling an input and its column the other way changes nothing
    other = refit_columns(W / scaled, (x * scaled).T @ (x * scaled), keep)
    torch.testing.assert_close(other * scaled, refit_columns(W, x.T @ x, keep), rtol=1e-3, atol=1e-3)
    dead = x.clone()
    dead[:, 1] = 0
    assert torch.equal(refit_columns(W, dead.T @ dead, keep)[:, 1], W[:, 1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_refit_lowers_the_error_of_every_consumer(family: str, tmp_path: Path):
    model = tiny.tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = run(model, None, units=["channels"])
    assert report.layers and all(layer.error <= layer.error_without for layer in report.layers)
    assert sum(layer.error for layer in report.layers) < 0.9 * sum(layer.error_without for layer in report.layers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
        "the caller's model changed"
    )
    plain = run(model, None, units=["channels"], refit=False)

    def distance(small) -> float:
        with torch.no_grad():
            return float((small(TOKENS).logits - model(TOKENS).logits).square().mean())

    assert distance(report.result) < distance(plain.result)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("layout", ["uniform", "padded"])
def test_recovery_nears_the_dense_model_and_keeps_padding_empty(kind: str, layout: str, tmp_path: Path):
    model = tiny.tiny_model()
    recover = tp.Distill(kind=kind, steps=20, sequences=4, learning_rate=3e-3)
    options = {
        "refit": False,
        "layout": layout,
        "max_waste": 2.0,
        "scope": None if layout == "uniform" else "parameters",
    }
    plain = run(model, None, **options)
    report = run(model, None, recover=recover, **options)
    assert report.recovered[-1]["loss"] < report.recovered[0]["loss"] and report.recovered[-1]["step"] == 20
    with torch.no_grad():
        moved = report.result(TOKENS).logits - model(TOKENS).logits
        still = plain.result(TOKENS).logits - model(TOKENS).logits
    assert float(moved.square().mean()) < float(still.square().mean())
    for name, value in plain.result.state_dict().items():
        if ".layers." in name and value.ndim == 2:
            assert not report.result.state_dict()[name][value == 0].any(), name
    for wrong in ({"kind": "half"}, {"steps": -1}, {"rank": 0}):
        with pytest.raises(tp.TopiaristError, match=f"Distill: {next(iter(wrong))} is"):
            tp.Distill(**wrong)


def test_a_method_s_biases_are_kept_or_their_loss_is_told(tmp_path: Path):
    class Biased(type(tp.structured.METHODS["random"]())):
        def biases(self, task, kept):
            return {group.consumer: torch.ones(32) for group in task.groups if group.kind == "channels"}

    options = {"method": Biased(), "data": None, "refit": False, "units": ["channels"]}
    held = run(tiny.tiny_model(), None, **options)
    assert torch.equal(held.result.model.layers[0].mlp.down_proj.bias, torch.ones(32))
    with pytest.warns(UserWarning, match="left out"):
        bare = run(tiny.tiny_model("mistral"), None, **options)
    assert bare.result.model.layers[0].mlp.down_proj.bias is None and "left out" in bare.warnings[0]
    assert held.parameters["stored"] == held.parameters["kept"] + held.parameters["biases"]
    assert "biases" not in bare.parameters


def test_where_nothing_goes_no_bias_comes():
    report = run(tiny.tiny_model(), None, method="flap", refit=False, units=["kv_groups", "channels"], keep=0.7)
    assert report.counts()["kv_groups"][:2] == (4, 4) and report.result.config.mlp_bias
    assert not report.result.config.attention_bias and report.result.model.layers[0].self_attn.o_proj.bias is None


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("layout", ["uniform", "hetero"])
@pytest.mark.filterwarnings("ignore:the biases that make up for what was cut are left out")
def test_experts_go_without_biases_and_others_keep_theirs(family: str, layout: str):
    """Experts are one tensor; qwen2_moe's shared expert is a matrix, for whose bias its own config has no room."""
    options = {"method": "flap", "refit": False, "units": ["channels"], "layout": layout}
    with pytest.warns(UserWarning, match="of experts are left out"):
        report = run(tiny.tiny_model(family), None, **options)
    with_bias = {
        name.split(".", 3)[3] for name, _ in report.result.named_parameters() if name.endswith("down_proj.bias")
    }
    shared = family == "qwen2_moe" and layout == "hetero"
    assert with_bias == ({"mlp.shared_expert.down_proj.bias"} if shared else set())


@pytest.mark.parametrize(
    ("options", "degrees"),
    [
        ({"units": ["channels"], "keep": 0.75}, [1, 2]),  # 48 channels, both KV heads
        ({"units": ["kv_groups"], "keep": 0.5}, [1]),
        ({"units": ["heads"], "keep": 0.75, "num_attention_heads": 8}, [1, 2]),  # three of four heads of each
        ({"units": ["block"], "keep": 0.5}, [1, 2]),
    ],
)
def test_degrees_of_tensor_parallelism_divide_what_was_not_cut_too(options: dict[str, Any], degrees: list[int]):
    heads = {"num_attention_heads": options.pop("num_attention_heads", 4)}
    assert run(tiny.tiny_model(**heads), None, method="magnitude", refit=False, **options).tensor_parallel == degrees


def test_uniform_results_can_be_shrunk_again(tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=3)
    run(tmp_path / "base", tmp_path / "short", method="random", units=["block"], keep=0.7)
    run(tmp_path / "short", tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.config.num_hidden_layers == 2 and opened.config.intermediate_size < 64
    assert opened.config.pruning_config["base_model"].endswith("short")


def test_what_was_pruned_otherwise_is_refused(tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune(tmp_path / "base", tmp_path / "sparse", method="magnitude", calibration=TOKENS)
    run(tmp_path / "base", tmp_path / "mixed", layout="hetero")
    for name in ("sparse", "mixed"):
        with pytest.raises(tp.CheckpointError, match="already pruned"):
            run(tmp_path / name, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "options", "error", "message"),
    [
        ("llama", {"keep": 0.0}, tp.TopiaristError, "keep is 0.0, should be greater than 0"),
        ("llama", {"keep": 1.5}, tp.TopiaristError, "keep is 1.5, should be less"),
        ("llama", {"keep": 0.01}, tp.PatternError, "no legal number"),
        ("llama", {"method": "guess"}, tp.TopiaristError, "choose one of .*magnitude"),
        ("llama", {"layout": "uneven"}, tp.TopiaristError, "layout is 'uneven', should be"),
        ("llama", {"units": ["attention"]}, tp.TopiaristError, "leaves out single sublayers"),
        ("llama", {"units": ["experts"]}, tp.UnsupportedModel, "no experts"),
        ("llama", {"scope": "global"}, tp.PatternError, "needs --layout hetero"),
        ("llama", {"scope": "local", "layout": "hetero"}, tp.TopiaristError, "scope is 'local', should be"),
        ("llama", {"round_to": 65}, tp.PatternError, "round_to 65 does not fit"),
        ("llama", {"data": None}, tp.CalibrationError, "refit needs text"),
        ("llama", {"data": ["short"], "tokenizer": tiny.tiny_tokenizer()}, tp.CalibrationError, "add text"),
        (
            "llama",
            {"window": 65, "data": ["text"], "tokenizer": 1},
            tp.CalibrationError,
            "longer than the model's limit",
        ),
        ("opt", {}, tp.UnsupportedModel, "no opt config can hold 3 kv_groups"),
        ("gpt2", {}, tp.UnsupportedModel, "choose other --units, or --layout hetero"),
        ("mixtral", {"units": ["experts"], "layout": "padded"}, tp.TopiaristError, "router"),
        ("qwen2_moe", {"round_to": 4}, tp.PatternError, "multiples of 8"),
    ],
)
def test_refused_before_any_work(family: str, options, error, message: str, tmp_path: Path, monkeypatch):
    tiny.tiny_checkpoint(tmp_path / "base", family)
    monkeypatch.setattr(
        "topiarist.models.folder.FolderModel.whole", lambda *_, **__: pytest.fail("weights were loaded")
    )
    with pytest.raises(error, match=message):
        run(tmp_path / "base", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_multi_query_attention_and_tied_embeddings(tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "mqa", "gemma", num_key_value_heads=1)
    report = run(tmp_path / "mqa", tmp_path / "out")
    assert report.units == ["heads", "channels"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.config.num_key_value_heads == 1 and opened.config.num_attention_heads == 2
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert sum(p.numel() for p in opened.parameters()) == report.parameters["stored"] == report.parameters["kept"]


def test_a_config_that_knows_few_head_counts_gets_the_nearest():
    model = tiny.tiny_model("gemma2", num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    with pytest.warns(UserWarning, match="keeps 4 instead of 5"):
        report = run(model, None, keep=0.7, refit=False)
    assert report.result.config.num_attention_heads == 4


def test_a_model_object_can_be_saved_and_its_run_found_again(tmp_path: Path):
    model = tiny.tiny_model()
    first = run(model, tmp_path / "out", tokenizer=tiny.tiny_tokenizer())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, opened.state_dict()[name]) for name, value in first.result.state_dict().items())
    again = run(model, tmp_path / "out")
    assert json.dumps(again.to_dict()) == json.dumps(first.to_dict())


def test_another_recipe_and_another_model_are_refused(tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base")
    run(tmp_path / "base", tmp_path / "out")
    with pytest.raises(tp.CheckpointError, match=r"keep was 0\.6 and is 0\.7"):
        run(tmp_path / "base", tmp_path / "out", keep=0.7)
    with pytest.raises(tp.CheckpointError, match="layout was 'uniform'"):
        run(tmp_path / "base", tmp_path / "out", layout="masked")
