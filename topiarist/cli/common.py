"""What the commands share: consoles, the progress bar, settings from text."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

out = Console()
err = Console(stderr=True)
Model = Annotated[str, typer.Argument(metavar="MODEL", help="model folder or hub id")]
Plan = Annotated[bool, typer.Option("--plan", help="say what the run will need, from a short probe, and stop")]

PushTo = Annotated[
    str | None, typer.Option("--push-to-hub", metavar="NAME", help="then upload the result to the hub as NAME")
]


def is_main() -> bool:
    """Whether this process talks: the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def set_threads(threads: int | None) -> None:
    """Set torch's number of threads; None leaves it, and does not import torch. Raises OptionError out of range."""
    if threads is not None:
        from topiarist.pipelines.common.options import RunOptions

        RunOptions(threads=threads).use_threads()


def quiet() -> None:
    """One progress bar is enough: ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


LINE_EVERY = 10.0
"""Seconds between two lines of progress where no terminal can show a bar."""


class ProgressLines:
    """Progress as lines of a log: what goes on, how far it is, how long it took, every ten seconds or so."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.started = clock, clock()
        self.told = self.started

    def __call__(self, what: str, done: int, total: int) -> None:
        """Print a line for step `done` of `total`, unless the last one is less than `LINE_EVERY` seconds old."""
        now = self.clock()
        if now - self.told >= LINE_EVERY:
            self.told = now
            err.print(
                printable(f"{what} {done}/{total}, {now - self.started:.0f} s"),
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on the standard error: a bar on a terminal, lines elsewhere. Of several processes one shows it."""
    if not err.is_terminal:
        yield ProgressLines()
        return
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bars:
        task = bars.add_task("starting", total=None)
        yield lambda what, done, total: bars.update(task, description=literal(what), completed=done, total=total)


class WarningLines:
    """Warnings on the terminal: of those that differ in numbers alone, as a layer's, only the first is shown."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def show(self, message: Warning | str, *_: Any, **__: Any) -> None:
        """For `warnings.showwarning`."""
        kind = re.sub(r"\d+", "#", str(message))
        self.seen[kind] += 1
        if self.seen[kind] == 1:
            err.print(f"[yellow]warning[/yellow] {literal(str(message))}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Say how many were not shown."""
        if more := sum(self.seen.values()) - len(self.seen):
            err.print(
                f"[yellow]warning[/yellow] {more} more, which differ from these in numbers alone", highlight=False
            )


def literal(text: str) -> str:
    """Foreign text for a console: no markup, and a character that no terminal shows as Python writes it.

    Paths and names in files may hold brackets, line breaks, colour codes, and bytes that are no UTF-8.
    """
    return escape(printable(text))


def printable(text: str) -> str:
    """As `literal`, for a console that reads no markup."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def say(text: str) -> None:
    """A line as it is: brackets in it, as paths have them, are no markup."""
    out.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def print_plan(lines: Sequence[tuple[str, str]]) -> None:
    """What a run will need, a line each."""
    for name, value in lines:
        say(f"{name:<34} {value}")


def print_dense(rows: Sequence[Mapping[str, Any]]) -> None:
    """What the run left as it was, and why."""
    if not rows:
        return
    table = Table(title="left as it was", title_justify="left")
    for column in ("what", "matrices", "weights", "why"):
        table.add_column(column, justify="right" if column in ("matrices", "weights") else "left")
    for row in rows:
        table.add_row(literal(row["what"]), f"{row['matrices']:,}", f"{row['weights']:,}", literal(row["why"]))
    out.print(table)


def print_run(run: Mapping[str, Any], output: Path, push_to: str | None = None) -> None:
    """Say how long it took, what memory, where the result is; upload it if a name on the hub was given."""
    say(f"{run['seconds']:.0f} s, peak memory {run['peak_memory_bytes'] / 1e9:.2f} GB; written to {output}")
    if push_to is not None and is_main():
        from topiarist.results.hub import push

        say(f"uploaded to {push(output, push_to)}")
