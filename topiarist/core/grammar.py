"""The one grammar of settings: `name:field=value,field=value`, settings inside settings in parentheses.

alps:preset=best                                sparsellm:local=(alps:preset=best),epochs=1
epochs=4,held_out=0.2                           lora:rank=8
"""

from __future__ import annotations

import re
from typing import Any

from topiarist.core.errors import TopiaristError

NOTHING = "none"
"""How None is written."""
_ASSIGNED = re.compile(r"\s*[A-Za-z_]\w*\s*=")


class OptionError(TopiaristError, ValueError):
    """A setting that does not exist or that cannot have the value given.

    owner, field, reason: the class and field at fault and what is wrong with its value, where it is one field.
    """

    def __init__(self, message: str, *, owner: type | None = None, field: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.owner, self.field, self.reason = owner, field, reason


def split_text(text: str) -> tuple[str, dict[str, Any]]:
    """Name and fields of a text; values stay text, `none` becomes None. Raises OptionError."""
    text = _bare(text.strip())
    if _ASSIGNED.match(text):
        return "", _fields(text)
    name, _, rest = text.partition(":")
    return name.strip(), _fields(rest)


def join_text(name: str, fields: dict[str, str]) -> str:
    """The text of a name and the texts of its fields: what `split_text` takes apart again."""
    words = [f"{field}={f'({value})' if _nests(value) else value}" for field, value in fields.items()]
    return f"{name}:{','.join(words)}" if name and words else name or ",".join(words)


def _nests(value: str) -> bool:
    return "," in value or (":" in value and "=" in value)


def _bare(text: str) -> str:
    return text[1:-1] if text.startswith("(") and text.endswith(")") else text


def _fields(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in _parts(text):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise OptionError(f"{part.strip()!r} is no field=value: write it as in alps:preset=best,ridge=0.01")
        if name in found:
            raise OptionError(f"{name} is given twice in {text!r}")
        found[name] = None if value == NOTHING else _bare(value)
    return found


def _parts(text: str) -> list[str]:
    """The text cut at commas outside parentheses."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth < 0:
            break
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    if depth:
        raise OptionError(f"{text!r} has a parenthesis without its partner")
    return [part for part in parts if part.strip()]
