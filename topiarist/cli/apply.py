"""The command that puts masks on a dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topiarist.cli.common import say


def apply(
    base: Annotated[str, typer.Argument(metavar="BASE", help="folder or hub id of the dense model")],
    masks: Annotated[Path, typer.Argument(metavar="MASKS", help="masks.safetensors")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the pruned checkpoint")],
) -> None:
    """Write BASE with its masks applied: one frozen base, many masks. Refuses another base than the masks' own."""
    import topiarist as tp

    say(f"written to {tp.masks.apply(base, masks, output)}")


COMMANDS = {"apply": apply}
