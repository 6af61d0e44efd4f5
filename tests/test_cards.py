"""Model cards: metadata that the hub reads, scores in it, and text that cannot become markup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard

import topiarist as tp
from topiarist.results.card import model_card, with_measurements
from topiarist.results.formats import code, code_block, escaped
from topiarist.results.pages import Result, compare_page, refresh, report_page, save_evaluation

TOKENS = tiny.tiny_tokens(8, 32)
PERPLEXITY = {
    "text": "held|out: <b>.txt", "digest": "d", "window": 32, "tokens": 99, "dtype": "float32", "value": 12.5,
    "dense": {"model": "base", "value": 10.0},
}  # fmt: skip
TASK = {
    "task": "piqa", "metric": "acc", "value": 0.75, "stderr": 0.01, "num_items": 9, "digest": "d", "dtype": "float32",
    "harness": "h", "dense": None,
}  # fmt: skip


def reports() -> list:
    shared = {"settings": {"damping": 0.01}, "model": "org/base", "base_model": "org/base", "pattern": "2:4"}
    text = {"num_windows": 4, "window_tokens": 32, "seed": 0, "digest": "ab" * 32}
    shrunk = {key: value for key, value in shared.items() if key != "pattern"}
    history = [{"step": 0, "tokens": 0, "hard_loss": 2.0, "loss": None, "flips": 0.0}]
    return [
        tp.Report(method="alps", calibration=text, **shared),
        tp.LearnReport(history=history, calibration=text, **shared),
        tp.ShrinkReport(
            method="magnitude", keep=0.5, layout="uniform", units=["channels"], scope="per_layer",
            parameters={"dense": 100, "kept": 60, "stored": 60}, **shrunk,
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_card_has_the_same_metadata_and_scores(number: int):
    report = reports()[number]
    plain = {**report.to_dict(), "command": ["topiarist", "prune", "org/base", "OUT"]}
    result = Result(plain, "0", {"perplexity": [PERPLEXITY], "tasks": [TASK]})
    card = ModelCard(model_card(result))
    assert {"base_model": "org/base", "library_name": "transformers"}.items() <= card.data.to_dict().items()
    assert {"pruned", report.method, report.pattern} <= set(card.data.tags)
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {("held|out: <b>.txt", "perplexity"): 12.5, ("piqa", "acc"): 0.75}
    assert "topiarist prune org/base OUT" in card.text and "held\\|out: &lt;b&gt;.txt" in card.text
    assert all(line.count("|") - line.count("\\|") in (0, 3, 4, 5, 6) for line in card.text.splitlines())


def test_a_dense_model_that_was_only_quantised_is_not_said_to_be_pruned():
    plain = {**reports()[0].to_dict(), "pipeline": "quantize", "bits": 8, "group": None, "pattern": "int8"}
    assert ModelCard(model_card(Result(plain, "0"))).data.tags == ["quantized", "int8", "alps"]
    chained = ModelCard(model_card(Result({**plain, "pruned": {"base_model": "org/base"}}, "0")))
    assert chained.data.tags == ["pruned", "sparse", "int8", "alps"]


@pytest.mark.parametrize("splits", [[], [{"loss": 1.0}]])
def test_the_budget_of_a_split_search_is_of_the_whole_model(splits: list):
    card = model_card(Result({**reports()[2].to_dict(), "splits": splits}, "0"))
    of = "the model's parameters" if splits else "the parameters of all channels"
    assert f"| budget | 0.5 of {of} |" in card


HOSTILE = "a: b | <script>alert(1)</script> ``` `x` [y](javascript:z)\n# heading"


def test_hostile_text_stays_text():
    report = tp.Report(method=HOSTILE, settings={"a": HOSTILE}, pattern=HOSTILE, model=HOSTILE, warnings=[HOSTILE])
    report.layers = [tp.results.report.LayerReport(HOSTILE, (2, 2), "2:4", 0.5, 0.1, 4)]
    report.command, report.not_in_command = ["topiarist", HOSTILE], [HOSTILE]
    result = Result(report.to_dict(), HOSTILE)
    text = model_card(result)
    card = ModelCard(text)
    assert card.data.tags[-1] == HOSTILE and card.data.base_model is None
    fence = "````"
    before, block, after = card.text.split(f"{fence}\n")
    assert HOSTILE in block.replace("'\"'\"'", "'")
    shown = before + after
    assert "<script>" not in shown.replace(code(HOSTILE), "") and "\n# heading" not in shown
    assert "[y](" not in shown.replace(code(HOSTILE), "")
    page = report_page(result)
    assert "<script>" not in page


def test_what_markdown_would_take_for_markup():
    assert escaped("a|b\n<i> & `c`") == "a\\|b &lt;i&gt; &amp; \\`c\\`"
    assert code("a`b|c") == "`` a`b\\|c ``" and code_block("x\n```\ny") == "````\nx\n```\ny\n````"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cards")
    tiny.tiny_checkpoint(root / "base")
    tp.prune(root / "base", root / "out", method="wanda", calibration=TOKENS)
    return root


def test_a_local_base_is_in_no_card_and_never_absolute(root: Path):
    head = (root / "out" / "README.md").read_text().split("---")[1]
    assert "base_model" not in yaml.safe_load(head)
    config = json.loads((root / "out" / "config.json").read_text())["pruning_config"]
    assert config["base_model"] == "../base" and len(config["base_digest"]) == 64
    assert tp.Report.from_folder(root / "out").base_digest == config["base_digest"]


def test_a_snapshot_of_the_hub_is_its_hub_id(root: Path, tmp_path: Path):
    snapshot = tmp_path / "models--org--some--name" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    tiny.tiny_checkpoint(snapshot)
    tp.prune(snapshot, tmp_path / "out", method="magnitude")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "org/some--name"


def test_saved_scores_reach_the_metadata_and_the_rest_stays(root: Path):
    path = root / "out" / "README.md"
    before = path.read_text()
    head, body = before.removeprefix("---\n").split("\n---\n", 1)
    path.write_text(f"---\n{head}\nlicense: mit\n---\n{body}\nMine.\n")
    save_evaluation(root / "out", {"perplexity": [PERPLEXITY], "tasks": [TASK]})
    card = ModelCard.load(path)
    assert card.data.license == "mit" and "Mine." in card.text and len(card.data.eval_results) == 2
    assert "12.5" in card.text and card.text.count("measured by topiarist") == 1
    once = path.read_text()
    refresh(root / "out")
    assert path.read_text() == once


def test_metadata_that_cannot_be_read_is_one_line(root: Path):
    result = Result.from_folder(root / "out")
    with pytest.raises(tp.CheckpointError, match=r"metadata of README.md cannot be read \(.*\): mend it"):
        with_measurements("---\na: [\n---\ntext", result)
    assert "Not measured" in with_measurements("text by hand", Result(result.report, "0"))


def test_links_to_odd_folders_are_no_schemes(root: Path, tmp_path: Path):
    for name in ("javascript:alert(1)", 'a"b#c?d%41'):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pruning_report.html").touch()
    results = [Result(reports()[0].to_dict(), "0", folder=folder) for folder in sorted(tmp_path.iterdir())]
    html = compare_page(results, links_from=tmp_path)
    assert 'href="javascript%3Aalert%281%29/pruning_report.html"' in html
    assert 'href="a%22b%23c%3Fd%2541/pruning_report.html"' in html


FIRST = {
    "prune": {
        "sparsity": 0.5, "mean_error": 0.1, "method": "alps", "settings": {}, "pattern": "2:4", "model": "base",
        "calibration": {"samples": 1, "window": 2, "seed": 0, "digest": "d"}, "layers": [], "refined": [], "joint": [],
        "warnings": [], "command": [], "not_in_command": [], "allocation": {}, "fingerprint": {},
        "weights": {"bytes": 10, "dtype": "float32"},
    },
    "learn": {
        "sparsity": 0.5, "flips": 0.1, "pattern": "2:4", "model": "base", "settings": {"preset": "quick"},
        "data": {"samples": 1, "window": 2, "seed": 0, "digest": "d", "held_out": 1}, "layers": [], "warnings": [],
        "history": [{"step": 0, "tokens": 0, "hard_loss": 2.0, "loss": None, "flips": 0.0}], "fingerprint": {},
    },
    "shrink": {
        "pattern": "keep 0.5, uniform", "method": "magnitude", "settings": {}, "keep": 0.5, "layout": "uniform",
        "units": ["heads"], "scope": "per_layer", "model": "base", "calibration": {"seed": 0},
        "blocks": [{"block": 0, "name": "o", "kind": "heads", "kept": 1, "of": 2, "slots": 1}],
        "parameters": {"dense": 10, "kept": 5, "stored": 5}, "tensor_parallel": [1], "layers": [], "recovered": [],
        "weights": {"dense": 10, "bytes": 5, "dtype": "float32"}, "warnings": [], "command": [], "not_in_command": [],
        "shrunk": True, "fingerprint": {},
    },
    "apply": {"pruning_config": {"version": "0.1.0", "method": "masks", "pattern": "2:4", "base_model": "base"}},
}  # fmt: skip


@pytest.mark.parametrize("pipeline", sorted(FIRST))
def test_results_of_the_first_version_are_read(pipeline: str, tmp_path: Path):
    (tmp_path / "pruning_report.json").write_text(json.dumps(FIRST[pipeline]))
    (tmp_path / "config.json").write_text(json.dumps({"pruning_config": {"version": "0.1.0"}}))
    (tmp_path / "README.md").write_text("---\nbase_model: /abs\n---\ntext")
    result = Result.from_folder(tmp_path)
    assert result.pipeline == pipeline and result.name == "base" and result.version == "0.1.0"
    refresh(tmp_path)
    assert "measured by topiarist" in (tmp_path / "README.md").read_text()
    kinds = {"prune": tp.Report, "learn": tp.LearnReport, "shrink": tp.ShrinkReport}
    if pipeline in kinds:
        report = kinds[pipeline].from_folder(tmp_path)
        assert report.model == "base" and report.output == str(tmp_path)
        if isinstance(report, tp.ShrinkReport):
            assert report.units == ["kv_groups"] and report.counts() == {"kv_groups": (1, 2, 1)}
        else:
            assert (report.calibration["num_windows"], report.calibration["window_tokens"]) == (1, 2)
    assert result.size is None or result.size["packed"] in (5, 10)


@pytest.mark.parametrize("damage", [{"layers": 3}, {"model": None}, {"calibration": []}, {"settings": "x"}])
def test_a_damaged_report_is_one_line(root: Path, tmp_path: Path, damage: dict):
    plain = json.loads((root / "out" / "pruning_report.json").read_text())
    (tmp_path / "pruning_report.json").write_text(json.dumps({**plain, **damage}))
    with pytest.raises(tp.CheckpointError, match=r"is damaged \("):
        Result.from_folder(tmp_path)
