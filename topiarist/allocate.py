"""How much each layer gets: {layer name: pattern}."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from topiarist.errors import PatternError
from topiarist.patterns import Pattern, parse_pattern

Allocation = Mapping[str, Pattern | None]
"""None leaves a layer dense."""


def uniform(shapes: Mapping[str, tuple[int, int]], pattern: Pattern | str | float) -> dict[str, Pattern | None]:
    """The same pattern for every layer. Raises PatternError, naming the first layer it does not fit."""
    return _checked(shapes, dict.fromkeys(shapes, parse_pattern(pattern)))


def given(shapes: Mapping[str, tuple[int, int]], chosen: Mapping[str, str | None]) -> dict[str, Pattern | None]:
    """A pattern by name for every layer, `null` for a dense one. Raises PatternError for unknown or missing names."""
    if unknown := sorted(set(chosen) - set(shapes)):
        raise PatternError(f"allocation names {unknown[0]!r} ({len(unknown)} such), which is no layer of this model")
    if missing := sorted(set(shapes) - set(chosen)):
        raise PatternError(
            f"allocation misses {missing[0]!r} ({len(missing)} such); give every layer a pattern or null"
        )
    patterns = {name: None if chosen[name] is None else parse_pattern(str(chosen[name])) for name in shapes}
    return _checked(shapes, patterns)


def from_file(shapes: Mapping[str, tuple[int, int]], path: str | Path) -> dict[str, Pattern | None]:
    """`given`, from a JSON object of name -> pattern."""
    try:
        chosen = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PatternError(f"cannot read the allocation {path}: {error}") from error
    if not isinstance(chosen, dict):
        raise PatternError(f"allocation {path} must be a JSON object of layer name -> pattern")
    return given(shapes, chosen)


def without(patterns: Allocation, skip: Sequence[str]) -> tuple[dict[str, Pattern | None], list[str]]:
    """The allocation with every layer dense whose name matches one of the regular expressions, and those that match
    nothing."""
    try:
        expressions = [re.compile(text) for text in skip]
    except re.error as error:
        raise PatternError(f"--skip takes regular expressions: {error}") from error
    unmatched = [e.pattern for e in expressions if not any(e.search(name) for name in patterns)]
    kept = {name: None if any(e.search(name) for e in expressions) else p for name, p in patterns.items()}
    return kept, unmatched


def _checked(shapes: Mapping[str, tuple[int, int]], patterns: dict[str, Pattern | None]) -> dict[str, Pattern | None]:
    for name, pattern in patterns.items():
        if pattern is not None:
            try:
                pattern.check(shapes[name])
            except PatternError as error:
                raise PatternError(f"layer {name}: {error}") from None
    return patterns
