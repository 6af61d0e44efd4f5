"""Zero-shot tasks from item files: refused early if they do not fit; scores against a plain loop where lm-eval is there."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

import topiarist as tp
from topiarist.core import linalg, products
from topiarist.evaluation import tasks
from topiarist.evaluation.items import FORMATS, local_task
from topiarist.results.pages import Result

PIQA = [{"goal": f"goal {i}", "sol1": f"first {i}", "sol2": f"the second {i * 7}", "label": i % 2} for i in range(6)]
ITEMS: dict[str, list[dict]] = {
    "piqa_valid": PIQA,
    "arc_easy_test": [{"question": "why?", "choices": ["a", "bee", "sea"], "label": 2}] * 3,
    "hellaswag_val": [{"query": "once", "choices": ["upon", "a", "time", "more"], "label": 0}] * 3,
    "openbookqa_test": [{"question": "fog is", "choices": ["wet", "dry"], "label": 0}] * 3,
    "winogrande_xl": [{"sentence": "It was _ who left.", "option1": "he", "option2": "she", "answer": "2"}] * 3,
    "boolq_validation": [{"question": "is it", "passage": "It is.", "answer": True}] * 3,
    "social_iqa_validation": [
        {"context": "c", "question": "q?", "answerA": "a", "answerB": "b", "answerC": "d", "label": "3"}
    ] * 3,
    "lambada_openai_test": [{"context": "a word is a", "continuation": w} for w in ("word", "bird", "cat")],
}  # fmt: skip


@pytest.fixture
def items(tmp_path: Path) -> Path:
    folder = tmp_path / "items"
    folder.mkdir()
    for name, rows in ITEMS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_without_the_harness_one_line_says_what_to_install(items: Path, tmp_path: Path, monkeypatch, command):
    tiny.tiny_checkpoint(tmp_path / "base")
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it now raises ImportError
    code, _, error = command("eval", str(tmp_path / "base"), "--tasks", "piqa", "--task-files", str(items))
    lines = [line for line in error.splitlines() if "error" in line]
    assert code == 2 and len(lines) == 1 and lines[0].endswith("pip install 'topiarist[eval]'")


def test_nothing_to_evaluate_on(tmp_path: Path, command):
    code, _, error = command("eval", str(tmp_path))
    assert code == 2 and "name --text" in error and "--tasks" in error


def test_text_that_does_not_fit_is_refused_before_any_task_runs(items: Path, tmp_path: Path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_checkpoint(Path("base"))
    tiny.tiny_text(tmp_path)
    ran = []
    monkeypatch.setattr(tasks, "compare_tasks", lambda *_, **__: ran.append(1) or [])
    words = ("eval", "base", "--text", "text.txt", "--tasks", "piqa", "--task-files", str(items), "--window")
    code, _, error = command(*words, "65536")
    assert code == 2 and "less than one window" in error and not ran
    assert command(*words, "32", "--max-windows", "1")[0] == 0 and ran == [1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--text", "text.txt", "--task-files", "nowhere"), "task files are of zero-shot tasks, and none is named"),
        (("--text", "text.txt", "--limit", "3"), "a limit is of zero-shot tasks, and none is named"),
        (
            ("--text", "text.txt", "--tasks", "piqa", "--task-files", "nowhere"),
            "nowhere must hold one file piqa*.jsonl",
        ),
    ],
)
def test_items_without_a_task_and_tasks_without_items_are_refused(tmp_path: Path, monkeypatch, command, words, says):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_checkpoint(Path("base"))
    tiny.tiny_text(tmp_path)
    code, printed, error = command("eval", "base", *words)
    assert code == 2 and says in error and error.count("error ") == 1 and not printed


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("--bos", "always"), "bos"),
        (("--window", "32"), "window"),
        (("--max-windows", "3"), "max windows"),
        (("--split", "train"), "split"),
        (("--text-field", "body"), "text field"),
        (("--allow-overlap",), "allow overlap"),
    ],
)
def test_settings_of_text_without_text_are_refused(command, words, name):
    code, printed, error = command("eval", "nowhere", "--tasks", "piqa", *words)
    assert code == 2 and f"{name} is a setting of text, and none is named" in error and not printed


def test_every_format_includes_the_harness_s_own_task(items: Path, tmp_path: Path):
    """Only where the rows come from differs: no prompt, choice or metric is written down here."""
    for name, given in ITEMS.items():
        task = next(t for t in FORMATS if name.startswith(t))
        found = local_task(task, items)
        own = tmp_path / "lm_eval" / "tasks" / FORMATS[task].yaml
        with pytest.raises(tp.TopiaristError, match=r"has no tasks/.*pip install -U lm-eval"):
            found.write(tmp_path, tmp_path / "lm_eval")
        own.parent.mkdir(parents=True)
        own.write_text("")
        written = json.loads(found.write(tmp_path, tmp_path / "lm_eval").read_text())
        assert written["include"] == str(own) and written["task"] == task
        assert not {key for key in written if key.startswith(("doc_to", "metric", "output"))}
        rows = Path(written["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        assert len(rows) == len(given)
    assert set(FORMATS) - {next(t for t in FORMATS if n.startswith(t)) for n in ITEMS} == {"arc_challenge"}


def test_items_become_the_rows_of_the_harness_s_dataset():
    row = FORMATS["arc_easy"].row(ITEMS["arc_easy_test"][0])
    assert row == {
        "question": "why?",
        "choices": {"text": ["a", "bee", "sea"], "label": ["A", "B", "C"]},
        "answerKey": "C",
    }
    assert FORMATS["openbookqa"].row(ITEMS["openbookqa_test"][0])["question_stem"] == "fog is"
    assert FORMATS["boolq"].row(ITEMS["boolq_validation"][0])["label"] == 1
    assert FORMATS["lambada_openai"].row(ITEMS["lambada_openai_test"][0]) == {"text": "a word is a word"}
    assert FORMATS["winogrande"].row({**ITEMS["winogrande_xl"][0], "answer": 2})["answer"] == "2"


def test_items_that_do_not_fit_are_refused(items: Path):
    with pytest.raises(tp.CalibrationError, match=r"no item format is known for task 'mmlu'.*piqa"):
        local_task("mmlu", items)
    with pytest.raises(tp.CalibrationError, match=r"must hold one file arc_challenge\*.jsonl, found none"):
        local_task("arc_challenge", items)
    (items / "piqa_again.jsonl").write_text("{}\n")
    with pytest.raises(tp.CalibrationError, match=r"found piqa_again.jsonl, piqa_valid.jsonl"):
        local_task("piqa", items)
    (items / "piqa_valid.jsonl").unlink()
    with pytest.raises(
        tp.CalibrationError, match=r"piqa_again.jsonl line 1 has no field 'goal'; items have goal, sol1"
    ):
        local_task("piqa", items)
    for text, says in (("", "is empty"), (json.dumps(PIQA[0]) + "\n{\n", "line 2 is not a JSON object")):
        (items / "piqa_again.jsonl").write_text(text)
        with pytest.raises(tp.CalibrationError, match=says):
            local_task("piqa", items)
    (items / "lambada_openai_test.jsonl").write_text('{"context": "a", "continuation": "b c"}')
    with pytest.raises(
        tp.CalibrationError, match=r"line 1 does not fit its task \(the continuation 'b c' is not one word"
    ):
        local_task("lambada_openai", items)
    (items / "arc_easy_test.jsonl").write_text('{"question": "a", "choices": ["b"], "label": 3}')
    with pytest.raises(tp.CalibrationError, match="line 1 does not fit its task"):
        local_task("arc_easy", items)


def log_likelihood(model, context: str, continuation: str) -> float:
    tokenizer = tiny.tiny_tokenizer()
    before, whole = (torch.tensor(tokenizer(text)["input_ids"]) for text in (context, context + continuation))
    with torch.no_grad():
        log_probabilities = model(whole[None]).logits[0].double().log_softmax(-1)
    return sum(float(log_probabilities[i - 1, whole[i]]) for i in range(len(before), len(whole)))


@pytest.mark.slow
def test_scores_agree_with_a_plain_loop(items: Path, tmp_path: Path, monkeypatch, command):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune("base", "out", method="magnitude", calibration=tiny.tiny_tokens(4, 16))
    names = ",".join(task for task in FORMATS if task != "arc_challenge")
    words = ("out", "--tasks", names, "--task-files", str(items), "--save", "--json")
    code, printed, error = command("eval", *words)
    assert code == 0, error
    dense, pruned = json.loads(printed)
    assert (dense["dense"], pruned["dense"]) == (True, False)
    model = tiny.tiny_model()
    value = {(s["task"], s["metric"]): s["value"] for s in dense["scores"]}
    right = 0
    for item in PIQA:
        context = f"Question: {item['goal']}\nAnswer:"
        first, second = (log_likelihood(model, context, f" {item[key]}") for key in ("sol1", "sol2"))
        right += int(second > first) == item["label"]
    assert value["piqa", "acc"] == pytest.approx(right / len(PIQA))
    ways = [log_likelihood(model, f"It was {who}", " who left.") for who in ("he", "she")]
    assert value["winogrande", "acc"] == float(ways[1] > ways[0])
    losses = [
        log_likelihood(model, item["context"], f" {item['continuation']}") for item in ITEMS["lambada_openai_test"]
    ]
    assert value["lambada_openai", "perplexity"] == pytest.approx(math.exp(-sum(losses) / 3), rel=1e-3)
    assert {task for task, _ in value} == set(names.split(",")) and dense["scores"][0]["num_items"] == 3
    saved = Result.from_folder(tmp_path / "out").tasks
    assert len(saved) == len(pruned["scores"]) and all(entry["dense"]["model"].endswith("base") for entry in saved)
    assert "winogrande" in (tmp_path / "out" / "pruning_report.html").read_text()
    assert "| lambada_openai | perplexity | 3 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_harness_s_products_are_quick(items: Path, tmp_path: Path, monkeypatch):
    """It runs the model itself: without care, bf16 on a processor that has no products for it takes many times as long."""
    tiny.tiny_model().bfloat16().save_pretrained(tmp_path / "base")
    dtypes = []

    def simple_evaluate(model, **_):
        with torch.no_grad():
            model(tiny.tiny_tokens(1, 4))
        return {"results": {}}

    harness = SimpleNamespace(
        __file__=str(items / "__init__.py"), __version__="0", simple_evaluate=simple_evaluate,
        models=SimpleNamespace(huggingface=SimpleNamespace(HFLM=lambda pretrained, **_: pretrained)),
    )  # fmt: skip
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        products, "_in_float32", lambda func, x, w, *bias: (dtypes.append(x.dtype), linear(x, w, *bias))[1]
    )
    monkeypatch.setattr(linalg, "search_dtype", lambda device: torch.float32)
    monkeypatch.setattr(tasks, "installed_harness", lambda: harness)
    tasks.compare_tasks([str(tmp_path / "base")], ["piqa"], tokenizer=tiny.tiny_tokenizer(), reference=False)
    assert len(dtypes) > 8 and set(dtypes) == {torch.bfloat16}


@pytest.mark.slow
def test_the_harness_s_refusal_is_one_line(tmp_path: Path, command):
    pytest.importorskip("lm_eval")
    tiny.tiny_checkpoint(tmp_path / "base")
    code, _, error = command("eval", str(tmp_path / "base"), "--tasks", "no_such_task")
    assert code == 2 and "no_such_task" in error and "--task-files" in error
