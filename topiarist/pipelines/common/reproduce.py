"""What repeats a call, made from its options: a command line, and a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from topiarist.checkpoints.references import MODEL
from topiarist.core.options import about, changed, in_order, tables_of, to_text
from topiarist.data import TextFiles

RECIPE = "recipe.yaml"
RECIPE_VERSION = 1


def flag_of(name: str, info: Any) -> str:
    """The flag of a field on the command line."""
    return "--" + (about(info).flag or name.replace("_", "-"))


@dataclass(frozen=True)
class Said:
    """One setting in writing."""

    field: str
    flag: str
    value: bool | list[str] | None
    """True or False, or the texts of its values; None if no text can say it."""
    what: str = ""
    """What it is, if no text can say it."""


def said(options: Any, *, always: Sequence[str] = ()) -> list[Said]:
    """The settings that the result depends on and that are not at their defaults, in the order of the fields.

    always: fields said even at their defaults.
    """
    wanted, tables, found = {*changed(options), *always}, tables_of(type(options)), []
    for name, info in in_order(type(options)):
        value = getattr(options, name)
        if value is None or name not in wanted or not (about(info).cli and about(info).result):
            continue
        texts = value if isinstance(value, bool) else _texts(name, value, tables.get(name))
        found.append(Said(name, flag_of(name, info), texts, "" if texts is not None else _what(name, value)))
    return found


def _texts(field: str, value: Any, table: Any) -> list[str] | None:
    if field == "data":
        return [str(path) for path in value.paths] if isinstance(value, TextFiles) else None
    if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
        return list(value)
    text = to_text(value, table)
    return None if text is None else [text]


def _what(field: str, value: Any) -> str:
    return "text given in memory" if field == "data" else f"the {field} {type(value).__name__} given as an object"


def command(name: str, model: str, options: Any, *, always: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The words of the command, and what in the call no command can say: that has a placeholder in capitals.

    model: `OpenedModel.said`. After another stage of a recipe it is the whole recipe that repeats the run.
    """
    if options.stands_for is not None:
        return ["topiarist", "run", RECIPE, "--out", "OUT"], []
    words, unsaid = ["topiarist", name, model, "OUT"], ["a model object"] * (model == MODEL)
    for setting in said(options, always=always):
        if setting.value is None:
            unsaid.append(setting.what)
            words += [setting.flag, setting.field.upper()]
        elif isinstance(setting.value, bool):
            words.append(setting.flag if setting.value else "--no-" + setting.flag.removeprefix("--"))
        elif setting.value == ["true"]:  # settings at their defaults
            words.append(setting.flag)
        else:
            words += [word for text in setting.value for word in (setting.flag, text)]
    return words, unsaid


def recipe(
    name: str,
    model: str,
    options: Any,
    *,
    always: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A recipe of one stage that repeats the call; what no text can say has a placeholder in capitals.

    more: settings of the stage that are no fields of its options.
    """
    fields: dict[str, Any] = dict(more or {})
    for setting in said(options, always=always):
        value = setting.value
        several = isinstance(getattr(options, setting.field), list | tuple | TextFiles)
        fields[setting.field] = (
            setting.field.upper()
            if value is None
            else value
            if isinstance(value, bool) or several
            else _number(value[0])
        )
    return {
        "topiarist": RECIPE_VERSION,
        "model": model,
        "stages": [{name: fields}],
    }


def _number(text: str) -> Any:
    """Whole numbers and truth as YAML has them; all else stays text."""
    return {"true": True, "false": False}.get(text, int(text) if text.isdigit() else text)


def as_yaml(found: Any) -> str:
    """A recipe as its file has it."""
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120)
