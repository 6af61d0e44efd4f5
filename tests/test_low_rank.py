"""The low-rank companion: best of its rank in the Gram's norm, an adapter that PEFT opens, the same bytes after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from killing import Killed, contents
from peft import PeftModel
from reference.low_rank import best_low_rank
from safetensors.torch import load_file
from tiny import tiny_checkpoint, tiny_model, tiny_text, tiny_tokens

import topiarist as tp
from topiarist.checkpoints.finished import check_finished
from topiarist.cli import main
from topiarist.core.errors import CheckpointError, NumericalWarning, TopiaristError, UnsupportedModel
from topiarist.core.grammar import OptionError
from topiarist.core.linalg import reconstruction_error
from topiarist.solvers.low_rank import low_rank_companion

TOKENS = tiny_tokens(8, 32)
SETTINGS = {"pattern": "2:4", "method": "wanda", "data": TOKENS, "low_rank": 4}


def problem(out: int, width: int, tokens: int = 512) -> tuple[torch.Tensor, torch.Tensor, tp.Gram]:
    generator = torch.Generator().manual_seed(out)
    weight, mix = torch.randn(out, width, generator=generator), torch.randn(width, width, generator=generator)
    gram = tp.Gram(width)
    gram.add(torch.randn(tokens, width, generator=generator) @ mix)
    return weight, tp.solvers.SparseGPT()(weight, gram, tp.parse_pattern("2:4")).weight, gram


@pytest.mark.parametrize(("out", "width"), [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_it_is_the_best_of_its_rank(out: int, width: int, rank: int):
    weight, pruned, gram = problem(out, width)
    found = low_rank_companion(weight, pruned, gram, rank)
    best = best_low_rank(weight - pruned, gram.matrix, rank)
    assert found.A.shape == (rank, width) and found.B.shape == (out, rank)
    wanted = reconstruction_error(weight, pruned + best.float(), gram)
    assert found.error == pytest.approx(reconstruction_error(weight, pruned + found.B @ found.A, gram), abs=1e-7)
    assert found.error == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert found.error < reconstruction_error(weight, pruned, gram)


def test_a_gram_without_an_inverse_and_a_rank_above_the_shape_are_served():
    weight, pruned, gram = problem(40, 24, tokens=6)
    found = low_rank_companion(weight, pruned, gram, 100)
    assert found.A.shape == (24, 24) and found.error < 1e-5


def test_a_gram_of_few_tokens_is_served_with_a_warning():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(256, 256, generator=generator) * (torch.arange(1, 257) ** -0.6)[:, None]
    gram = tp.Gram(256)
    gram.add(torch.randn(64, 256, generator=generator) @ mix)
    weight = torch.randn(512, 256, generator=generator)
    pruned = weight * tp.NM(2, 4).mask(weight.abs())
    with pytest.warns(NumericalWarning, match="not positive definite"):
        found = low_rank_companion(weight, pruned, gram, 16)
    assert found.error < 0.5 * reconstruction_error(weight, pruned, gram)


def test_nothing_is_made_up_for_where_nothing_was_lost():
    weight, _, gram = problem(24, 40)
    assert low_rank_companion(weight, weight, gram, 4).error < 1e-10


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_opens_what_is_beside_the_checkpoint(family: str, tmp_path: Path):
    base = tiny_checkpoint(tmp_path / "base", family)
    report = tp.prune(base, tmp_path / "out", **SETTINGS)
    tp.prune(base, tmp_path / "plain", **{**SETTINGS, "low_rank": None})
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain")}
    assert all(torch.equal(weights["out"][key], value) for key, value in weights["plain"].items())
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * len(report.layers) and report.companion["weights"] == sum(
        map(torch.numel, adapter.values())
    )
    assert report.companion["mean_error"] < report.mean_error
    assert "low-rank companion" in (tmp_path / "out" / "README.md").read_text()
    pruned, by_hand = tp.load_pruned(tmp_path / "out").float(), tp.load_pruned(tmp_path / "out").float()
    with torch.no_grad():
        for layer in report.layers:
            A, B = (adapter[f"base_model.model.{layer.name}.lora_{part}.weight"].float() for part in "AB")
            place = by_hand.get_submodule(layer.name).weight
            place += (B @ A).T if place.shape != (B @ A).shape or family == "gpt2" else B @ A
        adapted = PeftModel.from_pretrained(pruned, tmp_path / "out" / "adapter").eval()
        torch.testing.assert_close(adapted(TOKENS).logits, by_hand.eval()(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_a_rank_above_some_matrices_is_opened_by_peft(tmp_path: Path):
    base = tiny_checkpoint(tmp_path / "base")
    report = tp.prune(base, tmp_path / "out", **{**SETTINGS, "low_rank": 24})
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    ranks = {layer.name: len(adapter[f"base_model.model.{layer.name}.lora_A.weight"]) for layer in report.layers}
    assert min(ranks.values()) == 16 and max(ranks.values()) == 24
    adapted = PeftModel.from_pretrained(tp.load_pruned(tmp_path / "out").float(), tmp_path / "out" / "adapter").eval()
    dense, pruned = tp.load_pruned(base).float().eval(), tp.load_pruned(tmp_path / "out").float().eval()
    with torch.no_grad():
        wanted = dense(TOKENS).logits
        far, near = ((model(TOKENS).logits - wanted).norm() for model in (pruned, adapted))
    assert near < 0.5 * far


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path):
    base = tiny_checkpoint(tmp_path / "base")
    tp.prune(base, tmp_path / "whole", **SETTINGS)

    def kill(what: str, done: int, total: int) -> None:
        if what == "pruning" and done == 1:
            raise Killed

    with pytest.raises(Killed):
        tp.prune(base, tmp_path / "out", progress=kill, **SETTINGS)
    assert not (tmp_path / "out" / "adapter").exists()
    tp.prune(base, tmp_path / "out", **SETTINGS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="low_rank was"):
        tp.prune(base, tmp_path / "out", **{**SETTINGS, "low_rank": 2})


def test_it_goes_along_when_the_model_is_packed(tmp_path: Path):
    """So that what is unpacked is again what its report says."""
    tp.prune(tiny_checkpoint(tmp_path / "base"), tmp_path / "out", **SETTINGS)
    tp.runtime.pack_folder(tmp_path / "out", tmp_path / "packed")
    tp.runtime.unpack_folder(tmp_path / "packed", tmp_path / "back")
    check_finished(tmp_path / "back")
    adapters = [contents(tmp_path / name / "adapter") for name in ("out", "packed", "back")]
    assert adapters[0] and adapters[0] == adapters[1] == adapters[2]
    (tmp_path / "out" / "adapter" / "notes.txt").symlink_to(tmp_path / "base" / "config.json")
    with pytest.raises(CheckpointError, match=r"symbolic link to .*outside"):
        tp.runtime.pack_folder(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_it_makes_up_for_a_grid_too(tmp_path: Path):
    base = tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    report = tp.prune(base, tmp_path / "out", bits=4, **SETTINGS)
    assert report.companion["mean_error"] < report.mean_error


def test_what_contradicts_it_is_refused_before_any_work(tmp_path: Path):
    base = tiny_checkpoint(tmp_path / "base")
    experts = tiny_checkpoint(tmp_path / "experts", "mixtral")
    for model, more, error, message in (
        (base, {"refine": True}, OptionError, "refine changes again"),
        (base, {"method": "sparsellm"}, OptionError, "sparsellm changes again"),
        (base, {"low_rank": 0}, TopiaristError, "low_rank"),
        (base, {"data": None, "method": "magnitude"}, TopiaristError, "a low-rank companion looks at"),
        (experts, {}, UnsupportedModel, "experts share one"),
    ):
        with pytest.raises(error, match=message):
            tp.prune(model, tmp_path / "out", **{**SETTINGS, **more})
        assert not (tmp_path / "out").exists(), message
    with pytest.raises(CheckpointError, match="give an output folder"):
        tp.prune(tiny_model(), **SETTINGS)


def test_eval_puts_it_on_when_asked_and_says_when_not(tmp_path: Path, monkeypatch, capsys):
    base = tiny_checkpoint(tmp_path / "base")
    tp.prune(base, tmp_path / "out", **{**SETTINGS, "low_rank": 16})
    text = tiny_text(tmp_path)

    def run(*more: str) -> tuple[int, str, str]:
        words = ["topiarist", "eval", *more, "--text", str(text), "--window", "32", "--max-windows", "2"]
        monkeypatch.setattr("sys.argv", words)
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, said, _ = run(str(tmp_path / "out"))
    assert code == 0 and "--adapter puts it on" in " ".join(said.split())
    code, said, _ = run(str(tmp_path / "out"), "--adapter", "--json")
    rows = {row["model"]: row["results"][0]["value"] for row in json.loads(said)}
    assert code == 0 and any(name.endswith("+ adapter") for name in rows)
    code, _, said = run(str(base), "--adapter")
    assert code == 2 and "has a folder adapter" in said
    code, _, said = run(str(tmp_path / "out"), "--adapter", "--save")
    assert code == 2 and "leave --save out" in said
