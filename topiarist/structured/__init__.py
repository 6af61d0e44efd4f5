"""Structural pruning: what can be cut whole, how much stays, and the cut itself.

groups = units_of(model, ("kv_groups", "channels"))
kept = choose(groups, scores, keep=0.8, scope="per_layer")
with gates(model, groups) as masks: ...            the model without the units that go, without touching it
small = shrunk(model, groups, kept, plan_layout(model, groups, kept, "uniform"))
"""

from topiarist.structured.audit import ShrunkAudit, audit_shrunk
from topiarist.structured.choose import choose, kept_cost, layer_counts, total_cost, verify_budget
from topiarist.structured.cut import mask_in_place
from topiarist.structured.finding import default_kinds, units_of
from topiarist.structured.gates import gates
from topiarist.structured.layout import LAYOUTS, Plan, check_layout, holds, plan_layout, shrunk
from topiarist.structured.methods import Method, Scores, Task
from topiarist.structured.spec import PruneSpec, predicted_parameters
from topiarist.structured.table import METHODS
from topiarist.structured.units import KINDS, Kept, Part, UnitGroup

__all__ = [
    "KINDS",
    "LAYOUTS",
    "METHODS",
    "Kept",
    "Method",
    "Part",
    "Plan",
    "PruneSpec",
    "Scores",
    "ShrunkAudit",
    "Task",
    "UnitGroup",
    "audit_shrunk",
    "check_layout",
    "choose",
    "default_kinds",
    "gates",
    "holds",
    "kept_cost",
    "layer_counts",
    "mask_in_place",
    "plan_layout",
    "predicted_parameters",
    "shrunk",
    "total_cost",
    "units_of",
    "verify_budget",
]
