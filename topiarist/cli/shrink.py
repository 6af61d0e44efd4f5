"""The command of structural pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from topiarist.cli.common import Model, Plan, PushTo, out, print_dense, print_plan, print_run, progress_bar
from topiarist.cli.from_options import flags
from topiarist.pipelines.shrinking.options import ShrinkOptions


@flags(ShrinkOptions, stage="shrink")
def shrink(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the smaller model")],
    options: ShrinkOptions,
    plan: Plan = False,
    push_to_hub: PushTo = None,
) -> None:
    """Cut whole heads, channels, experts or blocks out of MODEL: a smaller dense OUT. The same command resumes."""
    import topiarist as tp
    from topiarist.pipelines.shrinking.plan import plan_shrink

    if plan:
        print_plan(plan_shrink(model, options))
        return
    with progress_bar() as progress:
        report = tp.shrink(model, output, options=options, progress=progress)
    table = Table(title=f"{report.method}: {report.share:.1%} of all parameters stay ({report.layout})")
    for column in ("units", "kept", "of", "in", "fewest", "most"):
        table.add_column(column, justify="left" if column == "units" else "right")
    for kind, (kept, of, groups) in report.counts().items():
        each = [row["kept"] for row in report.blocks if row["kind"] == kind]
        table.add_row(kind, f"{kept:,}", f"{of:,}", f"{groups} groups", str(min(each)), str(max(each)))
    out.print(table)
    if report.splits:
        tried = Table(title=f"{len(report.splits)} splits, by their loss on held-out windows")
        for column in report.splits[0]:
            tried.add_column(column, justify="right")
        for row in sorted(report.splits, key=lambda row: row["loss"]):
            tried.add_row(*(f"{value:.4f}" if isinstance(value, float) else f"{value:,}" for value in row.values()))
        out.print(tried)
    numbers = report.parameters
    biases = numbers.get("biases", 0)
    more = {"zeros": numbers["stored"] - numbers["kept"] - biases, "added biases": biases}
    among = " and ".join(f"{count:,} {what}" for what, count in more.items() if count)
    among = f", of them {among}" if among else ""
    out.print(f"{numbers['dense']:,} parameters -> {numbers['stored']:,}{among}", highlight=False)
    if report.layers:
        before = sum(layer.error_without for layer in report.layers) / len(report.layers)
        after = sum(layer.error for layer in report.layers) / len(report.layers)
        out.print(f"refit of {len(report.layers)} matrices: mean error {before:.4f} -> {after:.4f}", highlight=False)
    if report.recovered:
        first, last = report.recovered[0], report.recovered[-1]
        out.print(
            f"recovery, {last['step']} steps: divergence {first['loss']:.4f} -> {last['loss']:.4f}", highlight=False
        )
    print_dense(report.dense)
    print_run(report.run, output, push_to_hub)


COMMANDS = {"shrink": shrink}
OPTIONS = (ShrinkOptions,)
