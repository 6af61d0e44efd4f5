"""The command line: parse, call one function, print. Nothing else prints."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from topiarist.__about__ import __version__
from topiarist.cli import (
    allocate,
    apply,
    export,
    generate,
    learn,
    prune,
    push,
    quantize,
    recover,
    results,
    runtime,
    shrink,
)
from topiarist.cli import run as recipes
from topiarist.cli.common import WarningLines, err, is_main, literal, out, quiet
from topiarist.cli.from_options import understood
from topiarist.cli.together import Together, check_divided, several

app = typer.Typer(
    help="Prune Hugging Face causal language models, and measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
USAGE, INTERRUPTED = 2, 130
RESUMING = frozenset({"prune", "learn", "shrink", "recover", "quantize", "run", "allocate", "apply"})
"""Commands that keep what is finished: in OUT, `allocate` in the folder of --work."""


GROUPS = (prune, learn, apply, shrink, recover, quantize, export, recipes, allocate, results, runtime, generate, push)
OPTIONS = [kind for group in GROUPS for kind in getattr(group, "OPTIONS", ())]
for group in GROUPS:
    for name, command in group.COMMANDS.items():
        app.command(name)(command)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


def main() -> None:
    """Run the command line. User errors end in one line and exit code 2, of whichever process they are."""
    from topiarist.core.errors import LostProcess, TopiaristError

    # Before torch's first tensor: huge pages for the large ones, which save a training a tenth of its time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    lines = WarningLines()
    warnings.showwarning = lines.show
    quiet()
    out.quiet = err.quiet = not is_main()
    together = None
    try:
        if several():
            together = Together()
            check_divided(sys.argv[1:])
        code = app(understood(sys.argv[1:], OPTIONS), standalone_mode=False) or 0
    except TopiaristError as error:
        if together is not None:
            if isinstance(error, LostProcess):
                together.wait_for_cause()
            together.fail(str(error))
        err.print(f"[red]error[/red] {literal(str(error))}", highlight=False, soft_wrap=True)
        code = USAGE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        show = getattr(error, "show", None)  # usage errors of the parser know how to print themselves
        if show is None:
            raise
        if is_main():
            show()
        code = getattr(error, "exit_code", USAGE)
    lines.close()
    if code == INTERRUPTED:
        resumes = RESUMING.intersection(sys.argv[1:2]) and "--plan" not in sys.argv
        kept = "what is finished is kept, the same command resumes" if resumes else "nothing is kept"
        err.print(f"interrupted: {kept}", highlight=False)
    if together is not None:
        together.leave()
    sys.exit(code)


if __name__ == "__main__":
    main()
