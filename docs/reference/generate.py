"""Hook of mkdocs: fills the reference pages from the code, so that they cannot be older than it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import topiarist

CLI, API = "[[command line]]", "[[public names]]"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page by what they stand for."""
    if CLI in markdown:
        markdown = markdown.replace(CLI, command_line())
    return markdown.replace(API, public_names()) if API in markdown else markdown


def command_line() -> str:
    """Every command with its arguments and options, as typer writes them down."""
    call = [sys.executable, "-m", "typer", "topiarist.cli.app", "utils", "docs", "--name", "topiarist"]
    text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    return text.split("\n", 1)[1]


def public_names() -> str:
    """A heading and a reference for every public name of the package; those of its public rooms follow."""
    own, rooms = [], []
    for name in sorted(topiarist.__all__, key=str.lower):
        value = getattr(topiarist, name)
        if hasattr(value, "__path__"):
            rooms.append((name, value))
        elif not name.startswith("_"):
            own.append(f"::: topiarist.{name}\n")
    parts = ["## topiarist", *own]
    for name, room in rooms:
        parts += [f"## topiarist.{name}", (room.__doc__ or "").strip()]
        parts += [f"::: topiarist.{name}.{member}\n" for member in sorted(room.__all__, key=str.lower)]
        methods = getattr(room, "METHODS", {}).values()
        parts += [f"::: {method.__module__}.{method.__qualname__}\n" for method in methods]
    return "\n\n".join(parts)
