"""What one decoder block costs at the size of Llama-3-8B, piece by piece, and what follows for whole models and more processes.

    python -m benchmarks.scale measure --out benchmarks/results/scale-pieces.json [--threads 1]
    python -m benchmarks.scale table --pieces benchmarks/results/scale-pieces.json [--bandwidth 1.25e9] [--windows 128]

Weights and inputs are random: no time depends on them. With one thread the seconds are those of the processor, so that
what else runs on the machine does not count. The table scales each piece by its operations and adds the time of the sums
on their way at the bandwidth that it is given (bytes a second); nothing in it was run at that size. The program divides
windows into eight slots, so 64 processes, each with a slot of its own, are beyond it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from topiarist.core.gram import Gram
from topiarist.core.patterns import NM
from topiarist.core.slots import SLOTS, added
from topiarist.pipelines.common.grams import owners
from topiarist.solvers import SOLVERS

WINDOW = 2048
METHODS = ("sparsegpt", "alps")
Shape = tuple[int, int, int, int]
"""Blocks, hidden size, rows of the key (and of the value) matrix, channels of the feed-forward network."""
MODELS: dict[str, Shape] = {
    "Llama-3.2-1B": (16, 2048, 512, 8192),
    "Llama-3.1-8B": (32, 4096, 1024, 14336),
    "Qwen2.5-32B": (64, 5120, 1024, 27648),
    "Llama-3.1-70B": (80, 8192, 1024, 28672),
}
PROBED = "Llama-3.1-8B"


def groups_of(shape: Shape) -> dict[str, tuple[int, int]]:
    """Input -> (rows of all matrices that read it, its width)."""
    _, hidden, keys, channels = shape
    return {
        "q, k, v": (hidden + 2 * keys, hidden),
        "o": (hidden, hidden),
        "gate, up": (2 * channels, hidden),
        "down": (hidden, channels),
    }


def seconds(work: Callable[[], Any]) -> float:
    """Of the processor with one thread, of the clock with more."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def pieces() -> Iterator[dict[str, Any]]:
    """The pieces of a block of the probed size, input by input, narrow ones first: products and Gram of one window, the
    addition of two sums, solves. ALPS is left out where it would take longest.
    """
    generator = torch.Generator().manual_seed(0)
    groups = groups_of(MODELS[PROBED])
    for name, methods in (("o", METHODS), ("q, k, v", METHODS), ("gate, up", METHODS[:1]), ("down", METHODS[:1])):
        rows, width = groups[name]
        x = torch.randn(WINDOW, width, generator=generator)
        weight = torch.randn(rows, width, generator=generator)
        gram = Gram(width)
        yield {"piece": "forward", "input": name, "seconds": seconds(lambda x=x, weight=weight: x @ weight.T)}
        yield {"piece": "gram", "input": name, "seconds": seconds(lambda gram=gram, x=x: gram.add(x))}
        sums = gram.take()
        yield {"piece": "addition", "input": name, "seconds": seconds(lambda sums=sums: added(sums, sums.clone()))}
        for _ in range(-(-width // WINDOW) + 1):
            gram.add(torch.randn(WINDOW, width, generator=generator))
        for method in methods:
            solve = partial(SOLVERS[method](), weight, gram, NM(keep=2, of=4))
            yield {"piece": "solve", "method": method, "input": name, "seconds": seconds(solve)}


def measure(out: Path) -> None:
    """Write every piece as soon as it is known."""
    found: list[dict[str, Any]] = []
    for piece in pieces():
        found.append(piece)
        print(piece, flush=True)
        about = {"model": PROBED, "window": WINDOW, "threads": torch.get_num_threads(), "torch": torch.__version__}
        out.write_text(json.dumps({**about, "pieces": found}, indent=1) + "\n")


def operations(piece: str, rows: int, width: int) -> float:
    """Multiplications of a piece, up to a factor that is the same for all sizes; a solver factors once and updates rows."""
    if piece == "forward":
        return rows * width
    return width**2 if piece in ("gram", "addition") else width**3 + 1.5 * rows * width**2


class Rates:
    """Seconds an operation of every kind of piece, from what was measured."""

    def __init__(self, known: list[dict[str, Any]]) -> None:
        groups = groups_of(MODELS[PROBED])
        self._sums: dict[str, tuple[float, float]] = {}
        for piece in known:
            kind = piece.get("method", piece["piece"])
            done = operations(piece["piece"], *groups[piece["input"]])
            before = self._sums.get(kind, (0.0, 0.0))
            self._sums[kind] = before[0] + piece["seconds"], before[1] + done

    def seconds(self, piece: str, rows: int, width: int, method: str = "") -> float:
        """Of one piece of another size."""
        taken, done = self._sums[method or piece]
        return taken / done * operations(piece, rows, width)


def block_seconds(
    shape: Shape, rates: Rates, method: str, windows: int, processes: int, bandwidth: float
) -> dict[str, float]:
    """Seconds of a block by activity: two forwards of a process' windows and their Grams, sums to owners, solves, weights."""
    groups = groups_of(shape).values()
    own = windows / processes
    forward = sum(2 * rates.seconds("forward", *g) + rates.seconds("gram", *g) for g in groups) * own
    sums = [2.0 * width**2 for _, width in groups]  # bytes: fp32, the upper triangle
    solves = [rates.seconds("solve", *g, method=method) for g in groups]
    work = [width**3 + 30.0 * width**2 * rows for rows, width in groups]
    load, arriving = [0.0] * processes, [0.0] * processes
    for solve, size, owner in zip(solves, sums, owners(work, processes), strict=True):
        load[owner] += solve
        arriving[owner] += (processes - 1) * size
    slots = max(SLOTS, processes) / processes  # a process has one at least
    adding = sum(rates.seconds("addition", *g) for g in groups) * (slots + processes.bit_length())
    weights = 2.0 * sum(rows * width for rows, width in groups) * (processes > 1)
    moved = max(arriving) / bandwidth + adding
    return {"forward": forward, "sums": moved, "solver": max(load), "weights": weights / bandwidth}


def table(known: dict[str, Any], windows: int, bandwidth: float) -> None:
    """Hours of whole models, by number of processes."""
    rates = Rates(known["pieces"])
    print(
        f"| model | method | processes | {windows} windows: forward h | sums h | solver h | weights h | in all h | times |"
    )
    print("|" + "---|" * 9)
    measured = {piece["method"] for piece in known["pieces"] if piece["piece"] == "solve"}
    for name, shape in MODELS.items():
        for method in [m for m in METHODS if m in measured]:
            alone = 0.0
            for processes in (1, 2, 4, 8, 64):
                parts = block_seconds(shape, rates, method, windows, processes, bandwidth)
                hours = {part: shape[0] * taken / 3600 for part, taken in parts.items()}
                total = sum(hours.values())
                alone = alone or total
                cells = " | ".join(f"{h:.2f}" for h in (*hours.values(), total))
                print(f"| {name} | {method} | {processes} | {cells} | {alone / total:.2f} |")


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--threads", type=int, default=1)
    printing = commands.add_parser("table")
    printing.add_argument("--pieces", type=Path, required=True)
    printing.add_argument("--windows", type=int, default=128)
    printing.add_argument("--bandwidth", type=float, default=1.25e9)
    given = parser.parse_args()
    if given.command == "measure":
        torch.set_num_threads(given.threads)
        measure(given.out)
    else:
        table(json.loads(given.pieces.read_text()), given.windows, given.bandwidth)


if __name__ == "__main__":
    main()
