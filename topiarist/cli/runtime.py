"""The commands about running a pruned model: pack, unpack, bench."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from topiarist.cli.common import literal, out, say, set_threads

if TYPE_CHECKING:
    from topiarist.runtime import BenchReport


class Integers(StrEnum):
    """Values that floating-point weights can be rounded to."""

    INT8 = "int8"
    INT4 = "int4"


class Head(StrEnum):
    """The same of the head and the embeddings."""

    INT8 = "int8"


def pack(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="pruned or quantised checkpoint")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the packed one")],
    values: Annotated[
        Integers | None, typer.Option(help="round the linears to such integers; a quantised DIR keeps its own")
    ] = None,
    group: Annotated[int, typer.Option(min=32, help="columns that share a scale, with --values")] = 64,
    head: Annotated[Head | None, typer.Option(help="round the head and the embeddings, a scale a row")] = None,
) -> None:
    """Write a compact copy of a checkpoint without its zeros: exactly reversible, unless it is told to round."""
    from topiarist.runtime import pack_folder

    report = pack_folder(
        folder, output, values=getattr(values, "value", None), group=group, head=getattr(head, "value", None)
    )
    say(
        f"{report.num_packed} of {report.num_tensors} tensors packed, those to {report.ratio:.3f} x their size; "
        f"{report.dense_bytes / 1e6:.1f} MB -> {report.packed_bytes / 1e6:.1f} MB in all; written to {output}"
    )
    if not report.num_packed:
        say("nothing got smaller: no matrix has enough zeros. Prune it first, or round it with --values")


def unpack(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="packed checkpoint, or a legacy sparse-bitmask one")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder for the ordinary one")],
) -> None:
    """Write the ordinary checkpoint back, bit for bit. Also reads compressed-tensors' orphaned sparse formats."""
    from topiarist.checkpoints.access import check_name
    from topiarist.runtime import convert_legacy, unpack_folder
    from topiarist.runtime.packed import MANIFEST

    check_name(folder)
    if (folder / MANIFEST).exists():
        unpack_folder(folder, output)
    else:
        convert_legacy(folder, output)
    say(f"written to {output}")


def bench(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="pruned or quantised checkpoints, packed or not")
    ],
    tokens: Annotated[int, typer.Option(min=1, help="tokens to decode")] = 32,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of the prompt")] = 64,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="batch size; may be repeated; default 1, 4, 8, 32")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice")] = None,
    save: Annotated[bool, typer.Option("--save", help="put the result beside the checkpoint and on its page")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, a list of several")] = False,
) -> None:
    """Prefill and decode speed on this machine, dense against as it runs, and why layers run as they do.

    Of several DIRs whose perplexity is saved (`topiarist eval --save`): which are dominated in perplexity and speed.
    """
    from topiarist.evaluation.adapter import has_adapter
    from topiarist.results.result import names_of
    from topiarist.runtime import bench_folder

    set_threads(threads)
    found: list[tuple[Path, dict[str, Any]]] = []
    for folder, name in zip(folders, names_of(folders), strict=True):
        report = bench_folder(folder, tokens=tokens, prompt=prompt, batches=batch or (1, 4, 8, 32), device=device)
        plain = asdict(report) | {"verdict": report.verdict}
        found.append((folder, plain))
        if save:
            from topiarist.results.pages import save_benchmark

            save_benchmark(folder, plain)
        if not as_json:
            _print_speeds(report, name if len(folders) > 1 else "")
            if has_adapter(folder):
                out.print("measured without its low-rank companion")
    if as_json:
        whole = [plain for _, plain in found]
        sys.stdout.write(json.dumps(whole if len(whole) > 1 else whole[0], indent=2) + "\n")
    elif len(found) > 1:
        _print_frontier(found)


def _print_speeds(report: BenchReport, name: str) -> None:
    table = Table(title=literal(f"{name}: " if name else "") + f"tokens/s, {literal(report.machine)}")
    for column in ("phase", "batch", "dense", "sparse", "gain"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for speed in report.speeds:
        cells = (f"{speed.dense:.1f}", f"{speed.sparse:.1f}", f"{speed.gain:.2f} x")
        table.add_row(speed.phase, str(speed.batch), *cells)
    out.print(table)
    for reason, count in Counter(layer.reason for layer in report.acceleration.layers).most_common():
        say(f"{count:4d} linears: {reason}")
    out.print(f"weights {report.dense_bytes / 1e6:.0f} MB dense, {report.sparse_bytes / 1e6:.0f} MB as they run")
    say(report.verdict)


def _print_frontier(found: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """Which of the folders are dominated, of those that are results."""
    from topiarist.checkpoints.writing import REPORT
    from topiarist.results.frontier import sentences_of
    from topiarist.results.pages import Result

    known = [(folder, plain) for folder, plain in found if (folder / REPORT).is_file()]
    results = [replace(Result.from_folder(folder), benchmark=plain) for folder, plain in known]
    for sentence in sentences_of(results):
        out.print(literal(sentence), highlight=False, soft_wrap=True)


COMMANDS = {"pack": pack, "unpack": unpack, "bench": bench}
