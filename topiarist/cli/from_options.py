"""Flags made of the fields of an options value: name, help text and default come from it, checks are its own."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from topiarist.core.grammar import OptionError
from topiarist.core.options import ALIASES, Settings, about, default_of, fields_of, in_order, tables_of, to_text
from topiarist.pipelines.common.reproduce import flag_of

BARE = "true"
"""What stands for a settings flag without a value."""
METAVARS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


def flags(options_type: type[Any], stage: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command with a parameter `options`: the command line has a flag for every field in its place.

    Only flags that were given are passed on, so defaults are written once, in the options' class. stage: name of the
    command in recipes, whose settings `--recipe FILE` then gives; flags stand above them.
    """
    known = {name: info for name, info in in_order(options_type) if about(info).cli}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        hints = get_type_hints(function, localns={options_type.__name__: options_type}, include_extras=True)
        words = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values() if p.name != "options"]

        @functools.wraps(function)
        def run(**given: Any) -> Any:
            settings = {name: value for name in known if (value := given.pop(name)) not in (None, [])}
            if "data" in settings:
                settings["data"] = [Path(path) for path in settings["data"]]
            if stage and (source := given.pop("recipe")) is not None:
                from topiarist.pipelines.recipes.recipe import settings_from

                settings = settings_from(source, stage) | settings
            try:
                options = options_type(**settings)
            except OptionError as fault:  # who typed a flag knows no fields
                if fault.owner is not options_type or fault.field not in known:
                    raise
                raise OptionError(f"{flag_of(fault.field, known[fault.field])} {fault.reason}") from None
            if hasattr(options, "use_threads"):
                options.use_threads()
            return function(**given, options=options)

        made = [_parameter(options_type, name, info) for name, info in known.items()]
        if stage:
            words.append(_RECIPE)
        run.__signature__ = signature.replace(parameters=[*words, *made])  # pyright: ignore[reportAttributeAccessIssue]
        run.__annotations__ = {p.name: p.annotation for p in (*words, *made)}
        return run

    return decorate


def _parameter(options_type: type[Any], name: str, info: Any) -> inspect.Parameter:
    """The field as typer sees it. Values stay text: the options value checks them, in one place and one wording."""
    flag, kind, parts = flag_of(name, info), str, _parts(info.annotation)
    if bool in parts:
        kind, flag = bool, f"{flag}/--no-{flag.removeprefix('--')}"
    elif name == "data" or Sequence in parts:
        kind = list[str]
    text = " ".join((info.description or "").split()).rstrip(".")
    default = default_of(next(field for field in dataclasses.fields(options_type) if field.name == name))
    if default not in (None, False, dataclasses.MISSING, ()):
        text += f" (default: {to_text(default, tables_of(options_type).get(name))})"
    metavar = about(info).metavar or next((METAVARS[part] for part in parts if part in METAVARS), "TEXT")
    if any(isinstance(mark, Settings) for mark in info.metadata):
        metavar = "FIELD=VALUE,..."
    text = text if text[1:2].isupper() else text[:1].lower() + text[1:]
    option = typer.Option(flag, help=text, show_default=False, metavar=None if kind is bool else metavar)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


_RECIPE = inspect.Parameter(
    "recipe",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Option(
            "--recipe", metavar="FILE", help="take the settings from a recipe of this one stage; flags stand above"
        ),
    ],
)


def _parts(annotation: Any) -> list[Any]:
    """The types that an annotation names, outermost first."""
    return [get_origin(annotation) or annotation, *(part for inner in get_args(annotation) for part in _parts(inner))]


def understood(words: Sequence[str], options_types: Sequence[type[Any]]) -> list[str]:
    """The words of a command line as the parser takes them.

    Other words for a flag (`--calibration`) become the flag; a settings flag without a value (`--refine`) gets one.
    """
    aliases, settings = {}, {}
    for kind in options_types:
        for name, info in fields_of(kind).items():
            others = [name, *(word for word, meant in ALIASES.items() if meant == name)]
            aliases |= {f"--{word.replace('_', '-')}": flag_of(name, info) for word in others}
            settings |= {flag_of(name, info): mark.kind for mark in info.metadata if isinstance(mark, Settings)}
    found: list[str] = []
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        found.append(aliases.get(flag, flag) + equals + value)
        if word in settings and not _is_settings(settings[word], words[number + 1 : number + 2]):
            found.append(BARE)
    return found


def _is_settings(kind: type[Any], following: Sequence[str]) -> bool:
    """Whether the next word is the flag's value: field=value, or for a class with a leading field any word but a flag."""
    if not following:
        return False
    word = following[0]
    leading = hasattr(kind, "leads") and not word.startswith("-")
    return leading or word in (BARE, "false") or re.match(r"[A-Za-z_]\w*=", word) is not None
