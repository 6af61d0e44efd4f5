"""The command that puts a result on the hub: push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topiarist.cli.common import say


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="finished result")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="repository on the hub, ORG/NAME")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="of a repository that is made; default: the account's own")
    ] = None,
) -> None:
    """Upload DIR to the Hugging Face hub as NAME, by the hub's own client and its login."""
    from topiarist.results.hub import push as upload

    say(f"uploaded to {upload(folder, name, private=private)}")


COMMANDS = {"push": push}
