"""Feed-forward networks pruned as a whole: the published scheme with its improvements off, and what they add."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from reference import baselines
from reference import sparsellm as published
from torch import nn
from transformers import AutoModelForCausalLM

import topiarist as tp
from topiarist import cli
from topiarist.models import FAMILIES, family_of
from topiarist.pages.figures import rounds
from topiarist.pipelines import ffn_joint
from topiarist.pipelines.ffn_joint import JointSolver
from topiarist.pipelines.network import Network
from topiarist.pipelines.stream import BlockStream
from topiarist.sources import LoadedModel, block_matrices

QUICK = tp.SparseLLM(epochs=2)
TOKENS = tiny.tiny_tokens(24, 32)
NETWORKS = sorted(name for name in FAMILIES if name not in ("mixtral", "olmoe", "qwen3_moe"))


def first_network(model) -> tuple[nn.Module, Network]:
    source = LoadedModel(model)
    block = source.load(0)
    network = Network.find(block, source.family.feed_forward, block_matrices(source, 0))
    assert network is not None
    return block, network


def joint(network: Network, X: torch.Tensor, settings: tp.SparseLLM, pattern: str = "2:4") -> JointSolver:
    """A solver on inputs X (num, window, in) that aims at the dense network's outputs."""
    Y = torch.empty(*X.shape[:2], network.down.shape[0])
    network.outputs(X, Y)

    def solve(matrices, weights, gram):
        return settings.solver.together(weights, gram, [tp.parse_pattern(pattern)] * len(matrices))

    return JointSolver(
        settings, network, X, Y, solve, lambda width: SimpleNamespace(values=torch.empty(*X.shape[:2], width))
    )


def inputs(width: int, num: int = 20, window: int = 40) -> torch.Tensor:
    """Correlated tokens with channels of different size."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
    scales = torch.linspace(0.5, 1.5, width)
    return (torch.randn(num, window, width, generator=generator) @ mixing * scales).contiguous()


def no_warning(message: str, category: type[Warning]) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize("family", NETWORKS)
def test_every_row_describes_what_the_block_does(family: str):
    """The network, computed from the row, is what the block hands on, and its activations are what `down` reads."""
    model = tiny.tiny_model(family)
    block, network = first_network(model)
    seen = {}
    hooks = [
        network.first[0].module.register_forward_pre_hook(lambda _, args: seen.update(X=args[0])),
        network.down.module.register_forward_hook(lambda _, args, out: seen.update(p=args[0], Y=out)),
    ]
    with torch.no_grad():
        model(TOKENS[:2])
    for hook in hooks:
        hook.remove()
    X, p, Y = (seen[key].reshape(-1, seen[key].shape[-1]) for key in ("X", "p", "Y"))
    weights = network.weights
    torch.testing.assert_close(network.activate(X @ weights.first.T + network.biases[0]), p, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network(X, weights), Y, rtol=1e-4, atol=1e-4)
    stream = BlockStream(LoadedModel(model), TOKENS[:2], batch_size=1, device=torch.device("cpu"))
    found = stream.inputs(0, block, network.first[0]).values
    torch.testing.assert_close(found.view(-1, found.shape[-1]), X, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_the_published_scheme_with_improvements_switched_off(family: str, passes: int):
    _, network = first_network(tiny.tiny_model(family))
    X, price = inputs(32), {"alpha": 0.5, "beta": 1.5, "gamma": 1.0}
    settings = tp.SparseLLM(epochs=passes - 1, gate_rate=0.01, ridge=1e-9, keep_best=False, held_out=0.0, **price)
    solutions, record = joint(network, X, settings).run("", no_warning)
    assert record.best == ("local" if passes == 1 else f"epoch {passes - 1}")

    def prune(W, H):
        return baselines.sparsegpt(W, H, nm=(2, 4))[0].double()

    columns = X.view(-1, 32).T.double()
    dense = [matrix.weight.double() for matrix in network.matrices]
    if family == "opt":
        b1, b2 = (bias.double() for bias in network.biases)
        expected = published.opt(dense[0], b1, dense[1], b2, columns, prune, passes, **price)
    else:
        expected = published.swiglu(*dense, columns, prune, passes, **price, lr=0.01)
    for solution, wanted in zip(solutions, expected, strict=True):
        # Rounding may turn a close choice of a mask; everything else agrees.
        same = (solution.mask == (wanted != 0)).float().mean()
        assert same > 0.995
        torch.testing.assert_close(
            solution.weight.double() * (wanted != 0),
            wanted * solution.mask,
            rtol=2e-2,
            atol=2e-3 * float(wanted.abs().max()),
        )


@pytest.mark.parametrize("family", ["opt", "llama", "gemma", "phi3", "gpt2"])
@pytest.mark.parametrize("pattern", ["2:4", "0.7"])
@pytest.mark.parametrize("down_refit", [False, True])
def test_no_epoch_makes_a_network_worse(family: str, pattern: str, down_refit: bool):
    _, network = first_network(tiny.tiny_model(family))
    X = inputs(32)
    settings = tp.SparseLLM(epochs=2, down_refit=down_refit)
    solutions, record = joint(network, X, settings, pattern).run("", no_warning)
    assert list(record.errors) == ["local", "epoch 1", "epoch 2", *["down_refit"] * down_refit]
    assert record.errors[record.best] == min(record.errors.values())
    if down_refit:
        alone = joint(network, X, tp.SparseLLM(epochs=0, down_refit=True), pattern).run("", no_warning)[1]
        assert alone.best == "down_refit" and alone.errors["local"] == record.errors["local"]
    # The errors told are those of the block's own arithmetic on the windows held out.
    held = X[-2:].view(-1, 32)
    wanted = network(held, network.weights)
    for matrix, solution in zip(network.matrices, solutions, strict=True):
        matrix.assign(solution.weight)
        assert tp.parse_pattern(pattern).holds(solution.mask)
        assert not (torch.signbit(solution.weight) & (solution.weight == 0)).any()
    found = network(held, network.weights)
    error = float((found - wanted).square().sum() / wanted.square().sum())
    assert error == pytest.approx(record.errors[record.best], rel=1e-4)


def test_the_local_step_is_the_local_solver_alone():
    """Epoch zero is SparseGPT on the same tokens: nothing is lost by asking for no epochs."""
    plain, other = tiny.tiny_model(), tiny.tiny_model()
    settings = tp.SparseLLM(epochs=0, held_out=0.0, recompute_after_attention=False)
    tp.prune(plain, method="sparsegpt", calibration=TOKENS)
    report = tp.prune(other, method=settings, calibration=TOKENS)
    assert [block.best for block in report.joint] == ["local", "local"]
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma", "qwen2_moe"])
def test_files_open_as_the_model_pruned_in_memory(family: str, tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base", family)
    options = {"method": tp.SparseLLM(epochs=2, down_refit=True), "pattern": "2:4", "calibration": TOKENS}
    report = tp.prune(tmp_path / "base", tmp_path / "out", **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    same = tp.prune(model, **options)
    assert report.joint == same.joint and [x.name for x in report.joint] == [x.name for x in same.joint] != []
    assert tp.Report.from_folder(tmp_path / "out").joint == report.joint
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    probe = tiny.tiny_tokens(2, 32, seed=5)
    torch.testing.assert_close(reloaded(probe).logits, model(probe).logits, rtol=0, atol=0)
    provenance, matrices = tp.audit(tmp_path / "out")
    assert provenance["method"] == "sparsellm" and provenance["settings"]["local"] == "sparsegpt"
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
    with pytest.raises(tp.CheckpointError, match="method was"):
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
    with pytest.warns(tp.errors.NumericalWarning, match=r"layers\.0: epoch 1 failed .* a ridge of 0\.01 helped"):
        report = tp.prune(model, method=QUICK, calibration=TOKENS)
    assert list(report.joint[0].errors) == ["local", "epoch 1", "epoch 2"]
    # One time the ridge that was asked for, then ten times it for that epoch alone: damping does not pile up.
    assert ridges == [0.001, 0.01, 0.01, 0.001, 0.001]
    model, plain = tiny.tiny_model(num_hidden_layers=1), tiny.tiny_model(num_hidden_layers=1)
    tp.prune(plain, method=tp.SparseLLM(epochs=0), calibration=TOKENS)
    monkeypatch.setattr(ffn_joint, "refit", fails(10**6))
    with pytest.warns(tp.errors.NumericalWarning, match="kept what came before, sparsegpt at worst"):
        report = tp.prune(model, method=tp.SparseLLM(down_refit=True), calibration=TOKENS)
    assert report.joint[0].best == "local" and list(report.joint[0].errors) == ["local"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_any_solver_of_the_table_may_be_the_local_one():
    for local in (*tp.solvers.SOLVERS, tp.solvers.ALPS(preset="best")):
        report = tp.prune(tiny.tiny_model(), method=tp.SparseLLM(local=local, epochs=1), calibration=TOKENS)
        assert report.sparsity == pytest.approx(0.5) and len(report.joint) == 2
    assert report.settings["local"]["name"] == "alps"
    assert report.command[report.command.index("--set") + 1] == "local=alps"
    assert "the settings of the local solver alps" in report.not_in_command


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


def test_a_module_that_is_no_language_model_is_refused():
    with pytest.raises(tp.UnsupportedModel, match="local solver"):
        tp.prune_module(nn.Linear(8, 8), [torch.randn(4, 8)], method="sparsellm")


def test_every_family_with_dense_blocks_has_a_row():
    assert all(family_of(name).feed_forward for name in FAMILIES if name != "mixtral")


def test_the_command_line_and_the_page(tmp_path: Path, monkeypatch, capsys):
    tiny.tiny_checkpoint(tmp_path / "base")
    tiny.tiny_text(tmp_path, paragraphs=20)
    monkeypatch.chdir(tmp_path)
    command = "topiarist prune base out --method sparsellm --set local=wanda --set epochs=1 --set down_refit=true --pattern 0.7"
    command += " --calibration text.txt --samples 16 --window 32"
    for line in (f"{command} --plan", command):
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capsys.readouterr().err
        assert (tmp_path / "out").exists() == ("--plan" not in line)
    report = tp.Report.from_folder(tmp_path / "out")
    assert [list(block.errors) for block in report.joint] == [["local", "epoch 1", "down_refit"]] * 2
    assert " ".join(report.command).startswith(
        "topiarist prune base OUT --method sparsellm --set local=wanda --set epochs=1"
    )
    page = (tmp_path / "out" / "pruning_report.html").read_text()
    assert page.count('<polyline class="thin"') == 2 and "model.layers.1: local " in page
    for setting, said in (
        ("local=nobody", "unknown local solver"),
        ("alpha=0", "must be above 0"),
        ("gama=1", "has no field"),
    ):
        monkeypatch.setattr(sys, "argv", f"{command} --set {setting}".split())
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_lines_of_the_page_are_relative_to_the_local_solver():
    blocks = [
        {"name": "a", "errors": {"local": 0.2, "epoch 1": 0.1, "epoch 2": 0.3}, "best": "epoch 1"},
        {"name": "b", "errors": {"local": 0.4, "epoch 1": 0.3}, "best": "epoch 1"},
        {"name": "dead", "errors": {"local": 0.0, "epoch 1": 0.0}, "best": "local"},
    ]
    found = rounds(blocks)
    assert found is not None and (found.low, found.high) == (0.5, pytest.approx(1.5))
    assert [len(points) for _, points in found.lines] == [3, 2] and found.median == found.lines[0][1]
    assert rounds([]) is None and rounds([{"name": "a", "errors": {"local": 0.2}, "best": "local"}]) is None
