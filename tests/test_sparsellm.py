"""SparseLLM through the pipeline: files, resume, half precision, trouble, what it refuses, the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import topiarist as tp
from topiarist import cli
from topiarist.pipelines.pruning import ffn_joint
from topiarist.pipelines.pruning.ffn_joint import JointSolver

QUICK = tp.SparseLLM(epochs=2, down_refit=False)
TOKENS = tiny.tiny_tokens(24, 32)


def test_the_local_step_is_the_local_solver_alone():
    """Epoch zero is SparseGPT on the same tokens: nothing is lost by asking for no epochs."""
    plain, other = tiny.tiny_model(), tiny.tiny_model()
    settings = tp.SparseLLM(epochs=0, down_refit=False, held_out=0.0, recompute_after_attention=False)
    tp.prune(plain, method="sparsegpt", calibration=TOKENS)
    report = tp.prune(other, method=settings, calibration=TOKENS)
    assert [block.best for block in report.joint] == ["local", "local"]
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma", "qwen2_moe"])
def test_files_open_as_the_model_pruned_in_memory(family: str, tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base", family)
    options = {"method": tp.SparseLLM(epochs=2), "pattern": "2:4", "calibration": TOKENS}
    report = tp.prune(tmp_path / "base", tmp_path / "out", **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    same = tp.prune(model, **options)
    assert report.joint == same.joint and [x.name for x in report.joint] == [x.name for x in same.joint] != []
    assert tp.Report.from_folder(tmp_path / "out").joint == report.joint
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    probe = tiny.tiny_tokens(2, 32, seed=5)
    torch.testing.assert_close(reloaded(probe).logits, model(probe).logits, rtol=0, atol=0)
    provenance, matrices = tp.audit(tmp_path / "out")
    assert provenance["method"] == "sparsellm" and provenance["settings"]["local"]["name"] == "sparsegpt"
    assert all(matrix.holds and matrix.sparsity >= 0.5 for matrix in matrices)
    assert sorted(x.name for x in matrices) == sorted(x.name for x in report.layers)


def test_two_runs_and_a_resumed_one_write_the_same_bytes(tmp_path: Path, monkeypatch):
    tiny.tiny_checkpoint(tmp_path / "llama", num_hidden_layers=3, dtype=torch.bfloat16)
    real, calls = JointSolver.run, []

    def stops_in_the_second(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    options = {"method": QUICK, "pattern": "0.6", "calibration": TOKENS}
    whole = tp.prune(tmp_path / "llama", tmp_path / "whole", **options)
    tp.prune(tmp_path / "llama", tmp_path / "again", **options, spill=tmp_path / "spill")
    monkeypatch.setattr(JointSolver, "run", stops_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        tp.prune(tmp_path / "llama", tmp_path / "out", **options)
    monkeypatch.setattr(JointSolver, "run", real)
    resumed = tp.prune(tmp_path / "llama", tmp_path / "out", **options)
    assert resumed.joint == whole.joint and len(resumed.joint) == 3
    for path in (tmp_path / "whole").iterdir():
        if path.name != "pruning_run.json":
            for folder in ("again", "out"):
                assert path.read_bytes() == (tmp_path / folder / path.name).read_bytes(), (folder, path.name)
    with pytest.raises(tp.CheckpointError, match=r"method .* was"):
        tp.prune(tmp_path / "llama", tmp_path / "out", **(options | {"method": tp.SparseLLM(epochs=1)}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_half_precision_models_stay_finite(family: str, dtype: torch.dtype):
    model = tiny.tiny_model(family, dtype=dtype)
    report = tp.prune(model, method=tp.SparseLLM(epochs=3), pattern="0.8", calibration=TOKENS)
    assert not [w for w in report.warnings if "failed" in w]
    assert all(parameter.dtype == dtype and torch.isfinite(parameter).all() for parameter in model.parameters())
    assert all(min(block.errors.values()) == block.errors[block.best] < 1.5 for block in report.joint)


def test_trouble_is_retried_with_more_ridge_and_then_given_up(monkeypatch):
    real, ridges = ffn_joint.refit, []

    def fails(times: int):
        def refit(G, C, start, ridge):
            ridges.append(ridge)
            return real(G, C, start, ridge) * (float("nan") if len(ridges) <= times else 1.0)

        return refit

    model = tiny.tiny_model(num_hidden_layers=1)
    monkeypatch.setattr(ffn_joint, "refit", fails(1))
    with pytest.warns(tp.errors.NumericalWarning, match=r"layers\.0: epoch 1 failed .* a ridge of 0\.1 helped"):
        report = tp.prune(model, method=QUICK, calibration=TOKENS)
    assert list(report.joint[0].errors) == ["local", "epoch 1", "epoch 2"]
    # One time the ridge that was asked for, then ten times it for that epoch alone: damping does not pile up.
    base = 0.01 * 32 / (22 * 32)
    assert ridges == pytest.approx([base, base * 2, 10 * base, 10 * base * 2, base, base * 2])
    model, plain = tiny.tiny_model(num_hidden_layers=1), tiny.tiny_model(num_hidden_layers=1)
    tp.prune(plain, method=tp.SparseLLM(epochs=0, down_refit=False), calibration=TOKENS)
    monkeypatch.setattr(ffn_joint, "refit", fails(10**6))
    with pytest.warns(tp.errors.NumericalWarning, match="kept what came before, sparsegpt at worst"):
        report = tp.prune(model, method=tp.SparseLLM(), calibration=TOKENS)
    assert report.joint[0].best == "local" and list(report.joint[0].errors) == ["local"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_any_solver_of_the_table_may_be_the_local_one():
    for local in (*tp.solvers.SOLVERS, tp.solvers.ALPS(preset="best")):
        model = tiny.tiny_model(num_hidden_layers=1)
        report = tp.prune(model, method=tp.SparseLLM(local=local, epochs=1), calibration=TOKENS)
        assert report.sparsity == pytest.approx(0.5) and len(report.joint) == 1
    assert report.settings["local"]["name"] == "alps"
    assert report.command[report.command.index("--method") + 1] == "sparsellm:local=(alps:preset=best),epochs=1"


def test_inputs_and_targets_may_be_those_before_attention_was_pruned():
    found = [
        tp.prune(tiny.tiny_model(), method=settings, pattern="0.7", calibration=TOKENS).joint[0].errors["local"]
        for settings in (
            tp.SparseLLM(epochs=0),
            tp.SparseLLM(epochs=0, target="dense"),
            tp.SparseLLM(epochs=0, recompute_after_attention=False),
        )
    ]
    # A target for other inputs than those at hand can be met less well.
    assert found[1] > found[0] and len(set(found)) == 3


def test_experts_are_not_joined_and_that_is_said_once():
    model, plain = tiny.tiny_model("mixtral"), tiny.tiny_model("mixtral")
    with pytest.warns(UserWarning, match="mixtral: experts are pruned one by one by SparseGPT"):
        report = tp.prune(model, method="sparsellm", calibration=TOKENS)
    tp.prune(plain, method="sparsegpt", calibration=TOKENS)
    assert sum("one by one" in warning for warning in report.warnings) == 1 and report.joint == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_network_that_stays_dense_in_part_is_left_to_the_local_solver():
    with pytest.warns(UserWarning, match=r"layers\.1: its feed-forward network stays dense in part"):
        report = tp.prune(tiny.tiny_model(), method=QUICK, calibration=TOKENS, skip=[r"1\.mlp\.down_proj"])
    assert [block.name for block in report.joint] == ["model.layers.0"]
    report = tp.prune(tiny.tiny_model(), method=QUICK, calibration=TOKENS, skip=["self_attn"])
    assert len(report.joint) == 2 and len(report.layers) == 6


def test_true_sequential_goes_through_attention_in_stages():
    model, other = tiny.tiny_model(), tiny.tiny_model()
    tp.prune(model, method=QUICK, calibration=TOKENS, true_sequential=True)
    tp.prune(other, method=QUICK, calibration=TOKENS)
    a, b = (m.model.layers[0].self_attn for m in (model, other))
    assert torch.equal(a.q_proj.weight, b.q_proj.weight) and not torch.equal(a.o_proj.weight, b.o_proj.weight)
    with pytest.raises(tp.TopiaristError, match="recompute_after_attention=false"):
        settings = tp.SparseLLM(recompute_after_attention=False)
        tp.prune(tiny.tiny_model(), method=settings, calibration=TOKENS, true_sequential=True)


def test_refinement_follows_as_after_any_method():
    report = tp.prune(tiny.tiny_model(), method=QUICK, calibration=TOKENS, batch_size=4, refine=True)
    assert len(report.refined) == len(report.joint) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local": "sparsellm"}, "unknown local"),
        ({"alpha": 0.0}, "alpha"),
        ({"epochs": -1}, "epochs"),
        ({"held_out": 1.0}, "held_out"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str):
    with pytest.raises(tp.TopiaristError, match=message):
        tp.SparseLLM(**settings)


def test_something_is_left_to_fit():
    method = tp.SparseLLM(local="wanda", epochs=1, down_refit=False, held_out=0.99)
    report = tp.prune(tiny.tiny_model(), method=method, calibration=TOKENS, batch_size=4)
    assert len(report.joint) == 2


def test_a_module_that_is_no_language_model_is_refused():
    with pytest.raises(tp.UnsupportedModel, match="local solver"):
        tp.prune_module(nn.Linear(8, 8), [torch.randn(4, 8)], method="sparsellm")


def test_the_command_line_and_the_page(tmp_path: Path, monkeypatch, capsys):
    tiny.tiny_checkpoint(tmp_path / "base")
    tiny.tiny_text(tmp_path, paragraphs=20)
    monkeypatch.chdir(tmp_path)
    command = "topiarist prune base out --method sparsellm:local=wanda,epochs=1,down_refit=true --pattern 0.7"
    command += " --calibration text.txt --samples 16 --window 32"
    for line in (f"{command} --plan", command):
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capsys.readouterr().err
        assert (tmp_path / "out").exists() == ("--plan" not in line)
    report = tp.Report.from_folder(tmp_path / "out")
    assert [list(block.errors) for block in report.joint] == [["local", "epoch 1", "down_refit"]] * 2
    assert " ".join(report.command).startswith("topiarist prune base OUT --method sparsellm:local=wanda,epochs=1 ")
    page = (tmp_path / "out" / "pruning_report.html").read_text()
    assert page.count('<polyline class="thin"') == 2 and "model.layers.1: local " in page
    for setting, said in (
        ("gate_rate=-1", "should be greater than 0"),
        ("alpha=0", "should be greater than 0"),
        ("gama=1", "has no field"),
    ):
        monkeypatch.setattr(sys, "argv", command.replace("epochs=1", f"epochs=1,{setting}").split())
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2 and said in capsys.readouterr().err
