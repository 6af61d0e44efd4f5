"""The command that decides how much each layer gets, and prunes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from topiarist.cli.common import Text, out, progress_bar, quiet, rule_from_text, set_threads, solver_from_text

if TYPE_CHECKING:
    from topiarist import FoundAllocation


def allocate(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    output: Annotated[Path, typer.Argument(metavar="OUT.json", help="the file that prune --allocation takes")],
    calibration: Text,
    rule: Annotated[
        str, typer.Option(help="uniform, linear, owl, sensitivity or search; owl:threshold=7,level=matrix sets fields")
    ] = "linear",
    pattern: Annotated[str, typer.Option(help="how much is kept in all: 0.7 makes 70 % zeros; 2:4")] = "0.5",
    method: Annotated[str, typer.Option(help="solves the database of search")] = "alps",
    option: Annotated[
        list[str] | None, typer.Option("--set", help="a field of that method, e.g. refit=true; may be repeated")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="regular expression of layers that stay dense")] = None,
    work: Annotated[
        Path | None, typer.Option(help="folder for what takes long to get, to resume and reuse; default OUT.json.work")
    ] = None,
    samples: Annotated[int, typer.Option(help="calibration windows")] = 128,
    window: Annotated[int | None, typer.Option(help="tokens a window; default min(2048, the model's limit)")] = None,
    seed: Annotated[int, typer.Option(help="chooses the calibration windows, the probes, the mutations")] = 0,
    batch_size: Annotated[int, typer.Option(help="windows a forward pass")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run Python code that the model folder brings")] = False,
) -> None:
    """Say how much each layer of MODEL should get, exact by parameter count. The same command resumes a search."""
    import topiarist as tp

    set_threads(threads)
    quiet()
    with progress_bar() as progress:
        found = tp.find_allocation(
            model,
            rule_from_text(rule),
            pattern=pattern,
            calibration=tp.text_files(calibration),
            method=solver_from_text(method, option or []),
            skip=skip or [],
            work=work or output.with_name(output.name + ".work"),
            num_samples=samples,
            window=window,
            seed=seed,
            batch_size=batch_size,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    found.save(output)
    out.print(_table(found))
    out.print(f"{found.zeros:,} zeros; written {output}", highlight=False, soft_wrap=True)


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
