"""The command of recovery."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from topiarist.cli.common import Plan, PushTo, out, print_plan, print_run, progress_bar, say
from topiarist.cli.from_options import flags
from topiarist.pipelines.recovering.options import RecoverOptions


@flags(RecoverOptions)
def recover(
    model: Annotated[str, typer.Argument(metavar="PRUNED", help="pruned folder or hub id")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the recovered checkpoint")],
    options: RecoverOptions,
    teacher: Annotated[str | None, typer.Option(help="the dense model; default: the one that PRUNED names")] = None,
    plan: Plan = False,
    push_to_hub: PushTo = None,
) -> None:
    """Train PRUNED as a whole towards the dense model, its zeros held, and write OUT. The same command resumes."""
    import topiarist as tp
    from topiarist.pipelines.recovering.plan import plan_recover

    if plan:
        print_plan(plan_recover(model, teacher=teacher, options=options).lines())
        return
    main = os.environ.get("RANK", "0") == "0"  # under torchrun one process talks
    with progress_bar() if main else nullcontext() as progress:
        report = tp.recover(model, output, teacher=teacher, options=options, progress=progress)
    if not main:
        return
    what = "loss" if options.loss == "lm" else "divergence"
    table = Table(
        title=f"recovered: {report.weights['trained']:,} weights trained, {report.weights['held']:,} zeros held, "
        f"peak rate {report.learning_rate:.2g}"
    )
    for column in ("step", "tokens", f"held-out {what}", "exp"):
        table.add_column(column, justify="right")
    for entry in report.evaluations:
        seen = int(entry["step"]) * report.tokens // report.steps
        mark = " *" if entry == report.best else ""
        exp = math.exp(entry["loss"]) if entry["loss"] < 700 else math.inf
        table.add_row(f"{entry['step']:.0f}{mark}", f"{seen:,}", f"{entry['loss']:.4f}", f"{exp:.3f}")
    out.print(table)
    say("* kept: the least on a slice of the training text that was not trained on")
    print_run(report.run, output, push_to_hub)


COMMANDS = {"recover": recover}
OPTIONS = (RecoverOptions,)
