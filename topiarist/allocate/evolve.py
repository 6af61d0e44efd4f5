"""The moves of a search over levels, on numbers only (EvoPress, arXiv 2410.14649, section 3).

A genome gives every unit (a block or a matrix) a level, 0 the densest; `kept[unit][level]` weights are then kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from topiarist.allocate.budget import distances, knapsack, smallest_step

Genome = tuple[int, ...]
Kept = Sequence[Sequence[int]]
START_WIDTHS = (0.0, 0.05, 0.1, 0.15, -0.05)
"""Half-widths of the linear allocations that a search may start from; 0 is the uniform one."""

TRIES = 50
"""At a child, before a parent counts as stuck."""


def starts(kept: Kept, sizes: Sequence[int], depths: Sequence[int], budget: int) -> list[Genome]:
    """The uniform genome and arithmetic progressions over the depth, as near as levels within the budget come to them."""
    last, density = max(max(depths), 1), budget / sum(sizes)
    found = []
    for width in START_WIDTHS:
        wanted = [density + width * (1 - 2 * depth / last) for depth in depths]
        found.append(tuple(knapsack(kept, distances(kept, sizes, wanted), budget, sum(sizes))))
    return list(dict.fromkeys(found))


def spent(genome: Genome, kept: Kept) -> int:
    """Weights that the genome keeps over all units."""
    return sum(row[level] for row, level in zip(kept, genome, strict=True))


def mutate(genome: Genome, kept: Kept, budget: int, draw: random.Random) -> Genome:
    """A child: one to three units become a level sparser, then units drawn at random become denser while the budget
    has room. Few exchanges are likelier than many. One that leaves a step of the smallest unit unspent is thrown away;
    the parent itself comes back if no other was found.
    """
    step = smallest_step(kept)
    for _ in range(TRIES):
        child = list(genome)
        for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
            lower = [u for u, level in enumerate(child) if level + 1 < len(kept[u])]
            if lower:
                child[draw.choice(lower)] += 1
        room = budget - spent(tuple(child), kept)
        while fitting := [u for u, level in enumerate(child) if level and kept[u][level - 1] - kept[u][level] <= room]:
            unit = draw.choice(fitting)
            room -= kept[unit][child[unit] - 1] - kept[unit][child[unit]]
            child[unit] -= 1
        if tuple(child) != genome and room < step:
            return tuple(child)
    return genome
