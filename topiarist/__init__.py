"""topiarist: prune Hugging Face causal language models with the best methods known, and measure what it cost."""

from topiarist import allocate, masks, runtime, solvers, structured
from topiarist.__about__ import __version__
from topiarist.core import errors
from topiarist.core.errors import (
    CalibrationError,
    CheckpointError,
    NumericalError,
    PatternError,
    TopiaristError,
    UnsupportedModel,
)
from topiarist.core.gram import Gram
from topiarist.core.linalg import reconstruction_error
from topiarist.core.patterns import NM, Columns, Pattern, TransposableNM, Unstructured, parse_pattern
from topiarist.data import text_files
from topiarist.evaluation.audit import audit
from topiarist.evaluation.perplexity import load_model as load_pruned
from topiarist.evaluation.perplexity import perplexity
from topiarist.evaluation.verify import verify
from topiarist.masklearn import PRESETS, Preset
from topiarist.pipelines.allocating.allocation import FoundAllocation, find_allocation
from topiarist.pipelines.learning.learn import learn
from topiarist.pipelines.learning.report import LearnReport
from topiarist.pipelines.learning.train_kept import Recover
from topiarist.pipelines.pruning.correct import Correct
from topiarist.pipelines.pruning.oneshot import prune, prune_module
from topiarist.pipelines.pruning.refine import Refine
from topiarist.pipelines.pruning.sparsellm import SparseLLM
from topiarist.pipelines.quantizing.quantize import quantize
from topiarist.pipelines.quantizing.report import QuantizeReport
from topiarist.pipelines.recovering.options import RecoverOptions
from topiarist.pipelines.recovering.recover import recover
from topiarist.pipelines.recovering.report import RecoverReport
from topiarist.pipelines.shrinking.distill import Distill
from topiarist.pipelines.shrinking.report import ShrinkReport
from topiarist.pipelines.shrinking.shrink import shrink
from topiarist.results.report import Report
from topiarist.solvers import Solution

__all__ = [
    "NM",
    "PRESETS",
    "CalibrationError",
    "CheckpointError",
    "Columns",
    "Correct",
    "Distill",
    "FoundAllocation",
    "Gram",
    "LearnReport",
    "NumericalError",
    "Pattern",
    "PatternError",
    "Preset",
    "QuantizeReport",
    "Recover",
    "RecoverOptions",
    "RecoverReport",
    "Refine",
    "Report",
    "ShrinkReport",
    "Solution",
    "SparseLLM",
    "TopiaristError",
    "TransposableNM",
    "Unstructured",
    "UnsupportedModel",
    "__version__",
    "allocate",
    "audit",
    "errors",
    "find_allocation",
    "learn",
    "load_pruned",
    "masks",
    "parse_pattern",
    "perplexity",
    "prune",
    "prune_module",
    "quantize",
    "reconstruction_error",
    "recover",
    "runtime",
    "shrink",
    "solvers",
    "structured",
    "text_files",
    "verify",
]
