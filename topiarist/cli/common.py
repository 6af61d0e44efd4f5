"""What the commands share: consoles, the progress bar, settings from text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console()
err = Console(stderr=True)
Text = Annotated[list[Path], typer.Option(help=".txt, .jsonl, .jsonl.gz or a datasets folder; may be repeated")]


def filled(cls: type, option: str, assignments: list[str]) -> Any:
    """A frozen dataclass of settings from `field=value` texts, checked against its field types."""
    from pydantic import TypeAdapter, ValidationError

    from topiarist.core.errors import TopiaristError

    fields = {name: value for name, _, value in (text.partition("=") for text in assignments)}
    known = ", ".join(cls.__dataclass_fields__)
    if unknown := sorted(set(fields) - set(cls.__dataclass_fields__)):
        raise TopiaristError(f"{option}: {cls.__name__} has no field {unknown[0]!r}; it has {known}")
    try:
        return TypeAdapter(cls).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise TopiaristError(f"{option} {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def solver_from_text(name: str, assignments: list[str]) -> Any:
    """A method from its name and `field=value` texts."""
    from topiarist.core.registry import look_up
    from topiarist.pipelines.pruning.sparsellm import METHODS

    return filled(look_up(METHODS, name), "--set", assignments)


def rule_from_text(text: str | None) -> Any:
    """A rule of allocation from `name:field=value,...`; any other text as it is: it names a file."""
    from topiarist.allocate import ALLOCATIONS

    name, fields = name_and_fields(text or "")
    return filled(ALLOCATIONS[name], name, fields) if name in ALLOCATIONS else text


def name_and_fields(text: str) -> tuple[str, list[str]]:
    """The parts of `name:field=value,...`."""
    name, _, fields = text.partition(":")
    return name, [field for field in fields.split(",") if field]


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def quiet() -> None:
    """One progress bar is enough: ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bars:
        task = bars.add_task("starting", total=None)
        yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total)


class WarningLines:
    """Warnings on the terminal: of those that differ in numbers alone, as a layer's, only the first is shown."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def show(self, message: Warning | str, *_: Any, **__: Any) -> None:
        """For `warnings.showwarning`."""
        kind = re.sub(r"\d+", "#", str(message))
        self.seen[kind] += 1
        if self.seen[kind] == 1:
            err.print(f"[yellow]warning[/yellow] {escape(str(message))}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Say how many were not shown."""
        if more := sum(self.seen.values()) - len(self.seen):
            err.print(
                f"[yellow]warning[/yellow] {more} more, which differ from these in numbers alone", highlight=False
            )
