"""Methods as the benchmarks name them: `alps:preset=best+correct:share=0.5+refine`."""

from __future__ import annotations

from typing import Any

from topiarist.core.grammar import split_text
from topiarist.core.options import Registered
from topiarist.core.registry import look_up
from topiarist.pipelines.pruning.correct import Correct
from topiarist.pipelines.pruning.refine import Refine
from topiarist.pipelines.pruning.sparsellm import METHODS


def method_from_text(text: str) -> tuple[Any, dict[str, Any]]:
    """The solver, and what else `tp.prune` takes: after each plus, `correct` or `refine`, with fields or without."""
    method, *extras = text.split("+")
    found = {}
    for name, fields in map(split_text, extras):
        found[name] = look_up({"correct": Correct, "refine": Refine}, name, "addition")(**fields)
    return Registered(METHODS).parse(method), found
