"""The command of recovery: recover."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from topiarist.cli.common import out, progress_bar, quiet, set_threads


def recover(
    model: Annotated[str, typer.Argument(metavar="PRUNED", help="pruned folder or hub id")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the recovered checkpoint")],
    data: Annotated[
        list[Path],
        typer.Option("--data", "--calibration", help=".txt, .jsonl, .jsonl.gz or a datasets folder; may be repeated"),
    ],
    teacher: Annotated[str | None, typer.Option(help="the dense model; default: the one that PRUNED names")] = None,
    tokens: Annotated[str, typer.Option(help="budget of training tokens, e.g. 300k or 1M")] = "1M",
    kind: Annotated[
        str, typer.Option(help="full (every weight) or lora (low-rank updates, merged at the end)")
    ] = "full",
    loss: Annotated[str, typer.Option(help="kl, kl+hidden, or lm (no teacher)")] = "kl",
    rank: Annotated[int, typer.Option(help="of the low-rank updates")] = 16,
    norms: Annotated[bool, typer.Option(help="norms and biases are trained too")] = True,
    embeddings: Annotated[
        bool | None, typer.Option(help="embeddings and head are trained too; default: in full")
    ] = None,
    window: Annotated[int, typer.Option(help="tokens a sequence")] = 512,
    sequences: Annotated[int, typer.Option(help="sequences a step")] = 8,
    batch_size: Annotated[int, typer.Option(help="sequences a forward, at most")] = 4,
    learning_rate: Annotated[float, typer.Option(help="peak; falls to zero along a cosine")] = 3e-4,
    warmup: Annotated[float, typer.Option(help="share of the steps over which the rate climbs")] = 0.05,
    held_out: Annotated[int, typer.Option(help="sequences that are not trained on and choose the best state")] = 16,
    evaluate_every: Annotated[
        int | None, typer.Option(help="steps between two looks at them; default: a tenth")
    ] = None,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="a third more time, far less memory")
    ] = False,
    seed: Annotated[int, typer.Option(help="order of the text, and the start of low-rank updates")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run Python code that the model folders bring")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="say what the run will need, from two steps, and stop")] = False,
) -> None:
    """Train PRUNED as a whole towards the dense model, its zeros held, and write OUT. The same command resumes."""
    import topiarist as tp
    from topiarist.pipelines.recovering.plan import plan_recover
    from topiarist.pipelines.training.processes import Processes

    set_threads(threads)
    quiet()
    settings: dict[str, Any] = {
        "tokens": count_of(tokens),
        "kind": kind,
        "loss": loss,
        "rank": rank,
        "norms": norms,
        "embeddings": embeddings,
        "window_tokens": window,
        "sequences": sequences,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "held_out": held_out,
        "evaluate_every": evaluate_every,
        "activation_checkpointing": activation_checkpointing,
        "seed": seed,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    options = tp.RecoverOptions(data=tp.text_files(data), **settings)
    if plan:
        for name, value in plan_recover(model, teacher=teacher, options=options).lines():
            out.print(f"{name:<34} {value}", highlight=False)
        return
    main = os.environ.get("RANK", "0") == "0"  # under torchrun one process talks
    with progress_bar() if main else nullcontext() as progress:
        report = tp.recover(model, output, teacher=teacher, options=options, progress=progress)
    Processes.destroy()
    if not main:
        return
    what = "loss" if loss == "lm" else "divergence"
    table = Table(
        title=f"recovered: {report.weights['trained']:,} weights trained, {report.weights['held']:,} zeros held"
    )
    for column in ("step", "tokens", f"held-out {what}", "exp"):
        table.add_column(column, justify="right")
    for entry in report.evaluations:
        seen = int(entry["step"]) * sequences * report.data["window_tokens"]
        mark = " *" if entry == report.best else ""
        table.add_row(
            f"{entry['step']:.0f}{mark}", f"{seen:,}", f"{entry['loss']:.4f}", f"{math.exp(entry['loss']):.3f}"
        )
    out.print(table)
    out.print("* kept: the least on a slice of the training text that was not trained on", highlight=False)
    run = report.run
    out.print(f"{run['seconds']:.0f} s, peak memory {run['peak_memory_bytes'] / 1e9:.2f} GB; written to {output}")


def count_of(text: str) -> int:
    """A number of tokens from text such as 300k, 1.5M or 2B. Raises TopiaristError for other text."""
    from topiarist.core.errors import TopiaristError

    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        return int(float(text[:-1] if factor > 1 else text) * factor)
    except (ValueError, OverflowError):
        raise TopiaristError(f"{text!r} is no number of tokens: write 300000, 300k or 1M") from None


COMMANDS = {"recover": recover}
