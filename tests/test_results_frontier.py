"""Domination is by both measures at once; words and numbers agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tiny

import topiarist as tp
from topiarist.results.frontier import Frontier, Point, points_of, rival_of, sentences_of
from topiarist.results.pages import Result, compare_page, report_page
from topiarist.results.result import names_of

POINTS = (
    Point("dense bf16", 10.0, 2_000_000, 10.0, reference=True),
    Point("dense int8", 10.0, 1_100_000, 18.0, reference=True),
    Point("dense int4", 11.0, 600_000, 25.0, reference=True),
    Point("2:4 bf16", 14.0, 1_200_000, 15.0),
    Point("2:4 int8", 14.0, 640_000, 24.0),
    Point("2:4 int4", 15.0, 400_000, 30.0),
    Point("not timed", 9.0, 3_000_000),
)


def test_dominated_points_and_their_rivals():
    frontier = Frontier(POINTS)
    rivals = {point.name: (frontier.rival(point) or point).name for point in POINTS}
    assert rivals == {
        "dense bf16": "dense int8", "dense int8": "dense int8", "dense int4": "dense int4", "2:4 bf16": "dense int8",
        "2:4 int8": "dense int4", "2:4 int4": "2:4 int4", "not timed": "not timed",
    }  # fmt: skip
    assert [point.name for point in frontier.best] == ["2:4 int4", "dense int4", "dense int8", "not timed"]


def test_by_speed_only_what_was_timed_counts():
    frontier = Frontier(POINTS, "tokens_per_second")
    assert [point.name for point in frontier.best] == ["dense int8", "dense int4", "2:4 int4"]
    assert "not timed" not in " ".join(frontier.sentences())


def test_in_words():
    said = Frontier(POINTS).sentences()
    assert "2:4 bf16 is dominated: dense int8 has perplexity 10.00 instead of 14.00 at 1 MB instead of 1 MB." in said
    assert said[-1] == "Not dominated in perplexity and bytes: 2:4 int4, dense int4, dense int8, not timed."
    assert Frontier(()).sentences() == []


def test_equal_points_do_not_dominate_each_other():
    twins = (Point("a", 10.0, 5), Point("b", 10.0, 5))
    assert Frontier(twins).best == list(twins)


BENCH = {
    "machine": "a machine", "verdict": "", "acceleration": {"layers": []},
    "speeds": [{"phase": "decode", "batch": 1, "dense": 10.0, "sparse": 15.0}],
}  # fmt: skip


def result(folder: str, value: float | None, *, sparsity: float = 0.0, sparse: float | None = None, **more) -> Result:
    """A result of one matrix of (64, 128) in bf16 beside 100 other weights, and its perplexity and speed."""
    layer = {"name": "a.0.b", "shape": [64, 128], "pattern": "0.5", "sparsity": sparsity, "error": 0.1, "tokens": 9}
    after = 200 + (64 * 128 + 2 * 64 + 16 if more.get("bits") == 8 else 2 * 64 * 128)
    weights = {"before": 200 + 2 * 64 * 128, "after": after, "dtype": "bfloat16"}
    known = tp.Report(method="alps", settings={}, pattern="0.5", model="org/dense", weights=weights).to_dict()
    report = {**known, "layers": [layer], **more}
    entry = {
        "text": "t", "digest": "d", "window": 8, "tokens": 8, "dtype": "bfloat16", "value": value,
        "dense": {"model": "dense", "value": 10.0},
    }  # fmt: skip
    speeds = [{**BENCH["speeds"][0], "sparse": sparse}]
    return Result(
        report,
        "0",
        {"perplexity": [entry]} if value else {},
        {**BENCH, "speeds": speeds} if sparse else {},
        folder=Path(folder),
    )


INT8 = result("int8", 10.1, pipeline="quantize", bits=8, group=None, sparse=18.0)
SPARSE = result("sparse", 14.0, sparsity=0.5, sparse=15.0)
BOTH = result(
    "both",
    14.1,
    sparsity=0.5,
    pipeline="quantize",
    bits=8,
    group=128,
    model="sparse",
    pruned={"base_model": "../dense"},
)


def test_bytes_of_results_are_what_pack_writes():
    assert INT8.size is not None and INT8.size["packed"] == 200 + 64 * 128 + 2 * 64
    assert SPARSE.size is not None and SPARSE.size["packed"] == 200 + 64 * 128 + 64 * 128 // 8
    assert BOTH.size is not None and BOTH.size["matrices_packed"] == 64 * 128 // 2 + 64 * 128 // 8 + 2 * 64


def test_results_become_points_beside_the_dense_model():
    points = points_of([INT8, SPARSE, BOTH, result("unmeasured", None)])
    assert [(point.name, point.reference) for point in points] == [
        ("the dense model", True), ("int8", True), ("sparse", False), ("both", False),
    ]  # fmt: skip
    assert [point.tokens_per_second for point in points] == [10.0, 18.0, 15.0, None]
    assert points_of([INT8, result("other", 9.0, model="another")]) == ()


def test_folders_of_one_name_are_told_apart(tmp_path: Path, monkeypatch):
    (tmp_path / "sparse").mkdir()
    monkeypatch.chdir(tmp_path / "sparse")
    here, there = Path("."), Path("../x/sparse")
    assert names_of([here]) == ["sparse"] and names_of([here, there, Path("../other")])[1:] == ["x/sparse", "other"]
    assert names_of([here, here]) == ["sparse", "sparse"] and names_of([Path("/a"), Path("/b/a")]) == ["/a", "b/a"]
    pruned, quantised = replace(SPARSE, folder=here), replace(INT8, folder=there)
    rival = rival_of(pruned, [pruned, quantised])
    assert rival is not None and rival.name == "x/sparse"
    assert rival_of(quantised, [pruned, replace(quantised, folder=there.resolve())]) is None
    said = sentences_of([pruned, quantised])[0]
    assert said.startswith(f"{tmp_path.name}/sparse is dominated: x/sparse has")
    assert ">x/sparse</td>" in compare_page([pruned, quantised])


def test_speeds_of_other_numbers_of_tokens_are_not_compared():
    said, other = {"tokens": 32, "prompt": 64}, {"tokens": 32, "prompt": 512}

    def rates(*settings: dict) -> list[float | None]:
        results = [
            replace(SPARSE, folder=Path(f"r{i}"), benchmark={**SPARSE.benchmark, **s}) for i, s in enumerate(settings)
        ]
        return [point.tokens_per_second for point in points_of(results)[1:]]

    assert rates(said, other, said) == [15.0, None, 15.0]
    assert rates({}, {}, said) == [15.0, 15.0, None]  # older files do not say: alike among themselves alone
    assert rates({}, said, said) == [None, 15.0, 15.0]


def test_a_chain_of_runs_is_held_against_the_model_that_it_began_with(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_checkpoint(tmp_path / "base")
    tp.shrink("base", "small", method="magnitude", keep=0.7, units=["channels"], refit=False)
    tp.shrink("small", "smaller", method="magnitude", keep=0.7, units=["channels"], refit=False)
    tp.prune("smaller", "sparse", method="magnitude", pattern="0.5")
    tp.quantize("sparse", "both", bits=8, group="channel", method="round")
    dense = tp.ShrinkReport.from_folder("small").weights["before"]
    assert "first" not in tp.ShrinkReport.from_folder("small").weights
    for folder in ("small", "smaller", "sparse", "both"):
        found = Result.from_folder(folder)
        assert found.size is not None and (found.origin, found.size["dense"]) == ("base", dense), folder
    sparse = Result.from_folder("sparse")
    assert sparse.report["weights"]["before"] < dense
    entry = {**SPARSE.perplexities[0], "dense": {"model": "base", "value": 10.0}}
    points = points_of([replace(sparse, evaluation={"perplexity": [entry]})])
    assert (points[0].name, points[0].bytes) == ("the dense model", dense)
    tp.runtime.pack_folder("sparse", "packed")
    packed = Result.from_folder("packed").size
    assert packed is not None and packed["dense"] == dense


def test_a_quantised_pruned_model_has_the_base_of_the_model_that_was_pruned():
    page = compare_page([BOTH, INT8])
    assert "2 results, 1 base model<" in page and "different base models" not in page
    assert "different base models: another, dense." in compare_page([INT8, result("other", 9.0, model="org/another")])


def test_a_result_names_the_dense_quantised_model_nearest_in_bytes():
    smaller = result("int4", 12.0, pipeline="quantize", bits=4, group=128)
    rival = rival_of(SPARSE, [INT8, BOTH, smaller])
    assert rival is not None and rival.name == "int8"
    assert rival_of(SPARSE, [BOTH]) is None and rival_of(result("unmeasured", None), [INT8]) is None
    assert "sparse is dominated: int8 has perplexity 10.10 instead of 14.00" in " ".join(sentences_of([INT8, SPARSE]))
    page = report_page(SPARSE, [INT8])
    assert "The dense model, only quantised (int8), takes" in page and "(int8)" not in report_page(SPARSE)
    assert "sparse is dominated" in compare_page([INT8, SPARSE])
