"""What else than Wanda works on one model type: other solvers, learned masks, integers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import topiarist as tp
from sweep.tiny_types import VOCAB

WORKS = "yes"


def uses(folder: Path, out: Path) -> dict[str, str]:
    """{what: "yes", or why it is refused}. What is neither begins with "fails". folder: of a tiny model."""
    tokens = torch.randint(3, VOCAB - 6, (16, 32), generator=torch.Generator().manual_seed(1))
    calls: dict[str, Callable[..., Any]] = {
        "sparsegpt": partial(tp.prune, method="sparsegpt", pattern="2:4", calibration=tokens),
        "alps": partial(tp.prune, method="alps", pattern="2:4", calibration=tokens),
        "learn": partial(tp.learn, pattern="2:4", prior="magnitude", steps=2, held_out=4, data=tokens),
        "int8": partial(tp.quantize, bits=8),
    }
    found = {}
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = call(folder, out / name, device="cpu", batch_size=4)
            found[name] = WORKS if report.layers else "fails: nothing was pruned"
        except tp.TopiaristError as error:
            found[name] = " ".join(str(error).replace(str(folder), folder.name).split())
        except Exception as error:
            found[name] = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found
