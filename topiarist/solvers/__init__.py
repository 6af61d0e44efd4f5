"""One-shot solvers: (weight, gram, pattern) -> Solution. `SOLVERS` is the one table CLI, tests and docs read."""

from topiarist.solvers.alps import ALPS
from topiarist.solvers.base import GramSolver, Solution, Solver
from topiarist.solvers.isc import ISC
from topiarist.solvers.magnitude import Magnitude
from topiarist.solvers.sparsegpt import SparseGPT
from topiarist.solvers.wanda import Wanda

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "isc": ISC,
    "alps": ALPS,
}

__all__ = ["ALPS", "ISC", "SOLVERS", "GramSolver", "Magnitude", "Solution", "Solver", "SparseGPT", "Wanda"]
