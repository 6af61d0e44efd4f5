"""Settings as values: one frozen, validated dataclass from which everything that speaks of a setting derives.

    @options
    class Refine:
        epochs: Annotated[int, Field(gt=0)] = 8
        \"\"\"Passes over the calibration windows.\"\"\"

The type checks, in Python as on the command line; the line under a field is its help text. `plain` gives the value as JSON for
fingerprints and reports, `to_text` as one word (core/grammar.py) for commands and recipes, cli/from_options.py as flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from topiarist.core.errors import TopiaristError
from topiarist.core.grammar import NOTHING, OptionError, join_text, split_text
from topiarist.core.registry import key_of, look_up

T = TypeVar("T")
Table = Mapping[str, type[Any]]
"""Name -> class of settings."""

Share = Annotated[float, Field(ge=0, le=1)]
"""From nothing to the whole."""
Part = Annotated[float, Field(ge=0, lt=1)]
"""From nothing to less than the whole."""

ALIASES = {
    "calibration": "data",
    "samples": "num_windows",
    "num_samples": "num_windows",
    "window": "window_tokens",
}
"""Other words for a field, understood wherever a class has the field and not the word."""


@dataclasses.dataclass(frozen=True)
class About:
    """What cannot be seen from a field's type; stands in its `Annotated[...]`."""

    flag: str = ""
    """On the command line, where it is not the field's name."""
    metavar: str = ""
    cli: bool = True
    """Whether the command line has it."""
    result: bool = True
    """Whether the result depends on it. If not, it is in no fingerprint and in no command that repeats a run."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field, dataclasses.field))
def options(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass with validated fields. Whoever makes a wrong one gets an OptionError."""
    config = ConfigDict(
        use_attribute_docstrings=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
    )
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    for name, info in fields_of(made).items():  # pydantic reads the docstrings of a class's own fields alone
        inherited = (fields_of(base).get(name) for base in made.__mro__[1:])
        info.description = info.description or next((i.description for i in inherited if i and i.description), None)
    unnamed = made.__init__

    @functools.wraps(unnamed)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        try:
            unnamed(self, *args, **renamed(type(self), given))
        except ValidationError as error:
            raise _first_fault(type(self), error) from None

    made.__init__ = __init__
    return made


def renamed(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the names that the class has for them. Raises OptionError for one that is given twice."""
    known, found = {field.name for field in dataclasses.fields(cls)}, dict(given)
    for word, name in ALIASES.items():
        if word in found and word not in known and name in known:
            if name in found:
                raise OptionError(f"{name} is given twice, as {name} and as {word}; leave one out")
            found[name] = found.pop(word)
    return found


def _first_fault(cls: type, error: ValidationError) -> Exception:
    fault = error.errors()[0]
    own = fault.get("ctx", {}).get("error")
    if isinstance(own, TopiaristError):
        return own
    name = str(fault["loc"][0]) if fault["loc"] else ""
    if fault["type"] == "unexpected_keyword_argument":
        known = ", ".join(field.name for field in dataclasses.fields(cls))
        near = difflib.get_close_matches(
            name, [field.name for field in dataclasses.fields(cls)] + list(ALIASES), 1, 0.75
        )
        meant = f" (is {near[0]} meant?)" if near else ""
        return OptionError(f"{cls.__name__} has no field {name!r}{meant}; it has {known}")
    said = fault["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to parse")[0]
    reason = f"is {shown(fault['input'])}, {said[:1].lower()}{said[1:]}"
    return OptionError(f"{cls.__name__}: {name} {reason}", owner=cls, field=name, reason=reason)


def shown(value: Any) -> str:
    """A wrong value as a message shows it: nested or long ones are cut."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return " ".join(short.repr(value).split())


def given_or_made(cls: type[T], value: T | None, settings: Mapping[str, Any]) -> T:
    """The options value given, or a new one of single settings. Raises OptionError if both are given."""
    if value is None:
        return cls(**settings)
    if settings:
        raise OptionError(f"give options={cls.__name__}(...) or single settings ({', '.join(settings)}), not both")
    return value


class Registered:
    """In `Annotated[Base, Registered(TABLE)]`: a value, its name in the table, a text of the grammar, or a mapping with `name`.

    base: classes whose values pass although the table has not theirs. other: what else passes, as it is.
    """

    def __init__(
        self,
        table: Table,
        what: str = "method",
        base: tuple[type, ...] = (),
        other: Callable[[Any], bool] = lambda _: False,
    ) -> None:
        self.table, self.what, self.base, self.other = table, what, base, other

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.parse)

    def parse(self, given: Any) -> Any:
        """The value that is meant. Raises OptionError."""
        if isinstance(given, (*self.table.values(), *self.base)) or self.other(given):
            return given
        if isinstance(given, str):
            name, fields = split_text(given)
        elif isinstance(given, Mapping) and "name" in given:
            name, fields = str(given["name"]), {key: value for key, value in given.items() if key != "name"}
        else:
            cure = ": give a value of it, with ()" if isinstance(given, type) else ""
            raise OptionError(f"{shown(given)} is no {self.what}{cure}; choose one of {', '.join(self.table)}")
        return look_up(self.table, name, self.what)(**fields)


class Settings:
    """In `Annotated[Kind | None, Settings(Kind)]`: a value, True for its defaults, False or None for none, or a text.

    A class with `leads`, the name of a field, takes `value:field=value` with that field's value in front.
    """

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.parse)

    def parse(self, given: Any) -> Any:
        """The value that is meant, or None. Raises OptionError."""
        if given is None or isinstance(given, self.kind):
            return given
        if isinstance(given, bool | Mapping):
            return self.kind(**given) if isinstance(given, Mapping) else self.kind() if given else None
        if not isinstance(given, str):
            raise OptionError(f"{shown(given)} is no {self.kind.__name__}: give one, True, or text such as field=value")
        if given in ("true", ""):
            return self.kind()
        if given in ("false", NOTHING):
            return None
        name, fields = split_text(given)
        lead: str | None = getattr(self.kind, "leads", None)
        if name and lead is None:
            raise OptionError(
                f"{shown(given)}: {self.kind.__name__} takes field=value,...; its fields are {_names(self.kind)}"
            )
        return self.kind(**({str(lead): name} if name else {}), **fields)


def changed(value: Any) -> dict[str, Any]:
    """The fields that are not at their defaults. A class whose defaults depend on other fields says them in `derived()`."""
    defaults = {field.name: default_of(field) for field in dataclasses.fields(value)}
    if hasattr(value, "derived"):
        defaults |= value.derived()
    current = {name: getattr(value, name) for name in defaults}
    return {name: entry for name, entry in current.items() if not _same(entry, defaults[name])}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; dataclasses.MISSING if it has none."""
    if isinstance(field.default, FieldInfo):
        made = field.default.get_default(call_default_factory=True, validated_data={})
        return dataclasses.MISSING if field.default.is_required() else made
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b)) or (isinstance(a, int | float) and a == b)


def to_text(value: Any, table: Table | None = None) -> str | None:
    """A setting's value as one word; a value of a table's class begins with its name there. None if no text can hold it."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if not _is_options(value):
        said = isinstance(value, str | int | Path) or type(value).__str__ is not object.__str__
        return str(value) if (said and not isinstance(value, Mapping | Sequence)) or isinstance(value, str) else None
    name, fields, tables = key_of(table or {}, value), changed(value), tables_of(type(value))
    if table and name is None:
        return None
    if not table and (lead := getattr(value, "leads", None)) in fields:
        name = to_text(fields.pop(str(lead)))
    texts = {field: to_text(entry, tables.get(field)) for field, entry in fields.items()}
    if None in texts.values():
        return None
    return join_text(name or "", {field: str(text) for field, text in texts.items()}) or "true"


def tables_of(cls: type) -> dict[str, Table]:
    """The tables that fields of a class choose from."""
    marks = {name: [m for m in info.metadata if isinstance(m, Registered)] for name, info in fields_of(cls).items()}
    return {name: found[0].table for name, found in marks.items() if found}


def _is_options(value: Any) -> bool:
    return hasattr(type(value), "__pydantic_fields__")


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """Every field of a class of options; {} for any other class."""
    return getattr(cls, "__pydantic_fields__", {})


def in_order(cls: type) -> list[tuple[str, FieldInfo]]:
    """Every field of a class of options: its own first, then those that commands have in common."""
    own = cls.__annotations__
    return sorted(fields_of(cls).items(), key=lambda field: field[0] not in own)


def about(info: FieldInfo) -> About:
    """What a field's annotation says about it."""
    return next((mark for mark in info.metadata if isinstance(mark, About)), About())


def plain(value: Any, table: Table | None = None) -> Any:
    """A setting as JSON with every field that the result depends on; a value of a table's class has its `name` there."""
    if _is_options(value):
        known, tables = fields_of(type(value)), tables_of(type(value))
        name = {} if table is None else {"name": key_of(table, value) or type(value).__name__}
        wanted = [field for field, info in known.items() if about(info).result]
        return name | {field: plain(getattr(value, field), tables.get(field)) for field in wanted}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _names(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def takes(kind: type[Any]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a function with `**settings`: its signature and docstring show the fields of `kind` in their place."""

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        more = []
        for field in dataclasses.fields(kind):
            if field.name in signature.parameters:
                continue
            default = default_of(field)
            empty = inspect.Parameter.empty if default is dataclasses.MISSING else default
            more.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=empty, annotation=field.type)
            )
        function.__signature__ = signature.replace(parameters=[*own, *more])  # pyright: ignore[reportFunctionMemberAccess]
        lines = [f"    {name}: {' '.join((info.description or '').split())}" for name, info in fields_of(kind).items()]
        function.__doc__ = "\n".join(
            [inspect.cleandoc(function.__doc__ or ""), "", f"Settings ({kind.__name__}):", *lines]
        )
        return function

    return decorate
