"""The commands of recipes and of what there is to choose from: run, recipes, methods, families."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from topiarist.cli.common import Plan, PushTo, out, print_plan, print_run, progress_bar, say


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe file, or the name of one that is shipped")],
    model: Annotated[str | None, typer.Option(help="in place of the recipe's model")] = None,
    output: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="in place of the recipe's folder")] = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", "--calibration", metavar="FILE", help="in place of the recipe's text")
    ] = None,
    keep_stages: Annotated[
        bool, typer.Option("--keep-stages", help="keep what the stages before the last gave")
    ] = False,
    plan: Plan = False,
    push_to_hub: PushTo = None,
) -> None:
    """Run the stages of a recipe one after the other. The same command resumes a run that was stopped."""
    from topiarist.pipelines.recipes.plan import plan_recipe
    from topiarist.pipelines.recipes.recipe import read_recipe
    from topiarist.pipelines.recipes.running import run_recipe

    found = read_recipe(recipe, model=model, out=output, data=data)
    if plan:
        for title, lines in plan_recipe(found):
            say(title)
            print_plan(lines)
        return
    with progress_bar() as progress:
        report = run_recipe(found, keep_stages=keep_stages, progress=progress)
    say(f"{' -> '.join(step.name for step in found.steps)}: done")
    print_run(report.run, Path(found.out), push_to_hub)


def recipes(name: Annotated[str | None, typer.Argument(help="print this one whole")] = None) -> None:
    """The recipes that are shipped."""
    from topiarist.core.registry import look_up
    from topiarist.pipelines.recipes.recipe import shipped

    found = shipped()
    if name is not None:
        for line in look_up(found, name, "recipe").splitlines():
            say(line)
        return
    for key, text in found.items():
        say(f"{key:<18} {text.partition(chr(10))[0].removeprefix('# ')}")


def methods() -> None:
    """Methods of prune and shrink and rules of allocation, with their settings."""
    from topiarist.allocate import ALLOCATIONS
    from topiarist.pipelines.pruning.sparsellm import METHODS
    from topiarist.structured import METHODS as STRUCTURED

    for title, names in (("prune", METHODS), ("shrink", STRUCTURED), ("allocation", ALLOCATIONS)):
        table = Table(title=title, title_justify="left")
        for column in ("name", "what it does", "settings"):
            table.add_column(column, overflow="fold")
        for name, kind in names.items():
            what = (kind.__doc__ or "").strip().partition(". ")[0]
            table.add_row(name, " ".join(what.split()), _settings(kind))
        out.print(table)


def _settings(kind: Any) -> str:
    import dataclasses

    from topiarist.core.options import default_of, to_text

    pairs = ((field.name, default_of(field)) for field in dataclasses.fields(kind))
    return ", ".join(f"{name}={to_text(value) or '...'}" for name, value in pairs)


def families() -> None:
    """Model types that topiarist has a row of knowledge about; others are seen from the model itself."""
    from topiarist.models import FAMILIES

    say(", ".join(sorted(FAMILIES)))


COMMANDS = {"run": run, "recipes": recipes, "methods": methods, "families": families}
