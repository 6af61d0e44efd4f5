"""Sums by slots: the same tree whoever adds which part of it, and Grams that survive being packed."""

from __future__ import annotations

import pytest
import torch

import topiarist as tp
from topiarist.core.slots import SLOTS, PairwiseSum, added, check_slots, slot_batches
from topiarist.pipelines.common.grams import owners

SIZES = [size for size in range(1, SLOTS + 1) if SLOTS % size == 0]


@pytest.mark.parametrize("num", [1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("size", SIZES)
def test_every_batch_is_in_one_slot_of_one_process(num: int, size: int):
    slots = [slot for rank in range(size) for slot in slot_batches(num, rank, size)]
    assert len(slots) == SLOTS and [batch for slot in slots for batch in slot] == list(range(num))
    assert slots == slot_batches(num, 0, 1)
    if num >= size:
        assert all(any(slot_batches(num, rank, size)) for rank in range(size))


def literal(terms: list[torch.Tensor | None]) -> torch.Tensor | None:
    """The tree from its root."""
    if len(terms) == 1:
        return terms[0]
    left, right = literal(terms[: len(terms) // 2]), literal(terms[len(terms) // 2 :])
    return right if left is None else left if right is None else left + right


@pytest.mark.parametrize("missing", [(), (0,), (3, 4), (0, 1, 2, 3, 6), range(8)])
def test_the_sum_is_that_of_the_tree_for_any_number_of_processes(missing):
    drawn = torch.randn(SLOTS, 1000, generator=torch.Generator().manual_seed(0)).mul(100)
    terms = [None if slot in missing else row for slot, row in enumerate(drawn)]
    expected = literal(terms)
    for size in SIZES:
        each, parts = SLOTS // size, []
        for rank in range(size):
            own = terms[rank * each : (rank + 1) * each]
            empty = next((number for number, term in enumerate(own) if term is not None), len(own))
            total = PairwiseSum(empty=empty)
            for term in own[empty:]:
                total.push(None if term is None else term.clone())
            parts.append(total.total)
        while len(parts) > 1:
            parts = [added(*parts[number : number + 2]) for number in range(0, len(parts), 2)]
        found = parts[0]
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert torch.equal(found, expected), size


@pytest.mark.parametrize("width", [5, 192, 200, 500])
def test_a_gram_is_what_was_taken_and_put(width: int):
    x = torch.randn(50, width)
    gram, other = tp.Gram(width), tp.Gram(width)
    gram.add(x)
    expected = gram.matrix
    sums = gram.take()
    assert sums.numel() == gram.num_sums and not gram.matrix.any() and gram.tokens == 50
    other.drop()
    with pytest.raises(ValueError, match="in another process"):
        _ = other.matrix
    other.put(sums)
    assert torch.equal(other.matrix, expected)


def test_work_is_balanced():
    assert owners([8, 1, 1, 6], 2) == [0, 1, 1, 1]
    assert sorted(owners([1.0] * 8, 8)) == list(range(8))


def test_what_cannot_be_divided_is_refused():
    for num, size, message in (
        (9, 3, "start 1, 2, 4 or 8"),
        (0, 2, "without text"),
        (3, 4, "3 batches of windows"),
    ):
        with pytest.raises(tp.TopiaristError, match=message):
            check_slots(num, size)
