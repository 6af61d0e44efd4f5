"""One-shot solvers: (weight, gram, pattern) -> Solution. `SOLVERS` is the one table CLI, tests and docs read."""

from topiarist.solvers.alps import ALPS
from topiarist.solvers.base import Problem, Solution, Solver
from topiarist.solvers.magnitude import Magnitude
from topiarist.solvers.sparsegpt import SparseGPT
from topiarist.solvers.wanda import Wanda

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "alps": ALPS,
}

__all__ = ["ALPS", "SOLVERS", "Magnitude", "Problem", "Solution", "Solver", "SparseGPT", "Wanda"]
