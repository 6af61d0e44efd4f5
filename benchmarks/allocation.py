"""Perplexity of the demo model by how sparsity is divided among its layers: method x rule x sparsity.

    python -m benchmarks.allocation                                    # 2 methods x 6 rules x 4 sparsities: hours
    python -m benchmarks.allocation --patterns 0.7 --methods alps --rules uniform linear

Texts and measures are those of benchmarks/quality.py, the calibration is smaller (32 x 512 tokens) and so are the
evaluation texts (8 windows each): options restore them. A rule is text as `--allocation` takes it, e.g. `owl:level=matrix`.
Rules measure and select on calibration text alone; evaluation text is read at the very end. What is slow to get (traces,
solutions, the search's generations) lies in `.assets/allocation` and is shared by all cells.

Finished cells are kept in a JSON-lines file and not run again, so a long table can be made in pieces.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import topiarist as tp
from benchmarks import quality
from benchmarks.said import method_from_text
from demo.assets import assets_dir, model_dir

METHODS = ("sparsegpt", "alps")
RULES = (
    "uniform",
    "linear",
    "owl",
    "sensitivity:estimate=fisher,tokens=128",
    "sensitivity:estimate=hutchinson,tokens=128",
    # One search serves both methods: its database is SparseGPT's. The clock decides nothing.
    "search:solver=sparsegpt,generations=40,seconds=1e9",
)
PATTERNS = ("0.5", "0.6", "0.7", "0.8")


def run_cell(
    options: argparse.Namespace, method: str, rule: str, pattern: str, calibration: list[str], windows: Any
) -> dict[str, Any]:
    """Allocate, then prune and measure; the seconds of both."""
    cpu, work = time.process_time(), assets_dir() / "allocation"
    found = tp.find_allocation(
        model_dir(),
        rule,
        pattern=pattern,
        calibration=calibration,
        method=method_from_text(method)[0],
        num_samples=options.samples,
        window=options.window,
        batch_size=4,
        work=work,
    )
    work.mkdir(parents=True, exist_ok=True)
    file = work / "last.json"
    found.save(file)
    spent = time.process_time() - cpu
    cell = quality.run_cell(options, method, pattern, calibration, windows, label=f"-{rule}", allocation=file)
    densities = [1.0 if (p := found.patterns[n]) is None else 1 - p.sparsity_of(s) for n, s in found.shapes.items()]
    return {
        "allocation_seconds": spent,
        "density": [min(densities), max(densities)],
        "notes": dict(found.scores.notes),
        **cell,
    }


def table(
    cells: dict[tuple[str, str, str], dict[str, Any]], options: argparse.Namespace, windows: dict[str, Any]
) -> str:
    head = ["sparsity", "method", "rule", *windows, "against uniform", "density", "allocate min", "prune min"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    first = next(iter(windows))
    for (pattern, method, rule), cell in cells.items():
        uniform = cells.get((pattern, method, "uniform"))
        gain = "" if uniform is None else f"{cell['perplexity'][first] / uniform['perplexity'][first] - 1:+.1%}"
        words = [pattern, method, f"`{rule}`", *(f"{cell['perplexity'][name]:.2f}" for name in windows), gain]
        low, high = cell["density"]
        words += [f"{low:.3f}-{high:.3f}", f"{cell['allocation_seconds'] / 60:.1f}", f"{cell['cpu_seconds'] / 60:.1f}"]
        lines.append(f"| {' | '.join(words)} |")
    below = (
        f"Minutes are of CPU; an allocation measured before, for another method or sparsity, costs less here. "
        f"`against uniform`: perplexity on {first}. {quality.note(options, windows)}"
    )
    return "\n".join([*lines, "", below])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quality.add_protocol(parser, samples=32, eval_windows=8)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results/allocation.jsonl"), help="the table is beside"
    )
    options = parser.parse_args()
    calibration, windows, settings = quality.prepare(options)
    rows = quality.stored_cells(options.results, settings)
    for pattern, method, rule in (
        (pattern, method, rule) for pattern in options.patterns for method in options.methods for rule in options.rules
    ):
        key = f"{pattern} {method} {rule}"
        if key not in rows:
            rows[key] = run_cell(options, method, rule, pattern, calibration, windows)
            quality.keep_cell(options.results, key, settings, rows[key])
        print(key, {name: round(value, 2) for name, value in rows[key]["perplexity"].items()}, flush=True)
    known = sorted((key.split(" ") for key in rows), key=lambda words: words[:2])  # within a group, as they were made
    text = table({tuple(words): rows[" ".join(words)] for words in known}, options, windows)
    quality.page(options).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
