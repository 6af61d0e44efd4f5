"""Every solver against literal transcriptions of the originals: error, held-out error, CPU seconds, ratios.

    python -m benchmarks.solvers                                  # small shapes, all patterns, three seeds
    python -m benchmarks.solvers --shapes 1024x4096 --patterns 0.7 2:4 --seeds 11
    python -m benchmarks.solvers --llama8b --device cuda          # Llama-3-8B's layers, and a projected time for the model

Every problem comes from problems.py. All methods of a cell run one after the other in this process, in turn; times are medians
over the rounds, CPU seconds of the process on a CPU and synchronised wall seconds on a GPU. The Gram is given; the reported
error is part of the time.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import topiarist as tp
from benchmarks import problems
from benchmarks.originals import OriginalALPS, OriginalSparseGPT
from topiarist.core import linalg

SHAPES = ["576x576", "1536x576", "576x1536"]
PATTERNS = ["0.5", "0.7", "0.9", "2:4", "4:8"]
# (out, in) of one Llama-3-8B block, how many weights have it, of its seven linear layers.
LLAMA_8B = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
LLAMA_8B_BLOCKS = 32

Method = Callable[[problems.LayerProblem, str], Tensor]

SLOW = ("alps original", "alps best")


def solved_by(solver: tp.solvers.Solver) -> Method:
    return lambda problem, pattern: solver(problem.weight, problem.gram, tp.parse_pattern(pattern)).weight


METHODS: dict[str, Method] = {
    "alps original": solved_by(OriginalALPS()),
    "sparsegpt original": solved_by(OriginalSparseGPT()),
    "magnitude": solved_by(tp.solvers.Magnitude()),
    "wanda": solved_by(tp.solvers.Wanda()),
    "wanda + refit": solved_by(tp.solvers.Wanda(refit=True)),
    "sparsegpt": solved_by(tp.solvers.SparseGPT()),
    "alps fast": solved_by(tp.solvers.ALPS()),
    "alps best": solved_by(tp.solvers.ALPS(preset="best")),
}


def timed(call: Callable[[], Tensor], device: str) -> tuple[Tensor, float]:
    """The result and its CPU seconds (GPU: wall seconds between synchronisations)."""
    if device == "cpu":
        start = time.process_time()
        return call(), time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def run_cell(problem: problems.LayerProblem, pattern: str, methods: list[str], rounds: int, device: str) -> dict:
    """{method: (error, held-out error, seconds)}; the slow ones run once."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    weights = {}
    for turn in range(rounds):
        for name in methods:
            if turn == 0 or name not in SLOW:
                weights[name], spent = timed(lambda name=name: METHODS[name](problem, pattern), device)
                seconds[name].append(spent)
    return {
        name: (
            tp.reconstruction_error(problem.weight, weights[name], problem.gram),
            tp.reconstruction_error(problem.weight, weights[name], problem.held_out),
            statistics.median(seconds[name]),
        )
        for name in methods
    }


def summarise(cells: list[dict], methods: list[str]) -> list[str]:
    """One table row a method: medians over the seeds, ratios per cell before the median."""

    def median(pick: Callable[[dict], float]) -> float:
        return statistics.median(pick(cell) for cell in cells)

    def ratio(name: str, base: str, column: int) -> str:
        if base not in methods:
            return "-"
        return f"{median(lambda cell: cell[name][column] / cell[base][column]):.3f}"

    return [
        f"| {name} | {median(lambda c: c[name][0]):.3e} | {median(lambda c: c[name][1]):.3e} "  # noqa: B023
        f"| {median(lambda c: c[name][2]):.2f} | {ratio(name, 'alps original', 0)} | {ratio(name, 'alps original', 1)} "  # noqa: B023
        f"| {ratio(name, 'alps original', 2)} | {ratio(name, 'sparsegpt', 2)} |"
        for name in methods
    ]


def machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    low = linalg.search_dtype(torch.device("cpu"))
    return f"{names[0] if names else platform.processor()} ({os.cpu_count()} cores, support search in {low})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTxIN")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13])
    parser.add_argument("--rounds", type=int, default=3, help="timing rounds; the slow methods run once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--llama8b", action="store_true", help="the shapes of Llama-3-8B and a projected time")
    parser.add_argument("--out", type=Path, help="markdown file to append to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    if args.llama8b:
        shapes = list(LLAMA_8B)

    lines = [
        f"## {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "",
        f"{machine(args.device)}; {args.threads} thread(s); torch {torch.__version__}, Python {platform.python_version()}; "
        f"{args.tokens} calibration tokens; seeds {' '.join(map(str, args.seeds))}; rounds {args.rounds}.",
        "",
    ]

    def emit(*new: str) -> None:
        lines.extend(new)
        print(*new, sep="\n", flush=True)

    print(*lines, sep="\n")
    seconds_of: dict[tuple[int, ...], dict[str, float]] = {}
    for shape in shapes:
        inputs = [problems.make(*shape, seed, tokens=args.tokens, device=args.device) for seed in args.seeds]
        for pattern in args.patterns:
            if args.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            cells = [run_cell(p, pattern, args.methods, args.rounds, args.device) for p in inputs]
            memory = "" if args.device == "cpu" else f" (peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB)"
            emit(
                f"### {shape[0]}x{shape[1]}, {pattern}{memory}",
                "",
                "| method | error | held-out | seconds | error / ALPS original | held-out / | time / | time / SparseGPT |",
                "|---|---|---|---|---|---|---|---|",
                *summarise(cells, args.methods),
                "",
            )
            for name in args.methods:
                spent = statistics.median(cell[name][2] for cell in cells)
                seconds_of.setdefault(shape, {})[name] = spent
    if args.llama8b:
        emit(
            f"### Llama-3-8B, projected from the cells above (pattern {args.patterns[-1]}, no Gram shared, solver only)",
            "",
        )
        for name in args.methods:
            total = LLAMA_8B_BLOCKS * sum(count * seconds_of[shape][name] for shape, count in LLAMA_8B.items())
            emit(f"* {name}: {total / 60:.1f} minutes")
    if args.out:
        with args.out.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
