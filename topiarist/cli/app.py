"""The command line: parse, call one function, print. Nothing else prints."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from topiarist.__about__ import __version__
from topiarist.cli import allocate as cli_allocate
from topiarist.cli import generate as cli_generate
from topiarist.cli import masks as cli_masks
from topiarist.cli import recover as cli_recover
from topiarist.cli import report as cli_report
from topiarist.cli import runtime as cli_runtime
from topiarist.cli import shrink as cli_shrink
from topiarist.cli.common import (
    WarningLines,
    err,
    filled,
    name_and_fields,
    out,
    progress_bar,
    quiet,
    rule_from_text,
    set_threads,
    solver_from_text,
)

app = typer.Typer(
    help="Prune Hugging Face causal language models, and measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
USAGE, INTERRUPTED = 2, 130


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the pruned checkpoint")],
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help=".txt, .jsonl, .jsonl.gz or a datasets folder; may be repeated; only magnitude does without"),
    ] = None,
    method: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt, alps or sparsellm")] = "alps",
    pattern: Annotated[
        str | None, typer.Option(help="2:4 keeps 2 of 4; 0.7 makes 70 % zeros; 0.7/row; default 2:4")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="a field of the method, e.g. refit=true; may be repeated")
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            metavar="RULE|FILE",
            help="how much each layer gets: uniform, linear, owl, sensitivity or search (owl:threshold=7,level=matrix sets "
            "fields), or a JSON of layer name -> pattern",
        ),
    ] = None,
    allocation_work: Annotated[
        Path | None, typer.Option(help="folder for what a rule takes long to get; search: default OUT.search")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="regular expression of layers that stay dense")] = None,
    samples: Annotated[int, typer.Option(help="calibration windows")] = 128,
    window: Annotated[int | None, typer.Option(help="tokens a window; default min(2048, the model's limit)")] = None,
    seed: Annotated[int, typer.Option(help="chooses the calibration windows")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="windows a forward pass; default 8, or 1 with --refine, whose steps these are")
    ] = None,
    true_sequential: Annotated[
        bool, typer.Option(help="later matrices of a block see the already pruned earlier ones")
    ] = False,
    correct: Annotated[
        bool, typer.Option("--correct", help="each matrix also makes good what those before it lost of the dense model")
    ] = False,
    correct_option: Annotated[
        list[str] | None,
        typer.Option("--correct-set", help="a field of the correction, e.g. share=0.5; may be repeated"),
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="after each block, train its kept weights towards the dense model's states")
    ] = False,
    refine_option: Annotated[
        list[str] | None, typer.Option("--refine-set", help="a field of the refinement, e.g. epochs=4; may be repeated")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one")] = None,
    spill: Annotated[Path | None, typer.Option(help="folder for hidden states that do not fit in memory")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run Python code that the model folder brings")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="say what the run will need, from one block, and stop")] = False,
) -> None:
    """Prune MODEL to OUT with a one-shot method. The same command resumes a run that was stopped."""
    import topiarist as tp
    from topiarist.pipelines.pruning.correct import Correct
    from topiarist.pipelines.pruning.oneshot import prune_with
    from topiarist.pipelines.pruning.options import PruneOptions
    from topiarist.pipelines.pruning.plan import plan_prune
    from topiarist.pipelines.pruning.refine import Refine

    set_threads(threads)
    quiet()
    options = PruneOptions(
        calibration=tp.text_files(calibration) if calibration else None,
        method=solver_from_text(method, option or []),
        correct=filled(Correct, "--correct-set", correct_option or []) if correct or correct_option else False,
        refine=filled(Refine, "--refine-set", refine_option or []) if refine or refine_option else False,
        pattern=pattern,
        allocation=rule_from_text(allocation),
        allocation_work=allocation_work,
        skip=skip or [],
        num_samples=samples,
        window=window,
        seed=seed,
        batch_size=batch_size,
        true_sequential=true_sequential,
        device=device,
        spill=spill,
        trust_remote_code=trust_remote_code,
    )
    if plan:
        for name, value in plan_prune(model, options).lines():
            out.print(f"{name:<34} {value}", highlight=False)
        return
    with progress_bar() as progress:
        report = prune_with(options, model, output, progress=progress)
    table = Table(title=f"{method} {report.pattern}: {len(report.layers)} matrices, {report.sparsity:.2%} zeros")
    for column in ("layer kind", "matrices", "sparsity", "mean error", "worst error"):
        table.add_column(column, justify="left" if column == "layer kind" else "right")
    for kind, layers in report.by_kind().items():
        errors = [layer.error for layer in layers]
        sparsity = sum(layer.sparsity for layer in layers) / len(layers)
        row = (kind, str(len(layers)), f"{sparsity:.4f}", f"{sum(errors) / len(errors):.5f}", f"{max(errors):.5f}")
        table.add_row(*row)
    out.print(table)
    run = report.run
    out.print(f"{run['seconds']:.0f} s, peak memory {run['peak_memory_bytes'] / 1e9:.2f} GB; written to {output}")
    if (kept := output.with_name(output.name + ".search")).is_dir():
        out.print(f"{kept} holds the solutions that the search used: another sparsity needs them, nothing else does")


COMMAND_GROUPS = (cli_allocate, cli_report, cli_masks, cli_shrink, cli_recover, cli_runtime, cli_generate)
for group in (module.COMMANDS for module in COMMAND_GROUPS):
    for name, command in group.items():
        app.command(name)(command)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


def method_from_text(text: str) -> tuple[Any, dict[str, Any]]:
    """(solver, what else `tp.prune` takes) from `name:field=value,...` and, each after a plus, `correct` and `refine`, with
    fields or without."""
    from topiarist.core.registry import look_up
    from topiarist.pipelines.pruning.correct import Correct
    from topiarist.pipelines.pruning.refine import Refine

    solver, *extras = map(name_and_fields, text.split("+"))
    kinds = {"correct": Correct, "refine": Refine}
    return solver_from_text(*solver), {
        name: filled(look_up(kinds, name, "addition"), f"+{name}", fields) for name, fields in extras
    }


def main() -> None:
    """Run the command line. User errors end in one line and exit code 2."""
    from topiarist.core.errors import TopiaristError

    lines = WarningLines()
    warnings.showwarning = lines.show
    try:
        code = app(standalone_mode=False) or 0
    except TopiaristError as error:
        err.print(f"[red]error[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        code = USAGE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        show = getattr(error, "show", None)  # usage errors of the parser know how to print themselves
        if show is None:
            raise
        show()
        code = getattr(error, "exit_code", USAGE)
    lines.close()
    if code == INTERRUPTED:
        err.print("interrupted: finished blocks are kept, the same command resumes", highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
