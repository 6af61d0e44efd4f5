"""What a structural run will cut, for the run and for its plan: everything that shapes alone can refuse is refused here."""

from __future__ import annotations

from dataclasses import dataclass

from topiarist.models.derive import check_has_text_loss
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.shrinking.cuts import Cut, check_rotate, plan_cuts, refuse_pruned, remember
from topiarist.pipelines.shrinking.options import ShrinkOptions
from topiarist.pipelines.shrinking.splits import Splits, plan_splits
from topiarist.structured.units import COLUMN_KINDS, HIDDEN


@dataclass(frozen=True)
class Decided:
    """What the options come to for one model."""

    kinds: tuple[str, ...]
    scope: str
    keep: float
    """Share of the units' parameters that stays; of the model's, where splits are searched."""
    cuts: list[Cut]
    """In order; none yet where splits are searched."""
    splits: Splits | None
    refit: bool


def decide(opened: OpenedModel, options: ShrinkOptions, notes: list[str]) -> Decided:
    """Return what will be cut. notes: takes the warnings. Raises a TopiaristError for what the model cannot lose."""
    check_has_text_loss(opened.model, "shrinking")
    refuse_pruned(opened.config, opened.name)
    if opened.unused:
        remember(notes, f"tensors that the model does not use are left out: {opened.unused}")
    keep, cuts, splits = options.chosen_keep, list[Cut](), None
    if options.searches:
        splits = plan_splits(opened.model, options)
        kinds, scope, keep = splits.kinds, "per_layer", splits.target / splits.dense
    else:
        cuts = plan_cuts(
            opened.model, options.chosen_method, keep, options.layout, options.units, options.scope, options.round_to, notes
        )  # fmt: skip
        kinds, scope = tuple(dict.fromkeys(group.kind for cut in cuts for group in cut.groups)), cuts[-1].scope
    if options.rotate:
        check_rotate(opened.model, kinds)
    refit = options.refit and bool({*COLUMN_KINDS, HIDDEN} & {*kinds})
    options.check_text(refits=refit)
    return Decided(kinds, scope, keep, cuts, splits, refit)
