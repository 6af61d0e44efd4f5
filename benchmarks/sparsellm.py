"""SparseLLM step by step: what every round does to the error of a feed-forward network, from cells that quality.py made.

    python -m benchmarks.quality --methods sparsellm sparsellm:epochs=0 --patterns 2:4 0.7
    python -m benchmarks.sparsellm --out benchmarks/results/sparsellm-steps

Writes OUT.svg (a panel a pattern, a line a method: the median over blocks, relative to the local solver alone, with the middle
half of the blocks shaded) and OUT.md (the same as a table, with the share of blocks in which each step was the best).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

Cell = dict[str, Any]


def cells(path: Path) -> list[Cell]:
    """Cells of one protocol that have errors by step; the last of a name counts."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return list({(tuple(map(str, c["settings"])), c["cell"]): c for c in lines if c.get("joint")}.values())


def ratios(cell: Cell) -> tuple[list[str], np.ndarray]:
    """Steps, and (blocks, steps) errors relative to the first; blocks whose later steps failed are left out."""
    steps = max((list(errors) for errors in cell["joint"]), key=len)
    whole = np.array([[errors[step] for step in steps] for errors in cell["joint"] if len(errors) == len(steps)])
    return steps, whole / whole[:, :1]


def table(found: list[Cell]) -> str:
    lines = [
        "| method | pattern | step | median error / local | best in blocks | worst block |",
        "|---|---|---|---|---|---|",
    ]
    for cell in found:
        method, pattern = cell["cell"].split(" ")
        steps, values = ratios(cell)
        best = Counter(values.argmin(1).tolist())
        for i, step in enumerate(steps):
            row = (method, pattern, step, f"{np.median(values[:, i]):.4f}", f"{best[i]}", f"{values[:, i].max():.4f}")
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def draw(found: list[Cell], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "topiarist"  # the same bytes for the same numbers
    from matplotlib import pyplot

    patterns = sorted({cell["cell"].split(" ")[1] for cell in found})
    figure, axes = pyplot.subplots(1, len(patterns), figsize=(4 * len(patterns), 3.4), sharey=True, squeeze=False)
    for axis, pattern in zip(axes[0], patterns, strict=True):
        for cell in (c for c in found if c["cell"].endswith(f" {pattern}")):
            steps, values = ratios(cell)
            axis.plot(steps, np.median(values, axis=0), marker="o", markersize=3, label=cell["cell"].split(" ")[0])
            axis.fill_between(steps, *np.quantile(values, (0.25, 0.75), axis=0), alpha=0.15)
        axis.axhline(1.0, color="grey", linewidth=0.6)
        axis.set_title(pattern)
        axis.tick_params(axis="x", rotation=30)
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("error of a network / local solver alone")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results/quality.jsonl"), help="cells of benchmarks.quality"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sparsellm-steps"))
    options = parser.parse_args()
    found = cells(options.results) if options.results.exists() else []
    if not found:
        raise SystemExit(f"{options.results} has no cell of sparsellm; make some with benchmarks.quality first")
    text = table(found)
    draw(found, options.out.with_suffix(".svg"))
    options.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
