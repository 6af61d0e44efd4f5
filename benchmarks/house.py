"""The picture of the house in docs/figures: rooms of the package by floor, and an arrow for every room that one imports from.

python -m benchmarks.house
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from benchmarks.figures import COLOURS, FIGURES, GREY, ROOT, plt, same_bytes, save

FLOORS = (
    ("core",), ("quantization", "checkpoints", "data", "models"),
    ("solvers", "allocate", "structured", "masklearn", "results"), ("masks", "runtime", "evaluation"),
    ("pipelines",), ("cli",),
)  # fmt: skip


def house() -> None:
    """Rooms of the package by floor, and an arrow for every room that another one imports from."""
    package = ROOT / "topiarist"
    floors = [[room for room in floor if (package / room).is_dir()] for floor in FLOORS]
    places = {
        room: ((i + 0.5) / len(floor) * 14, 1.6 * level)
        for level, floor in enumerate(floors)
        for i, room in enumerate(floor)
    }
    figure, ax = plt.subplots(figsize=(10, 6))
    for user, used in sorted(imports(package, places)):
        (x, y), (u, v) = places[user], places[used]
        bend = "arc3,rad=0.25" if y == v else "arc3,rad=0.0"
        arrow = {"arrowstyle": "->", "color": GREY, "lw": 0.8, "connectionstyle": bend, "shrinkA": 14, "shrinkB": 14}
        ax.annotate("", (u, v), (x, y), arrowprops=arrow, zorder=1)
    for room, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": COLOURS[0]}
        ax.text(x, y, room, ha="center", va="center", fontsize=11, bbox=box, zorder=2)
    ax.set(xlim=(0, 14), ylim=(-0.8, 1.6 * len(floors) - 0.8))
    ax.axis("off")
    save(figure, "house")


def imports(package: Path, rooms: Iterable[str]) -> set[tuple[str, str]]:
    """(room, room that it imports from) over all modules."""
    found = set()
    for room in rooms:
        for file in (package / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("topiarist."):
                    found.add((room, (node.module or "").split(".")[1]))
    return {(user, used) for user, used in found if user != used and used in rooms}


if __name__ == "__main__":
    same_bytes()
    house()
    print(FIGURES / "house.svg")
