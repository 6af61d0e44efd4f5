"""The command that quantises."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from topiarist.cli.common import Model, Plan, PushTo, out, print_dense, print_plan, print_run, progress_bar, say
from topiarist.cli.from_options import flags
from topiarist.pipelines.quantizing.options import QuantizeOptions


@flags(QuantizeOptions, stage="quantize")
def quantize(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the quantised checkpoint")],
    options: QuantizeOptions,
    plan: Plan = False,
    push_to_hub: PushTo = None,
) -> None:
    """Put the weights of MODEL, pruned or not, on 8 or 4 bits: OUT opens in transformers and vLLM, zeros stay zero."""
    import topiarist as tp

    if plan:
        from topiarist.pipelines.quantizing.plan import plan_quantize

        print_plan(plan_quantize(model, options).lines())
        return
    with progress_bar() as progress:
        report = tp.quantize(model, output, options=options, progress=progress)
    group = "a row" if report.group is None else f"{report.group} weights"
    table = Table(title=f"{report.method}, {report.bits} bits, a scale for {group}: {len(report.layers)} matrices")
    for column in ("layer kind", "matrices", "zeros before", "zeros after", "error of rounding", "error"):
        table.add_column(column, justify="left" if column == "layer kind" else "right")
    for kind, layers in report.by_kind().items():
        means = [
            sum(getattr(layer, name) for layer in layers) / len(layers)
            for name in ("sparsity_before", "sparsity", "rounding_error", "error")
        ]
        zeros, errors = [f"{mean:.4f}" for mean in means[:2]], [f"{mean:.6f}" for mean in means[2:]]
        table.add_row(kind, str(len(layers)), *zeros, *errors)
    out.print(table)
    before, after = report.weights["before"], report.weights["after"]
    say(f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({report.format})")
    print_dense(report.dense)
    print_run(report.run, output, push_to_hub)


COMMANDS = {"quantize": quantize}
OPTIONS = (QuantizeOptions,)
