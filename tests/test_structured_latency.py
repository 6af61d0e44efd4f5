"""A target of milliseconds a token: met by what is cut, held to what was measured, refused where it cannot be met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from killing import Killed

import topiarist as tp
from topiarist.pipelines.shrinking import latency
from topiarist.pipelines.shrinking import search as split_search

TEXT = tiny.tiny_tokens(16, 32)
UNITS = ["hidden", "kv_groups", "channels", "block"]


def time_of(model: Any) -> float:
    """Stands in for a measurement: parameters take time, and so do blocks by themselves."""
    return sum(p.numel() for p in model.parameters()) / 10_000 + model.config.num_hidden_layers


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every time that was measured."""
    told: list[float] = []

    def measure(model: Any) -> float:
        told.append(time_of(model))
        return told[-1]

    for module in (latency, split_search):
        monkeypatch.setattr(module, "token_milliseconds", measure)
    return told


def run(base: Any, out: Path | None, **options: Any) -> tp.ShrinkReport:
    defaults: dict[str, Any] = {"method": "activation", "units": UNITS, "data": TEXT, "batch_size": 4, "round_to": 4}
    return tp.shrink(base, out, **(defaults | {"search": {"values": 3}} | options))


def test_the_target_is_met_at_the_lowest_loss_that_was_tried(measured: list[float]):
    model = tiny.tiny_model(num_hidden_layers=4, intermediate_size=128)
    target = 0.7 * time_of(model)
    report = run(model, None, target_latency=target)
    assert time_of(report.result) <= target and measured[0] == time_of(model)
    assert [row["milliseconds"] for row in report.splits] == measured[1:]
    met = [row for row in report.splits if row["milliseconds"] <= target]
    best = min(met, key=lambda row: row["loss"])
    assert report.parameters["stored"] == best["parameters"] and max(row["milliseconds"] for row in met) >= 0.9 * target
    assert len({row["parameters"] for row in report.splits}) > 1
    assert report.parameters["stored"] / report.parameters["dense"] <= report.keep < 1
    assert report.pattern == f"keep {report.keep:g}, uniform"


def test_a_killed_search_goes_by_the_times_it_measured(measured: list[float], tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=3)
    target = 0.75 * time_of(tiny.tiny_model(num_hidden_layers=3))
    whole = run(base, tmp_path / "whole", target_latency=target)
    asked = len(measured)

    def killing(what: str, done: int, total: int) -> None:
        if what == "trying splits" and done == 2:
            raise Killed

    with pytest.raises(Killed):
        run(base, tmp_path / "killed", target_latency=target, progress=killing)
    resumed = run(base, tmp_path / "killed", target_latency=target)
    assert resumed.splits == whole.splits and len(measured) == 2 * asked
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_latency": 1e6}, "meets the target of 1e+06 ms already"),
        ({"target_latency": 2.5}, "no split"),
        ({"target_latency": 1e-9}, "no split takes 1e-09 ms a token here, where the dense model takes"),
        (
            {"target_latency": 3.4, "units": ["hidden", "channels"]},
            "no split takes 3.4 ms a token here, the fastest took",
        ),
        ({"target_latency": 5.0, "target_params": 10_000}, "target_params and target_latency both say how much stays"),
        ({"target_latency": 5.0, "keep": 0.5}, "keep and target_latency both say"),
        ({"target_latency": 5.0, "layout": "hetero"}, "--target-latency needs --layout uniform"),
        ({"target_latency": 5.0, "units": ["hidden"]}, "needs channels"),
        ({"target_latency": -1.0}, "greater than 0"),
    ],
)
def test_what_cannot_be_met_is_refused(options: dict[str, Any], message: str, measured: list[float]):
    with pytest.raises(tp.TopiaristError) as refused:
        run(tiny.tiny_model(), None, **options)
    assert message in str(refused.value)


def test_a_token_takes_some_time():
    assert latency.token_milliseconds(tiny.tiny_model()) > 0
