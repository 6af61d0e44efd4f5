"""What `--plan` of a command says: a line a need, whatever the method or the rule, and nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

import topiarist as tp
from topiarist.models.opened import open_model
from topiarist.pipelines.pruning.options import PruneOptions
from topiarist.pipelines.pruning.plan import plan_prune
from topiarist.pipelines.shrinking.distill import Distill, bytes_due
from topiarist.pipelines.shrinking.options import ShrinkOptions
from topiarist.pipelines.shrinking.plan import plan_shrink

TEXT = ("--data", "text.txt", "--samples", "8", "--window", "32", "--plan")
FEW = ("--samples", "3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.tiny_checkpoint(tmp_path / "model")
    tiny.tiny_text(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rule", "linear"), ["measuring", "none: the rule looks at shapes alone"]),
        (("--rule", "owl"), ["8 x 32 tokens, 8\n", "peak memory, about", "measuring, about"]),
        (("--rule", "sensitivity:sequences=4,tokens=16"), ["8 x 16 tokens, 12\n"]),
        (("--rule", "sensitivity:estimate=hutchinson,sequences=2,probes=3"), ["8 x 32 tokens, 36\n"]),
        (("--rule", "search:generations=2,children=3,finalists=2,sequences=2", "--pattern", "2:4", "--method", "wanda"),
         ["levels, candidates x windows       3, 20 at most", "solving every level, about", "disk, about"]),
    ],
)  # fmt: skip
def test_allocate(folder: Path, command, words: tuple[str, ...], said: list[str]):
    before = sorted(folder.rglob("*"))
    code, printed, error = command("allocate", "model", "out.json", *words, *TEXT)
    assert code == 0 and sorted(folder.rglob("*")) == before, error
    assert all(text in printed for text in said), printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rule", "owl"), "allocation owl looks at what flows through the model: give calibration text"),
        (("--rule", "sensitivity"), "allocation sensitivity looks at what flows through the model"),
        (("--rule", "search", *TEXT[:2], "--samples", "4"), "4 calibration windows, of which the search keeps 4"),
        (("--rule", "linear:max_sparsity=0.5", "--pattern", "0.7"), "0.7 in all cannot be met; widen the bounds"),
        (("--rule", "owl", *TEXT, "--pattern", "3:5"), "pattern 3:5 needs an input width divisible by 5"),
    ],
)
def test_what_allocate_refuses_its_plan_refuses(folder: Path, command, words: tuple[str, ...], said: str):
    before = sorted(folder.rglob("*"))
    run = command("allocate", "model", "out.json", *words)
    plan = command("allocate", "model", "out.json", *words, "--plan")
    assert plan[0] == run[0] == 2 and said in plan[2] and plan[2] == run[2]
    assert sorted(folder.rglob("*")) == before


def test_a_rule_that_cannot_meet_the_pattern_is_refused_by_the_plan_of_prune(folder: Path, command):
    words = (
        "prune",
        "model",
        "out",
        "--method",
        "magnitude",
        "--pattern",
        "0.7",
        "--allocation",
        "linear:max_sparsity=0.5",
    )
    for plan in ((), ("--plan",)):
        code, _, error = command(*words, *plan)
        assert code == 2 and "0.7 in all cannot be met; widen the bounds" in error and not (folder / "out").exists()


def test_linear_needs_no_text_and_a_plan_of_nothing_says_so(folder: Path, command):
    assert command("allocate", "model", "out.json", "--rule", "linear")[0] == 0
    code, printed, _ = command("allocate", "model", "out.json", "--rule", "search", "--skip", ".", *TEXT)
    assert code == 0 and "none: every layer is skipped" in printed


def test_the_disk_of_a_cut_counts_the_states_of_its_recovery(folder: Path):
    source = open_model(folder / "model")
    none, full, lora = (
        bytes_due(source, recover) for recover in (None, Distill(kind="full"), Distill(kind="lora", rank=2))
    )
    matrices = [m for i in range(len(source.block_names)) for m in source.matrices(i)]
    weights = sum(m.shape[0] * m.shape[1] for m in matrices)
    assert full - none == 2 * 12 * weights  # fp32 weights and two moments, of an old and of a new state
    assert lora - none == 2 * 12 * 2 * sum(sum(m.shape) for m in matrices)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), ["scores, taylor, about", "refit, about", "peak memory, about", "disk, at most"]),
        (("--method", "wanda-sp", "--no-refit"), ["scores, wanda-sp, about"]),
        (("--method", "occlusion"), ["no estimate: how many forwards it takes depends on the units"]),
        (("--target-latency", "5"), ["trying a split, at most about", "measured in the run alone"]),
        (("--target-params", "30k", "--recover", "lora:steps=4"), ["trying a split, at most about", "recovery, about"]),
    ],
)
def test_shrink(folder: Path, command, words: tuple[str, ...], said: list[str]):
    before = sorted(folder.rglob("*"))
    code, printed, error = command("shrink", "model", "out", *words, *TEXT)
    assert code == 0 and sorted(folder.rglob("*")) == before, error
    assert all(text in printed for text in said), printed
    assert ("refit, about" in printed) == ("--no-refit" not in words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--units", "experts"), "experts"),
        (("--target-params", "30M"), "lower it"),
        (("--units", "hidden", "--rotate", "--layout", "hetero"), "hidden"),
        (("--recover", "lora:sequences=9"), "a step of the recovery takes 9 windows of text, and there are 8"),
        (("--target-params", "30k", *FEW), "3 calibration windows of 32 tokens are too few to hold some out"),
        (("--method", "policy-gradient", *FEW), "3 calibration windows of 32 tokens are too few to hold some out"),
        (("--method", "taylor:fusion=uncertainty,window_tokens=32", "--samples", "1"), "2 windows or more"),
        (("--method", "taylor:fusion=uncertainty,pooled=true"), "2 windows or more"),
        (("--method", "taylor:fusion=learned", *FEW), "3 calibration windows of 32 tokens are too few"),
        (("--method", "taylor:order=third"), "unknown order 'third'; choose one of first, second, mix"),
    ],
)
def test_what_shrink_refuses_its_plan_refuses(folder: Path, command, words: tuple[str, ...], said: str):
    run = command("shrink", "model", "out", *TEXT[:-1], *words)
    plan = command("shrink", "model", "out", *TEXT, *words)
    assert plan[0] == run[0] == 2 and said in plan[2] and plan[2] == run[2]
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prune", "model", "out", "--method", "wanda", *TEXT), "2 x 7"),
        (("prune", "model", "out", "--method", "magnitude", "--plan"), "2 x 7"),
        (("quantize", "model", "out", "--bits", "8", "--group", "32", *TEXT), "2 x 7"),
        (("allocate", "model", "out.json", "--rule", "search:generations=1", *TEXT), "solving every level, about"),
    ],
)
def test_the_first_block_may_be_skipped(folder: Path, command, words: tuple[str, ...], said: str):
    code, printed, error = command(*words, "--skip", r"layers\.0\.")
    assert code == 0 and said in printed, (printed, error)


def test_a_plan_goes_past_a_block_that_text_does_not_call(tmp_path: Path):
    tiny.model_with_uncalled_block().save_pretrained(tmp_path)
    options = PruneOptions(method="wanda", data=tiny.tiny_tokens(4, 16), skip=[r"layers\.0\."])
    assert plan_prune(tmp_path, options).matrices == 7
    with pytest.raises(tp.CalibrationError, match="the text reaches no matrix that is to be changed"):
        plan_prune(tmp_path, replace(options, skip=[r"layers\.[02]\."]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model", "out", "--method", "sparsellm", "--correct"), "drop the error correction"),
        (("model", "out", "--method", "sparsellm:recompute_after_attention=false", "--true-sequential"), "drop one of"),
        (("experts", "out", "--method", "wanda", "--low-rank", "2"), "experts share one"),
        (("paused", "out", "--method", "wanda", "--refine"), "refinement needs hidden states that are one tensor"),
        (("paused", "out", "--method", "wanda", "--spill", "spill"), "spilling hidden states to a file needs"),
        (("model", "out", "--method", "wanda", "--spill", "text.txt/spill"), "cannot create text.txt/spill"),
        (("model", "out", "--method", "wanda", "--allocation", "search", *FEW), "3 calibration windows, of which"),
    ],
)
def test_what_prune_refuses_its_plan_refuses(folder: Path, command, words: tuple[str, ...], said: str):
    tiny.tiny_checkpoint(folder / "experts", "mixtral")
    tiny.model_with_uncalled_block().save_pretrained(folder / "paused")
    tiny.tiny_tokenizer().save_pretrained(folder / "paused")
    run = command("prune", *TEXT[:-1], *words)
    plan = command("prune", *TEXT, *words)
    assert plan[0] == run[0] == 2 and said in plan[2] and plan[2] == run[2]
    assert not (folder / "out").exists()


def test_hidden_states_in_a_file_are_told_and_not_written(folder: Path):
    options = PruneOptions(method="wanda", data=tiny.tiny_tokens(8, 32))
    kept, spilled = (plan_prune(folder / "model", replace(options, spill=spill)) for spill in (None, folder / "spill"))
    assert (kept.spilled_bytes, spilled.spilled_bytes) == (0, 8 * 32 * 32 * 4)
    assert dict(spilled.lines()).keys() - dict(kept.lines()).keys() == {"spilled hidden states, at most"}
    assert not (folder / "spill").exists()


def test_a_plan_says_that_an_allocation_is_measured_first(folder: Path, command):
    words = ("prune", "model", "out", "--method", "wanda", "--pattern", "0.5", *TEXT, "--allocation")
    for rule, told in (("owl", True), ("linear", False)):
        code, printed, error = command(*words, rule)
        assert code == 0 and (f"allocation {rule}, of which" in printed) == told, (printed, error)


def test_a_plan_of_taylor_counts_the_windows_that_it_looks_at(folder: Path, monkeypatch):
    monkeypatch.setattr("topiarist.pipelines.shrinking.plan.window_seconds", lambda *_: 100.0)
    monkeypatch.setattr("topiarist.pipelines.shrinking.plan.duration", str)
    options = ShrinkOptions(method="taylor:num_windows=4,window_tokens=8", data=tiny.tiny_tokens(8, 32), refit=False)
    assert dict(plan_shrink(folder / "model", options))["scores, taylor, about"] == "300.0"  # 4 * 8 of 32 tokens


def test_shrink_without_text(folder: Path, command):
    code, printed, error = command("shrink", "model", "out", "--method", "magnitude", "--no-refit", "--plan")
    assert code == 0 and "none: no text is looked at" in printed, error
