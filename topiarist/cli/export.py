"""The command that writes checkpoints for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topiarist.cli.common import progress_bar, say


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="model folder: ordinary, pruned, shrunk or quantised")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new .gguf file")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="bf16, q8_0 or q4_0; default what DIR holds: q8_0 of 8-bit weights, q4_0 of 4-bit ones, else bf16",
        ),
    ] = None,
) -> None:
    """Write DIR as one GGUF file, which llama.cpp and what is built on it run."""
    from topiarist.pipelines.exporting.gguf_file import export_gguf

    with progress_bar() as progress:
        done = export_gguf(folder, output, type=kind, progress=progress)
    if done.rounded:
        say(f"{done.rounded} quantised matrices were rounded again: {done.type} cannot hold them as they are")
    if done.integers:
        say(f"{done.integers} quantised matrices keep their integers and scales")
    if done.values:
        say(f"{done.values} quantised matrices keep their very values")
    say(f"{done.tensors} tensors, {done.type}, {done.nbytes / 1e6:.1f} MB; written to {done.path}")


COMMANDS = {"export": export}
