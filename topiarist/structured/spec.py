"""PruneSpec: what stays of a model, as JSON. Saved beside every shrunk checkpoint; the base and it give the masks again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from topiarist.core import former
from topiarist.core.errors import CheckpointError
from topiarist.structured.choose import kept_cost, total_cost
from topiarist.structured.cut import mask_in_place
from topiarist.structured.finding import units_of
from topiarist.structured.units import Kept, UnitGroup, cut_order

SPEC = "pruning_spec.json"
FORMAT = 2


@dataclass(frozen=True)
class PruneSpec:
    """Kept units of every group, and where they come from."""

    model: str
    digest: str
    """Of the source model: sha256 over its config and weight files."""
    method: str
    settings: Mapping[str, Any]
    keep: float
    scope: str
    layout: str
    units: tuple[str, ...]
    parameters: Mapping[str, int]
    """Of the whole model: `dense`, `kept` (without the units that go), `stored` (with padding), and `biases`: those of the
    stored that a method added, if it did."""
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Group key -> {"of": count, "units": indices that stay, "slots": units that the stored tensors have room for}."""
    rotated: bool = False
    """Whether the hidden states were rotated before they were cut."""
    format: int = FORMAT

    @staticmethod
    def indices(groups: Sequence[UnitGroup], kept: Kept, slots: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Masks as `kept` holds them."""
        return {
            g.key: {
                "of": g.count,
                "units": kept[g.key].nonzero().flatten().tolist(),
                "slots": slots.get(g.key, g.count),
            }
            for g in groups
        }

    @classmethod
    def load(cls, path: str | Path) -> PruneSpec:
        """From a file, or the folder of a shrunk model. Raises CheckpointError if it cannot be read."""
        path = Path(path) / SPEC if Path(path).is_dir() else Path(path)
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            if plain.get("format") == 1:
                plain = _renewed(plain, path)
            spec = cls(**{**plain, "units": tuple(plain["units"])})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"cannot read {path} as a PruneSpec ({error})") from error
        if spec.format != FORMAT:
            raise CheckpointError(f"{path} is of format {spec.format}, this topiarist reads {FORMAT}: update topiarist")
        return spec

    def to_json(self) -> str:
        """The spec as one line of JSON, as `load` reads it."""
        return json.dumps(asdict(self)) + "\n"

    def masks(self, groups: Sequence[UnitGroup]) -> Kept:
        """The masks for the groups of the base. Raises CheckpointError if those are of another shape."""
        masks: Kept = {}
        for group in groups:
            known = self.kept.get(group.key)
            if known is None or known["of"] != group.count:
                raise CheckpointError(
                    f"{group.key} has {group.count} units, the PruneSpec has {known and known['of']}: not the model it is of"
                )
            masks[group.key] = torch.zeros(group.count, dtype=torch.bool)
            masks[group.key][known["units"]] = True
        return masks

    def apply(self, model: Any) -> Any:
        """Write zeros into everything of the base (a model object, in place) that goes, and return it. Refit weights and
        biases are not in a PruneSpec: without them the function is that of the cut alone, but for norms that span all heads.

        Raises CheckpointError or UnsupportedModel where no zeros in the base are that cut.
        """
        if self.rotated:
            raise CheckpointError("the hidden states were rotated before the cut: no mask of the base is that cut")
        cut = {key.rpartition(":")[2] for key in self.kept}  # a split may leave an axis whole
        kinds = cut_order([kind for kind in self.units if kind in cut])
        groups = [group for together in kinds for group in units_of(model, together)]
        mask_in_place(model, groups, self.masks(groups))
        return model

    def by_block(self) -> list[dict[str, Any]]:
        """One row a group: block (-1 for all of them), name, kind, kept, of, slots."""
        rows = []
        for key, known in self.kept.items():
            name, _, kind = key.rpartition(":")
            block = next((int(part) for part in name.split(".") if part.isdigit()), -1)
            counts = {"kept": len(known["units"]), "of": known["of"], "slots": known["slots"]}
            rows.append({"block": block, "name": name, "kind": kind, **counts})
        return rows


def _renewed(plain: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A spec of topiarist 0.1 in today's names of units and methods; warns where kinds of units had other names."""
    if told := [f"{kind!r} is {former.UNITS[kind]!r}" for kind in plain["units"] if kind in former.UNITS]:
        warnings.warn(f"{path} is of topiarist 0.1: its kind of units {', '.join(told)} today", stacklevel=3)
    return {
        **plain,
        "format": FORMAT,
        "method": former.METHODS.get(plain["method"], plain["method"]),
        "units": [former.UNITS.get(kind, kind) for kind in plain["units"]],
        "kept": {former.unit_key(key): known for key, known in plain["kept"].items()},
    }


def predicted_parameters(
    dense: int, groups: Sequence[UnitGroup], kept: Kept, slots: Mapping[str, int]
) -> dict[str, int]:
    """Numbers of parameters of the whole model: dense, kept, stored."""
    stored = dense - sum(group.cost * (group.count - slots[group.key]) for group in groups)
    return {"dense": dense, "kept": dense - total_cost(groups) + kept_cost(groups, kept), "stored": stored}
