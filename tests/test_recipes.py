"""Recipes: checked as a whole before any work, resumed, and written beside every result."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml
from recipe_files import ENDS, STAGES, recipe_folder
from safetensors.torch import load_file, save_file

import topiarist as tp
from topiarist.core.errors import DamagedWeights
from topiarist.pipelines.recipes.recipe import read_recipe, shipped
from topiarist.pipelines.recipes.running import run_recipe

LAUGHS = "model: [&a0 [ha], " + ", ".join(f"&a{i} [" + f"*a{i - 1}, " * 9 + "]" for i in range(1, 30)) + "]"
"""Nine aliases in every line of nine aliases: a few hundred bytes that stand for 9^29 values."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return recipe_folder(tmp_path, STAGES)


def weights(folder: Path) -> dict:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_stages_follow_one_another_and_the_recipe_beside_the_result_repeats_them(folder: Path, command):
    code, printed, error = command("run", "recipe.yaml")
    assert code == 0 and "prune -> recover: done" in printed, error
    assert not (folder / "out" / "stages").exists() and tp.verify(folder / "out").holds
    tp.prune(
        "model",
        "pruned",
        method="wanda",
        pattern="2:4",
        data=tp.text_files("text.txt"),
        num_windows=4,
        window_tokens=32,
    )
    tp.recover(
        "pruned",
        "by-hand",
        data=tp.text_files("text.txt"),
        tokens=512,
        window_tokens=32,
        sequences=2,
        batch_size=2,
        held_out=2,
    )
    assert same(folder / "out", folder / "by-hand") and not same(folder / "out", folder / "pruned")
    assert command("run", "out/recipe.yaml", "--out", "again", "--keep-stages")[0] == 0
    assert (
        same(folder / "out", folder / "again") and (folder / "again" / "stages" / "01-prune" / "config.json").is_file()
    )
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "other.yaml").write_text(recipe.replace("512", "640"))
    code, _, error = command("run", "other.yaml")
    assert code == 2 and "out holds another run: stage 2 recover tokens was 512 and is 640. Choose" in error
    before = (folder / "out" / "pruning_run.json").read_bytes()
    assert command("run", "recipe.yaml")[0] == 0 and (folder / "out" / "pruning_run.json").read_bytes() == before


def test_a_run_that_was_stopped_between_stages_goes_on(folder: Path, monkeypatch):
    from topiarist.pipelines.recipes import stages

    run = stages.STAGES["recover"]
    broken = type(run)(**{**vars(run), "run": lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)})
    monkeypatch.setitem(stages.STAGES, "recover", broken)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(read_recipe("recipe.yaml"))
    kept = folder / "out" / "stages" / "01-prune" / "pruning_run.json"
    before = kept.read_bytes()
    monkeypatch.setitem(stages.STAGES, "recover", run)
    seen: list[str] = []
    run_recipe(read_recipe("recipe.yaml"), progress=lambda what, *_: seen.append(what))
    assert before and not any(what.startswith("pruning") for what in seen) and tp.verify(folder / "out").holds


def test_every_result_has_the_recipe_that_made_it(folder: Path, command):
    words = (
        "--method",
        "wanda:refit=true",
        "--samples",
        "4",
        "--window",
        "32",
        "--data",
        "text.txt",
        "--refine",
        "epochs=1",
    )
    assert command("prune", "model", "one", *words)[0] == 0
    assert command("run", "one/recipe.yaml", "--out", "two")[0] == 0
    assert same(folder / "one", folder / "two")
    shrink = ("--method", "magnitude", "--keep", "0.6", "--samples", "4", "--window", "32", "--data", "text.txt")
    assert command("shrink", "model", "small", *shrink)[0] == 0
    assert command("run", "small/recipe.yaml", "--out", "small-again")[0] == 0
    assert same(folder / "small", folder / "small-again")


THREE = (
    STAGES.partition("data:")[0]
    + """stages:
- shrink: {method: magnitude, keep: 0.7, units: [channels], refit: false}
- prune: {method: magnitude, pattern: 0.5}
- recover: {tokens: 256, window_tokens: 32, sequences: 2, batch_size: 2, held_out: 2, teacher: model, data: [text.txt]}
"""
)


def watched(monkeypatch, seen: list[str], stop: str = "") -> None:
    """Note the stages that begin from now on; that one called `stop` is killed."""
    from topiarist.pipelines.recipes import stages

    for name, stage in stages.STAGES.items():

        def run(*args, name=name, run=stage.run):
            seen.append(name)
            if name == stop:
                raise KeyboardInterrupt
            return run(*args)

        monkeypatch.setitem(stages.STAGES, name, replace(stage, run=run))


def test_a_run_killed_in_its_third_stage_goes_on_there(folder: Path, monkeypatch):
    (folder / "recipe.yaml").write_text(THREE)
    seen: list[str] = []
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        watched(patched, seen, "recover")
        run_recipe(read_recipe("recipe.yaml"))
    assert seen == ["shrink", "prune", "recover"]
    assert sorted(path.name for path in (folder / "out" / "stages").iterdir()) == ["02-prune", "made.json"]
    (folder / "other.yaml").write_text(THREE.replace("keep: 0.7", "keep: 0.6"))
    with pytest.raises(
        tp.TopiaristError, match=r"out holds another run: stage 1 shrink keep was 0.7 and is 0.6. Choose"
    ):
        run_recipe(read_recipe("other.yaml"))
    seen.clear()
    watched(monkeypatch, seen)
    run_recipe(read_recipe("recipe.yaml"))
    assert seen == ["recover"] and not (folder / "out" / "stages").exists()
    run_recipe(read_recipe("recipe.yaml", out="whole"))
    assert seen == ["recover", "shrink", "prune", "recover"] and same(folder / "out", folder / "whole")


ALLOCATED = (
    STAGES.partition("data:")[0]
    + """stages:
- allocate: {rule: owl, pattern: 0.5, num_windows: 4, window_tokens: 32, data: [text.txt]}
- prune: {method: magnitude, pattern: 0.5}
- eval: {text: [heldout.txt], window_tokens: 32, max_windows: 2}
- pack
"""
)
ROUNDED = ALLOCATED.partition("- eval")[0] + "- pack: {head: int8}\n"


@pytest.mark.parametrize(
    ("text", "stop", "was", "becomes", "said"),
    [
        (ALLOCATED, "prune", "rule: owl", "rule: linear", "stage 1 allocate rule was 'owl' and is 'linear'"),
        (ALLOCATED, "pack", "max_windows: 2", "max_windows: 1", "stage 3 eval max_windows was 2 and is 1"),
        (ROUNDED, "", "head: int8", "values: int8", "stage 3 pack head was 'int8' and is None"),
    ],
    ids=["allocate", "eval", "pack"],
)
def test_what_a_stage_left_is_not_taken_for_that_of_other_settings(
    folder: Path, monkeypatch, text, stop, was, becomes, said
):
    (folder / "recipe.yaml").write_text(text)
    seen: list[str] = []
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) if stop else nullcontext():
        watched(patched, seen, stop)
        run_recipe(read_recipe("recipe.yaml"), keep_stages=True)
    (folder / "other.yaml").write_text(text.replace(was, becomes))
    before = (folder / "out" / "stages" / "01-allocate.json").read_bytes()
    with pytest.raises(tp.TopiaristError, match=said):
        run_recipe(read_recipe("other.yaml"), keep_stages=True)
    assert (folder / "out" / "stages" / "01-allocate.json").read_bytes() == before
    seen.clear()
    watched(monkeypatch, seen)
    run_recipe(read_recipe("recipe.yaml"))
    assert seen == {"prune": ["prune", "eval", "pack"], "pack": ["pack"], "": ["pack"]}[stop]


def test_a_stage_that_failed_may_have_other_settings(folder: Path, monkeypatch):
    (folder / "recipe.yaml").write_text(ROUNDED)
    for stop, was, becomes in (("allocate", "rule: owl", "rule: linear"), ("pack", "{head: int8}", "{values: int8}")):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            watched(patched, [], stop)
            run_recipe(read_recipe("recipe.yaml"))
        (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace(was, becomes))
    run_recipe(read_recipe("recipe.yaml"))
    assert (folder / "out" / "packed.json").is_file()


def test_damage_that_a_later_stage_meets_leaves_what_is_finished(folder: Path):
    (folder / "recipe.yaml").write_text(THREE.replace("teacher: model", "teacher: damaged"))
    tiny.tiny_checkpoint(folder / "damaged")
    weights = load_file(folder / "damaged" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "damaged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedWeights):
        run_recipe(read_recipe("recipe.yaml"))
    assert (folder / "out" / "stages" / "02-prune" / "config.json").is_file()
    with pytest.raises(DamagedWeights):
        run_recipe(read_recipe("recipe.yaml", model="damaged", out="none"))
    assert not (folder / "none").exists()


def test_a_given_text_stands_above_that_of_the_stages(folder: Path, command):
    tiny.tiny_text(folder, "other.txt", paragraphs=60, seed=2)
    words = ("--method", "wanda", "--samples", "4", "--window", "32")
    for text in ("text.txt", "other.txt"):
        assert command("prune", "model", text[:-4], *words, "--data", text)[0] == 0
    assert command("run", "text/recipe.yaml", "--data", "other.txt", "--out", "again")[0] == 0
    assert same(folder / "again", folder / "other") and not same(folder / "again", folder / "text")
    assert "text.txt" not in (folder / "again" / "recipe.yaml").read_text()


TRAINED = ("--data", "text.txt", "--tokens", "256", "--window", "32", "--sequences", "2", "--held-out", "2")
SECOND = {
    "recover a sparse model": (("recover", *TRAINED), "sparse"),
    "recover a quantised model": (("recover", *TRAINED, "--teacher", "model"), "quantised"),
    "recover a dense model to its text": (("recover", *TRAINED, "--loss", "lm"), "model"),
    "recover a dense model towards another": (("recover", *TRAINED, "--teacher", "model"), "model"),
    "prune a sparse model": (("prune", "--method", "magnitude", "--pattern", "0.6"), "sparse"),
    "prune a padded model": (("prune", "--method", "magnitude"), "padded"),
    "prune a quantised model": (("prune", "--method", "magnitude"), "quantised"),
    "quantise a sparse model": (("quantize", "--bits", "8"), "sparse"),
    "shrink a shrunk model": (("shrink", "--method", "magnitude", "--keep", "0.7", "--no-refit"), "small"),
}
FIRST = {
    "sparse": ("prune", "--method", "magnitude"),
    "padded": ("shrink", "--method", "magnitude", "--keep", "0.6", "--no-refit", "--layout", "padded"),
    "quantised": ("quantize", "--bits", "8"),
    "small": ("shrink", "--method", "magnitude", "--keep", "0.6", "--no-refit"),
}


@pytest.mark.parametrize("case", SECOND)
def test_a_result_made_of_a_result_has_its_own_recipe_which_runs(folder: Path, command, case: str):
    (name, *words), source = SECOND[case]
    if source in FIRST:
        (made, *by), pages = FIRST[source], ("recipe.yaml", "README.md", "pruning_report.html", "pruning_report.json")
        assert command(made, "model", source, *by)[0] == 0
    code, _, error = command(name, source, "one", *words)
    assert code == 0 and yaml.safe_load((folder / "one" / "recipe.yaml").read_text())["model"] == source, error
    assert source not in FIRST or all(
        (folder / "one" / p).read_text() != (folder / source / p).read_text() for p in pages
    )
    code, _, error = command("run", "one/recipe.yaml", "--out", "two")
    assert code == 0 and same(folder / "one", folder / "two"), error
    assert (folder / "one" / "config.json").read_bytes() == (folder / "two" / "config.json").read_bytes()


@pytest.mark.parametrize("plan", [(), ("--plan",)])
def test_what_only_model_or_text_can_tell_is_told_with_its_line(folder: Path, command, plan: tuple[str, ...]):
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "long.yaml").write_text(recipe.replace("window_tokens: 32", "window_tokens: 4096", 1))
    (folder / "much.yaml").write_text(recipe.replace("num_windows: 4", "num_windows: 4000"))
    for name in ("long", "much"):
        code, _, error = command("run", f"{name}.yaml", *plan)
        assert code == 2 and f"{name}.yaml line 6: " in error, error
    assert not (folder / "out").exists()


WRONG_STAGES = [
    ("- recover: {", "- recver: {", "line 11: unknown stage 'recver'; stages are"),
    ("    method: wanda", "    method: wander", "line 7: unknown method 'wander'"),
    ("    num_windows: 4", "    num_windows: 0", "line 9: PruneOptions: num_windows is 0"),
    ("    num_windows: 4", "    windows: 4", "PruneOptions has no field 'windows' (is window meant?)"),
    ("topiarist: 1", "topiarist: 7", "line 1: recipe version 7"),
    ("topiarist: 1\n", "", "line 1: no version"),
    ("out: out", "outt: out", "line 3: unknown key 'outt'"),
    (
        "- recover: {tokens: 512,",
        "- shrink: {keep: 0.8}\n- recover: {tokens: 512,",
        "line 11: shrink takes a model",
    ),
    (
        "- recover: {tokens: 512,",
        "- quantize: {group: 32}\n- recover: {kind: lora, tokens: 512,",
        "line 12: the model is quantised: its scales learn, which low-rank updates and shards are not made for; use kind full",
    ),
    ("- recover: {", "- shrink: {units: 7}\n- recover: {", "line 11: ShrinkOptions: units is 7, should be an instance"),
    ("- recover: {", "- shrink: {units: neurons}\n- recover: {", "line 11: unknown units 'neurons'"),
    (
        "- recover: {",
        "- shrink: {units: [channels, block]}\n- recover: {",
        "line 11: channels and block cannot be cut in one",
    ),
    ("    method: wanda", "    method: wanda\n    allocation: 7", "line 8: 7 is no allocation rule"),
    ("    method: wanda", "    method: wanda\n    tokenizer: 7", "an object of type int is no tokenizer"),
    ("- recover: {", "- recover: {teacher: [model], ", "line 11: teacher is ['model']; name one model"),
    ("- recover: {", "- recover: {teacher: nowhere/, ", "line 11: model folder nowhere/ does not exist"),
    ("- recover: {", "- recover: {teacher: model, loss: lm, ", "line 11: loss lm asks no teacher"),
    ("out: out", "out: ~/out", "only a shell knows what ~ is"),
    ("stages:", "stages: none\nmore:", "unknown key 'more'"),
    ("model: model", "model: [", "is no YAML"),
    ("data: [text.txt]", "data: [nowhere.txt]", "nowhere.txt does not exist"),
    ("model: model", "model: ''", "names no model"),
    ("model: model", "model: model\nmodel: other", "line 3: 'model' stands there twice"),
    ("    method: wanda", "    method: wanda\n    method: alps", "line 8: 'method' stands there twice"),
    ("model: model", "model: [a, b]", "line 2: model is one text"),
    ("data: [text.txt]", "data: [{a: b}]", "line 4: data is [{'a': 'b'}]"),
    ("data: [text.txt]", "data: 7", "line 4: data is 7"),
    ("    num_windows: 4", "    7: 4", "the settings of prune are"),
    ("model: model", "model: !!python/object/apply:os.getcwd []", "is no YAML"),
    ("model: model", "model: &model [*model]", "line 2: an alias stands inside its own anchor"),
    ("model: model", "model: " + "[" * 5000, "is no YAML"),
    ("topiarist: 1", "topiarist: " + "1" * 5000, "is no YAML"),
    ("model: model", LAUGHS, "stand for more than 65,536 values"),
    ("model: model", "model: " + "m" * (1 << 20), "a recipe at most 1,048,576"),
]
WRONG_ENDS = [
    ("- pack\n", "- pack\n- prune: {method: magnitude}\n", "line 9: prune takes a model that is dense or"),
    ("- pack\n", "- pack\n- eval: {tasks: piqa}\n", "line 9: eval takes a model"),
    (
        "- prune: {method: magnitude",
        "- eval: {tasks: piqa}\n- prune: {method: magnitude",
        "line 6: eval ends a recipe",
    ),
    ("text: [heldout.txt], ", "", "line 7: eval has nothing to measure on"),
    ("text: [heldout.txt]", "text: [nowhere.txt]", "nowhere.txt does not exist"),
    ("max_windows: 2", "limit: 3", "line 7: a limit is of zero-shot tasks, and none is named"),
    (
        "text: [heldout.txt], window_tokens: 32, max_windows: 2",
        "tasks: piqa, bos: never",
        "line 7: bos is a setting of text, and none is named",
    ),
    (
        "max_windows: 2",
        "tasks: piqa, task_files: nowhere",
        "line 7: nowhere must hold one file piqa*.jsonl, found none",
    ),
    ("- pack\n", "- pack: {group: 128}\n", "line 8: group 128 is of rounded values, and none are asked for"),
    ("- pack\n", "- pack: {values: int2}\n", "line 8: PackOptions: values is 'int2'"),
]


@pytest.mark.parametrize(
    ("recipe", "was", "becomes", "said"),
    [(recipe, *case) for recipe, cases in ((STAGES, WRONG_STAGES), (ENDS, WRONG_ENDS)) for case in cases],
)
def test_a_wrong_recipe_is_refused_before_any_work(
    folder: Path, command, recipe: str, was: str, becomes: str, said: str
):
    assert was in recipe
    (folder / "recipe.yaml").write_text(recipe.replace(was, becomes))
    code, _, error = command("run", "recipe.yaml")
    assert code == 2 and said in error and not (folder / "out").exists()


def test_a_stage_that_does_not_fit_the_model_is_refused(folder: Path, command):
    assert command("prune", "model", "sparse", "--method", "magnitude")[0] == 0
    (folder / "small.yaml").write_text(STAGES.partition("- prune")[0] + "- shrink: {keep: 0.8}\n")
    code, _, error = command("run", "small.yaml", "--model", "sparse")
    assert code == 2 and "line 6: shrink takes a model that is dense or shrunk, and it is sparse there" in error
    for plan in ((), ("--plan",)):
        code, _, error = command("run", "recipe.yaml", "--model", "sparse", *plan)
        assert code == 2 and "line 11: recover learns from the model that the recipe starts from" in error, error
    assert not (folder / "out").exists()


@pytest.mark.parametrize("follower", ["shrink: {keep: 0.8}", "prune: {allocation: linear}", "allocate: {rule: linear}"])
def test_an_allocation_that_nothing_would_read_is_refused(folder: Path, command, follower: str):
    stages = f"- allocate: {{rule: linear, pattern: 0.7}}\n- {follower}\n- prune: {{method: magnitude}}\n"
    (folder / "one.yaml").write_text(STAGES.partition("- prune")[0] + stages)
    code, _, error = command("run", "one.yaml")
    name = follower.partition(":")[0]
    assert code == 2 and f"line 7: {name} does not read what allocate before it finds" in error, error
    assert not (folder / "out").exists()


def test_an_allocation_of_another_density_than_its_prune_asks_for_is_refused(folder: Path, command):
    def run(pattern: str) -> tuple[int, str]:
        text = "num_windows: 4, window_tokens: 32"
        stages = f"- allocate: {{rule: linear, pattern: 0.5, {text}}}\n"
        stages += f"- prune: {{method: magnitude, pattern: {pattern}, {text}}}\n"
        (folder / "one.yaml").write_text(STAGES.partition("- prune")[0] + stages)
        code, _, error = command("run", "one.yaml", "--plan")
        return code, error

    code, error = run("0.7")
    assert code == 2 and "line 7: prune asks for 0.7, allocate before it allocates for 0.5: leave the pattern" in error
    assert not (folder / "out").exists()
    assert run("0.5") == (0, "")


@pytest.mark.parametrize("text", ["", "topiarist: 1", "stages: 3", "[1, 2]"])
def test_an_edited_recipe_beside_a_result_is_told(folder: Path, command, text: str):
    (folder / "one.yaml").write_text(
        STAGES.partition("- prune")[0] + "- prune: {method: magnitude, num_windows: 4, window_tokens: 32}\n"
    )
    assert command("run", "one.yaml")[0] == 0
    (folder / "out" / "recipe.yaml").write_text(text)
    code, _, error = command("run", "one.yaml")
    assert code == 2 and "out/recipe.yaml is no recipe any more: choose another output, or delete out" in error, error


def test_a_plan_says_what_every_stage_will_need_and_writes_nothing(folder: Path, command):
    (folder / "recipe.yaml").write_text(STAGES + "- eval: {text: [heldout.txt], window_tokens: 64}\n- pack\n")
    before = sorted(folder.rglob("*"))
    code, printed, error = command("run", "recipe.yaml", "--plan")
    assert code == 0 and sorted(folder.rglob("*")) == before, error
    prune, recover, measured, packed = re.split(r"(?m)^[234] \w+, at most.*\n", printed)
    assert prune.startswith("1 prune\n") and "solver, about" in prune and "2 x 7" in prune
    assert "tokens a step x steps              64 x 8" in recover and "peak memory" in recover and "disk" in recover
    assert re.search(r"windows x models +\d+ x 2\n", measured) and "forward passes, about" in measured
    assert "size at 2:4, about" in packed and "packing, about" in packed
    alone = command("prune", "model", "alone", "--method", "wanda", "--samples", "4", "--window", "32", "--data", "text.txt",
                    "--plan")[1]  # fmt: skip
    assert [line[:35] for line in prune.splitlines()[1:]] == [line[:35] for line in alone.splitlines()]
    (folder / "recipe.yaml").write_text(STAGES.replace("out: out", "out: model"))
    code, _, error = command("run", "recipe.yaml", "--plan")
    assert code == 2 and "is not a topiarist run" in error


def test_shipped_recipes_are_listed_and_can_be_read(command):
    code, printed, _ = command("recipes")
    assert code == 0 and all(name in printed for name in shipped())
    for name in shipped():
        read_recipe(name).check("dense")
        assert "topiarist: 1" in command("recipes", name)[1]
    assert command("methods")[0] == 0 and command("families")[0] == 0
    assert json.dumps(shipped())
