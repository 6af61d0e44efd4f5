"""The stages that a recipe may have: what each takes, what it gives, and what runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topiarist.models.modeling_pruned import PREFIX
from topiarist.pipelines.allocating.allocation import FoundAllocation, find_allocation
from topiarist.pipelines.allocating.options import AllocateOptions
from topiarist.pipelines.allocating.plan import plan_allocate
from topiarist.pipelines.common.options import Progress
from topiarist.pipelines.learning.learn import learn
from topiarist.pipelines.learning.options import LearnOptions
from topiarist.pipelines.learning.plan import plan_learn
from topiarist.pipelines.learning.report import LearnReport
from topiarist.pipelines.pruning.oneshot import prune
from topiarist.pipelines.pruning.options import PruneOptions
from topiarist.pipelines.pruning.plan import plan_prune
from topiarist.pipelines.quantizing.options import QuantizeOptions
from topiarist.pipelines.quantizing.plan import plan_quantize
from topiarist.pipelines.quantizing.quantize import quantize
from topiarist.pipelines.quantizing.report import QuantizeReport
from topiarist.pipelines.recipes.end_plans import plan_eval, plan_pack
from topiarist.pipelines.recipes.ends import EvalOptions, PackOptions, run_eval, run_pack
from topiarist.pipelines.recovering.options import RecoverOptions
from topiarist.pipelines.recovering.plan import plan_recover
from topiarist.pipelines.recovering.recover import recover
from topiarist.pipelines.recovering.report import RecoverReport
from topiarist.pipelines.shrinking.options import ShrinkOptions
from topiarist.pipelines.shrinking.plan import plan_shrink
from topiarist.pipelines.shrinking.report import ShrinkReport
from topiarist.pipelines.shrinking.shrink import shrink
from topiarist.results.report import Report

DENSE, SPARSE, SMALL, UNEVEN, QUANTISED = "dense", "sparse", "shrunk", "shrunk unevenly", "quantised"
PACKED = "packed"
"""What a model is: as it was trained; with zeros in a pattern; smaller; smaller, with layers of different size or padded; on a
grid; stored without its zeros."""
ANY = (DENSE, SPARSE, SMALL, UNEVEN, QUANTISED)

Run = Callable[[Path | str, Path, Any, Mapping[str, Any], Progress], Any]
"""(model, out, options, more settings, progress) -> report"""
Plan = Callable[[str, Any, Mapping[str, Any]], list[tuple[str, str]]]
"""(model, options, more settings) -> what it will need, as (what, how much)"""


@dataclass(frozen=True)
class Stage:
    """One kind of stage."""

    options: type[Any]
    run: Run
    takes: tuple[str, ...]
    """What the model may be before it."""
    gives: Callable[[str, Any], str]
    """What the model is after it, from what it was and the options."""
    report: Any
    """The class of its report; None for one that ends a recipe."""
    plan: Plan
    """What it will need, from a short probe: what `--plan` of its command says."""
    more: tuple[str, ...] = ()
    """Settings that are no fields of the options."""
    to_file: bool = False
    """It writes a file that a later stage reads, and leaves the model as it is."""
    ends: bool = False
    """It works on the finished OUT: only its like may follow."""


def _allocate(model: Path | str, out: Path, options: Any, more: Mapping[str, Any], progress: Progress) -> Any:
    found = find_allocation(model, options=options, progress=progress)
    found.save(out)
    return found


def _shrunk(_: str, options: ShrinkOptions) -> str:
    return SMALL if options.layout == "uniform" else UNEVEN


def _pruned(_: str, options: PruneOptions) -> str:
    return SPARSE if options.bits is None else QUANTISED


def _recovered(was: str, _: RecoverOptions) -> str:
    return SPARSE if was == DENSE else was  # as `state_of` will say: a result, which shrink refuses


STAGES: dict[str, Stage] = {
    "allocate": Stage(AllocateOptions, _allocate, ANY, lambda was, _: was, FoundAllocation,
        plan=lambda model, options, _: plan_allocate(model, options), to_file=True),
    "prune": Stage(
        PruneOptions, lambda model, out, options, _, tell: prune(model, out, options=options, progress=tell),
        ANY, _pruned, Report,
        plan=lambda model, options, _: plan_prune(model, options).lines(),
    ),
    "learn": Stage(
        LearnOptions, lambda model, out, options, _, tell: learn(model, out, options=options, progress=tell),
        ANY, lambda *_: SPARSE, LearnReport,
        plan=lambda model, options, _: plan_learn(model, options).lines(),
    ),
    "shrink": Stage(
        ShrinkOptions, lambda model, out, options, _, tell: shrink(model, out, options=options, progress=tell),
        (DENSE, SMALL), _shrunk, ShrinkReport,
        plan=lambda model, options, _: plan_shrink(model, options),
    ),
    "recover": Stage(
        RecoverOptions, lambda model, out, options, more, tell: recover(model, out, options=options, progress=tell, **more),
        ANY, _recovered, RecoverReport,
        plan=lambda model, options, more: plan_recover(model, options=options, **more).lines(), more=("teacher",),
    ),
    "quantize": Stage(
        QuantizeOptions, lambda model, out, options, _, tell: quantize(model, out, options=options, progress=tell),
        (DENSE, SPARSE, SMALL, UNEVEN), lambda *_: QUANTISED, QuantizeReport,
        plan=lambda model, options, _: plan_quantize(model, options).lines(),
    ),
    "eval": Stage(EvalOptions, run_eval, ANY, lambda was, _: was, None, plan_eval, ends=True),
    "pack": Stage(PackOptions, run_pack, ANY, lambda *_: PACKED, None, plan_pack, ends=True),
}  # fmt: skip


def state_of(config: Mapping[str, Any]) -> str:
    """What the model of a config is."""
    provenance = config.get("pruning_config") or {}
    structured = provenance.get("structured")
    if "quantization_config" in config:
        # Without provenance it came so: what reads it reads what the integers stand for.
        return QUANTISED if provenance else DENSE
    if str(config.get("model_type", "")).startswith(PREFIX):
        return UNEVEN
    if structured:
        return SMALL if structured.get("layout") == "uniform" else UNEVEN
    return SPARSE if provenance else DENSE
