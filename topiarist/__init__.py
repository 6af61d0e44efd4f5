"""topiarist: prune Hugging Face causal language models with the best methods known, and measure what it cost."""

from topiarist import allocate, solvers
from topiarist.__about__ import __version__
from topiarist.data import text_files
from topiarist.errors import (
    CalibrationError,
    CheckpointError,
    NumericalError,
    PatternError,
    TopiaristError,
    UnsupportedModel,
)
from topiarist.evaluate import audit, perplexity
from topiarist.gram import Gram
from topiarist.linalg import reconstruction_error
from topiarist.patterns import NM, Columns, Pattern, TransposableNM, Unstructured, parse_pattern
from topiarist.pipelines.oneshot import prune, prune_module
from topiarist.report import Report
from topiarist.solvers import Solution

__all__ = [
    "NM",
    "CalibrationError",
    "CheckpointError",
    "Columns",
    "Gram",
    "NumericalError",
    "Pattern",
    "PatternError",
    "Report",
    "Solution",
    "TopiaristError",
    "TransposableNM",
    "Unstructured",
    "UnsupportedModel",
    "__version__",
    "allocate",
    "audit",
    "parse_pattern",
    "perplexity",
    "prune",
    "prune_module",
    "reconstruction_error",
    "solvers",
    "text_files",
]
