"""Allocations that are said, not measured: the same for all, or layer by layer."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from topiarist.allocate.budget import Shapes, budget, check_layer, step
from topiarist.core.errors import PatternError
from topiarist.core.patterns import Pattern, parse_pattern

Allocation = Mapping[str, Pattern | None]
"""None leaves a layer dense."""


def uniform(shapes: Shapes, pattern: Pattern | str | float) -> dict[str, Pattern | None]:
    """The same pattern for every layer. Raises PatternError, naming the first layer it does not fit."""
    return _checked(shapes, dict.fromkeys(shapes, parse_pattern(pattern)))


def given(
    shapes: Shapes, chosen: Mapping[str, str | None], dense: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Pattern | None]:
    """A pattern by name for every layer, `null` for a dense one.

    dense: names that are never pruned, and why. Raises PatternError for these, for unknown or missing names, unreadable
    patterns and a layer asked to keep nothing.
    """
    if unknown := sorted(set(chosen) - set(shapes)):
        why = dense.get(unknown[0].removesuffix(".weight"))
        near = difflib.get_close_matches(unknown[0], shapes, 1, 0.0)
        known = "which is none of the layers that can be pruned here" + "".join(f"; the nearest is {n!r}" for n in near)
        reason = f"which stays dense ({why}): leave it out" if why else known
        raise PatternError(f"allocation names {unknown[0]!r} ({len(unknown)} such), {reason}")
    if missing := sorted(set(shapes) - set(chosen)):
        raise PatternError(
            f"allocation misses {missing[0]!r} ({len(missing)} such); give every layer a pattern or null"
        )
    patterns: dict[str, Pattern | None] = {}
    for name in shapes:
        try:
            patterns[name] = None if chosen[name] is None else parse_pattern(str(chosen[name]))
        except PatternError as error:
            raise PatternError(f"layer {name}: {error}") from None
    return _checked(shapes, patterns)


def from_file(shapes: Shapes, path: str | Path) -> dict[str, Pattern | None]:
    """`given`, from a JSON object of name -> pattern, or from a file that `topiarist allocate` wrote.

    The latter states how many zeros it was made for, and which layers it skipped; a PatternError says if an edit has broken
    that.
    """
    return read_file(shapes, path)[0]


def read_file(
    shapes: Shapes, path: str | Path, dense: Mapping[str, str] = MappingProxyType({})
) -> tuple[dict[str, Pattern | None], list[str]]:
    """`from_file`, and the layers that no budget counts because the allocation was made without them."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PatternError(f"cannot read the allocation {path}: {error}") from error
    if not isinstance(stored, dict):
        raise PatternError(f"allocation {path} must be a JSON object of layer name -> pattern")
    if not isinstance(stored.get("patterns"), dict):
        return given(shapes, stored, dense), []
    skipped = stored.get("skipped", [])
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise PatternError(f"allocation {path} says skipped {skipped!r}, which is no list of layers: allocate again")
    patterns = given(shapes, stored["patterns"], dense)
    zeros = sum(math.prod(shape) for shape in shapes.values()) - kept_by(shapes, patterns)
    if zeros != stored.get("zeros"):
        raise PatternError(
            f"allocation {path} makes {zeros:,} zeros and says {stored.get('zeros')}: it was edited; allocate again, or "
            "keep only its `patterns` object to give up the check"
        )
    return patterns, skipped


def kept_by(shapes: Shapes, patterns: Allocation) -> int:
    """How many weights an allocation keeps."""
    return sum(
        math.prod(shape) if (pattern := patterns[name]) is None else pattern.num_kept(shape)
        for name, shape in shapes.items()
    )


def check_budget(shapes: Shapes, patterns: Allocation, pattern: Pattern, what: str) -> None:
    """Raise PatternError if the allocation keeps another number of weights than `pattern` everywhere would: by more
    than one a layer, or more than one step of the coarsest layer.
    """
    kept, wanted = kept_by(shapes, patterns), budget(shapes, pattern)
    total = sum(math.prod(shape) for shape in shapes.values())
    if abs(kept - wanted) > max(len(shapes), *(step(patterns[name], shape) for name, shape in shapes.items())):
        raise PatternError(
            f"{what} makes {1 - kept / total:.6f} zeros, pattern {pattern} asks for {1 - wanted / total:.6f}: leave the "
            "pattern out, or allocate for it"
        )


def without(patterns: Allocation, skip: Sequence[str]) -> tuple[dict[str, Pattern | None], list[str]]:
    """The allocation with every layer dense whose name matches one of the regular expressions, and those that match
    nothing.
    """
    try:
        expressions = [re.compile(text) for text in skip]
    except re.error as error:
        raise PatternError(f"--skip takes regular expressions: {error}") from error
    unmatched = [e.pattern for e in expressions if not any(e.search(name) for name in patterns)]
    kept = {name: None if any(e.search(name) for e in expressions) else p for name, p in patterns.items()}
    return kept, unmatched


def _checked(shapes: Shapes, patterns: dict[str, Pattern | None]) -> dict[str, Pattern | None]:
    for name, pattern in patterns.items():
        check_layer(name, pattern, shapes[name])
    return patterns
