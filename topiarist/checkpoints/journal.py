"""The journal of a run, line by line, and how two runs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from topiarist.core.errors import CheckpointError

SEAL = "line_sha256"
"""The entry of a line that holds the digest of all others: what a line says goes into the report of the run."""


def sealed(line: Mapping[str, Any]) -> str:
    """The text of a journal's line, with its digest."""
    return json.dumps({**line, SEAL: _digest(line)})


def _digest(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line).encode()).hexdigest()


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal; a last one cut off by a kill does not count.

    The first line says what the run is; each other one names a finished "block" or "file", its sha256 and its tensors.
    A first line without a digest is of an earlier version: nothing after it counts.
    Raises CheckpointError for a line that is anything else, or that is not what the run wrote.
    """
    lines: list[dict[str, Any]] = []
    for number, raw in enumerate(path.read_bytes().split(b"\n")[:-1]):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            line = None
        if number == 0 and isinstance(line, dict) and SEAL not in line:
            return [line]
        if not isinstance(line, dict) or (number and not _is_known(line)) or line.pop(SEAL, None) != _digest(line):
            raise CheckpointError(f"line {number + 1} of {path} is damaged: delete {path.parent} and start again")
        lines.append(line)
    return lines


def _is_known(line: Mapping[str, Any]) -> bool:
    place = line.get("block", line.get("file"))
    names = line.get("tensors")
    inside = isinstance(place, str) and not Path(place).is_absolute() and ".." not in Path(place).parts
    return inside and isinstance(line.get("sha256"), str) and isinstance(names, list | dict)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield what differs between two runs, a sentence each, down to single entries."""
    for key in sorted({*found, *wanted}):
        was, now = found.get(key), wanted.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from differences(was, now, f"{path}{key} ")
        elif was != now:
            yield f"{path}{key} was {was!r} and is {now!r}"
