"""Structural pruning: what can be cut whole, how much stays, and the cut itself.

groups = units_of(model, ("heads", "channels"))
kept = choose(groups, scores, keep=0.8)
with gates(model, groups) as masks: ...
"""

from topiarist.structured.choose import choose, kept_cost, layer_counts, total_cost, verify_budget
from topiarist.structured.gates import gates
from topiarist.structured.layout import LAYOUTS, Plan, plan_layout, shrunk
from topiarist.structured.shrink import mask_in_place
from topiarist.structured.units import KINDS, Kept, Part, UnitGroup, default_kinds, units_of

__all__ = [
    "KINDS",
    "LAYOUTS",
    "Kept",
    "Part",
    "Plan",
    "UnitGroup",
    "choose",
    "default_kinds",
    "gates",
    "kept_cost",
    "layer_counts",
    "mask_in_place",
    "plan_layout",
    "shrunk",
    "total_cost",
    "units_of",
    "verify_budget",
]
