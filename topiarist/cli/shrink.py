"""The command of structural pruning: shrink."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from topiarist.cli.common import filled, out, progress_bar, quiet, set_threads


def shrink(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the smaller model")],
    method: Annotated[str, typer.Option(help="what scores the units; an unknown name lists all")] = "hybrid",
    data: Annotated[
        list[Path] | None, typer.Option(help=".txt, .jsonl, .jsonl.gz or a datasets folder; may be repeated")
    ] = None,
    keep: Annotated[float, typer.Option(help="share of the units' parameters that stays; never exceeded")] = 0.8,
    layout: Annotated[str, typer.Option(help="uniform (opens everywhere), padded, hetero or masked")] = "uniform",
    units: Annotated[
        str | None,
        typer.Option(
            help="heads, query_heads, channels, experts, attention, ffn, block; default heads,channels as the method scores"
        ),
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="per_layer, global or parameters; default: what layout and method want")
    ] = None,
    round_to: Annotated[int | None, typer.Option(help="channels go in multiples; default 64, less if narrow")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="a field of the method, e.g. steps=500; may be repeated")
    ] = None,
    refit: Annotated[bool, typer.Option(help="least squares for the matrices that consumed the units")] = True,
    recover: Annotated[
        str | None, typer.Option(help="lora or full: afterwards, train towards the dense model's predictions")
    ] = None,
    recover_option: Annotated[
        list[str] | None, typer.Option("--recover-set", help="a field of the recovery, e.g. steps=200; may be repeated")
    ] = None,
    samples: Annotated[int, typer.Option(help="calibration windows")] = 128,
    window: Annotated[int | None, typer.Option(help="tokens a window; default min(2048, the model's limit)")] = None,
    seed: Annotated[int, typer.Option(help="chooses the calibration windows, and the method's noise")] = 0,
    batch_size: Annotated[int, typer.Option(help="windows a forward pass")] = 8,
    max_waste: Annotated[
        float, typer.Option(help="of layout padded: zeros that only fill up, per kept parameter")
    ] = 0.1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run Python code that the model folder brings")] = False,
) -> None:
    """Cut whole heads, channels, experts or blocks out of MODEL: a smaller dense OUT. The same command resumes."""
    import topiarist as tp
    from topiarist.core.registry import look_up
    from topiarist.structured import METHODS

    set_threads(threads)
    quiet()
    scorer = filled(look_up(METHODS, method), "--set", option or [])
    recovery = None
    if recover is not None or recover_option:
        recovery = filled(tp.Distill, "--recover-set", [*(recover_option or []), f"kind={recover or 'lora'}"])
    options: dict[str, Any] = {
        "method": scorer,
        "keep": keep,
        "data": tp.text_files(data) if data else None,
        "layout": layout,
        "units": None if units is None else [kind.strip() for kind in units.split(",") if kind.strip()],
        "scope": scope,
        "round_to": round_to,
        "refit": refit,
        "recover": recovery,
        "num_samples": samples,
        "window": window,
        "seed": seed,
        "batch_size": batch_size,
        "max_waste": max_waste,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    with progress_bar() as progress:
        report = tp.shrink(model, output, progress=progress, **options)
    table = Table(title=f"{report.method}: {report.share:.1%} of the parameters stay ({report.layout})")
    for column in ("units", "kept", "of", "in", "fewest", "most"):
        table.add_column(column, justify="left" if column == "units" else "right")
    for kind, (kept, of, groups) in report.counts().items():
        each = [row["kept"] for row in report.blocks if row["kind"] == kind]
        table.add_row(kind, f"{kept:,}", f"{of:,}", f"{groups} groups", str(min(each)), str(max(each)))
    out.print(table)
    numbers = report.parameters
    padding = f", of them {numbers['stored'] - numbers['kept']:,} zeros" if numbers["stored"] != numbers["kept"] else ""
    out.print(f"{numbers['dense']:,} parameters -> {numbers['stored']:,}{padding}", highlight=False)
    if report.layers:
        before = sum(layer.error_without for layer in report.layers) / len(report.layers)
        after = sum(layer.error for layer in report.layers) / len(report.layers)
        out.print(f"refit of {len(report.layers)} matrices: mean error {before:.4f} -> {after:.4f}", highlight=False)
    if report.recovered:
        first, last = report.recovered[0], report.recovered[-1]
        out.print(
            f"recovery, {last['step']} steps: divergence {first['loss']:.4f} -> {last['loss']:.4f}", highlight=False
        )
    run = report.run
    out.print(f"{run['seconds']:.0f} s, peak memory {run['peak_memory_bytes'] / 1e9:.2f} GB; written to {output}")


COMMANDS = {"shrink": shrink}
