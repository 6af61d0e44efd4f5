"""Pages and cards: complete, the same bytes for the same run, true to the JSON beside them, and safe with odd numbers."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny

import topiarist as tp
from topiarist.checkpoints.locking import LOCK
from topiarist.results import saved
from topiarist.results.formats import percent, short, size_text
from topiarist.results.pages import Result, compare_page, report_page, save_benchmark, save_evaluation
from topiarist.results.pages.figures import curve, heat_map, nice_ticks, panel, place_of

BENCH = {
    "machine": "a machine",
    "verdict": "Decoding is up to 1.71 x as fast (batch 1).",
    "speeds": [
        {"phase": "prefill", "batch": 1, "dense": 100.0, "sparse": 90.0},
        {"phase": "decode", "batch": 1, "dense": 10.0, "sparse": 17.1},
    ],
    "acceleration": {"layers": [{"reason": "runs packed"}, {"reason": "runs packed"}, {"reason": "too small"}]},
}


class Page(HTMLParser):
    """Checks that tags are balanced and nothing is loaded from elsewhere, and gathers the text."""

    VOID = frozenset({"meta", "wbr", "br", "rect", "circle", "polyline"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not any(name == "src" or str(value).startswith(("http:", "https:", "//")) for name, value in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A base model, two results of it, and a held-out text."""
    root = tmp_path_factory.mktemp("report")
    tiny.tiny_checkpoint(root / "base", num_hidden_layers=3)
    tiny.tiny_text(root, "heldout.txt", paragraphs=8)
    options = {"calibration": tiny.tiny_tokens(8, 32), "batch_size": 4}
    skip = [r"layers\.1\.self_attn"]
    tp.prune(root / "base", root / "a", method="sparsegpt", pattern="2:4", refine=True, skip=skip, **options)
    tp.prune(root / "base", root / "b", method="wanda", pattern="0.7", **options)
    return root


@pytest.fixture
def call(root: Path, command, monkeypatch):
    monkeypatch.chdir(root)
    return command


def test_a_run_writes_a_page_that_is_whole(root: Path, tmp_path: Path):
    html = (root / "a" / "pruning_report.html").read_text()
    page = Page(html)
    assert "base, pruned 2:4 with sparsegpt" in page.text and "What refinement gained" in page.text
    # 3 blocks of 7 matrices, less the 4 that were skipped; 9 colours of the legend; 2 bars for each of 3 blocks
    assert html.count("<rect") == 17 + 9 + 6
    assert "block 1, mlp.up_proj" in page.text and "block 1, self_attn.q_proj" not in page.text
    assert "--skip &#39;layers\\.1\\.self_attn&#39;" in html or "layers\\.1\\.self_attn" in page.text
    assert "of memory" not in page.text, "timings would differ from run to run"
    assert "Not measured yet" in page.text and "Words in capitals stand for text given in memory" in page.text
    again = tp.prune(
        root / "base", tmp_path / "a", method="sparsegpt", refine=True, skip=[r"layers\.1\.self_attn"], batch_size=4,
        calibration=tiny.tiny_tokens(8, 32),
    )  # fmt: skip
    assert (tmp_path / "a" / "pruning_report.html").read_text() == html
    assert "--refine" in again.command and again.command[again.command.index("--batch-size") + 1] == "4"


def test_the_command_of_the_page_repeats_the_run(root: Path, call):
    text = tiny.tiny_text(root, "calibration.txt")
    words = ("--calibration", str(text), "--samples", "4", "--window", "16", "--method", "alps:refit=true")
    code, _, error = call("prune", "base", "first", *words, "--pattern", "0.5/row", "--true-sequential")
    assert code == 0, error
    command = json.loads((root / "first" / "pruning_report.json").read_text())["command"]
    code, _, error = call(*["second" if word == "OUT" else word for word in command[1:]])
    assert code == 0, error
    for name in ("pruning_report.html", "README.md", "pruning_report.json", "model.safetensors"):
        assert (root / "first" / name).read_bytes() == (root / "second" / name).read_bytes()


def test_saved_measurements_show_on_page_and_card(root: Path, call):
    before = (root / "b" / "README.md").read_text()
    assert "Not measured yet" in before
    (root / "b" / "README.md").write_text(before + "\nWritten by hand.\n")
    code, printed, _ = call("eval", "b", "--text", "heldout.txt", "--window", "32", "--save", "--json")
    dense, pruned = (row["results"][0] for row in json.loads(printed))
    assert code == 0
    saved = json.loads((root / "b" / "pruning_evaluation.json").read_text())["perplexity"]
    assert saved == [
        {
            "text": "heldout.txt",
            "digest": pruned["text_digest"],
            "window": 32,
            "tokens": pruned["tokens"],
            "start_tokens": 0,
            "dtype": "float32",
            "value": pruned["value"],
            "dense": {"model": "base", "value": dense["value"]},
        }
    ]
    page = Page((root / "b" / "pruning_report.html").read_text())
    card = (root / "b" / "README.md").read_text()
    assert short(pruned["value"]) in page.text and short(dense["value"]) in page.text
    assert f"| {short(dense['value'])} | {short(pruned['value'])} |" in card
    assert "Not measured yet" not in card and "Written by hand." in card and card.count("measured by topiarist") == 1
    call("eval", "b", "--text", "heldout.txt", "--window", "32", "--save")
    assert json.loads((root / "b" / "pruning_evaluation.json").read_text())["perplexity"] == saved, (
        "replaced, not added"
    )
    call("eval", "b", "--text", "heldout.txt", "--window", "16", "--save", "--no-reference")
    assert [e["dense"] is None for e in Result.from_folder(root / "b").perplexities] == [False, True]


def test_several_results_in_one_picture(root: Path, call):
    code, _, _ = call("eval", "a", "b", "--text", "heldout.txt", "--window", "32", "--save")
    assert code == 0
    save_benchmark(root / "a", BENCH)
    assert "1.71 ×" in Page((root / "a" / "pruning_report.html").read_text()).text
    code, printed, _ = call("report", "a", "b", "--out", "pages.html")
    assert code == 0 and "written pages.html" in printed
    html = (root / "pages.html").read_text()
    page = Page(html)
    assert "2 results, 1 base model" in page.text and "1.71 ×" in page.text
    assert 'href="a/pruning_report.html"' in html and 'href="b/pruning_report.html"' in html
    assert html.count('class="panel"') == 2 and html.count('class="dot dense"') == 2
    # dense, a and b by size; dense and a by speed, because b was not timed
    assert html.count('class="dot') == 3 + 2


def test_one_folder_gets_its_page_again_with_timings(root: Path, call):
    code, printed, _ = call("report", "a")
    assert code == 0 and "written a/pruning_report.html" in printed and "pruning_comparison" not in printed
    assert "of memory" in (root / "a" / "pruning_report.html").read_text()


def test_what_is_no_result_is_refused_in_one_line(root: Path, tmp_path: Path, call):
    for folder, says in ((root / "base", "has no pruning_report.json"), (tmp_path / "none", "does not exist")):
        code, _, error = call("report", str(folder))
        assert code == 2 and says in error and len(error.strip().splitlines()) == 1
    (tmp_path / "pruning_report.json").write_text("{")
    code, _, error = call("report", str(tmp_path))
    assert code == 2 and "is not valid JSON" in error


def layer(name: str, error: float | None, sparsity: float = 0.5) -> dict:
    return {"name": name, "shape": [8, 8], "pattern": "2:4", "sparsity": sparsity, "error": error, "tokens": 4}


def result(layers: list[dict], **more) -> Result:
    facts = tp.Report(method="m", settings={}, pattern="2:4", model="org/<b>").to_dict()
    return Result({**facts, "layers": layers, "sparsity": 0.5, "mean_error": None, **more}, "0")


def test_odd_numbers_and_hostile_names():
    layers = [layer("l.0.up", math.nan), layer("l.0.down", 0.0), layer("l.1.up", 2.5), layer("odd", 1e-9, 0.9)]
    page = report_page(result(layers, mean_error=math.inf, warnings=["<script>alert(1)</script>"] * 30))
    assert "<script>" not in page and "org/<b>" not in page and "and 10 more" in page
    text = Page(page).text
    assert "not a number" in text and "Where the zeros are" in text
    assert "nothing" not in Page(report_page(result([]))).text
    infinite = {
        "text": "t",
        "digest": "d",
        "window": 8,
        "tokens": 7,
        "dtype": "float32",
        "value": math.inf,
        "dense": None,
    }
    shown = Result(result(layers).report, "0", {"perplexity": [infinite]})
    assert "∞" in Page(report_page(shown)).text
    Page(compare_page([shown, result([])]))


def test_learned_results_have_a_page_too():
    masked = [
        {"name": f"l.{i}.up.weight", "shape": [8, 8], "pattern": "2:4", "sparsity": 0.5, "flips": i / 10}
        for i in (0, 1)
    ]
    history = [{"step": s, "tokens": s, "hard_loss": 4.0 - s / 100, "loss": 1.0, "flips": 0.0} for s in (0, 50, 100)]
    text_of = {"num_windows": 3, "window_tokens": 8, "digest": "ab"}
    learned = tp.LearnReport(
        settings={"preset": "quick"}, pattern="2:4", model="m", calibration=text_of, history=history
    )
    text = Page(report_page(Result({**learned.to_dict(), "layers": masked}, "0"))).text
    assert "How learning went" in text and "from 54.6 with the one-shot mask to 20.09" in text
    assert "Where learning changed the mask" in text and "mean flips" in text


def test_the_page_of_learned_masks_states_the_evaluation_that_was_kept():
    history = [
        {"step": s, "tokens": s, "hard_loss": h, "loss": 1.0, "flips": 0.0} for s, h in ((0, 4), (50, 2), (100, 3))
    ]
    learned = tp.LearnReport(settings={}, pattern="2:4", model="m", history=history)
    text = Page(report_page(Result(learned.to_dict(), "0"))).text
    assert "from 54.6 with the one-shot mask to 7.389 with the best, which the files hold." in text


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ((2.0, 1.0, 3.0), "from 2 before to 1 at best, which the files hold"),
        ((2.0, 2.5, 3.0), "2 before, and never less: nothing was gained"),
    ],
)
def test_the_page_of_a_recovery_claims_no_more_than_was_gained(losses: tuple[float, ...], says: str):
    recovery = {
        "tokens": 9, "steps": 2, "teacher": None, "command": [], "warnings": ["a warning of the recovery"],
        "evaluations": [{"step": step, "loss": loss} for step, loss in enumerate(losses)],
    }  # fmt: skip
    text = Page(report_page(result([layer("l.0.up", 0.1)], recovery=recovery, warnings=["one of pruning"]))).text
    assert says in text and "one of pruning" in text and "a warning of the recovery" in text


def test_papers_of_a_dense_model_that_was_trained_say_nothing_of_pruning(root: Path, tmp_path: Path):
    settings = {"tokens": 128, "window_tokens": 32, "sequences": 2, "batch_size": 2, "held_out": 2}
    text = tp.text_files(tiny.tiny_text(tmp_path))
    tp.recover(root / "base", tmp_path / "out", data=text, loss="lm", **settings)
    shown = Page((tmp_path / "out" / "pruning_report.html").read_text()).text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base, trained further" in shown and "nothing was pruned" in shown and "Nothing was pruned." in card
    for wrong in ("masked", "masks", "0 % of", "zeros held", "stayed zero", "- pruned", "?"):
        assert wrong not in card and wrong not in shown, wrong


def test_the_axis_of_blocks_begins_with_the_first_that_was_pruned():
    page = report_page(result([layer("l.2.up", 0.1), layer("l.3.up", 0.1, 0.9), layer("l.7.up", 0.1)]))
    assert "<span>block 2</span><span>block 7</span>" in page


def test_pages_say_whether_windows_begin_with_a_start_token():
    entry = {"text": "t", "window": 8, "tokens": 7, "dtype": "float32", "value": 9.0, "dense": None}
    plain, start = {**entry, "digest": "d"}, {**entry, "digest": "e", "start_tokens": 1}
    facts = result([layer("l.0.up", 0.1)]).report

    def text_of(*entries: dict) -> str:
        return Page(report_page(Result(facts, "0", {"perplexity": entries}))).text

    assert "without overlap, no start token." in text_of(plain) and "overlap, start token first." in text_of(start)
    both = text_of(plain, start)
    assert "without overlap, start tokens differ." in both and both.count("t start token first") == 1
    text = Page(compare_page([Result(facts, "0", {"perplexity": [plain, start]})])).text
    assert "t 8" in text and "t 8, start token first" in text and "windows of 8 tokens, start token first" in text


def test_scores_of_other_items_stand_in_other_columns():
    score = {
        "task": "piqa", "metric": "acc", "digest": "d", "num_items": 20, "dtype": "float32", "stderr": None, "value": 0.71,
        "dense": {"value": 0.81, "stderr": None},
    }  # fmt: skip
    others = [{"num_items": 900, "digest": "e"}, {"metric": "acc_norm"}, {"digest": "f"}, {}]
    facts = result([layer("l.0.up", 0.1)]).report
    results = [
        Result(facts, "0", {"tasks": [{**score, **other, "value": 0.1 * i}]}) for i, other in enumerate(others, 1)
    ]
    html = compare_page([*results, Result(facts, "0", {"tasks": [score]})])
    assert html.count("items</span></th>") == 4 and "acc, 900 items" in html and "acc_norm, 20 items" in html
    # a score and dashes in every row; the two of the same items share a column
    assert html.count("0.81</td>") == 4 and html.count("0.71</td>") == 1 and html.count("0.4</td>") == 1


def test_experts_share_a_cell():
    map_ = heat_map(
        [layer(f"m.layers.3.mlp.experts.up.{e}", e / 10) for e in range(1, 5)], "error", str, logarithmic=True
    )
    assert map_ is not None and map_.columns == 4
    ((kind, (cell,)),) = map_.rows
    assert kind == "mlp.experts.up" and "mean of 4, largest 0.4" in cell.title
    assert place_of("transformer.h.11.attn.c_attn") == (11, "attn.c_attn") and place_of("fc") == (0, "fc")


def test_scales():
    assert nice_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0] and nice_ticks(12.0, 14.5) == [12.0, 13.0, 14.0]
    assert curve([(0.0, 1.0)]) is None and curve([(0.0, math.nan), (1.0, 2.0)]) is None
    line = curve([(0.0, 4.0), (10.0, 2.0)])
    assert line is not None and line.points == [(0.0, 1.0), (1.0, 0.0)]
    wide = panel("x", [(1, 0.5, 10.0, ""), (2, 1.0, 1e6, "")], (10.0, 1e6), str, str)
    assert all(0 < dot.x < 1 and 0 < dot.y < 1 for dot in wide.dots) and 2 <= len(wide.y_ticks) <= 7
    alone = panel("x", [(1, 0.5, 10.0, "")], (10.0, 10.0), str, str)
    assert all(0 <= at <= 1 for at, _ in alone.x_ticks + alone.y_ticks)
    assert [percent(0.5), percent(0.703), percent(1.0)] == ["50 %", "70.3 %", "100 %"]
    assert [short(12.345), short(1234.5), short(3e9), short(math.inf)] == ["12.35", "1,234", "3.0e+09", "∞"]
    assert [size_text(12), size_text(345678), size_text(16e9)] == ["12 B", "346 kB", "16.00 GB"]


def test_packed_size_is_what_pack_makes(root: Path, tmp_path: Path):
    from topiarist.runtime import pack_folder

    packed = pack_folder(root / "b", tmp_path / "packed")
    size = Result.from_folder(root / "b").size
    assert size is not None
    assert size["matrices_packed"] == packed.sparse_packed_bytes and size["matrices"] == packed.sparse_dense_bytes


def test_a_packed_folder_has_figures_of_its_own_weights_only(root: Path, tmp_path: Path):
    from topiarist.runtime import pack_folder

    entry = {"text": "t", "digest": "d", "window": 8, "tokens": 7, "dtype": "float32", "value": 87.65, "dense": None}
    source = tmp_path / "source"
    shutil.copytree(root / "b", source)
    save_evaluation(source, {"perplexity": [entry]})
    save_benchmark(source, BENCH)
    for values, head in ((None, None), ("int4", None), (None, "int8")):
        out = tmp_path / f"{values}-{head}"
        packed = pack_folder(source, out, values=values, head=head)
        shown = Result.from_folder(out)
        text = Page((out / "pruning_report.html").read_text()).text + (out / "README.md").read_text()
        kept = values is None and head is None
        assert bool(shown.perplexities) == bool(shown.benchmark) == ("87.65" in text) == ("1.71" in text) == kept
        assert shown.size is not None and (shown.size["dense"], shown.size["packed"]) == (
            packed.dense_bytes, packed.packed_bytes,
        )  # fmt: skip
        assert size_text(packed.packed_bytes) in text


def test_papers_of_a_packed_folder_say_how_it_is_opened(root: Path, tmp_path: Path):
    from topiarist.runtime import pack_folder, unpack_folder

    def papers(folder: Path) -> tuple[str, str]:
        return (folder / "README.md").read_text(), Page((folder / "pruning_report.html").read_text()).text

    source = tmp_path / "source"
    shutil.copytree(root / "a", source)
    card = (source / "README.md").read_text()
    old = card.replace("any loader opens them, and", "any loader opens\nthem, and")  # as cards were wrapped before
    assert old != card
    (source / "README.md").write_text(f"{old}\nMine.\n")
    pack_folder(source, tmp_path / "packed")
    for text in papers(tmp_path / "packed"):
        assert "unpack" in text and "from_packed" in text and "topiarist pack" not in text
        assert "ordinary dense tensors" not in text and "which every loader opens" not in text
    assert "Mine." in papers(tmp_path / "packed")[0] and "Packed it is" in papers(tmp_path / "packed")[0]
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert papers(tmp_path / "again")[0] == f"{card}\nMine.\n"
    assert "topiarist pack" in papers(tmp_path / "again")[1] and "from_packed" not in papers(tmp_path / "again")[1]


def test_two_that_save_at_once_keep_both_their_figures(root: Path, tmp_path: Path, monkeypatch):
    """The second reads what the first has written, however long that takes."""
    shutil.copytree(root / "a", tmp_path / "a")
    (tmp_path / "a" / "pruning_evaluation.json").unlink(missing_ok=True)
    entry = {"text": "t", "window": 8, "tokens": 8, "dtype": "float32", "value": 2.0, "dense": None}
    reading, both = threading.Event(), threading.Barrier(2, timeout=60)
    read = saved.json_if_any

    def slowly(path: Path) -> dict:
        found = read(path)
        if not reading.is_set() and path.name == "pruning_evaluation.json":
            reading.set()
            both.wait()  # the other is on its way
            time.sleep(0.2)
        return found

    monkeypatch.setattr(saved, "json_if_any", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(save_evaluation, tmp_path / "a", {"perplexity": [entry | {"digest": "1"}]})
        assert reading.wait(60)
        second = pool.submit(
            lambda: (both.wait(), save_evaluation(tmp_path / "a", {"perplexity": [entry | {"digest": "2"}]}))
        )
        for saving in (first, second):
            saving.result()
    assert [found["digest"] for found in Result.from_folder(tmp_path / "a").perplexities] == ["1", "2"]
    assert not (tmp_path / "a" / LOCK).exists()
    with pytest.raises(tp.CheckpointError, match="none does not exist"):
        save_benchmark(tmp_path / "none", BENCH)


def test_of_several_base_models_none_is_the_dense_one(root: Path):
    results = [Result.from_folder(root / name) for name in ("a", "b")]
    entry = {"text": "t", "digest": "d", "window": 8, "tokens": 8, "dtype": "float32", "value": 2.0}
    one, two = (
        replace(r, evaluation={"perplexity": [entry | {"dense": {"model": "m", "value": 1.5}}]}) for r in results
    )
    assert "D is the dense model, 1.5" in Page(compare_page([one, two])).text
    other = replace(two, report={**two.report, "model": "another"})
    text = Page(compare_page([one, other])).text
    assert "is the dense model" not in text and "different base models: another, base" in text


def test_measurements_can_wait_for_a_report(tmp_path: Path):
    save_evaluation(tmp_path, {"perplexity": []})
    save_benchmark(tmp_path, BENCH)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruning_benchmark.json", "pruning_evaluation.json"]
