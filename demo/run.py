"""The demo: a real 135M model pruned with every one-shot method, measured on text it was not pruned on.

Prints the table that README shows and writes .assets/demo/report.md with a plot of the error in every layer.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import topiarist as tp
from demo.assets import assets_dir, model_dir, text_dir
from topiarist.cli.common import progress_bar
from topiarist.data import TextFiles
from topiarist.evaluation.comparison import held_out_windows
from topiarist.evaluation.perplexity import load_model
from topiarist.pipelines.common.options import Progress

PATTERNS = ("2:4", "0.7")
METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
EVAL_WINDOW = 1024
TEXTS = {"c4": 5, "wikipedia": 3}
"""Held-out texts and how many of their windows are evaluated."""
Cell = dict[str, float | str]


def main() -> None:
    """Run every method at every pattern; minutes on two quiet cores with AVX-512, longer without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12, help="calibration windows")
    parser.add_argument("--window", type=int, default=512, help="tokens a calibration window")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    console = Console()
    model, out = model_dir(), assets_dir() / "demo"
    calibration = tp.text_files(text_dir() / "calibration.jsonl")
    texts = {name: tp.text_files(text_dir() / f"heldout_{name}.jsonl") for name in TEXTS}
    console.print(
        f"SmolLM2-135M, calibration {options.samples} x {options.window} tokens, {options.threads} threads; perplexity on "
        f"the first windows of {EVAL_WINDOW} tokens: {', '.join(f'{n} of {name}' for name, n in TEXTS.items())}"
    )
    reports: dict[tuple[str, str], tp.Report] = {}
    cells: list[Cell] = []
    with progress_bar() as progress:
        cells.append({"method": "dense", "pattern": ""} | perplexities("dense", model, texts, progress))
        for pattern in PATTERNS:
            for method in METHODS:
                name = f"{method} {pattern}"

                def show(what: str, done: int, total: int, name: str = name) -> None:
                    progress(f"{name}: {what}", done, total)

                folder = out / f"{method}-{pattern.replace(':', 'of')}-{options.samples}x{options.window}"
                report = tp.prune(
                    model,
                    folder,
                    method=method,
                    pattern=pattern,
                    calibration=calibration,
                    num_samples=options.samples,
                    window=options.window,
                    progress=show,
                )
                reports[method, pattern] = report
                cells.append(
                    {
                        "method": method,
                        "pattern": pattern,
                        "seconds": report.run["seconds"],
                        "memory": report.run["peak_memory_bytes"] / 1e9,
                    }
                    | perplexities(name, folder, texts, progress)
                )
    table = Table(*(["method", "pattern", *(f"ppl {name}" for name in texts), "prune s", "peak GB"]))
    rows = [row(cell, list(texts)) for cell in cells]
    for cell in rows:
        table.add_row(*cell)
    console.print(table)
    write_report(out, rows, list(texts), reports, options.samples * options.window)
    console.print(f"report with a plot of the error in every layer: {out / 'report.md'}")


def perplexities(what: str, folder: Path, texts: dict[str, TextFiles], progress: Progress) -> Cell:
    model = load_model(folder)
    found: Cell = {}
    for name, text in texts.items():
        windows = held_out_windows(folder, text, window=EVAL_WINDOW, max_windows=TEXTS[name])
        show = partial(progress, f"{what}: perplexity on {name}")
        found[name] = tp.perplexity(model, windows, progress=show).value
    return found


def row(cell: Cell, texts: list[str]) -> list[str]:
    numbers = [f"{cell[name]:.1f}" for name in texts]
    return [str(cell["method"]), str(cell["pattern"]), *numbers] + (
        [f"{cell['seconds']:.0f}", f"{cell['memory']:.2f}"] if "seconds" in cell else ["", ""]
    )


def write_report(
    out: Path, rows: list[list[str]], texts: list[str], reports: dict[tuple[str, str], tp.Report], tokens: int
) -> None:
    """report.md with the table, and error-per-layer.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(PATTERNS), 1, figsize=(11, 4 * len(PATTERNS)), squeeze=False)
    for axis, pattern in zip(axes[:, 0], PATTERNS, strict=True):
        for method in METHODS:
            axis.semilogy([layer.error for layer in reports[method, pattern].layers], label=method, linewidth=1)
        axis.set(title=pattern, xlabel="layer (q, k, v, o, gate, up, down of every block)", ylabel="relative error")
        axis.legend()
    figure.tight_layout()
    figure.savefig(out / "error-per-layer.png", dpi=120)
    header = ["method", "pattern", *(f"ppl {name}" for name in texts), "prune s", "peak GB"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    text = "\n".join(lines)
    (out / "report.md").write_text(
        f"# SmolLM2-135M pruned with every one-shot method\n\nCalibration {tokens:,} tokens, "
        f"{torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}.\n\n{text}\n\n![error](error-per-layer.png)\n"
    )


if __name__ == "__main__":
    main()
