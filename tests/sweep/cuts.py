"""What can be cut whole out of one model type: each kind of unit, stored, opened again by plain transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import topiarist as tp
from sweep.tiny_types import VOCAB
from topiarist.structured import choose, plan_layout, shrunk, units_of

UNITS = ("kv_groups", "heads", "channels", "experts", "block")
CUT = "yes"


def cuts(model: Any) -> dict[str, str]:
    """{kind of unit: "yes", or why it cannot be cut}. What is neither begins with "fails"."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        _, about = type(model).from_pretrained(folder, output_loading_info=True)
    if about["missing_keys"] or about["unexpected_keys"]:
        return dict.fromkeys(UNITS, f"{type(model).__name__} does not open again, whole as it is, what it stored")
    for kind in UNITS:
        try:
            found[kind] = CUT if not (why := _cut(model, kind)) else f"fails: {why}"
        except tp.TopiaristError as error:
            found[kind] = " ".join(str(error).split())
        except Exception as error:
            found[kind] = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


@torch.no_grad()
def _cut(model: Any, kind: str) -> str:
    """What is wrong with the model without some units; `units_of` held it against the masked one already."""
    groups = units_of(model, (kind,))
    rng = torch.Generator().manual_seed(0)
    scores = {group.key: torch.rand(group.count, generator=rng) for group in groups}
    kept = choose(groups, scores, 0.76 if kind == "experts" else 0.6, scope="per_layer")
    if all(bool(mask.all()) for mask in kept.values()):
        return "nothing was cut"
    small = shrunk(model, groups, kept, plan_layout(model, groups, kept, "uniform"))
    tokens = torch.randint(3, VOCAB - 6, (2, 24), generator=rng)
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(Path(folder))
        again, about = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    logits, expected = (m.eval()(input_ids=tokens, use_cache=False).logits for m in (again, small))
    if about["missing_keys"] or about["unexpected_keys"]:
        return "the stored model has other tensors"
    if not bool(torch.isfinite(logits).all()):
        return "logits are not finite"
    return "" if torch.allclose(logits, expected, rtol=1e-4, atol=1e-4) else "it opens as another model"
