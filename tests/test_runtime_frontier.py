"""Domination is by both measures at once; words and numbers agree."""

from __future__ import annotations

import pytest

from topiarist.runtime.frontier import Frontier, Point, dense_bytes

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


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(16, 2 * 100 + 2 * 8 * 576), (8, 2 * 100 + 8 * 576 + 2 * 8 * 9), (4, 2 * 100 + 4 * 576 + 144)],
)
def test_bytes_of_dense_models(bits, expected):
    assert dense_bytes([(8, 576)], 100, bits) == expected
