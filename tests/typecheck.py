"""What checks annotations while the tests run: shapes and types, of the first calls of every function in every test.

Checking takes most of the time of a small model, and a loop that calls a function a thousand times with the same shapes has
nothing new to show after the first few.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

FIRST = 12
"""Calls of a function that are checked in a test."""
tower = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Reads annotations as type checkers do: an int is good where a float is asked for (PEP 484's numeric tower)."""
_calls: Counter[CodeType] = Counter()


def forget_calls() -> None:
    """What comes now is checked again."""
    _calls.clear()


def install(package: str) -> None:
    """Check the functions of a package that is imported from now on."""
    jaxtyping.jaxtyped = functools.partial(_sparing, jaxtyping.jaxtyped)
    jaxtyping.install_import_hook(package, "typecheck.tower")


def _sparing(jaxtyped: Callable[..., Any], function: Any = None, **options: Any) -> Any:
    """`jaxtyped` that stops checking a function after its first calls, and checks none before it is called: functions inside
    others are made anew with every call of those.
    """
    if function is None:
        return functools.partial(_sparing, jaxtyped, **options)
    if not isinstance(function, FunctionType):
        return jaxtyped(function, **options)
    code, checked = function.__code__, None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if _calls[code] >= FIRST:
            return function(*args, **kwargs)
        _calls[code] += 1
        if checked is None:
            checked = jaxtyped(function, **options)
        return checked(*args, **kwargs)

    return call
