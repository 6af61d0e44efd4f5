"""What `--plan` of a command says: a line a need, whatever the method or the rule, and nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

import topiarist as tp
from topiarist.pipelines.pruning.options import PruneOptions
from topiarist.pipelines.pruning.plan import plan_prune

TEXT = ("--data", "text.txt", "--samples", "8", "--window", "32", "--plan")


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
    ],
)
def test_what_shrink_refuses_its_plan_refuses(folder: Path, command, words: tuple[str, ...], said: str):
    run = command("shrink", "model", "out", *words, *TEXT[:-1])
    plan = command("shrink", "model", "out", *words, *TEXT)
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
    ],
)
def test_what_prune_refuses_its_plan_refuses(folder: Path, command, words: tuple[str, ...], said: str):
    tiny.tiny_checkpoint(folder / "experts", "mixtral")
    tiny.model_with_uncalled_block().save_pretrained(folder / "paused")
    tiny.tiny_tokenizer().save_pretrained(folder / "paused")
    run = command("prune", *words, *TEXT[:-1])
    plan = command("prune", *words, *TEXT)
    assert plan[0] == run[0] == 2 and said in plan[2] and plan[2] == run[2]
    assert not (folder / "out").exists()


def test_shrink_without_text(folder: Path, command):
    code, printed, error = command("shrink", "model", "out", "--method", "magnitude", "--no-refit", "--plan")
    assert code == 0 and "none: no text is looked at" in printed, error
