"""The command of learned masks."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from topiarist.cli.common import Model, Plan, PushTo, out, print_dense, print_plan, print_run, progress_bar, say
from topiarist.cli.from_options import flags
from topiarist.pipelines.learning.options import LearnOptions


@flags(LearnOptions, stage="learn")
def learn(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the pruned checkpoint and its masks")],
    options: LearnOptions,
    plan: Plan = False,
    push_to_hub: PushTo = None,
) -> None:
    """Learn MODEL's masks on text, from a one-shot prior, and write OUT. The same command resumes a stopped run."""
    import topiarist as tp
    from topiarist.pipelines.learning.plan import plan_learn

    if plan:
        print_plan(plan_learn(model, options).lines())
        return
    first = os.environ.get("RANK", "0") == "0"  # under torchrun one process talks
    with progress_bar() if first else nullcontext() as progress:
        report = tp.learn(model, output, options=options, progress=progress)
    if not first:
        return
    table = Table(title=f"learned {report.pattern}: {len(report.layers)} masks, {report.sparsity:.2%} zeros")
    for column in ("step", "tokens", "soft loss", "perplexity of the hard mask", "changed", "certainty"):
        table.add_column(column, justify="right")
    for entry in report.history:
        soft = "" if entry["loss"] is None else f"{entry['loss']:.3f}"
        certainty = "" if entry["certainty"] is None else f"{entry['certainty']:.3f}"
        hard = f"{math.exp(min(entry['hard_loss'], 700.0)):.2f}"
        table.add_row(f"{entry['step']}", f"{entry['tokens']:,}", soft, hard, f"{entry['flips']:.2%}", certainty)
    out.print(table)
    say("perplexity on a slice of the training text that was not trained on")
    print_dense(report.dense)
    print_run(report.run, output, push_to_hub)


COMMANDS = {"learn": learn}
OPTIONS = (LearnOptions,)
