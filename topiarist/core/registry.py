"""Tables from a name to what it stands for: how text chooses a method, a rule or a preset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from topiarist.core.errors import TopiaristError
from topiarist.core.former import METHODS

T = TypeVar("T")


def look_up(table: Mapping[str, T], name: str, what: str = "method") -> T:
    """The entry of that name. Raises TopiaristError, with all names, if there is none."""
    if name not in table:
        if METHODS.get(name) in table:
            raise TopiaristError(f"{what} {name!r} is called {METHODS[name]!r} now: use that name")
        raise TopiaristError(f"unknown {what} {name!r}; choose one of {', '.join(table)}")
    return table[name]


def key_of(table: Mapping[str, type[Any]], value: object) -> str | None:
    """The name of the value's own class; None if the table has it not."""
    return next((name for name, cls in table.items() if type(value) is cls), None)


def name_of(table: Mapping[str, type[Any]], value: object) -> str:
    """Its name in the table, else that of its class."""
    return key_of(table, value) or type(value).__name__
