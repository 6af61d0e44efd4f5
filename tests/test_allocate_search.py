"""The search: budget kept by every move, stopped and resumed to the same result, a database that is reused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import topiarist as tp
from topiarist.allocate import Search
from topiarist.allocate.evolve import mutate, spent, starts
from topiarist.pipelines.allocating import search as search_pipeline
from topiarist.pipelines.allocating.database import Database
from topiarist.pipelines.allocating.search import CandidateModel, levels_of

QUICK = {"seconds": 1e6, "generations": 5, "children": 3, "finalists": 1, "sequences": 2}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from([100, 300, 800]), min_size=2, max_size=8), st.integers(0, 10**6))
def test_moves_keep_the_budget(sizes: list[int], seed: int):
    kept = [[size * level // 10 for level in (5, 4, 3, 2, 1)] for size in sizes]
    budget, step = sum(size * 3 // 10 for size in sizes), min(sizes) // 10
    draw, genome = random.Random(seed), None
    for genome in starts(kept, sizes, list(range(len(sizes))), budget):
        assert budget - step < spent(genome, kept) <= budget
    for _ in range(5):
        assert genome is not None
        child = mutate(genome, kept, budget, draw)
        assert budget - step < spent(child, kept) <= budget and all(0 <= level < 5 for level in child)
        assert child != genome or len(set(sizes)) > 1, "units of one size can always exchange"
        genome = child


def test_nothing_can_move_where_there_is_one_level():
    assert mutate((0, 0), [[5], [5]], 10, random.Random(0)) == (0, 0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=3)


def find(base, work: Path | None, *, pattern="0.6", method="wanda", **rule) -> tp.FoundAllocation:
    return tp.find_allocation(
        base, Search(**(QUICK | rule)), pattern=pattern, method=method, calibration=tiny.tiny_tokens(10, 32), work=work
    )


def test_search_is_exact_and_never_worse_than_uniform(base: Path, tmp_path: Path):
    found = find(base, tmp_path / "work")
    total = sum(math.prod(shape) for shape in found.shapes.values())
    assert found.zeros == round(0.6 * total)
    assert found.scores.notes["divergence"] <= found.scores.notes["divergence_uniform"]
    assert found.scores.notes["generations"] == 5
    by_block = {name.split(".")[2]: found.scores.values[name] for name in found.shapes}
    assert all(
        found.scores.values[name] == pytest.approx(by_block[name.split(".")[2]], abs=1e-3) for name in found.shapes
    )


def test_the_judge_sees_what_is_stored(base: Path, tmp_path: Path, monkeypatch):
    """The divergence of a candidate is that of the dense model with the solutions of the solver in it."""
    seen = {}
    real = CandidateModel.divergence

    def noted(self, genome, row):
        value = real(self, genome, row)
        if not seen:
            logits = [self.model(input_ids=window[None]).logits[0].float().log_softmax(-1) for window in self.windows]
            wanted = [t.float().log_softmax(-1) for t in self.targets]
            seen["value"] = value
            seen["expected"] = float((wanted[row].exp() * (wanted[row] - logits[row])).sum(-1).mean())
            seen["zeros"] = float((self.model.model.layers[2].mlp.up_proj.weight == 0).float().mean())
        return value

    monkeypatch.setattr(CandidateModel, "divergence", noted)
    find(base, tmp_path / "work", generations=0)
    assert seen["value"] == pytest.approx(seen["expected"], rel=1e-4) and seen["value"] > 0.01
    assert seen["zeros"] == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("when", ["database", "start", "generation"])
def test_stopped_and_resumed_to_the_same_result(base: Path, tmp_path: Path, monkeypatch, when: str):
    expected = find(base, tmp_path / "whole")
    cls, method, after = {
        "database": (Database, "write", 7),
        "start": (CandidateModel, "divergence", 3),
        "generation": (CandidateModel, "divergence", 19),
    }[when]
    real, calls = getattr(cls, method), []

    def stopped(self, *args):
        calls.append(None)
        if len(calls) == after:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(cls, method, stopped)
    with pytest.raises(KeyboardInterrupt):
        find(base, tmp_path / "work")
    monkeypatch.setattr(cls, method, real)
    for journal in (tmp_path / "work").glob("search-*.jsonl"):
        journal.write_text(journal.read_text() + '{"genome": [1,')  # killed while it wrote a line
    assert find(base, tmp_path / "work").to_dict() == expected.to_dict()


def test_a_search_finds_the_same_after_a_longer_one(base: Path, tmp_path: Path):
    """Its length is no part of what is stored; what a longer one stored beyond it stays for the next."""
    fresh = find(base, tmp_path / "fresh", level="matrix", generations=1)
    longer = find(base, tmp_path / "work", level="matrix")
    stored = next((tmp_path / "work").glob("search-*.jsonl"))
    before = stored.read_text()
    assert fresh.scores.notes["divergence"] > longer.scores.notes["divergence"], "else nothing is shown"
    assert find(base, tmp_path / "work", level="matrix", generations=1).to_dict() == fresh.to_dict()
    assert find(base, tmp_path / "work", level="matrix", seconds=1e-9).scores.notes["generations"] == 0
    assert find(base, tmp_path / "work", level="matrix").to_dict() == longer.to_dict()
    assert stored.read_text() == before
    assert find(base, tmp_path / "fresh", level="matrix").to_dict() == longer.to_dict(), "goes on from the shorter one"


def test_the_database_is_written_once_and_grows(base: Path, tmp_path: Path, monkeypatch):
    find(base, tmp_path / "work")
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("solutions-*/*.safetensors")}
    assert len(files) == 3 * 7
    monkeypatch.setattr(search_pipeline, "evolve", lambda *_: tp.allocate.Scores(dict.fromkeys(_NAMES(base), 0.4), {}))
    find(base, tmp_path / "work", pattern="0.7")
    grown = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("solutions-*/*.safetensors")}
    assert len(grown) == 3 * 9 and all(grown[name] == when for name, when in files.items())
    find(base, tmp_path / "work", method="magnitude", generations=0)
    assert len(list((tmp_path / "work").glob("solutions-*"))) == 2, "another method's solutions stand apart"
    find(base, tmp_path / "work", method="alps", solver="wanda")
    assert len(list((tmp_path / "work").glob("solutions-*"))) == 2


def _NAMES(base: Path) -> list[str]:
    return [matrix.name for matrix in tp.audit(base)[1]]


def test_prune_by_search_keeps_its_work_and_resumes(base: Path, tmp_path: Path):
    options = {
        "method": "wanda", "pattern": 0.6, "allocation": Search(**QUICK), "calibration": tiny.tiny_tokens(10, 32),
    }  # fmt: skip
    report = tp.prune(base, tmp_path / "out", **options)
    assert report.sparsity == pytest.approx(0.6, abs=1e-4) and list((tmp_path / "out.search").glob("solutions-*"))
    assert report.allocation["notes"]["divergence"] > 0
    again = tp.prune(base, tmp_path / "again", allocation_work=tmp_path / "out.search", **options)
    assert [layer.pattern for layer in again.layers] == [layer.pattern for layer in report.layers]


def test_a_model_in_memory_is_left_as_it_was():
    model = tiny.tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = find(model, None, level="matrix")
    assert found.sparsity == pytest.approx(0.6, abs=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_search_where_only_nm_is_allowed(base: Path, tmp_path: Path):
    found = find(base, tmp_path / "work", pattern="0.4", choices="dense+2:4", level="matrix")
    assert {str(p) for p in found.patterns.values()} == {"None", "2:4"} and 0.4 <= found.sparsity < 0.41
    assert [str(p) for p in levels_of(Search(), tp.NM(2, 4))] == ["None", "3:4", "2:4", "1:4"]


def test_bad_input(base: Path, tmp_path: Path):
    with pytest.raises(tp.CalibrationError, match="10 calibration windows, of which the search keeps 10"):
        find(base, tmp_path / "work", sequences=10)
    with pytest.raises(tp.TopiaristError, match="2 finalists of 1 children"):
        Search(children=1)
    with pytest.raises(tp.PatternError, match=r"may have 0 to 0\.5 zeros, so 0\.6 in all cannot be met"):
        find(base, tmp_path / "work", max_sparsity=0.5)
    assert not (tmp_path / "work").exists()
    assert json.loads(json.dumps(find(base, None, generations=0).to_dict()))["rule"]["name"] == "search"
