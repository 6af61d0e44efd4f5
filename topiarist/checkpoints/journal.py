"""The journal of a run, line by line, other JSON that a run goes on from, sealed, and how two runs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from topiarist.checkpoints.reading import whole
from topiarist.core.errors import CheckpointError

SEAL = "seal"
"""The entry of a JSON object that holds the digest of all others: what a state says decides what a resumed run writes."""


def sealed(plain: Mapping[str, Any], *, indent: int | None = None) -> str:
    """The text of a JSON object, on one line unless there is an indent, with its digest."""
    return json.dumps({**plain, SEAL: _digest(plain)}, indent=indent)


def unsealed(found: Any) -> dict[str, Any] | None:
    """A JSON object as it was before it was sealed; None for what was not, or has changed since."""
    plain = dict(found) if isinstance(found, dict) else {}
    return plain if plain.pop(SEAL, None) == _digest(plain) else None


def unsealed_text(text: bytes) -> dict[str, Any] | None:
    """The JSON object that `sealed` gave the text of; None if it is not that text any more."""
    try:
        return unsealed(json.loads(text))
    except (ValueError, RecursionError):
        return None


def read_sealed(path: Path) -> dict[str, Any] | None:
    """As `unsealed_text`, of a file; None also if there is none. Raises CheckpointError if it cannot be read."""
    with whole(path):
        return unsealed_text(path.read_bytes()) if path.is_file() else None


def _digest(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line).encode()).hexdigest()


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal; a last one cut off by a kill does not count.

    The first line says what the run is; each other one names a finished "block" or "file", its sha256 and its tensors.
    A first line without a digest is of an earlier version: nothing after it counts.
    Raises CheckpointError for a line that is anything else, or that is not what the run wrote.
    """
    lines: list[dict[str, Any]] = []
    with whole(path):
        found = path.read_bytes()
    for number, raw in enumerate(found.split(b"\n")[:-1]):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            line = None
        if number == 0 and isinstance(line, dict) and SEAL not in line:
            return [line]
        plain = unsealed(line)
        if plain is None or (number and not _is_known(plain)):
            raise CheckpointError(f"line {number + 1} of {path} is damaged: delete {path.parent} and start again")
        lines.append(plain)
    return lines


def _is_known(line: Mapping[str, Any]) -> bool:
    place = line.get("block", line.get("file"))
    names = line.get("tensors")
    inside = isinstance(place, str) and not Path(place).is_absolute() and ".." not in Path(place).parts
    return inside and isinstance(line.get("sha256"), str) and isinstance(names, list | dict)


SHOWN = 3
"""Differences between two runs that a refusal names."""


def listed(named: Sequence[str]) -> str:
    """The first few differences, and how many there are beside."""
    return "; ".join(named[:SHOWN]) + (f" (and {len(named) - SHOWN} more)" if len(named) > SHOWN else "")


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield what differs between two runs, a sentence each, down to single entries."""
    for key in sorted({*found, *wanted}):
        was, now = found.get(key), wanted.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from differences(was, now, f"{path}{key} ")
        elif was != now:
            yield f"{path}{key} was {was!r} and is {now!r}"
