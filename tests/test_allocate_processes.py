"""Measuring and searching divided among processes give every one of them the numbers that one alone finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from several import run_in, start_command

import topiarist as tp
from topiarist.allocate import Owl, Rule, Search, Sensitivity

pytestmark = pytest.mark.distributed

RULES: dict[str, tuple[str, Rule]] = {
    "owl": ("llama", Owl()),
    "owl of experts": ("mixtral", Owl(level="matrix")),
    "fisher": ("llama", Sensitivity(sequences=5)),
    "hutchinson": ("llama", Sensitivity(estimate="hutchinson", probes=2, sequences=4)),
    "input trace": ("mixtral", Sensitivity(estimate="input_trace", sequences=9)),
    "search": ("llama", Search(generations=3, children=3, finalists=2, sequences=2)),
}


def find(base: Path, rule: Rule, work: Path | None, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"pattern": "0.6", "method": "wanda", "data": tiny.tiny_tokens(20, 32), "batch_size": 2}
    return tp.find_allocation(base, rule, work=work, **(defaults | options)).to_dict()


@pytest.mark.parametrize("case", RULES)
def test_any_number_of_processes_finds_the_same(case: str, tmp_path: Path):
    family, rule = RULES[case]
    base = tiny.tiny_checkpoint(tmp_path / "base", family)
    expected = find(base, rule, tmp_path / "1")
    names = sorted(path.name for path in (tmp_path / "1").rglob("*") if path.is_file())
    for size in (2, 4):
        work = tmp_path / str(size)
        for _ in ("measured", "read from the work folder"):
            assert run_in(size, lambda _: _check(find(base, rule, work), expected)) == {}  # noqa: B023
            assert sorted(path.name for path in work.rglob("*") if path.is_file()) == names


def _check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found == expected


def test_a_search_begun_by_one_is_finished_by_two(tmp_path: Path):
    base, rule = tiny.tiny_checkpoint(tmp_path / "base"), Search(generations=3, children=3, sequences=2)
    expected = find(base, rule, tmp_path / "whole")
    find(base, Search(generations=1, children=3, sequences=2), tmp_path / "work")
    assert run_in(2, lambda _: _check(find(base, rule, tmp_path / "work"), expected)) == {}


def test_the_command_writes_one_file(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    tiny.tiny_text(tmp_path)
    words = ["allocate", base, tmp_path / "OUT.json", "--rule", "owl", "--data", tmp_path / "text.txt"]
    workers = start_command(2, [*words, "--samples", "16", "--window", "32"], tmp_path / "printed")
    for worker in workers:
        worker.join(120)
    printed = [(tmp_path / "printed" / f"{rank}.txt").read_text() for rank in range(2)]
    assert [worker.exitcode for worker in workers] == [0, 0], printed
    assert "written" in printed[0] and not printed[1]
    assert json.loads((tmp_path / "OUT.json").read_text())["rule"]["name"] == "owl"


@pytest.mark.parametrize(
    ("size", "everywhere", "rule", "differently", "message"),
    [
        (3, True, Owl(), {}, "3 processes cannot divide 8 slots"),
        (4, True, Sensitivity(sequences=3), {}, "3 batches of windows are too few for 4 processes"),
        (4, True, Search(sequences=18), {}, "1 batches of windows are too few for 4 processes"),
        (2, False, Owl(threshold=3), {}, "process 1 on .* works on something else than process 0: rule"),
        (2, False, Owl(), {"data": tiny.tiny_tokens(20, 32, seed=1)}, "process 1 on .*: calibration digest was"),
    ],
    ids=["size", "sequences", "search", "rule", "text"],
)
def test_what_processes_cannot_share_is_refused(
    size: int, everywhere: bool, rule: Rule, differently: dict[str, Any], message: str, tmp_path: Path
):
    base = tiny.tiny_checkpoint(tmp_path / "base")

    def work(rank: int) -> None:
        other = everywhere or rank == 1
        with pytest.raises(tp.TopiaristError, match=message):
            find(base, rule if other else Owl(), tmp_path / "work", **(differently if other else {}))

    assert run_in(size, work) == {}
    assert not (tmp_path / "work").exists()
