"""The command of one-shot pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from topiarist.cli.common import Model, Plan, PushTo, out, print_dense, print_plan, print_run, progress_bar, say
from topiarist.cli.from_options import flags
from topiarist.pipelines.pruning.options import PruneOptions


@flags(PruneOptions, stage="prune")
def prune(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the pruned checkpoint")],
    options: PruneOptions,
    plan: Plan = False,
    push_to_hub: PushTo = None,
) -> None:
    """Prune MODEL to OUT with a one-shot method. The same command resumes a run that was stopped."""
    from topiarist.pipelines.pruning.oneshot import prune as run_prune
    from topiarist.pipelines.pruning.plan import plan_prune

    if plan:
        print_plan(plan_prune(model, options).lines())
        return
    with progress_bar() as progress:
        report = run_prune(model, output, options=options, progress=progress)
    table = Table(title=f"{report.method} {report.pattern}: {len(report.layers)} matrices, {report.sparsity:.2%} zeros")
    for column in ("layer kind", "matrices", "sparsity", "mean error", "worst error"):
        table.add_column(column, justify="left" if column == "layer kind" else "right")
    for kind, layers in report.by_kind().items():
        errors = [layer.error for layer in layers]
        sparsity = sum(layer.sparsity for layer in layers) / len(layers)
        row = (kind, str(len(layers)), f"{sparsity:.4f}", f"{sum(errors) / len(errors):.5f}", f"{max(errors):.5f}")
        table.add_row(*row)
    out.print(table)
    if report.quantized:
        before, after = report.weights["before"], report.weights["after"]
        say(f"{report.quantized['bits']} bits: {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB")
    if (kept := output.with_name(output.name + ".search")).is_dir():
        say(f"{kept} holds the solutions that the search used: another sparsity needs them, nothing else does")
    print_dense(report.dense)
    print_run(report.run, output, push_to_hub)


COMMANDS = {"prune": prune}
OPTIONS = (PruneOptions,)
