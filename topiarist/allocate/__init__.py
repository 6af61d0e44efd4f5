"""How much each layer gets: {layer name: pattern}. Shapes and numbers in, patterns out; what walks a model to measure
the numbers stands in `pipelines/`.

ALLOCATIONS is the table of rules: name -> frozen dataclass of its hyper-parameters. `fit` makes any wish exact.
"""

from topiarist.allocate.budget import fit
from topiarist.allocate.fixed import Allocation, from_file, given, uniform, without
from topiarist.allocate.rules import ALLOCATIONS, Linear, Owl, Rule, Search, Sensitivity, Uniform, recipe
from topiarist.allocate.scores import Scores

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "Linear",
    "Owl",
    "Rule",
    "Scores",
    "Search",
    "Sensitivity",
    "Uniform",
    "fit",
    "from_file",
    "given",
    "recipe",
    "uniform",
    "without",
]
