"""topiarist: prune Hugging Face causal language models with the best methods known, and measure what it cost."""

from topiarist import solvers
from topiarist.gram import Gram
from topiarist.linalg import reconstruction_error
from topiarist.patterns import NM, Columns, Pattern, TransposableNM, Unstructured, parse_pattern
from topiarist.solvers import Solution

__all__ = [
    "NM",
    "Columns",
    "Gram",
    "Pattern",
    "Solution",
    "TransposableNM",
    "Unstructured",
    "parse_pattern",
    "reconstruction_error",
    "solvers",
]
