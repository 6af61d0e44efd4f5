"""The commands of learned masks: learn, apply."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from topiarist.cli.common import Text, filled, out, progress_bar, quiet, set_threads


def learn(
    model: Annotated[str, typer.Argument(help="model folder or hub id")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the pruned checkpoint and its masks")],
    data: Text,
    pattern: Annotated[str, typer.Option(help="2:4 keeps 2 of 4; any N:M")] = "2:4",
    prior: Annotated[str, typer.Option(help="wanda, sparsegpt, magnitude, alps, or a masks.safetensors")] = "wanda",
    preset: Annotated[str, typer.Option(help="quick, standard or paper")] = "quick",
    steps: Annotated[int | None, typer.Option(help="steps, instead of the preset's")] = None,
    relaxation: Annotated[str | None, typer.Option(help="categorical, topn or bernoulli; default: what fits")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="regular expression of layers that stay dense")] = None,
    last_block_dense: Annotated[
        bool, typer.Option("--last-block-dense", help="the most sensitive block stays")
    ] = False,
    distill: Annotated[float, typer.Option(help="share of the loss that is divergence from the dense model")] = 0.0,
    recover: Annotated[bool, typer.Option("--recover", help="then train the kept weights under the mask")] = False,
    recover_option: Annotated[
        list[str] | None, typer.Option("--recover-set", help="a field of the recovery, e.g. steps=100; may be repeated")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="sequences a forward pass")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="steps between evaluations and saved states")] = None,
    seed: Annotated[int, typer.Option(help="order of the text, and the noise")] = 0,
    lean: Annotated[bool, typer.Option("--lean", help="9 bytes a masked weight instead of 14")] = False,
    eight_bit: Annotated[
        bool,
        typer.Option("--eight-bit", help="moments in 8 bits, by torchao: 11 bytes, 7.5 with --lean; slow on a CPU"),
    ] = False,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="a third more time, far less memory")
    ] = False,
    replicate: Annotated[
        bool, typer.Option("--replicate", help="under torchrun: the whole model in every process, not FSDP2's shards")
    ] = False,
    tensorboard: Annotated[Path | None, typer.Option(help="folder for TensorBoard scalars")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run Python code that the model folder brings")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="say what the run will need, from one step, and stop")] = False,
) -> None:
    """Learn MODEL's masks on text, from a one-shot prior, and write OUT. The same command resumes a stopped run."""
    import topiarist as tp
    from topiarist.pipelines.learning.plan import plan_learn
    from topiarist.pipelines.training.processes import Processes

    set_threads(threads)
    quiet()
    options: dict[str, Any] = {
        "data": tp.text_files(data),
        "pattern": pattern,
        "preset": preset,
        "steps": steps,
        "relaxation": relaxation,
        "skip": skip or [],
        "last_block_dense": last_block_dense,
        "distill": distill,
        "batch_size": batch_size,
        "seed": seed,
        "lean": lean,
        "eight_bit": eight_bit,
        "activation_checkpointing": activation_checkpointing,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    if plan:
        for name, value in plan_learn(model, **options).lines():
            out.print(f"{name:<34} {value}", highlight=False)
        return
    recovery = filled(tp.Recover, "--recover-set", recover_option or []) if recover or recover_option else False
    first = os.environ.get("RANK", "0") == "0"  # under torchrun one process talks
    with progress_bar() if first else nullcontext() as progress:
        report = tp.learn(
            model,
            output,
            prior=prior,
            recover=recovery,
            evaluate_every=evaluate_every,
            shard=False if replicate else None,
            tensorboard=tensorboard,
            progress=progress,
            **options,
        )
    Processes.destroy()
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
    out.print("perplexity on a slice of the training text that was not trained on", highlight=False)
    run = report.run
    out.print(f"{run['seconds']:.0f} s, peak memory {run['peak_memory_bytes'] / 1e9:.2f} GB; written to {output}")


def apply(
    base: Annotated[str, typer.Argument(help="folder or hub id of the dense model")],
    masks: Annotated[Path, typer.Argument(help="masks.safetensors")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the pruned checkpoint")],
) -> None:
    """Write BASE with its masks applied: one frozen base, many masks. Refuses another base than the masks' own."""
    import topiarist as tp

    out.print(f"written to {tp.masks.apply(base, masks, output)}")


COMMANDS = {"learn": learn, "apply": apply}
