"""Recipes that measure and pack at their end, stages that stand for the recipe's model, and commands that read a recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from recipe_files import ENDS, recipe_folder
from safetensors.torch import load_file

import topiarist as tp
from topiarist.pipelines.recipes import stages
from topiarist.pipelines.recipes.recipe import read_recipe
from topiarist.pipelines.recipes.running import run_recipe


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return recipe_folder(tmp_path, ENDS)


def test_a_recipe_ends_measured_and_packed_wherever_it_was_stopped(folder: Path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    pack = stages.STAGES["pack"]
    monkeypatch.setitem(stages.STAGES, "pack", type(pack)(**{**vars(pack), "run": stopped}))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(read_recipe("recipe.yaml"))
    out = folder / "out"
    whole = load_file(out / "model.safetensors")
    figures = json.loads((out / "pruning_evaluation.json").read_text())["perplexity"][0]
    assert figures["value"] > 1 and figures["dense"]["model"].endswith("model")
    monkeypatch.setitem(stages.STAGES, "pack", pack)
    replace = Path.replace

    def killed(path: Path, target):
        if path.name == "packed.json":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(read_recipe("recipe.yaml"))
    monkeypatch.setattr(Path, "replace", replace)
    report = run_recipe(read_recipe("recipe.yaml"))
    assert isinstance(report, tp.Report) and not (out / "stages").exists() and not (out / "model.safetensors").exists()
    assert run_recipe(read_recipe("recipe.yaml")).to_dict() == report.to_dict()
    tp.runtime.unpack_folder(out, folder / "whole")
    unpacked = {n: t for path in (folder / "whole").glob("*.safetensors") for n, t in load_file(path).items()}
    assert unpacked.keys() == whole.keys() and all(whole[name].equal(unpacked[name]) for name in whole)


def test_a_later_stage_names_the_model_that_the_recipe_starts_from(folder: Path):
    (folder / "recipe.yaml").write_text(ENDS.partition("- eval")[0])
    report = run_recipe(read_recipe("recipe.yaml"))
    assert report.model == "model" and report.command == ["topiarist", "run", "recipe.yaml", "--out", "OUT"]
    config = json.loads((folder / "out" / "config.json").read_text())["pruning_config"]
    assert config["base_model"] == "../model" and config["base_digest"] == ""
    for name in ("README.md", "pruning_report.json", "pruning_report.html"):
        assert "01-shrink" not in (folder / "out" / name).read_text()


@pytest.mark.parametrize("settings", ["{values: int4}", "{head: int8}"])
def test_figures_of_weights_that_pack_rounds_are_refused_before_any_work(folder: Path, settings: str, command):
    (folder / "recipe.yaml").write_text(ENDS.replace("- pack", f"- pack: {settings}"))
    code, _, error = command("run", "recipe.yaml")
    assert code == 2 and "pack rounds the weights that eval has measured" in error and not (folder / "out").exists()


@pytest.mark.parametrize("plan", [(), ("--plan",)])
@pytest.mark.parametrize(
    ("change", "says"),
    [(("window_tokens: 32", "window_tokens: 4096"), "line 7: text holds 2,399 tokens, less than one window of 4096"),
     (("max_windows: 2", "max_windows: 2, text_field: body"), "--text-field body is for rows with fields"),
     (("heldout.txt", "text.txt"), "line 7: eval measures on text.txt, which is the text of prune: the result would"),
     (("text: [heldout.txt]", "text: [heldout.txt], tasks: [piqa]"), "tasks need lm-evaluation-harness")],
)  # fmt: skip
def test_what_eval_would_refuse_at_the_end_is_refused_before_any_work(
    folder: Path, command, monkeypatch, change: tuple[str, str], says: str, plan: tuple[str, ...]
):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it now raises ImportError
    recipe = ENDS.replace(*change).replace("pattern: 2:4", "pattern: 2:4, data: [text.txt], num_windows: 4")
    (folder / "recipe.yaml").write_text(recipe)
    code, _, error = command("run", "recipe.yaml", *plan)
    assert code == 2 and says in error and not (folder / "out").exists(), error


def test_a_command_takes_its_settings_from_a_recipe(folder: Path, command):
    assert command("prune", "model", "one", "--method", "magnitude", "--pattern", "0.6", "--skip", "v_proj")[0] == 0
    assert command("prune", "model", "two", "--recipe", "one/recipe.yaml")[0] == 0
    assert (folder / "one" / "model.safetensors").read_bytes() == (folder / "two" / "model.safetensors").read_bytes()
    assert command("prune", "model", "three", "--recipe", "one/recipe.yaml", "--pattern", "0.5")[0] == 0
    assert tp.Report.from_folder("three").pattern == "0.5"
    code, _, error = command("prune", "model", "four", "--recipe", "recipe.yaml")
    assert code == 2 and "takes one stage, prune" in error and not (folder / "four").exists()


def test_a_low_rank_companion_stays_beside_packed_weights(folder: Path):
    (folder / "recipe.yaml").write_text(
        ENDS.partition("stages:")[0]
        + "data: [text.txt]\nstages:\n- prune: {method: magnitude, low_rank: 2, num_windows: 4, window_tokens: 32}\n- pack\n"
    )
    run_recipe(read_recipe("recipe.yaml"))
    assert (folder / "out" / "packed.json").is_file() and not (folder / "out" / "model.safetensors").exists()
    assert load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
