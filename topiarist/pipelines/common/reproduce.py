"""The command line that repeats a call, made from its options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from topiarist.core.options import about, changed, fields_of, tables_of, to_text
from topiarist.data import TextFiles


def flag_of(name: str, info: Any) -> str:
    """The flag of a field on the command line."""
    return "--" + (about(info).flag or name.replace("_", "-"))


def command(name: str, model: Any, options: Any, *, always: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The words of the command, and what in the call no command can say: that has a placeholder in capitals.

    always: fields said even at their defaults, because those are the model's.
    """
    unsaid: list[str] = []
    given_object = isinstance(model, nn.Module)
    words = ["topiarist", name, "MODEL" if given_object else str(model), "OUT"]
    unsaid += ["a model object"] * given_object
    said = {*changed(options), *always}
    for field, info in fields_of(type(options)).items():
        value = getattr(options, field)
        if value is None or field not in said or not (about(info).cli and about(info).result):
            continue
        flag = flag_of(field, info)
        texts = _texts(field, value, tables_of(type(options)).get(field))
        if texts is None:
            unsaid.append(f"{field}: {_what(value)}")
            words += [flag, field.upper()]
        elif isinstance(value, bool):
            words.append(flag if value else "--no-" + flag.removeprefix("--"))
        elif texts == ["true"]:  # settings at their defaults
            words.append(flag)
        else:
            words += [word for text in texts for word in (flag, text)]
    return words, unsaid


def _texts(field: str, value: Any, table: Any) -> list[str] | None:
    """A flag's values; None if text cannot hold one."""
    if field == "data":
        return [str(path) for path in value.paths] if isinstance(value, TextFiles) else None
    if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
        return list(value)
    text = to_text(value, table)
    return None if text is None else [text]


def _what(value: Any) -> str:
    return "given in memory" if isinstance(value, Sequence) or hasattr(value, "shape") else f"a {type(value).__name__}"
