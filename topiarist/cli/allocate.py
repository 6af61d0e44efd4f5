"""The command that decides how much each layer gets, and prunes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from topiarist.cli.common import Model, Plan, out, print_plan, progress_bar, say
from topiarist.cli.from_options import flags
from topiarist.pipelines.allocating.options import AllocateOptions

if TYPE_CHECKING:
    from topiarist import FoundAllocation


@flags(AllocateOptions)
def allocate(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT.json", help="the file that prune --allocation takes")],
    options: AllocateOptions,
    plan: Plan = False,
) -> None:
    """Say how much each layer of MODEL should get, exact by parameter count. The same command resumes a search."""
    import topiarist as tp
    from topiarist.checkpoints.atomic import refuse_foreign
    from topiarist.pipelines.allocating.allocation import MARK
    from topiarist.pipelines.allocating.plan import plan_allocate
    from topiarist.pipelines.training.processes import Processes

    if plan:
        print_plan(plan_allocate(model, options))
        return
    refuse_foreign(output, MARK)
    work = options.work or output.with_name(output.name + ".work")
    with progress_bar() as progress:
        found = tp.find_allocation(model, options=replace(options, work=work), progress=progress)
    Processes.join().on_main(lambda: found.save(output))
    out.print(_table(found))
    say(f"{found.zeros:,} zeros; written {output}")


def _table(found: FoundAllocation) -> Table:
    """A line for every kind of matrix: its zeros over the blocks, its scores and how sure they are."""
    from topiarist.results.pages.figures import place_of

    columns = ["layer kind", "matrices", "least zeros", "mean", "most"]
    columns += ["mean score"] * bool(found.scores.values) + ["mean standard error"] * bool(found.scores.errors)
    table = Table(title=f"{found.rule['name']} {found.pattern}: {found.sparsity:.4%} zeros")
    for column in columns:
        table.add_column(column, justify="left" if column == "layer kind" else "right")
    kinds: dict[str, list[str]] = {}
    for name in found.shapes:
        kinds.setdefault(place_of(name)[1], []).append(name)
    for kind, names in kinds.items():
        zeros = [0.0 if (p := found.patterns[name]) is None else p.sparsity_of(found.shapes[name]) for name in names]
        numbers = [f"{min(zeros):.4f}", f"{sum(zeros) / len(zeros):.4f}", f"{max(zeros):.4f}"]
        for stated in filter(None, (found.scores.values, found.scores.errors)):
            known = [stated[name] for name in names if name in stated]
            numbers.append(f"{sum(known) / len(known):.3g}" if known else "-")
        table.add_row(kind, str(len(names)), *numbers)
    return table


COMMANDS = {"allocate": allocate}
OPTIONS = (AllocateOptions,)
