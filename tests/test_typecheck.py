"""The checker of annotations itself: it sees wrong shapes, and stops looking after the first calls of a test."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
import typecheck

from topiarist.core.losses import next_token_losses
from topiarist.core.patterns import NM

WRONG = torch.zeros(2, 3, 7), torch.zeros(2, 4, dtype=torch.int64)
"""Logits and tokens of different windows."""


def test_wrong_shapes_are_seen():
    with pytest.raises(jaxtyping.TypeCheckError):
        next_token_losses(*WRONG)


def test_the_next_test_looks_again():
    """Whatever the test before it called."""
    for _ in range(typecheck.FIRST):
        NM(2, 4).mask(torch.ones(4, 4))
    NM(2, 4).mask(torch.ones(4, 4))
    typecheck.forget_calls()
    with pytest.raises(jaxtyping.TypeCheckError):
        NM(2, 4).mask(torch.ones(4))  # pyright: ignore


def test_functions_inside_others_are_checked():
    jaxtyped = typecheck.jaxtyping.jaxtyped

    def made() -> object:
        def inner(x: jaxtyping.Float[torch.Tensor, "rows 2"]) -> int:
            return len(x)

        return jaxtyped(inner, typechecker=typecheck.tower)

    assert made()(torch.ones(3, 2)) == 3
    with pytest.raises(jaxtyping.TypeCheckError):
        made()(torch.ones(3, 3))
    for _ in range(typecheck.FIRST):
        made()(torch.ones(3, 2))
    assert made()(torch.ones(3, 3)) == 3, "after the first calls nothing is checked"
